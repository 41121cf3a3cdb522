"""The same training in one process and over several: every parameter and moment, and the codes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from processes import run
from torch import Tensor
from trained import Case, Trained, batch, make, share, train, trained

from csae import SAE, Adam, ContextualSAE
from csae.data.activations import Batch
from csae.dead_rows import Dead
from csae.distributed import Ranks, codes, sharded
from csae.errors import UserError
from csae.factors import Factors
from csae.sae import Sweeps
from csae.step import exact_gap
from csae.tables import TABLES


def _train(ranks: Ranks | None, case: Case) -> Trained:
    return train(case, ranks)


def whole(found: list[Trained], of: str) -> dict[str, Tensor]:
    """The parameters or moments of all ranks put together. What has no rows is the same on all."""
    tensors = [getattr(one, of) for one in found]
    together = {}
    for name, first in tensors[0].items():
        if name.split(".")[0] in TABLES and first.dim():
            together[name] = torch.cat([one[name] for one in tensors])
        else:
            assert all(torch.equal(one[name].nan_to_num(7), first.nan_to_num(7)) for one in tensors), name
            together[name] = first
    return together


def check_alike(one: Trained, found: list[Trained], case: Case, tolerance: float = 2e-6) -> None:
    for of in ("parameters", "moments"):
        ours, expected = whole(found, of), getattr(one, of)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            scale = max(1e-3, float(tensor.abs().max()))
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance * scale, msg=f"{of} {name}")
    since = torch.cat([each.tokens_since_fired for each in found])
    assert torch.equal(since, one.tokens_since_fired)
    for each in found:
        assert torch.equal(each.losses, found[0].losses)
        torch.testing.assert_close(each.losses, one.losses, rtol=1e-5, atol=1e-6)
    for step, (values, indices) in enumerate(one.codes):
        mask = batch(case, step)["mask"]
        ours = [torch.cat([each.codes[step][i] for each in found])[: case.windows] for i in (0, 1)]
        # Whole, as values that are nearly equal may come in either order.
        one_whole, other = (
            values.new_zeros(*values.shape[:-1], case.d_sae).scatter_add(-1, features, of)[mask]
            for of, features in ((values, indices), (ours[0], ours[1]))
        )
        torch.testing.assert_close(other, one_whole, rtol=1e-4, atol=1e-5)


BATCH = {"selection": "batch"}
# Thresholds begin at zero, and a wide band says something about them. Slots are few, so that features die.
JUMPRELU = {"selection": "jumprelu", "bandwidth": 0.5, "l0_coef": 0.3, "k_max": 6}
PAST = JUMPRELU | {"query": "past"}
# With Adam's own eps, the first step is as large for a gradient of 1e-9 as for any other, and so is its rounding.
even_case = functools.partial(Case, eps=1e-6)
CASES = {
    "topk": Case(),
    "topk, three shards of few rows": Case(d_sae=10, k=8, windows=7),
    "topk, an empty shard": Case(d_sae=9, k=3, steps=20, sae={"dead_after": 30}),
    "transcoder with skip": Case(d_out=15, sae={"skip": True}),
    "current": Case("contextual"),
    "past, few remembered": Case("contextual", {"query": "past", "k_mem": 2}, windows=10),
    # Of 200 gradients of W_I one is that small; the moments agree to 2e-7.
    "past transcoder with skip": even_case("contextual", {"query": "past", "skip": True}, d_out=15, steps=20),
    "current from exact codes": Case("contextual", from_exact=True, steps=10),
    "past from exact codes": Case("contextual", {"query": "past"}, from_exact=True, steps=10),
    "matryoshka": Case(sae={"prefixes": (3, 9, 20)}),
    "matryoshka, past": Case("contextual", {"query": "past", "prefixes": (3, 9, 20)}, steps=20),
    "lazy": Case(lazy=True),
    "no mask": Case(masked=False, steps=10),
    "more ranks than windows": Case(windows=2, steps=20),
    "a shared budget": Case(sae={"selection": "batch"}),
    "a shared budget, past, an empty shard": Case("contextual", BATCH | {"query": "past"}, d_sae=9, k=2, windows=7),
    "a shared budget, current from exact codes": Case("contextual", BATCH, from_exact=True, steps=10),
    "thresholds": even_case(sae=JUMPRELU),
    "thresholds, a wide band, lazy": even_case(sae=JUMPRELU | {"bandwidth": 2}, lazy=True),
    "thresholds, current": even_case("contextual", JUMPRELU),
    "thresholds, past, few remembered": even_case("contextual", JUMPRELU | {"query": "past", "k_mem": 2}, windows=10),
    "thresholds, past, an empty shard": even_case("contextual", JUMPRELU | {"query": "past"}, d_sae=9, k=2, windows=7),
    "thresholds, current from exact codes": even_case("contextual", JUMPRELU, from_exact=True, steps=10),
    "thresholds, many slots, matryoshka": even_case(sae=JUMPRELU | {"prefixes": (3, 9, 20), "k_max": 20}),
    "thresholds, transcoder with skip": even_case(d_out=15, sae=JUMPRELU | {"skip": True}, steps=20),
}


# These end after 20 steps.
FAST = {("topk", 3), ("current", 2), ("matryoshka", 3)}
FAST |= {("a shared budget", 3), ("a shared budget, past, an empty shard", 4)}
FAST |= {("thresholds", 2), ("thresholds, past, an empty shard", 4)}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if (name, size) in FAST else pytest.mark.slow)
        for name in CASES
        for size in ((2, 3, 4) if not name.startswith("thresholds, ") else (3, 4) if "shard" in name else (3,))
    ],
)
def test_equal_to_one_process(name: str, size: int) -> None:
    case = CASES[name]._replace(steps=20) if (name, size) in FAST else CASES[name]
    (one,) = run(1, _train, case)
    assert torch.isfinite(one.losses).all()
    with_dead = ("topk", "current", "past, few remembered", "thresholds", "thresholds, current")
    if case.steps == 50 and name in with_dead:
        assert (one.losses[:, 2] > 0).any()  # AuxK had a part
    # A threshold's gradient is a difference of large terms: what follows from it is rounded more.
    check_alike(one, run(size, _train, case), case, 1e-5 if "thresholds" in name else 2e-6)


@pytest.mark.parametrize(
    "case",
    [
        Case(steps=20),
        pytest.param(Case("contextual", {"query": "past"}, windows=9, steps=20), marks=pytest.mark.slow),
        pytest.param(Case(sae={"prefixes": (3, 9, 20)}, steps=20), marks=pytest.mark.slow),
        pytest.param(Case("contextual", JUMPRELU, windows=9, steps=20), marks=pytest.mark.slow),
        pytest.param(Case(sae=JUMPRELU | {"prefixes": (3, 9, 20)}, steps=20), marks=pytest.mark.slow),
    ],
    ids=["topk", "past", "matryoshka", "thresholds, current", "thresholds, matryoshka"],
)
def test_replicas(case: Case) -> None:
    """Two replicas of an SAE of two ranks each: the step of one process with all windows."""
    (one,) = run(1, _train, case)
    found = run(4, _train, case, data=2)
    first, second = found[:2], found[2:]
    for ours, other in zip(first, second, strict=True):
        for of in ("parameters", "moments"):
            assert all(torch.equal(tensor, getattr(other, of)[name]) for name, tensor in getattr(ours, of).items())
    # Ranks are numbered replica by replica, and windows with them.
    codes = [tuple(torch.cat([each.codes[step][i] for each in found]) for i in (0, 1)) for step in range(case.steps)]
    none = [(values[:0], indices[:0]) for values, indices in codes]
    found = [first[0]._replace(codes=codes), first[1]._replace(codes=none)]
    check_alike(one, found, case, 5e-5 if case.sae.get("selection") == "jumprelu" else 2e-6)


@pytest.mark.parametrize("selected", [{}, JUMPRELU], ids=["topk", "jumprelu"])
def test_the_same_bits_twice(selected: dict[str, Any]) -> None:
    case = Case("contextual", selected, steps=10)
    for one, other in zip(run(3, _train, case), run(3, _train, case), strict=True):
        assert torch.equal(one.losses, other.losses)
        for of in ("parameters", "moments"):
            for name, tensor in getattr(one, of).items():
                assert torch.equal(tensor, getattr(other, of)[name])


@pytest.mark.parametrize("selected", [{}, BATCH, JUMPRELU], ids=["topk", "batch", "jumprelu"])
def test_a_step_of_broken_activations_breaks_the_same(selected: dict[str, Any]) -> None:
    """A NaN is seen by every rank, in the loss and in the rows that it breaks on one device."""
    case = Case(broken=True, steps=3, sae=selected)
    (one,) = run(1, _train, case)
    found = run(3, _train, case)
    assert one.losses[-1].isnan().any()
    for each in found:
        assert torch.equal(each.losses.isnan(), one.losses.isnan())
    ours = whole(found, "parameters")
    for name, tensor in one.parameters.items():
        assert torch.equal(ours[name].isnan(), tensor.isnan()), name
    values, indices = (torch.cat([each.codes[-1][i] for each in found]) for i in (0, 1))
    assert values[1, 3].isnan().all()
    assert torch.equal(indices[1, 3], one.codes[-1][1][1, 3])


def _one_step(ranks: Ranks | None, case: Case, change: str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The gradients of one batch, and its code, of an SAE that `change` was done to."""
    sae = make(case) if ranks is None else sharded(lambda: make(case), ranks)
    rows = range(case.d_sae) if ranks is None else ranks.rows(case.d_sae)
    with torch.no_grad():
        if change == "ties":  # features come in threes of equal encoders, on different ranks
            generator = torch.Generator().manual_seed(5)
            third = torch.randn(case.d_sae // 3, sae.d_in, generator=generator)
            sae.W_enc.copy_(third.repeat(3, 1)[rows.start : rows.stop])
    frozen = {"only the decoder": ("W_dec",), "only the encoder": ("W_enc",), "only b_dec": ("b_dec",)}
    frozen |= {"only the look-back": sae.look_back}
    for name, parameter in sae.named_parameters():
        parameter.requires_grad_(change not in frozen or name in frozen[change])
    given = batch(case, 0) if ranks is None else share(batch(case, 0), ranks)
    # Those that are dead are all on one rank.
    dead = torch.tensor([feature - rows.start for feature in (60, 62, 69) if feature in rows], dtype=torch.int64)
    sweeps = Sweeps(2) if isinstance(sae, ContextualSAE) else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
        losses, gradients = sae.gradients(**given, dead=dead, sweeps=sweeps)
    found = {name: of if isinstance(of, Tensor) else of.dense() for name, of in gradients.items()}
    return found, torch.stack(losses[:3]), losses.code.values, losses.code.indices


def _calibrated(ranks: Ranks | None, case: Case) -> tuple[float, Tensor]:
    sae = make(case) if ranks is None else sharded(lambda: make(case), ranks)
    sae.initialise(torch.full((20,), 0.4), 1.7)
    given = batch(case, 0) if ranks is None else share(batch(case, 0), ranks)
    if sae.selection == "jumprelu":
        rows = range(case.d_sae) if ranks is None else ranks.rows(case.d_sae)
        with torch.no_grad():
            sae.threshold += torch.linspace(0, 1, case.d_sae)[rows.start : rows.stop]
    l0 = sae.calibrate([Batch(**given, tokens=None)])
    return l0, sae.threshold.detach()


@pytest.mark.parametrize("selected", [BATCH, JUMPRELU], ids=["batch", "jumprelu"])
@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_calibrated_over_ranks_as_in_one_process(arch: str, selected: dict[str, Any]) -> None:
    case = Case(arch, selected, windows=19, d_sae=9 if selected == JUMPRELU else 70, k=3)
    ((l0, threshold),) = run(1, _calibrated, case)
    assert l0 == pytest.approx(case.k, rel=0.01)
    found = run(4, _calibrated, case)
    for each in found:
        assert each[0] == pytest.approx(l0, rel=1e-3)
    thresholds = [each[1] for each in found]
    ours = torch.cat(thresholds) if selected == JUMPRELU else torch.stack(thresholds)
    torch.testing.assert_close(ours, threshold.expand_as(ours), rtol=1e-2, atol=1e-3)


CHANGES = ("ties", "only the decoder", "only the encoder", "only b_dec", "only the look-back", "none")


@pytest.mark.parametrize(
    ("arch", "change"),
    [(arch, change) for change in CHANGES for arch in ("topk", "contextual") if (arch, change) != ("topk", CHANGES[4])],
)
def test_gradients(arch: str, change: str) -> None:
    case = Case(arch, d_sae=72 if change == "ties" else 70)
    ((expected, losses, values, indices),) = run(1, _one_step, case, change)
    found = run(3, _one_step, case, change)
    assert losses[2] > 0
    torch.testing.assert_close(found[1][1], losses)
    active = (values > 1e-5) & batch(case, 0)["mask"].unsqueeze(-1)
    torch.testing.assert_close(torch.cat([each[2] for each in found])[active], values[active])
    assert torch.equal(torch.cat([each[3] for each in found])[active], indices[active])
    for name, gradient in expected.items():
        ours = torch.cat([each[0][name] for each in found]) if name in TABLES else found[0][0][name]
        torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)
    assert all(each[0].keys() == expected.keys() for each in found)


