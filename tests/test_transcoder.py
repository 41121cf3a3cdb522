"""Transcoders, per token and contextual: against the reference in float64, gradients in factors, saving, steps."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from csae import SAE, Adam, Code, ContextualSAE, TopKSAE, reference
from csae.attribution import attribute
from csae.checkpoint import load_sae
from csae.factors import Factors
from csae.outputs import Sweeps

D_IN, D_OUT, D_SAE, K = 6, 11, 15, 3
DEAD = torch.tensor([0, 3, 7, 14])
FORMS = [{}, {"skip": True}]
KINDS = ["topk", "current", "past"]


def make(kind: str, d_out: int = D_OUT, dtype: torch.dtype = torch.float64, **options: object) -> SAE:
    """With a look-back and a skip connection that matter."""
    torch.manual_seed(0)
    if kind == "topk":
        sae: SAE = TopKSAE(D_IN, D_SAE, K, d_out=d_out, k_aux=2, **options)  # type: ignore[arg-type]
    else:
        sizes = {"n_heads": 2, "d_head": 3, "d_value": 4, "d_memory": 7, "sweeps": 2}
        sae = ContextualSAE(D_IN, D_SAE, K, d_out=d_out, query=kind, k_aux=2, **(sizes | options))  # type: ignore[arg-type]
    sae.initialise(torch.randn(D_IN), 1.7, torch.randn(d_out), 0.6)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter is not sae.W_dec:
                parameter += 0.3 * torch.randn_like(parameter)
    return sae.to(dtype).eval()


def windows(B: int = 2, T: int = 9, d_out: int = D_OUT) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    acts = 2 * torch.randn(B, T, D_IN, generator=generator, dtype=torch.float64) + 0.5
    target = torch.randn(B, T, d_out, generator=generator, dtype=torch.float64) - 1
    mask = torch.rand(B, T, generator=generator) > 0.2
    documents = torch.randint(0, 2, (B, T), generator=generator).sort(dim=1).values
    return acts, target, mask, documents


def weights(sae: SAE) -> reference.ContextualWeights:
    return reference.ContextualWeights(*(getattr(sae, name) for name in reference.ContextualWeights._fields))


def by_reference(sae: SAE, acts: Tensor, mask: Tensor | None, documents: Tensor | None, how: object) -> object:
    """What the reference makes of it: how is "exact", or `Sweeps`."""
    x = acts / sae.scale
    if isinstance(sae, TopKSAE):
        given = (sae.mean, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.W_skip, sae.k)
        return reference.topk_transcoder(x, *given)  # type: ignore[arg-type]
    assert isinstance(sae, ContextualSAE)
    where = {"mask": mask, "documents": documents, "k_mem": sae.k_mem}
    if how == "exact":
        return reference.contextual_exact(x, weights(sae), sae.k, sae.query, **where)  # type: ignore[arg-type]
    assert isinstance(how, Sweeps)
    start = None
    if how.from_exact:
        with torch.no_grad():
            start = reference.contextual_exact(x, weights(sae), sae.k, sae.query, **where)  # type: ignore[arg-type]
    return reference.contextual_sweeps(x, weights(sae), sae.k, sae.query, how.times, **where, start=start)  # type: ignore


CASES: list[tuple[str, object]] = [("topk", None)]
CASES += [(query, how) for query in KINDS[1:] for how in (Sweeps(0), Sweeps(1), Sweeps(3), Sweeps(2, True), "exact")]


@pytest.mark.parametrize("bounds", [False, True], ids=["open", "mask+documents"])
@pytest.mark.parametrize("options", FORMS, ids=["plain", "skip"])
@pytest.mark.parametrize("d_out", [D_OUT, D_IN, 1], ids=["wider", "as wide", "one"])
@pytest.mark.parametrize(("kind", "how"), CASES, ids=str)
def test_forward_and_every_gradient_are_the_references(
    kind: str, how: object, d_out: int, options: dict[str, bool], bounds: bool
) -> None:
    more = {} if kind == "topk" else {"k_mem": 2}
    sae, (acts, target, mask, documents) = make(kind, d_out, **options, **more), windows(d_out=d_out)
    where = (mask, documents) if bounds else (None, None)
    wanted = by_reference(sae, acts, *where, how)
    if kind == "topk":
        out = sae(acts, *where)
    else:
        out = sae(acts, *where, exact=how == "exact", sweeps=None if how == "exact" else how)
    assert out.x_hat.shape == target.shape == out.c.shape
    torch.testing.assert_close(out.x_hat, wanted.x_hat * sae.target_scale)
    torch.testing.assert_close(out.c, wanted.c * sae.target_scale)
    torch.testing.assert_close(out.code.values, wanted.values)
    assert torch.equal(out.code.indices[wanted.values > 0], wanted.indices[wanted.values > 0])
    if how == "exact":
        return
    # The loss, by autograd and in factors, is the squared error of the target over its variance.
    parameters = dict(sae.named_parameters())
    y = target / sae.target_scale
    weight = (mask if bounds else torch.ones_like(mask)).double().unsqueeze(-1)
    spread = y - (y * weight).sum(dim=(0, 1)) / weight.sum()
    fvu = ((y - wanted.x_hat).square() * weight).sum() / (spread.square() * weight).sum()
    expected = dict(
        zip(parameters, torch.autograd.grad(fvu, list(parameters.values()), allow_unused=True), strict=True)
    )
    given = (acts, *where, None, None if kind == "topk" else how, target)
    losses = sae.loss(*given)
    torch.testing.assert_close(losses.fvu, fvu)
    losses.loss.backward()
    _, factored = sae.gradients(*given)
    for name, want in expected.items():
        if want is None:
            assert parameters[name].grad is None, name
            assert name not in factored
            continue
        torch.testing.assert_close(parameters[name].grad, want, msg=lambda m, name=name: f"{name}: {m}")
        found = factored[name]
        found = found.dense().view(want.shape) if isinstance(found, Factors) else found
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()), msg=name)
    if kind != "topk" and isinstance(how, Sweeps) and how.times:
        assert expected["W_I"] is not None
        assert expected["W_I"].abs().max() > 0


@pytest.mark.parametrize("options", FORMS, ids=["plain", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_aux_rebuilds_what_is_missed_of_the_target(kind: str, options: dict[str, bool]) -> None:
    sae, (acts, target, mask, documents) = make(kind, **options), windows()
    given = (acts, mask, documents, DEAD, None if kind == "topk" else Sweeps(1), target)
    losses = sae.loss(*given)
    out = by_reference(sae, acts, mask, documents, Sweeps(1))
    residual = target / sae.target_scale - out.x_hat
    pre_acts = (acts / sae.scale - sae.mean - out.suppressed) @ sae.W_enc[DEAD].T + sae.b_enc[DEAD]
    best = pre_acts.topk(sae.k_aux)
    rebuilt = (best.values.relu().unsqueeze(-1) * sae.W_dec[DEAD][best.indices]).sum(dim=-2)
    wanted = (residual - rebuilt)[mask].square().sum() / residual[mask].square().sum()
    torch.testing.assert_close(losses.aux, wanted)
    losses.loss.backward()
    _, factored = sae.gradients(*given)
    for name, parameter in sae.named_parameters():
        want = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        found = factored[name]
        found = found.dense().view(want.shape) if isinstance(found, Factors) else found
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()), msg=name)


def test_k_aux_is_half_of_what_is_rebuilt() -> None:
    assert TopKSAE(D_IN, D_SAE, K, d_out=20).k_aux == 10


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_mask_leaves_out_of_the_target_may_be_anything(kind: str, number: float) -> None:
    sae, (acts, target, mask, documents) = make(kind, skip=True), windows()
    wild = [of.masked_fill(~mask.unsqueeze(-1), number) for of in (acts, target)]
    want = sae.gradients(acts, mask, documents, DEAD, target=target)
    found = sae.gradients(wild[0], mask, documents, DEAD, target=wild[1])
    assert torch.equal(found[0].loss, want[0].loss)
    for name, of in want[1].items():
        right, got = (g.dense() if isinstance(g, Factors) else g for g in (of, found[1][name]))
        torch.testing.assert_close(got, right, msg=name)


@pytest.mark.parametrize("options", FORMS, ids=["plain", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_gives_the_prediction_again(kind: str, options: dict[str, bool]) -> None:
    sae, (acts, _, mask, documents) = make(kind, **options), windows()
    out = sae(acts, mask, documents)
    code = out.code
    with_c = () if kind != "current" else (out.c,)
    if not options:
        torch.testing.assert_close(sae.decode(code, *with_c), out.x_hat)
        return
    torch.testing.assert_close(sae.decode(code, *with_c, acts=acts), out.x_hat)
    with pytest.raises(ValueError, match="acts: not given; needed the activations that were encoded"):
        sae.decode(code, *with_c)
    with pytest.raises(ValueError, match=r"acts: given shape \[1, 9, 6\]; needed \[2, 9, 6\]"):
        sae.decode(code, *with_c, acts=acts[:1])


@pytest.mark.parametrize("cuts", [[21], [1] * 21, [5, 1, 9, 6]], ids=["whole", "single", "uneven"])
@pytest.mark.parametrize("options", FORMS, ids=["plain", "skip"])
@pytest.mark.parametrize("query", KINDS[1:])
def test_any_cutting_gives_the_same_codes(query: str, options: dict[str, bool], cuts: list[int]) -> None:
    sae, (acts, _, mask, documents) = make(query, **options), windows(T=21)
    assert isinstance(sae, ContextualSAE)
    whole = sae(acts, mask, documents)
    state, outputs = sae.initial_state(2), []
    for part in zip(*(tensor.split(cuts, dim=1) for tensor in (acts, mask, documents)), strict=True):
        output, state = sae.stream(part[0], state, *part[1:])
        outputs.append(output)
    assert torch.equal(torch.cat([output.code.indices for output in outputs], dim=1), whole.code.indices)
    for name in ("x_hat", "c"):
        torch.testing.assert_close(torch.cat([getattr(of, name) for of in outputs], dim=1), getattr(whole, name))
    with torch.no_grad():
        sae.W_skip.add_(1) if sae.W_skip is not None else sae.mean.add_(1)
    with pytest.raises(ValueError, match="state: given one from before the weights changed"):
        sae.stream(acts, state)


@torch.no_grad()
@pytest.mark.parametrize("query", KINDS[1:])
def test_the_strict_form_knows_nothing_of_later_inputs_but_by_the_codes(query: str) -> None:
    """With a skip connection too: what x_{t-1} adds by W_skip is in no query."""
    sae, (acts, *_) = make(query, skip=True), windows()
    other = copy.deepcopy(sae)
    other.W_skip.mul_(-3)
    assert torch.equal(sae(acts).c, other(acts).c)


@pytest.mark.parametrize("query", KINDS[1:])
def test_a_position_that_is_captured_and_run_again(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph replays, without the graph."""
    from csae.ops import recurrence

    sae, (acts, _, mask, documents) = make(query, skip=True), windows(T=40)
    wanted = sae(acts, mask, documents)
    swept = sae(acts, mask, documents, sweeps=Sweeps(1, from_exact=True))
    monkeypatch.setattr(recurrence, "_loop", lambda *given: recurrence.replay(*given, lambda work: work))
    found = sae(acts, mask, documents)
    assert torch.equal(found.code.indices, wanted.code.indices)
    torch.testing.assert_close(found.x_hat, wanted.x_hat)
    torch.testing.assert_close(sae(acts, mask, documents, sweeps=Sweeps(1, from_exact=True)).x_hat, swept.x_hat)


