"""The copies in bfloat16 that `csae.Adam` keeps of tables: used by the next step, never stale, never another result."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import Windows, config, new_sae, stopped
from torch import Tensor

from csae import SAE, Adam, ContextualSAE, TopKSAE
from csae.rounded import Copies, copy_of
from csae.tables import TABLES
from csae.train import train


@pytest.fixture(autouse=True)
def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel that updates a table writes its copy too."""
    monkeypatch.setattr("csae.rounded.kept", lambda table: True)


def make(arch: str = "topk", **options: object) -> SAE:
    torch.manual_seed(0)
    if arch == "topk":
        return TopKSAE(d_in=12, d_sae=60, k=4, **options)
    return ContextualSAE(d_in=12, d_sae=60, k=4, n_heads=2, d_head=3, d_value=5, d_memory=8, sweeps=1, **options)


def acts(step: int = 0) -> Tensor:
    return torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(step)) + 0.5


def step(sae: SAE, optimizer: Adam, number: int = 0, half: bool = True) -> Tensor:
    with optimizer.copies.used(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses, gradients = sae.gradients(acts(number))
    optimizer.update(gradients)
    return losses.loss


def used(sae: SAE, optimizer: Adam, name: str) -> Tensor:
    """The table that a step takes."""
    with optimizer.copies.used(), torch.autocast("cpu", torch.bfloat16):
        return sae._trace(()).table(name)


def tables(sae: SAE) -> list[str]:
    return [name for name, _ in sae.named_parameters() if name in TABLES]


def assert_right(sae: SAE, optimizer: Adam) -> None:
    for name in tables(sae):
        assert torch.equal(used(sae, optimizer, name), getattr(sae, name).detach().bfloat16()), name


@pytest.mark.parametrize("arch", ["topk", "contextual"])
@pytest.mark.parametrize("how", [{}, {"lazy": True}, {"moments": torch.bfloat16}], ids=str)
def test_a_copy_is_what_a_cast_gives(arch: str, how: dict[str, object]) -> None:
    sae = make(arch)
    optimizer = Adam(sae, lr=1e-2, **how)
    for number in range(3):
        step(sae, optimizer, number)
        for name in tables(sae):
            assert used(sae, optimizer, name) is used(sae, optimizer, name), "no copy was kept"
        assert_right(sae, optimizer)


@pytest.mark.parametrize("arch", ["topk", "contextual"])
@pytest.mark.parametrize("lazy", [False, True], ids=["adam", "lazy"])
def test_steps_are_those_without_copies(arch: str, lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, other = make(arch), make(arch)
    ours, theirs = Adam(sae, lr=1e-2, lazy=lazy), Adam(other, lr=1e-2, lazy=lazy)
    for number in range(4):
        losses = step(sae, ours, number)
        with monkeypatch.context() as without:
            without.setattr("csae.rounded.kept", lambda table: False)
            assert torch.equal(losses, step(other, theirs, number))
    for one, two in zip(sae.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_no_table_is_cast_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make("contextual")
    optimizer = Adam(sae)
    step(sae, optimizer)
    kept = {id(used(sae, optimizer, name)) for name in tables(sae)}
    with optimizer.copies.used(), torch.autocast("cpu", torch.bfloat16):
        trace = sae._trace(())
        sae._losses(trace, acts(), None, None, None, None, None)
    assert {id(table) for table in trace._tables.values()} == kept
    assert len(kept) == 4


def _by_another_view(sae: SAE) -> None:
    """A parameter in the same memory that counts its writes anew."""
    version = sae.W_enc._version
    sae.W_enc = torch.nn.Parameter(sae.W_enc.data)
    while sae.W_enc._version < version:
        sae.W_enc.mul_(1.5)


CHANGES: dict[str, Callable[[SAE], object]] = {
    "load_state_dict": lambda sae: sae.load_state_dict(make().state_dict()),
    "load_state_dict, assigned": lambda sae: sae.load_state_dict(make().state_dict(), assign=True),
    "copy_": lambda sae: sae.W_enc.copy_(torch.zeros(60, 12)),
    "an edit of a row": lambda sae: sae.W_enc[3].zero_(),
    "an edit of what is detached": lambda sae: sae.W_enc.detach().mul_(2),
    "data replaced": lambda sae: setattr(sae.W_enc, "data", sae.W_enc.data * 2),
    "a new parameter": lambda sae: setattr(sae, "W_enc", torch.nn.Parameter(sae.W_enc * 2)),
    "to another dtype and back": lambda sae: sae.bfloat16().float(),
    "normalise_decoder": lambda sae: (sae.W_dec.mul_(3), sae.normalise_decoder()),
    "torch's own optimizer": lambda sae: torch.optim.SGD([sae.W_enc], lr=1.0).step() or sae.W_enc.sub_(1),
    "another view of the same memory": lambda sae: _by_another_view(sae),
    "swapped": lambda sae: torch.utils.swap_tensors(sae.W_enc, torch.nn.Parameter(sae.W_enc * 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("lazy", [False, True], ids=["adam", "lazy"])
def test_a_change_is_seen(change: Callable[[SAE], object], lazy: bool) -> None:
    sae = make()
    optimizer = Adam(sae, lr=1e-2, lazy=lazy)
    step(sae, optimizer)
    with torch.no_grad():
        change(sae)
    assert_right(sae, optimizer)
    if all(of is known for of, known in zip(sae.parameters(), optimizer.names, strict=True)):
        step(sae, optimizer, 1)  # a lazy one writes some rows of the copy only
        assert_right(sae, optimizer)


def test_steps_that_write_no_copy_are_seen() -> None:
    sae = make()
    optimizer = Adam(sae, lr=1e-2)
    for number, half in enumerate([True, False, True, False]):
        step(sae, optimizer, number, half)
        assert_right(sae, optimizer)
    sae.loss(acts()).loss.backward()
    optimizer.step()
    assert_right(sae, optimizer)


def test_a_broken_step_leaves_no_copy_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make()
    optimizer = Adam(sae, lr=1e-2)
    step(sae, optimizer)
    copy_now = used(sae, optimizer, "W_enc")

    def broken(*given: object, **more: object) -> None:
        copy_now.zero_()  # half written
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("csae.adam.adam_rows", broken)
        with pytest.raises(KeyboardInterrupt):
            step(sae, optimizer, 1)
    assert_right(sae, optimizer)


def test_a_write_that_no_one_counts_is_seen_outside_of_used() -> None:
    """In a loop of one's own, copies are taken where it says so only."""
    sae = make()
    optimizer = Adam(sae, lr=1e-2)
    step(sae, optimizer)
    sae.W_enc.data.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        table = sae._trace(()).table("W_enc")
    assert torch.equal(table, sae.W_enc.detach().bfloat16())


def test_of_two_saes_each_takes_its_own() -> None:
    sae, other = make(), make()
    ours, theirs = Adam(sae, lr=1e-2), Adam(other, lr=1e-2)
    step(sae, ours)
    step(other, theirs, 1)
    with torch.no_grad():
        other.W_enc.mul_(2)
    assert torch.equal(used(other, ours, "W_enc"), other.W_enc.detach().bfloat16())
    assert torch.equal(used(other, theirs, "W_enc"), other.W_enc.detach().bfloat16())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))], ids=["copy", "pickle"])
def test_a_copied_optimizer_has_copies_of_its_own(again: Callable[[Adam], Adam]) -> None:
    sae = make()
    optimizer = Adam(sae, lr=1e-2)
    step(sae, optimizer)
    other = again(optimizer)
    assert other.copies is not optimizer.copies
    step(other.sae, other, 1)
    step(sae, optimizer, 1)
    assert_right(other.sae, other)
    assert torch.equal(other.sae.W_enc, sae.W_enc)


def test_no_copy_without_use() -> None:
    """A step that uses none, or not in bfloat16, keeps none: it would cost memory and writes."""
    sae = make()
    optimizer = Adam(sae)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = sae.gradients(acts())[1]
    optimizer.update(gradients)
    step(sae, optimizer, half=False)
    with torch.autocast("cpu", torch.float16), optimizer.copies.used():
        assert sae._trace(()).table("W_enc").dtype == torch.float16
        assert copy_of("W_enc", sae.W_enc) is None
    assert not optimizer.copies._kept


def test_on_a_cpu_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the kernel would write it in a pass of its own."""
    monkeypatch.undo()
    sae = make()
    optimizer = Adam(sae)
    step(sae, optimizer)
    assert not optimizer.copies._kept


def test_training_uses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on `csae train` casts no table, trains the same, and goes on to the same."""
    found: list[bool] = []
    of = Copies.of

    def counted(self: Copies, name: str, table: Tensor) -> Tensor | None:
        copy = of(self, name, table)
        found.append(copy is not None)
        return copy

    monkeypatch.setattr(Copies, "of", counted)
    how = config(precision="bfloat16", log_every=11)
    trained = new_sae("topk")
    train(trained, Windows(), range(12), tmp_path / "kept", how)
    assert found == [False] * 3 + [True] * 3 * 10  # three tables a step
    interrupted = tmp_path / "interrupted"
    stopped(interrupted, 5, new_sae("topk"), precision="bfloat16", log_every=11)
    again = new_sae("topk")
    train(again, Windows(), range(12), interrupted, how)
    monkeypatch.setattr("csae.rounded.kept", lambda table: False)
    without = new_sae("topk")
    train(without, Windows(), range(12), tmp_path / "without", how)
    for other in (again, without):
        for one, two in zip(trained.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
