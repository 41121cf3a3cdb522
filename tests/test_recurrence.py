"""The recurrence: the same codes however a sequence is cut, and the same as the reference's."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from csae import Adam, Code, ContextualSAE, reference
from csae.kernels import cpu
from csae.kernels.cpu import library, topk_coarse
from csae.kernels.portable import read_memory as portable
from csae.ops import recurrence

D_IN, B, T = 10, 3, 21


def make(query: str = "current", **options: int) -> ContextualSAE:
    torch.manual_seed(0)
    sae = ContextualSAE(D_IN, 40, 4, n_heads=2, d_head=3, d_value=5, query=query, **options)
    sae.initialise(torch.randn(D_IN), 1.7)
    with torch.no_grad():  # a look-back that matters
        sae.W_O.mul_(5)
        sae.W_mem.mul_(3)
        sae.gain.mul_(2)
        sae.null.sub_(1)
    return sae.eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    acts = 2 * torch.randn(B, T, D_IN, generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.15
    documents = torch.randint(0, 2, (B, T), generator=generator).cumsum(1) // 5
    return acts, mask, documents


@pytest.mark.parametrize("query", ["current", "past"])
@pytest.mark.parametrize("cuts", [[T], [1] * T, [5, 1, 9, 6], [0, 2, 19]], ids=["whole", "single", "uneven", "empty"])
def test_any_cutting_gives_the_same_codes(query: str, cuts: list[int]) -> None:
    sae = make(query)
    acts, mask, documents = batch()
    whole = sae(acts, mask, documents)
    state = sae.initial_state(B)
    outputs = []
    for part in zip(*(tensor.split(cuts, dim=1) for tensor in (acts, mask, documents)), strict=True):
        output, state = sae.stream(part[0], state, *part[1:])
        outputs.append(output)
    assert state.position == T
    assert torch.equal(torch.cat([output.code.indices for output in outputs], dim=1), whole.code.indices)
    for name in ("x_hat", "c"):
        found = torch.cat([getattr(output, name) for output in outputs], dim=1)
        torch.testing.assert_close(found, getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_one_position_at_a_time_without_its_dimension() -> None:
    sae = make()
    acts, mask, documents = batch()
    whole = sae.encode(acts, mask, documents)
    state = sae.initial_state(B)
    for t in range(T):
        code, state = sae.step(acts[:, t], state, mask[:, t], documents[:, t])
        assert code.values.shape == (B, 4)
        torch.testing.assert_close(code.values, whole.values[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k_mem", [4, 1])
@pytest.mark.parametrize("query", ["current", "past"])
def test_equal_to_the_reference(query: str, k_mem: int) -> None:
    sae = make(query, k_mem=k_mem).double()
    acts, mask, documents = batch()
    acts = acts.double()
    output = sae(acts, mask, documents)
    weights = reference.ContextualWeights(*(getattr(sae, name) for name in reference.ContextualWeights._fields))
    expected = reference.contextual_exact(acts / sae.scale, weights, sae.k, query, mask, documents, k_mem)
    torch.testing.assert_close(output.x_hat / sae.scale, expected.x_hat)


@torch.no_grad()
@pytest.mark.parametrize("look_back", [None, 5, 100])
@pytest.mark.parametrize("query", ["current", "past"])
def test_a_position_that_is_captured_and_run_again(
    query: str, look_back: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph replays, without the graph: the position's number is on the device."""
    sae = make(query)
    acts, mask, documents = (tensor.repeat(1, 8, *[1] * (tensor.dim() - 2)) for tensor in batch())
    documents = documents // 3
    expected, _ = sae.stream(acts, sae.initial_state(B, look_back), mask, documents)
    captures = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        captures.append(work)
        return work

    monkeypatch.setattr(recurrence, "_loop", lambda *given: recurrence.replay(*given, capture))
    state = sae.initial_state(B, look_back)
    outputs = []
    for part in zip(*(tensor.split([3, 165], dim=1) for tensor in (acts, mask, documents)), strict=True):
        output, state = sae.stream(part[0], state, *part[1:])
        outputs.append(output)
    # 64, 128 and 256 rows, of which a bounded memory has fewer, after the 3 positions.
    assert len(captures) - 1 == {None: 3, 5: 1, 100: 2}[look_back]
    assert torch.equal(torch.cat([output.code.indices for output in outputs], dim=1), expected.code.indices)
    found = torch.cat([output.x_hat for output in outputs], dim=1)
    torch.testing.assert_close(found, expected.x_hat, rtol=1e-4, atol=1e-4)
    if query == "past" and look_back is None:
        decoded = sae.decode(expected.code, mask=mask, documents=documents)
        torch.testing.assert_close(decoded, expected.x_hat, rtol=1e-4, atol=1e-4)


