"""The baselines of other papers, against brute-force definitions and against statements of the papers."""

import math

import pytest
import torch

from csae import TopKSAE
from csae.bench.baselines import BASELINES
from csae.bench.baselines.batch_topk import THRESHOLD_RATE, BatchTopKSAE
from csae.bench.baselines.temporal_features import TemporalFeatureSAE
from csae.bench.baselines.temporal_sae import TemporalSAE
from csae.config import TrainConfig
from csae.data.activations import Batch, estimate_normalisation
from csae.evaluate import evaluate
from csae.factors import Factors
from csae.train import train

OPTIONS = {"temporal-features": {"n_heads": 2, "d_head": 3, "d_value": 4}, "temporal-sae": {"temperature": 0.3}}
every_baseline = pytest.mark.parametrize("name", BASELINES)


def small(name, **options):
    torch.manual_seed(0)
    sae = BASELINES[name](6, 15, 3, dead_after=20, **(OPTIONS.get(name, {}) | options))
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter is not sae.W_dec:
                parameter += 0.1 * torch.randn_like(parameter)
    sae.initialise(torch.randn(6), 1.7)
    return sae.double()


def windows(B=2, T=9):
    generator = torch.Generator().manual_seed(3)
    acts = 2 * torch.randn(B, T, 6, generator=generator).double()
    mask = torch.rand(B, T, generator=generator) > 0.2
    documents = torch.randint(0, 2, (B, T), generator=generator).sort(dim=1).values
    return acts, mask, documents


def dense(code, d_sae):
    """A code [..., k] as activations [..., d_sae]."""
    return code.values.new_zeros(*code.values.shape[:-1], d_sae).scatter_add(-1, code.indices, code.values)


class Source:
    """Given activations [n_windows, n_ctx, d_in] as a source."""

    def __init__(self, acts):
        self.acts = acts
        self.n_windows, self.n_ctx, self.d_in = acts.shape

    def read(self, window_indices):
        acts = self.acts[list(window_indices)]
        everywhere = torch.ones(acts.shape[:2], dtype=torch.bool)
        return Batch(acts, everywhere, torch.zeros(acts.shape[:2], dtype=torch.int64), None)

    def describe(self):
        return {"made": "in a test"}


def trained(sae, acts, run, steps=150, lr=0.02):
    """`sae` after training on all but the last 16 windows, and its figures on these."""
    source = Source(acts)
    sae.initialise(*estimate_normalisation(source))
    train(sae, source, range(len(acts) - 16), run, TrainConfig(steps=steps, lr=lr, checkpoint_every=steps))
    return evaluate(sae, source, range(len(acts) - 16, len(acts)))


# What holds for all of them.


@every_baseline
def test_gradients_are_those_of_the_loss(name):
    sae, (acts, mask, documents) = small(name), windows()
    dead = torch.tensor([2, 5, 6])
    losses, gradients = sae.gradients(acts, mask, documents, dead)
    wanted = sae.loss(acts, mask, documents, dead)
    wanted.loss.backward()
    torch.testing.assert_close(losses.loss, wanted.loss.detach())
    assert losses.aux > 0
    assert set(gradients) == {key for key, parameter in sae.named_parameters() if parameter.grad is not None}
    for key, parameter in sae.named_parameters():
        found = gradients[key]
        found = found.dense() if isinstance(found, Factors) else found
        torch.testing.assert_close(
            found.view_as(parameter), parameter.grad.to_dense(), msg=lambda m, key=key: f"{key}: {m}"
        )


@every_baseline
def test_gradients_are_the_slopes_of_the_loss(name):
    sae, batch = small(name), windows()
    _, gradients = sae.gradients(*batch)
    for key, parameter in sae.named_parameters():
        found = gradients[key]
        found = (found.dense() if isinstance(found, Factors) else found).view_as(parameter)
        step = 1e-6 * torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step
            above = sae.loss(*batch).loss
            parameter -= 2 * step
            below = sae.loss(*batch).loss
            parameter += step
        torch.testing.assert_close((above - below) / 2, (found * step).sum(), rtol=1e-4, atol=1e-11)