@pytest.mark.parametrize("windows_kept", [1, 5])
@pytest.mark.parametrize("query", KINDS[1:])
def test_narrow_sweeps_are_the_same_sweeps(query: str, windows_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from csae import contextual_sae, selection

    torch.manual_seed(0)
    sae = ContextualSAE(64, 50, 4, n_heads=2, d_head=3, d_value=5, query=query, sweeps=2, d_out=9)
    sae.W_I.data.normal_(std=0.3)
    acts, target, mask = torch.randn(5, 9, 64), torch.randn(5, 9, 9), torch.rand(5, 9) > 0.2
    keep, kept = selection.encode_and_keep, []
    monkeypatch.setattr(contextual_sae, "KEPT_BYTES", windows_kept * 4 * 9 * 50)
    monkeypatch.setattr(selection, "encode_and_keep", lambda *given: kept.append(given) or keep(*given))
    narrow = sae.gradients(acts, mask, None, DEAD, target=target)
    assert len(kept) == -(-5 // windows_kept)
    monkeypatch.setattr(contextual_sae, "NARROW", 1000)
    wide = sae.gradients(acts, mask, None, DEAD, target=target)
    torch.testing.assert_close(narrow[0].loss, wide[0].loss)
    for name, of in wide[1].items():
        want, found = (g.dense() if isinstance(g, Factors) else g for g in (of, narrow[1][name]))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_map_and_keeps_unit_rows(kind: str) -> None:
    """A target that is a linear map of the input: Adam in factors and from dense gradients take the same steps."""
    sae = make(kind, dtype=torch.float32, skip=True)
    generator = torch.Generator().manual_seed(5)
    acts = torch.randn(8, 12, D_IN, generator=generator)
    target = acts @ torch.randn(D_IN, D_OUT, generator=generator) + 1
    sae.initialise(acts.mean(dim=(0, 1)), 1.0, target.mean(dim=(0, 1)), 2.0)
    other = copy.deepcopy(sae)
    optimizer, dense = Adam(sae, lr=1e-2), Adam(other, lr=1e-2)
    first = float(sae.gradients(acts, target=target)[0].fvu)
    for step in range(60):
        optimizer.update(sae.gradients(acts, target=target)[1])
        if step < 3:
            other.zero_grad()
            other.loss(acts, target=target).loss.backward()
            dense.step()
            for name, parameter in sae.named_parameters():
                torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)
    assert float(sae.gradients(acts, target=target)[0].fvu) < 0.2 * first
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    groups = [[optimizer.names[of] for of in group["params"]] for group in optimizer.param_groups]
    assert "W_skip" in groups[0]
    assert kind == "topk" or "W_I" in groups[1]


@pytest.mark.parametrize("names", [("W_skip",), ("W_I", "W_O"), ("b_dec",), ("W_enc", "b_enc"), ("W_dec", "W_mem")])
def test_frozen_parameters_get_no_gradient(names: tuple[str, ...]) -> None:
    sae, (acts, target, mask, documents) = make("current", skip=True), windows()
    wanted = sae.gradients(acts, mask, documents, DEAD, target=target)[1]
    for name in names:
        sae.get_parameter(name).requires_grad_(False)
    found = sae.gradients(acts, mask, documents, DEAD, target=target)[1]
    assert found.keys() == wanted.keys() - set(names)
    for name, of in found.items():
        got, want = (g.dense() if isinstance(g, Factors) else g for g in (of, wanted[name]))
        torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    sae, (acts, target, mask, documents) = make(kind, skip=True, dtype=torch.float32), windows()
    wanted = sae(acts.float(), mask, documents)
    half = copy.deepcopy(sae).to(dtype)
    found = half(acts.to(dtype), mask, documents)
    assert found.x_hat.dtype == found.c.dtype == dtype
    assert (found.x_hat - wanted.x_hat).norm() < 0.2 * wanted.x_hat.norm()
    losses, gradients = half.gradients(acts.to(dtype), mask, documents, target=target.to(dtype))
    assert losses.fvu.dtype == torch.float32
    assert losses.fvu.isfinite()
    assert gradients["W_skip"].dtype == dtype
    sae.target_scale.fill_(1e-9)
    with pytest.raises(ValueError, match=r"target_scale: 1e-09 does not fit torch\.float16"):
        sae.half()


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    sae, (acts, target, mask, documents) = make(kind, skip=True, dtype=torch.float32), windows()
    acts, target = acts.float(), target.float()
    plain, _ = sae.gradients(acts, mask, documents, DEAD, target=target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = sae.gradients(acts, mask, documents, DEAD, target=target)
        out = sae.train()(acts, mask, documents)
    assert out.x_hat.dtype == losses.fvu.dtype == torch.float32
    assert abs(float(losses.fvu - plain.fvu)) < 0.2 * float(plain.fvu)
    assert gradients["W_skip"].dtype == torch.float32


@pytest.mark.parametrize("options", FORMS, ids=["plain", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, options: dict[str, bool], tmp_path) -> None:
    sae, (acts, _, mask, documents) = make(kind, dtype=torch.float32, **options), windows()
    sae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["d_out"] == D_OUT
    assert config.get("skip", False) == bool(options)
    card = (tmp_path / "README.md").read_text()
    assert "transcoder" in card
    assert f"| d_out | {D_OUT} |" in card
    loaded = load_sae(tmp_path)
    assert loaded.config == sae.config
    assert torch.equal(loaded(acts.float(), mask, documents).x_hat, sae(acts.float(), mask, documents).x_hat)
    with pytest.raises(ValueError, match=f"d_out: given 12; needed {D_OUT}, as the parameters have"):
        loaded.d_out = 12
    if not options:
        with pytest.raises(ValueError, match="skip: given True; needed False, as the parameters have"):
            loaded.skip = True
    loaded.k = 2
    assert loaded.config["k"] == 2


def test_an_autoencoder_knows_nothing_of_it(tmp_path) -> None:
    sae = TopKSAE(D_IN, D_SAE, K)
    sae.save_pretrained(tmp_path)
    assert not {"d_out", "skip"} & json.loads((tmp_path / "config.json").read_text()).keys()
    assert set(sae.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec", "scale", "tokens_since_fired"}
    assert (sae.d_out, sae.is_transcoder, sae.W_skip) == (D_IN, False, None)
    assert "W_I" not in ContextualSAE(D_IN, D_SAE, K).state_dict()
    with pytest.raises(ValueError, match="d_out: given 6; needed None, as the parameters have"):
        sae.d_out = D_IN


@torch.no_grad()
@pytest.mark.parametrize("query", KINDS[1:])
def test_the_parts_of_c_are_in_the_targets_space(query: str) -> None:
    sae, (acts, _, mask, documents) = make(query, skip=True), windows()
    found = attribute(sae, acts[0], mask[0], documents[0])
    whole = sae(acts, mask, documents)
    torch.testing.assert_close(found.output.c, whole.c[0])
    for t in (3, 8):
        torch.testing.assert_close(found.parts(t).sum(dim=(0, 1)), whole.c[0, t])
    assert found.remainder().max() < 1e-9
    assert whole.c.norm(dim=-1).max() <= sae.c_bound()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda acts, target: make("topk").loss(acts), ValueError, "target: not given; needed [..., d_out]"),
        (lambda acts, target: make("topk").gradients(acts), ValueError, "target: not given; needed [..., d_out]"),
        (
            lambda acts, target: TopKSAE(D_IN, 9, 2).loss(acts, target=target),
            ValueError,
            "target: given one; needed None: this is no transcoder",
        ),
        (
            lambda acts, target: make("past").loss(acts, target=target[..., :5]),
            ValueError,
            "target: given shape [2, 9, 5]; needed [2, 9, 11], as acts is, with d_out = 11",
        ),
        (lambda acts, target: make("topk").loss(acts, target=target[:1]), ValueError, "target: given shape [1, 9, 11]"),
        (lambda acts, target: make("topk").loss(acts, target=target.long()), TypeError, "target: given dtype torch.i"),
        (lambda acts, target: make("topk").loss(acts, target=[1]), TypeError, "target: given a list"),
        (lambda acts, target: make("topk").loss(acts, target=target.to("meta")), ValueError, "target: given on meta"),
        (lambda acts, target: TopKSAE(D_IN, 9, 2, skip=True), ValueError, "skip: given True without d_out"),
        (lambda acts, target: TopKSAE(D_IN, 9, 2, d_out=6, skip=1), TypeError, "skip: given 1; needed True or False"),
        (lambda acts, target: TopKSAE(D_IN, 9, 2, d_out=0), ValueError, "d_out: given 0; needed at least 1"),
        (
            lambda acts, target: make("topk").initialise(torch.zeros(D_IN), 1.0),
            ValueError,
            "target_mean, target_scale: not given and not given; needed those of the target",
        ),
        (
            lambda acts, target: TopKSAE(D_IN, 9, 2).initialise(torch.zeros(D_IN), 1.0, torch.zeros(D_IN), 1.0),
            ValueError,
            "target_mean, target_scale: given and given; needed None",
        ),
        (
            lambda acts, target: make("topk").initialise(torch.zeros(D_IN), 1.0, torch.zeros(D_IN), 1.0),
            ValueError,
            "target_mean: given shape [6]; needed [d_out] = [11]",
        ),
        (
            lambda acts, target: make("topk").initialise(torch.zeros(D_IN), 1.0, torch.zeros(D_OUT), 0.0),
            ValueError,
            "target_scale: given 0.0; needed a positive finite number",
        ),
    ],
)
def test_errors_name_the_argument(call: Callable[..., object], error: type[Exception], words: str) -> None:
    acts, target, *_ = windows()
    with pytest.raises(error) as raised:
        call(acts, target)
    assert words in str(raised.value)


def test_a_code_of_a_transcoder_is_a_code() -> None:
    sae, (acts, _, mask, _) = make("topk"), windows()
    code = sae.encode(acts)  # type: ignore[operator]
    assert isinstance(code, Code)
    sae.track(code, mask)
    assert (sae.tokens_since_fired > 0).any()


def test_the_page_of_a_text_refuses_a_transcoder_without_its_target() -> None:
    from types import SimpleNamespace

    from csae.errors import UserError
    from csae.pages.view import Window, view

    windows_of_text = [Window(torch.arange(5), torch.randn(5, D_IN), torch.ones(5, dtype=torch.bool))]
    with pytest.raises(UserError, match="the SAE is a transcoder to 6 numbers; needed 6 numbers a position, its input"):
        view(make("topk", D_IN), windows_of_text, SimpleNamespace(name="a model"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_exported_it_computes_the_same(kind: str) -> None:
    sae, (acts, target, mask, documents) = make(kind, dtype=torch.float32, skip=True), windows()
    acts, target = acts.float(), target.float()
    compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
    for training in (False, True):
        sae.train(training)
        torch.testing.assert_close(compiled(acts, mask, documents).x_hat, sae(acts, mask, documents).x_hat)

    def loss() -> Tensor:
        return sae.loss(acts, mask, documents, DEAD, target=target).loss

    found, wanted = torch.compile(loss, backend="aot_eager", fullgraph=True)(), loss()
    parameters = list(sae.parameters())
    for got, want in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(got.to_dense(), want.to_dense(), rtol=1e-4, atol=1e-6)
    sae.eval()
    program = torch.export.export(sae, (acts, mask, documents))
    torch.testing.assert_close(program.module()(acts, mask, documents).x_hat, sae(acts, mask, documents).x_hat)