def test_a_position_is_captured_on_the_device_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, where the graph would be empty. CUDA is faked: which device is current, and a capture."""
    current, captured = ["cuda:0"], []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(str(chosen))
        yield
        current.pop()

    @contextmanager
    def graph(_: object, stream: str) -> Iterator[None]:
        captured.append((current[-1], stream))
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda chosen: f"a stream of {chosen}")
    done = []
    recurrence._captured(torch.device("cuda:1"), lambda: done.append(current[-1]))
    assert captured == [("cuda:1", "a stream of cuda:1")]
    assert done == ["cuda:1"]
    assert current == ["cuda:0"]


def test_a_state_can_be_branched() -> None:
    sae = make()
    acts, _, _ = batch()
    _, state = sae.step(acts[:, :10], sae.initial_state(B))
    other = state.clone()
    sae.step(-acts[:, 10:], other)
    code, _ = sae.step(acts[:, 10:], state)
    assert torch.equal(code.indices, sae.encode(acts).indices[:, 10:])


@torch.no_grad()
def test_a_bounded_look_back_forgets() -> None:
    """With look_back=L, position t is coded as in a window that begins L positions before it knows the memories."""
    sae = make()
    acts, mask, documents = batch()
    bounded, state = sae.stream(acts, sae.initial_state(B, look_back=4), mask, documents)
    assert state.memory.shape[1] == 4
    whole = sae(acts, mask, documents)
    torch.testing.assert_close(bounded.x_hat[:, :5], whole.x_hat[:, :5])  # position 4 looks at 0 to 3
    assert not torch.allclose(bounded.c[:, 5:], whole.c[:, 5:])
    # By hand: attention over the last four codes only.
    code, x = bounded.code, acts / sae.scale - sae.b_dec
    memory = (code.values.unsqueeze(-1) * sae.W_mem[code.indices]).sum(2)  # [B, T, d_memory]
    keys, values = (memory @ sae.W_K.T).view(B, T, 2, 3), (memory @ sae.W_V.T).view(B, T, 2, 5)
    t = 13
    looks = list(range(t - 4, t))
    for b in range(B):
        read = []
        for h in range(2):
            q = sae.W_Q.view(2, 3, D_IN)[h] @ x[b, t]
            q = sae.gain[h] * q / q.norm() * 3**0.5  # a mean square of gain squared
            unit = keys[b, :, h] / keys[b, :, h].norm(dim=1, keepdim=True) * 3**0.5
            scores = [
                float(q @ unit[j] / 3**0.5 - sae.slope[h] * torch.tensor(float(t - j)).log())
                if mask[b, j] and mask[b, t] and (documents[b, j : t + 1] == documents[b, t]).all()
                else -torch.inf
                for j in looks
            ]
            weights = torch.tensor([*scores, float(sae.null[h])]).softmax(0)[:-1]
            v = values[b, looks, h]
            read.append(weights @ (v / (1 + v.square().mean(dim=1, keepdim=True) / 4.0**2).sqrt()))
        torch.testing.assert_close(sae.W_O @ torch.cat(read) * sae.scale, bounded.c[b, t], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("query", ["current", "past"])
def test_it_does_not_diverge_on_long_windows(query: str) -> None:
    """Values are bounded, so c is, on windows of any length and with weights of any size."""
    sae = make(query)
    acts = 3 * torch.randn(2, 2048, D_IN, generator=torch.Generator().manual_seed(4))
    loud = make(query)
    loud.W_mem.mul_(1e3)
    loud.W_O.mul_(10)
    loud.null.sub_(5)
    for recurrent in (sae, loud):
        output = recurrent(acts)
        assert output.c.norm(dim=-1).max() <= recurrent.c_bound()
        assert output.code.values.isfinite().all()
        # The end is no louder than the beginning.
        early, late = (output.c[:, part].square().mean() for part in (slice(1, 257), slice(1792, 2048)))
        assert late <= 2 * early
    # The bound is not far away: a memory that holds one thing only, in one head, comes near to it.
    one = ContextualSAE(D_IN, 40, 4, n_heads=1, d_head=3, d_value=1, query=query).eval()
    one.W_mem.fill_(1e3)
    one.W_V.abs_()
    one.null.fill_(-1e3)
    output = one(acts)
    assert output.c.norm(dim=-1).max() == pytest.approx(one.c_bound(), rel=1e-3)


def test_the_memory_grows() -> None:
    sae = make()
    acts = torch.randn(1, 600, D_IN, generator=torch.Generator().manual_seed(0))
    state = sae.initial_state(1)
    codes = []
    for part in acts.split(7, dim=1):
        code, state = sae.step(part, state)
        codes.append(code.indices)
    assert state.memory.shape[1] >= 600
    assert torch.equal(torch.cat(codes, dim=1), sae.encode(acts).indices)


def test_documents_that_go_on_across_steps() -> None:
    sae = make()
    acts, _, _ = batch()
    ids = torch.tensor([7] * 9 + [8] * (T - 9)).expand(B, T)
    expected = sae.encode(acts, documents=ids)
    state, codes = sae.initial_state(B), []
    for t in range(T):
        code, state = sae.step(acts[:, t], state, documents=ids[:, t])
        codes.append(code.indices)
    assert torch.equal(torch.stack(codes, dim=1), expected.indices)
    assert torch.equal(state.start, torch.full((B,), 9))


def test_codes_from_a_file_rebuild_the_window_elsewhere(tmp_path) -> None:
    """The strict form: a process that never saw the activations makes the reconstruction from the codes alone."""
    sae = make("past")
    acts, mask, documents = batch()
    output = sae(acts, mask, documents)
    sae.save_pretrained(tmp_path / "sae")
    code = {"values": output.code.values, "indices": output.code.indices}
    save_file(code | {"mask": mask, "documents": documents}, tmp_path / "codes.safetensors")
    script = f"""