@every_baseline
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_positions_out_of_the_mask_do_not_matter(name, training):
    sae, (acts, mask, documents) = small(name).train(training), windows()
    changed = torch.where(mask[..., None], acts, 1e3)
    one, other = sae(acts, mask, documents), sae(changed, mask, documents)
    for part, same in ((one.x_hat, other.x_hat), (one.c, other.c), (dense(one.code, 15), dense(other.code, 15))):
        torch.testing.assert_close(part, same)
    assert one.code.values[~mask].abs().max() == 0
    torch.testing.assert_close(one.x_hat[~mask], (sae.b_dec * sae.scale).expand_as(one.x_hat[~mask]))
    torch.testing.assert_close(sae.loss(acts, mask, documents).loss, sae.loss(changed, mask, documents).loss)


@every_baseline
def test_neither_the_future_nor_another_document_is_seen(name):
    sae, (acts, mask, _) = small(name).eval(), windows()
    documents = (torch.arange(9) >= 6).long().expand(2, 9)
    before = sae(acts, mask, documents)
    changed = acts.clone()
    changed[:, 4:6] += 1
    after = sae(changed, mask, documents)
    for one, other in (
        (before.x_hat, after.x_hat),
        (before.c, after.c),
        (dense(before.code, 15), dense(after.code, 15)),
    ):
        assert torch.equal(one[:, :4], other[:, :4])
        assert torch.equal(one[:, 6:], other[:, 6:])


@every_baseline
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    sae, batch = small(name).float(), windows()
    batch = (batch[0].float(), *batch[1:])
    sae.track(sae.gradients(*batch)[0].code, batch[1])
    sae.save_pretrained(tmp_path)
    loaded = type(sae).from_pretrained(str(tmp_path))
    assert loaded.config == sae.config
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in sae.state_dict().items())
    assert torch.equal(sae.eval()(*batch).x_hat, loaded.eval()(*batch).x_hat)
    assert isinstance(sae.note, str)


@every_baseline
def test_training_lowers_the_loss_and_code_and_c_rebuild_the_output(name, tmp_path):
    sae, acts = small(name).float(), regions()
    sae = type(sae)(acts.shape[2], 24, 3, **OPTIONS.get(name, {}))
    before = trained(sae, acts, tmp_path / "one", steps=1)["fvu"]
    after = trained(sae, acts, tmp_path / "many", steps=80)["fvu"]
    assert after < 0.7 * before
    batch = Source(acts).read(range(4))
    out = sae(batch.acts, batch.mask, batch.documents)
    rebuilt = sae.decode(out.code, out.c) if name == "temporal-features" else sae.decode(out.code)
    torch.testing.assert_close(rebuilt, out.x_hat)


# Batch TopK.