@pytest.mark.slow
def test_half_precision_and_small_moments_train_alike() -> None:
    """Sums differ, and with them what is rounded: to bfloat16 before sums over ranks, and by chance for the moments."""
    for case in (Case(autocast=True), Case(moments=torch.bfloat16), Case("contextual", autocast=True, steps=20)):
        (one,) = run(1, _train, case)
        found = run(3, _train, case)
        torch.testing.assert_close(found[0].losses, one.losses, rtol=0.03, atol=0.01)
        ours = whole(found, "parameters")
        for name, tensor in one.parameters.items():
            assert (ours[name] - tensor).norm() < 0.03 * tensor.norm() + 1e-3, name


def _in_pieces(ranks: Ranks | None, case: Case) -> Trained:
    codes.PIECE = 10  # tokens: the last piece is smaller
    return train(case, ranks)


def _rounded(ranks: Ranks | None, lazy: bool) -> Trained:
    """Steps with the same gradients on any number of ranks."""
    case = Case("contextual", moments=torch.bfloat16, lazy=lazy)
    sae = make(case) if ranks is None else sharded(lambda: make(case), ranks)
    optimizer = Adam(sae, 3e-3, lazy=lazy, moments=case.moments)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients: dict[str, Tensor | Factors] = {}
        for name, parameter in sae.named_parameters():
            rows = name in TABLES
            whole = torch.randn(case.d_sae if rows else len(parameter), *parameter.shape[1:], generator=generator)
            own = whole if sae.shard is None or not rows else whole[sae.shard.rows.start : sae.shard.rows.stop]
            gradients[name] = torch.where(own > 0.5, own, 0)
        optimizer.update(gradients)
    return trained(sae, optimizer)