from safetensors.torch import load_file, save_file
from csae.checkpoint import load_sae
from csae import Code
codes = load_file({str(tmp_path / "codes.safetensors")!r})
sae = load_sae({str(tmp_path / "sae")!r})
x_hat = sae.decode(Code(codes["values"], codes["indices"]), mask=codes["mask"], documents=codes["documents"])
save_file({{"x_hat": x_hat.detach().contiguous()}}, {str(tmp_path / "x_hat.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    from safetensors.torch import load_file

    rebuilt = load_file(tmp_path / "x_hat.safetensors")["x_hat"]
    torch.testing.assert_close(rebuilt, output.x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda sae: sae.initial_state(0), "B: given 0"),
        (lambda sae: sae.initial_state(2, look_back=0), "look_back: given 0"),
        (lambda sae: sae.step(torch.randn(3, D_IN), sae.initial_state(2)), "acts: given 3 sequences; needed 2"),
        (lambda sae: sae.step(torch.randn(2, D_IN + 1), sae.initial_state(2)), "acts: given shape"),
    ],
)
def test_bad_input(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(make())


def test_read_memory_of_a_position_that_does_not_look() -> None:
    memory = torch.randn(1, 4, 2 * (3 + 5))
    q, ones = torch.randn(1, 2, 3), torch.ones(1, 4, dtype=torch.bool)
    given = (q, memory, ones, torch.zeros(2), torch.zeros(2), torch.zeros(1, dtype=torch.int64))
    assert portable.read_memory(*given, torch.tensor([True]), 3).abs().min() > 0
    assert torch.equal(portable.read_memory(*given, torch.tensor([False]), 3), torch.zeros(1, 10))
    assert torch.equal(portable.read_memory(*given, torch.tensor([True]), 0), torch.zeros(1, 10))


# --- what is needed to decode a code, or to go on from a state, is known or asked for ---------------------


def bounds_of(which: str) -> tuple[Tensor | None, Tensor | None]:
    _, mask, documents = batch()
    return (mask if "mask" in which else None), (documents if "documents" in which else None)


@pytest.mark.parametrize("which", ["none", "mask", "documents", "mask and documents"])
def test_a_code_knows_what_it_was_encoded_with(which: str) -> None:
    sae, (acts, *_), bounds = make("past"), batch(), bounds_of(which)
    given = tuple(None if of is None else of.clone() for of in bounds)
    output = sae(acts, *given)
    for of in given:
        if of is not None:
            of.zero_()  # the caller's own, to be used again
    for code in (output.code, copy.deepcopy(output.code), pickle.loads(pickle.dumps(output.code))):
        torch.testing.assert_close(sae.decode(code), output.x_hat, rtol=1e-5, atol=1e-5)
    edited = output.code._replace(values=2 * output.code.values)
    torch.testing.assert_close(sae.decode(edited), sae.decode(Code(*edited), None, *bounds))
    values, indices = output.code
    torch.testing.assert_close(sae.decode(Code(values, indices), None, *bounds), output.x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(output.code, None, *bounds), output.x_hat, rtol=1e-5, atol=1e-5)


def stepped(sae: ContextualSAE) -> Code:
    _, state = sae.step(batch()[0][:, :5], sae.initial_state(B))
    return sae.step(batch()[0][:, 5:], state)[0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (lambda sae, code: Code(*code), "mask: not given, and this code doesn't know"),
        (
            lambda sae, code: Code(code.values[:, :5], code.indices[:, :5]),
            "mask: not given, and this code doesn't know",
        ),
        (lambda sae, code: stepped(sae), "mask: not given, and this code doesn't know"),
        (lambda sae, code: code._replace(values=code.values[:1], indices=code.indices[:1]), "mask: given shape"),
        (lambda sae, code: Code(code.values[0], code.indices[0]), r"code: given values of shape \[21, 4\]"),
    ],
    ids=["from its parts", "cut", "of a step", "of some windows", "of no windows"],
)
def test_a_code_that_does_not_know_is_refused(code, words: str) -> None:
    sae, (acts, *bounds) = make("past"), batch()
    with pytest.raises(ValueError, match=words):
        sae.decode(code(sae, sae.encode(acts, *bounds)))


def test_another_mask_or_other_documents_than_it_was_encoded_with_are_refused() -> None:
    sae, (acts, mask, documents) = make("past"), batch()
    code = sae.encode(acts, mask, documents)
    for name, other in (("mask", None), ("mask", ~mask), ("documents", None), ("documents", documents * 0)):
        with pytest.raises(ValueError, match=f"{name}: given another than the code was encoded with"):
            sae.decode(code, **{name: other})
    torch.testing.assert_close(sae.decode(code, documents=documents + 5), sae.decode(code))  # the same runs
    with pytest.raises(ValueError, match=r"mask: given shape \[3, 20\]; needed one entry a position, \[3, 21\]"):
        sae.decode(Code(*code), mask=mask[:, 1:], documents=None)


def test_a_c_of_other_windows_is_refused() -> None:
    sae, (acts, *_) = make(), batch()
    output = sae(acts)
    with pytest.raises(ValueError, match=r"c: given shape \[1, 21, 10\]; needed \[3, 21, 10\], as the code is"):
        sae.decode(output.code, output.c[:1])


def loaded(sae: ContextualSAE) -> ContextualSAE:
    sae.load_state_dict(sae.state_dict())
    return sae


def moved(sae: ContextualSAE) -> ContextualSAE:
    return sae.double()


def stepped_by_adam(sae: ContextualSAE) -> ContextualSAE:
    acts, *_ = batch()
    Adam(sae).update(sae.gradients(acts)[1])
    return sae


def rescaled(sae: ContextualSAE) -> ContextualSAE:
    sae.initialise(sae.b_dec * sae.scale, 2.0)
    return sae


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sae: make("past"), "state: given one of other weights"),
        (copy.deepcopy, "state: given one of other weights"),
        (moved, "state: given one of other weights"),
        (lambda sae: sae.requires_grad_(False), None),
        (loaded, "state: given one from before the weights changed"),
        (stepped_by_adam, "state: given one from before the weights changed"),
        (rescaled, "state: given one from before the weights changed"),
    ],
    ids=["another SAE", "a copy", "in another dtype", "frozen", "loaded", "trained", "another scale"],
)
def test_a_state_goes_on_with_the_weights_that_made_it(change, words: str | None) -> None:
    sae, (acts, *_) = make("past"), batch()
    _, state = sae.step(acts[:, :3], sae.initial_state(B))
    sae = change(sae)
    for call in (sae.step, sae.stream):
        if words is None:
            call(acts[:, 3:], state.clone())
        else:
            with pytest.raises(ValueError, match=words):
                call(acts[:, 3:].to(sae.W_enc.dtype), state)