def uneven(n_windows=80, T=32, d_in=24, d_sae=48):
    """Sums of 1 to 9 of 48 directions: tokens differ in how many they need."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(d_sae, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    needed = torch.tensor([1, 1, 1, 9])[torch.randint(0, 4, (n_windows, T), generator=generator)]
    ranks = torch.rand(n_windows, T, d_sae, generator=generator).argsort(dim=-1).argsort(dim=-1)
    strengths = (ranks < needed[..., None]) * (1 + torch.rand(n_windows, T, d_sae, generator=generator))
    return strengths @ directions


def test_batch_topk_keeps_the_largest_of_the_batch():
    sae, (acts, mask, documents) = small("batch-topk"), windows()
    pre_acts = (acts / sae.scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    counted = pre_acts.masked_fill(~mask[..., None], -math.inf).flatten()
    best = counted.topk(int(mask.sum()) * 3)
    wanted = torch.zeros_like(counted).scatter(0, best.indices, best.values.relu()).view(2, 9, 15)
    code = sae(acts, mask, documents).code
    torch.testing.assert_close(dense(code, 15), wanted)
    active = (code.values > 0).sum(dim=-1)
    assert active.sum() == mask.sum() * 3
    assert code.values.shape[-1] == active.max() > active[mask].min()
    assert (code.values.diff(dim=-1) <= 0).all()


def test_batch_topk_threshold_is_a_running_mean_of_the_smallest_active_value():
    sae, (acts, mask, _) = small("batch-topk"), windows()
    smallest = []
    for shift in range(4):
        code = sae(acts * (1 + shift), mask).code
        smallest.append(code.values[code.values > 0].min())
        sae.track(code, mask)
    weights = torch.tensor([(1 - THRESHOLD_RATE) ** age for age in (3, 2, 1, 0)]).double()
    torch.testing.assert_close(sae.threshold, (weights @ torch.stack(smallest)) / weights.sum())
    pre_acts = (acts / sae.scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    wanted = (pre_acts * (pre_acts > sae.threshold)).masked_fill(~mask[..., None], 0)
    torch.testing.assert_close(dense(sae.eval().encode(acts, mask), 15), wanted)


def test_batch_topk_beats_topk_where_tokens_differ_in_what_they_need(tmp_path):
    acts = uneven()
    torch.manual_seed(0)
    batched, per_token = BatchTopKSAE(24, 48, 3), TopKSAE(24, 48, 3)
    found, plain = trained(batched, acts, tmp_path / "batched"), trained(per_token, acts, tmp_path / "per token")
    assert found["l0"] == pytest.approx(3, rel=0.1)
    assert found["fvu"] < 0.8 * plain["fvu"]
    # As many features as a token needs.
    l0 = (batched.encode(acts[-16:]).values > 0).sum(dim=-1).float()
    assert l0.std() > 1


# Temporal Feature Analysis.


def regions(n_windows=80, T=32, d_in=16, staying=4):
    """A direction that stays for 8 positions, one of a few, and one of the others that is new at each position."""
    generator = torch.Generator().manual_seed(2)
    directions = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
    high = torch.randint(0, staying, (n_windows, T // 8), generator=generator).repeat_interleave(8, dim=1)
    new = torch.randint(staying, d_in, (n_windows, T), generator=generator)
    noise = 0.05 * torch.randn(n_windows, T, d_in, generator=generator)
    jitter = 1 + 0.5 * torch.rand(n_windows, T, 1, generator=generator)
    return 2 * directions[high] + 2 * jitter * directions[new] + noise


def test_temporal_features_are_as_defined():
    sae, (acts, mask, documents) = small("temporal-features"), windows()
    x = acts / sae.scale - sae.b_dec
    z = (x @ sae.W_enc.T + sae.b_enc).relu()
    out = sae(acts, mask, documents)
    for b, t in mask.nonzero().tolist():
        past = [j for j in range(t) if mask[b, j] and documents[b, j] == documents[b, t]]
        read = []
        for h in range(2):
            rows, columns = slice(3 * h, 3 * h + 3), slice(4 * h, 4 * h + 4)
            query = sae.W_Q[rows] @ z[b, t] + sae.b_Q[rows]
            likeness = [query @ (sae.W_K[rows] @ z[b, j]) / math.sqrt(3) for j in past]
            scores = [s - sae.slope[h] * math.log(t - j) for s, j in zip(likeness, past, strict=True)]
            weights = torch.stack([*scores, sae.null[h]]).softmax(dim=0)
            parts = [weights[i] * (sae.W_V[columns] @ z[b, j]) for i, j in enumerate(past)]
            read.append(sum(parts, torch.zeros(4).double()))
        direction = (sae.W_O @ torch.cat(read) + sae.b_O).relu() @ sae.W_dec
        c = (x[b, t] @ direction) / (direction @ direction) * direction
        torch.testing.assert_close(out.c[b, t] / sae.scale, c)
        best = (sae.W_enc @ (x[b, t] - c) + sae.b_enc).topk(3)
        torch.testing.assert_close(out.code.values[b, t], best.values.relu())
        assert torch.equal(out.code.indices[b, t], best.indices)
        x_hat = best.values.relu() @ sae.W_dec[best.indices] + c + sae.b_dec
        torch.testing.assert_close(out.x_hat[b, t] / sae.scale, x_hat)


def test_temporal_features_predict_what_stays_and_encode_what_is_new(tmp_path):
    acts = regions()
    torch.manual_seed(0)
    sae, plain = TemporalFeatureSAE(16, 16, 1, n_heads=2, d_head=8, d_value=16), TopKSAE(16, 16, 1)
    found, without = trained(sae, acts, tmp_path / "tfa"), trained(plain, acts, tmp_path / "topk")
    assert found["fvu"] < 0.6 * without["fvu"]
    # Where the region goes on, the prediction holds the direction that stays, and the code the one that is new.
    held = acts[-16:]
    generator = torch.Generator().manual_seed(2)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    with torch.no_grad():
        out = sae(held)
    inside = (torch.arange(32) % 8 > 1).expand(16, 32)
    mean = acts.mean(dim=(0, 1))
    of_c, of_code = ((part @ directions.T)[inside] for part in (out.c, out.x_hat - out.c - sae.b_dec * sae.scale))
    truth = ((held - mean) @ directions.T)[inside]

    def unexplained(part, which):
        return ((truth - part)[:, which].square().sum() / truth[:, which].square().sum()).item()

    stays, new = slice(0, 4), slice(4, 16)
    assert unexplained(of_c, stays) < 0.3 < 0.7 < unexplained(of_c, new)
    assert unexplained(of_code, new) < 0.3 < 0.7 < unexplained(of_code, stays)


# Temporal SAE.


def test_temporal_sae_contrasts_a_token_with_the_one_before_it():
    sae, (acts, mask, documents) = small("temporal-sae"), windows()
    losses = sae.loss(acts, mask, documents)
    high = dense(losses.code, 15)[..., : sae.n_high]
    assert sae.n_high == 3
    where = [(b, t) for b in range(2) for t in range(1, 9)]
    where = [(b, t) for b, t in where if mask[b, t] and mask[b, t - 1] and documents[b, t] == documents[b, t - 1]]
    assert 4 < len(where) < 12

    def alike(one, other):
        return torch.cosine_similarity(high[one], high[other[0], other[1] - 1], dim=0, eps=1e-12) / 0.3

    total = 0
    for own in where:
        others = [pair for pair in where if pair[0] != own[0] or documents[pair] != documents[own]]
        forwards = [alike(own, own), *(alike(own, other) for other in others)]
        backwards = [alike(own, own), *(alike(other, own) for other in others)]
        total -= torch.stack(forwards).log_softmax(0)[0] + torch.stack(backwards).log_softmax(0)[0]
    contrast = total / (2 * len(where))
    x, x_hat = acts / sae.scale, high @ sae.W_dec[:3] + sae.b_dec
    fvu_high = (x - x_hat)[mask].square().sum() / (x - x[mask].mean(dim=0))[mask].square().sum()
    torch.testing.assert_close(losses.loss, 0.2 * fvu_high + 0.8 * losses.fvu + 0.1 * contrast)


def test_temporal_sae_makes_high_level_features_smooth(tmp_path):
    acts = regions(d_in=24, staying=12)
    smooth, figures = {}, {}
    for coef in (0.0, 0.1):
        torch.manual_seed(0)
        sae = TemporalSAE(24, 32, 2, high_level=0.4, contrast_coef=coef, temperature=0.1)
        figures[coef] = trained(sae, acts, tmp_path / str(coef))
        high = dense(sae.encode(acts[-16:]), 32)[..., : sae.n_high]
        inside = torch.arange(1, 32) % 8 > 0
        smooth[coef] = torch.cosine_similarity(high[:, 1:], high[:, :-1], dim=-1)[:, inside].mean().item()
    assert smooth[0.1] > smooth[0.0] + 0.2
    assert figures[0.1]["fvu"] < figures[0.0]["fvu"] + 0.05


def test_a_batch_without_pairs_has_no_contrast():
    sae = small("temporal-sae")
    acts = windows()[0][:, :1]
    plain = sae.loss(acts)
    assert torch.isfinite(plain.loss)
    with pytest.raises(ValueError, match=r"high_level: given 0; needed"):
        TemporalSAE(6, 15, 3, high_level=0)
