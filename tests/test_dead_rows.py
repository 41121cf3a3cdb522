"""AuxK over few dead features by dense products: the loss and gradients of the definition, and of the sparse ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csae import SAE, Adam, ContextualSAE, TopKSAE, dead_rows, reference
from csae.dead_rows import Dead, pad
from csae.factors import Factors

DEAD = torch.tensor([0, 3, 7, 20, 41, 48, 49])
SIZES = {"d_in": 12, "d_sae": 50, "k": 4}


def make(arch: str = "topk", k_aux: int = 9, **options: object) -> SAE:
    torch.manual_seed(0)
    if arch == "contextual":
        sae: SAE = ContextualSAE(**SIZES, k_aux=k_aux, n_heads=2, d_head=3, d_value=5, **options)  # type: ignore[arg-type]
    else:
        sae = TopKSAE(**SIZES, k_aux=k_aux, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
    return sae


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(3, 17, 12, generator=generator, dtype=dtype) + 0.5
    return acts, torch.rand(3, 17, generator=generator) > 0.2


def few(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(dead_rows, "FEW", dict.fromkeys(("cpu", "cuda"), 100 if on else 0))


def dense(gradient: Tensor | Factors, like: Tensor) -> Tensor:
    return gradient.dense().view(like.shape) if isinstance(gradient, Factors) else gradient


def padded(dead: Tensor, by: int) -> Dead:
    return Dead.unpadded(torch.cat([dead, dead.new_full((by,), -1)]))


@pytest.mark.parametrize("on", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("by", [None, 0, 1, 5], ids="padded={}".format)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("k_aux", [9, 7, 3], ids="k_aux={}".format)
def test_gradients_of_the_definition(
    k_aux: int, masked: bool, by: int | None, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss as `SAE._aux` defines it, by the ops of the reference in float64, differentiated by autograd."""
    few(monkeypatch, on)
    sae = make(k_aux=k_aux).double()
    acts, mask = batch()
    x = acts if not masked else acts.masked_fill(~mask.unsqueeze(-1), 0)
    weight = mask.double() if masked else torch.ones(3, 17, dtype=torch.float64)
    seen = (x - sae.b_dec).detach()
    rebuilt = reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, 4).x_hat
    residual = (x - rebuilt).detach()
    k = min(k_aux, len(DEAD))
    best = reference.topk_encode(seen, sae.W_enc[DEAD], sae.b_enc[DEAD], k)
    by_dead = reference.sparse_decode(*best, sae.W_dec[DEAD])
    left, before = (((of.square().sum(-1)) * weight).sum() for of in (residual - by_dead, residual))
    aux = k / k_aux * left / before
    wanted = torch.autograd.grad(sae.aux_coef * aux, [sae.W_enc, sae.b_enc, sae.W_dec])

    given = acts, mask if masked else None
    losses, gradients = sae.gradients(*given, dead=DEAD if by is None else padded(DEAD, by))
    _, without = sae.gradients(*given)
    torch.testing.assert_close(losses.aux, aux.detach())
    for name, want in zip(("W_enc", "b_enc", "W_dec"), wanted, strict=True):
        found = dense(gradients[name], want) - dense(without[name], want)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-7, msg=name)  # weights are kept in float32
    assert torch.equal(dense(gradients["b_dec"], sae.b_dec), dense(without["b_dec"], sae.b_dec))