def test_what_is_no_state_is_refused() -> None:
    sae, (acts, *_) = make(), batch()
    with pytest.raises(TypeError, match="state: given a tuple; needed what initial_state"):
        sae.step(acts, tuple(sae.initial_state(B)))
    state = sae.initial_state(B)
    with pytest.raises(ValueError, match="acts: given 3 sequences; needed 2, 3, as the state is of"):
        sae.step(acts, state._replace(start=state.start[:2]))
    sae.k -= 1
    with pytest.raises(ValueError, match="from before k, k_mem or query changed"):
        sae.step(acts, state)


@pytest.mark.skipif(not cpu.available(), reason="the native library was not built")
@pytest.mark.parametrize("query", ["current", "past"])
def test_steps_by_the_encoders_table(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once enough was encoded the weights are rounded, once, whether or not this CPU has units for them."""
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: True)
    torch.manual_seed(0)
    sae = ContextualSAE(130, 1700, 4, n_heads=2, d_head=3, d_value=5, query=query).eval()
    acts = torch.randn(2, 150, 130)
    wanted = sae.double().encode(acts.double())
    sae.float()
    made, table = [], topk_coarse.rounded
    monkeypatch.setattr(topk_coarse, "rounded", lambda W, *rest: made.append(len(W)) or table(W, *rest))
    state, codes = sae.initial_state(2), []
    for t in range(150):
        code, state = sae.step(acts[:, t], state)
        codes.append(code.indices)
    assert made.count(1700) == 1
    assert state.table
    assert (torch.stack(codes, dim=1) == wanted.indices).float().mean() > 0.99