@pytest.mark.parametrize("lazy", [False, True], ids=["exact", "lazy"])
def test_small_moments_are_rounded_alike_on_any_number_of_ranks(lazy: bool) -> None:
    (one,) = run(1, _rounded, lazy)
    assert one.moments["W_enc.exp_avg"].dtype == torch.bfloat16
    for size in (2, 3):
        found = run(size, _rounded, lazy)
        for of in ("parameters", "moments"):
            ours = whole(found, of)
            for name, tensor in getattr(one, of).items():
                assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_tokens_may_travel_in_pieces(arch: str) -> None:
    case = Case(arch, steps=10)
    (one,) = run(1, _train, case)
    check_alike(one, run(2, _in_pieces, case), case)


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_half_precision_selects_as_one_device(arch: str) -> None:
    """Many of the rounded values are equal; the selection is by what they were."""
    case = Case(arch, autocast=True)
    ((_, _, values, indices),) = run(1, _one_step, case, "none")
    found = run(3, _one_step, case, "none")
    first = (values > 0) & batch(case, 0)["mask"].unsqueeze(-1)
    assert torch.cat([each[3] for each in found])[first].eq(indices[first]).float().mean() > (
        0.999 if arch == "topk" else 0.98  # c is of bfloat16 sums
    )


def _initial(ranks: Ranks | None, arch: str, sizes: dict[str, Any]) -> dict[str, Tensor]:
    def of_seed() -> SAE:
        torch.manual_seed(7)
        return ContextualSAE(**sizes) if arch == "contextual" else make(Case())

    sae = of_seed() if ranks is None else sharded(of_seed, ranks)
    return {"after": torch.randn(4), **sae.state_dict(), "params": torch.tensor(sae.n_params)}