CASES = {
    "topk": {},
    "topk, fewer than are dead": {"k_aux": 3},
    "contextual": {"arch": "contextual", "sweeps": 2},
    "transcoder": {"d_out": 8, "skip": True},
    "matryoshka": {"prefixes": (10, 30)},
    "jumprelu": {"selection": "jumprelu", "bandwidth": 0.2},
    "batch": {"selection": "batch", "k_max": 8},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("frozen", [(), ("W_enc", "b_enc"), ("W_dec",), ("W_enc", "b_enc", "b_dec")], ids=str)
def test_gradients_of_the_sparse_ops(
    options: dict[str, object], frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make(**options).double()  # type: ignore[arg-type]
    for name in frozen:
        getattr(sae, name).requires_grad_(False)
    acts, mask = batch()
    target = {"target": acts[..., :8] * 2} if sae.is_transcoder else {}
    found = []
    for on in (True, False):
        few(monkeypatch, on)
        losses, gradients = sae.gradients(acts, mask, dead=DEAD, **target)
        sae.zero_grad()
        by_autograd = sae.loss(acts, mask, dead=DEAD, **target)
        by_autograd.loss.backward()
        torch.testing.assert_close(by_autograd.loss.detach(), losses.loss)
        found.append((losses, gradients, {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}))
    (losses, gradients, autograd), (expected, wanted, wanted_autograd) = found
    torch.testing.assert_close(losses.aux, expected.aux)
    assert gradients.keys() == wanted.keys() == autograd.keys() == wanted_autograd.keys()
    for name, parameter in sae.named_parameters():
        if name in gradients:
            want = dense(wanted[name], parameter)
            scale = 1e-6 * float(want.abs().max())
            torch.testing.assert_close(dense(gradients[name], parameter), want, rtol=1e-5, atol=scale, msg=name)
            torch.testing.assert_close(autograd[name].to_dense(), want, rtol=1e-5, atol=scale, msg=name)


@pytest.mark.parametrize("k_aux", [9, 3], ids="k_aux={}".format)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_step_is_that_of_the_sparse_ops(k_aux: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by Adam's own rule, where a small difference of a small gradient is a large one: eps is large."""
    acts, mask = batch(torch.float32)
    after = []
    for on in (True, False):
        few(monkeypatch, on)
        sae = make(k_aux=k_aux)
        optimizer = Adam(sae, lr=1.0, eps=1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses, gradients = sae.gradients(acts, mask, dead=DEAD)
        optimizer.update(gradients)
        after.append((losses.aux, [p.detach().clone() for p in sae.parameters()]))
        if half and isinstance(gradients["W_enc"], Factors):
            assert gradients["W_enc"].rows.dtype == torch.bfloat16
    tolerance = 2e-2 if half else 1e-5
    torch.testing.assert_close(after[0][0], after[1][0], rtol=tolerance, atol=0)
    for one, two in zip(after[0][1], after[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=2e-3 if half else 1e-6)


def test_one_sort_of_pairs_a_token_s_code_and_a_dead_feature_s_row(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, True)
    sae = make()
    _, gradients = sae.gradients(batch(torch.float32)[0], dead=DEAD)
    W_enc, W_dec = gradients["W_enc"], gradients["W_dec"]
    assert isinstance(W_enc, Factors)
    assert isinstance(W_dec, Factors)
    assert W_enc.pairs is W_dec.pairs
    assert W_enc.weights.numel() == (3 * 17 + len(DEAD)) * 4  # not 3 * 17 * 7 more


def test_a_broken_dead_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, True)
    for k_aux in (9, 3):
        sae = make(k_aux=k_aux)
        with torch.no_grad():
            sae.W_enc[7, 0] = torch.nan
        losses, _ = sae.gradients(batch(torch.float32)[0], dead=DEAD)
        assert losses.aux.isnan()


def test_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, True)
    for k_aux in (9, 3):
        _, gradients = make(k_aux=k_aux).gradients(torch.zeros(0, 12), dead=DEAD)
        W_dec = gradients["W_dec"]
        assert isinstance(W_dec, Factors)
        assert W_dec.dense().shape == (50, 12)


def test_where_they_are_many_the_ops_are_sparse() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert dead_rows.are_few(576, 288, cpu)
    assert not dead_rows.are_few(577, 288, cpu)
    assert dead_rows.are_few(3072, 384, cuda)
    assert not dead_rows.are_few(3073, 384, cuda)


@pytest.mark.parametrize("on", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("frozen", [(), ("W_enc", "b_enc"), ("W_dec",)], ids=str)
def test_padding_has_no_part(
    options: dict[str, object], frozen: tuple[str, ...], on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In factors and by autograd, with more slots than dead features, and with fewer."""
    few(monkeypatch, on)
    sae = make(**options).double()  # type: ignore[arg-type]
    for name in frozen:
        getattr(sae, name).requires_grad_(False)
    acts, mask = batch()
    target = {"target": acts[..., :8] * 2} if sae.is_transcoder else {}
    found = []
    for dead in (padded(DEAD, 4), DEAD):
        losses, gradients = sae.gradients(acts, mask, dead=dead, **target)
        sae.zero_grad()
        sae.loss(acts, mask, dead=dead, **target).loss.backward()
        found.append((losses, gradients, {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}))
    (losses, gradients, autograd), (expected, wanted, wanted_autograd) = found
    torch.testing.assert_close(losses.aux, expected.aux, rtol=1e-12, atol=0)
    assert gradients.keys() == wanted.keys() == autograd.keys() == wanted_autograd.keys()
    for name, parameter in sae.named_parameters():
        if name in gradients:
            want, by_autograd = dense(wanted[name], parameter), wanted_autograd[name].to_dense()
            close = {"rtol": 1e-9, "atol": 1e-12 * float(want.abs().max()), "msg": name}
            torch.testing.assert_close(dense(gradients[name], parameter), want, **close)
            torch.testing.assert_close(autograd[name].to_dense(), by_autograd, **close)


@pytest.mark.parametrize(("on", "k_aux", "half"), [(True, 30, True), (False, 3, True), (False, 7, False)])
def test_padding_leaves_each_bit(on: bool, k_aux: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all dead features are taken by products, and where as many slots are by sparse ops.

    In float32, where the order of a product's sums differs with its shape, pre-activations are exact numbers.
    """
    few(monkeypatch, on)
    acts, mask = batch(torch.float32)
    sae = make(k_aux=k_aux)
    if not half:
        acts = (acts * 8).round() / 8
        with torch.no_grad():
            for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
                parameter.mul_(8).round_().div_(8)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        (losses, gradients), (expected, wanted) = (
            sae.gradients(acts, mask, dead=dead) for dead in (padded(DEAD, 4), DEAD)
        )
    assert torch.equal(losses.aux, expected.aux)
    assert torch.equal(losses.loss, expected.loss)
    for name, parameter in sae.named_parameters():
        assert torch.equal(dense(gradients[name], parameter), dense(wanted[name], parameter)), name


@pytest.mark.parametrize("on", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("k_aux", [20, 9, 3], ids="k_aux={}".format)
def test_nan_and_padding(k_aux: int, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken dead feature is seen, whatever is padded; a broken row that is not a dead feature's never is."""
    few(monkeypatch, on)
    acts, _ = batch(torch.float32)
    sae, dead = make(k_aux=k_aux), DEAD[1:]
    wanted, _ = sae.gradients(acts, dead=dead)
    with torch.no_grad():
        sae.W_dec[0] = torch.nan
        sae.b_enc[0] = -1e9  # it never fires
    losses, gradients = sae.gradients(acts, dead=padded(dead, 9))
    torch.testing.assert_close(losses.aux, sae.gradients(acts, dead=dead)[0].aux)
    assert losses.aux.isfinite()
    assert wanted.aux.isfinite()
    assert all(dense(gradients[name], getattr(sae, name)).isfinite().all() for name in ("W_enc", "W_dec", "b_enc"))
    for feature in dead:
        broken = make(k_aux=k_aux)
        with torch.no_grad():
            broken.W_enc[feature, 0] = torch.nan
        assert broken.gradients(acts, dead=padded(dead, 9))[0].aux.isnan()


@pytest.mark.parametrize("on", [True, False], ids=["dense", "sparse"])
def test_only_padding_is_no_loss(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, on)
    acts, mask = batch()
    sae = make().double()
    (losses, gradients), (expected, wanted) = (
        sae.gradients(acts, mask, dead=dead) for dead in (padded(DEAD[:0], 8), DEAD[:0])
    )
    assert torch.equal(losses.aux, expected.aux)
    assert torch.equal(losses.loss, expected.loss)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(dense(gradients[name], parameter), dense(wanted[name], parameter), msg=name)


def test_capacities() -> None:
    """Few, none smaller than the number, none of many a quarter larger; at most all rows."""
    found = [len(pad(torch.arange(n_dead), 1 << 20)) for n_dead in range(4097)]
    assert all(n_dead <= capacity for n_dead, capacity in enumerate(found))
    assert all(capacity <= 1.25 * n_dead for n_dead, capacity in enumerate(found) if n_dead >= 256)
    assert sorted(found) == found
    assert len(set(found)) == 21
    assert found[0] == 0
    assert found[1] == found[64] == 64
    assert found[4096] == 4096
    assert len(pad(torch.arange(3), 50)) == 50


def test_padded_dead_features() -> None:
    dead = Dead.unpadded(pad(DEAD, 50))
    assert dead.real is not None
    assert dead.features[dead.real].tolist() == DEAD.tolist()
    assert set(dead.features[~dead.real].tolist()) == {0}
    assert dead.named(50).tolist() == DEAD.tolist() + [50] * 43


@pytest.mark.parametrize("method", ["loss", "gradients"])
@pytest.mark.parametrize(
    ("dead", "kind", "words"),
    [
        (pad(DEAD, 50), ValueError, "dead: given -1 to 49; needed 0 <= feature < d_sae"),
        (Dead(torch.tensor([1, 50]), torch.tensor([True, False])), ValueError, "dead: given 1 to 50; needed"),
        (Dead(DEAD, torch.ones(7)), TypeError, r"dead.real: given torch.float32, \[7\] on cpu; needed torch.bool"),
        (Dead(DEAD, torch.ones(3, dtype=torch.bool)), TypeError, r"dead.real: given torch.bool, \[3\] on cpu"),
        (Dead(DEAD.double(), DEAD >= 0), TypeError, "dead: given dtype torch.float64"),
        (Dead([1, 2], DEAD >= 0), TypeError, "dead: given a list"),  # type: ignore[arg-type]
    ],
)
def test_wrong_padding_is_refused(dead: Tensor | Dead, kind: type[Exception], words: str, method: str) -> None:
    with pytest.raises(kind, match=words):
        getattr(make(), method)(batch(torch.float32)[0], dead=dead)