@pytest.mark.parametrize("sizes", [(24, 1000, 24), (7, 19, 7), (5, 2, None), (12, 333, 24)])
def test_initial_weights_are_those_of_one_device(sizes: tuple[int, int, int | None], monkeypatch: Any) -> None:
    arguments = {"d_in": sizes[0], "d_sae": sizes[1], "d_out": sizes[2], "k": 2, "n_heads": 2, "d_memory": 11}
    (one,) = run(1, _initial, "contextual", arguments)
    found = run(3, _initial, "contextual", arguments)
    for name, tensor in one.items():
        if name in (*TABLES, "tokens_since_fired"):
            assert torch.equal(torch.cat([each[name] for each in found]), tensor), name
        else:
            assert all(torch.equal(each[name], tensor) for each in found), name


def _refusals(ranks: Ranks) -> None:
    acts = torch.zeros(2, 5, 20)
    sae = sharded(lambda: make(Case("contextual")), ranks)
    needed = rf": this process has {len(sae.shard.rows)} of 70 features, the other ranks have the rest; needed a whole"
    for call in (
        lambda: sae.loss(acts),
        lambda: sae(acts),
        lambda: sae.encode(acts),
        lambda: sae.decode(None),
        lambda: sae.initial_state(2),
        lambda: sae.recurrence,
        lambda: sharded(lambda: make(Case()), ranks)(acts),
        lambda: sharded(lambda: make(Case()), ranks).encode(acts),
        lambda: sharded(lambda: make(Case()), ranks).decode(None),
    ):
        with pytest.raises(UserError, match=needed):
            call()
    sae.k = 3  # what no shape depends on can be changed
    with pytest.raises(ValueError, match="d_sae: given 71; needed 70"):
        sae.d_sae = 71
    with pytest.raises(ValueError, match="dead: given 40 to 40; needed 0 <= feature < 35, the rows of this process"):
        sae.gradients(acts, dead=torch.tensor([40]))
    with pytest.raises(ValueError, match="dead: given padded, where other processes own rows too"):
        sae.gradients(acts, dead=Dead.unpadded(torch.tensor([4, -1])))


def test_what_needs_a_whole_sae_is_refused() -> None:
    run(2, _refusals)


def _gap(ranks: Ranks | None, case: Case) -> tuple[float, float]:
    sae = make(case) if ranks is None else sharded(lambda: make(case), ranks)
    assert isinstance(sae, ContextualSAE)
    sae.initialise(torch.full((20,), 0.4), 1.7)
    given = batch(case, 0) if ranks is None else share(batch(case, 0), ranks)
    with torch.no_grad():
        sae.W_O.mul_(20)  # so that it matters
        if sae.threshold is not None:
            sae.threshold.fill_(0.5)
    return exact_gap(sae, Batch(**given, tokens=None), Sweeps(1))


@pytest.mark.parametrize("selected", [{}, BATCH, JUMPRELU], ids=["topk", "batch", "jumprelu"])
@pytest.mark.parametrize("query", ["current", "past"])
def test_the_exact_form_over_ranks(query: str, selected: dict[str, Any]) -> None:
    case = Case("contextual", {"query": query, "k_mem": 3} | selected, windows=7)
    (one,) = run(1, _gap, case)
    assert abs(one[1]) > 1e-3
    found = run(3, _gap, case)
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(one, rel=1e-4)
