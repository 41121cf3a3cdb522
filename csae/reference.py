"""The specification: the ops and the two models in plain PyTorch.

Written to be read, in any floating dtype, float64 included. Everything fast in this package is tested
against this file, forward and backward. It imports nothing of ours, and it is allowed to be slow: it
forms [n, d_sae] pre-activations, [T, T] scores, and loops over positions.

Shapes: B windows, T positions, d_in the width of the activations, d_out that of what is reconstructed (d_in
but for a transcoder), d_sae features, k active features a token, H heads. A code is the pair (values [..., k],
indices [..., k]).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# --- the ops ---------------------------------------------------------------------------------------------


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """relu(topk(W_enc x + b_enc, k)): the k largest pre-activations of each token, negative ones as 0.

    x [..., d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [..., k], indices [..., k] int64.

    Ordered by pre-activation, largest first, equal ones by lower index first. If any pre-activation of a token is
    NaN, all its k values are NaN and its indices are 0..k-1.
    """
    pre_acts = x @ W_enc.T + b_enc
    indices = pre_acts.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values = pre_acts.gather(-1, indices).relu()
    broken = pre_acts.isnan().any(dim=-1, keepdim=True)
    values = torch.where(broken, torch.full_like(values, math.nan), values)
    indices = torch.where(broken, torch.arange(k, device=x.device).expand_as(indices), indices)
    return values, indices


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """The pre-activations v of each token with v > threshold and v > 0; the k_max largest where there are more.

    x [..., d_in], W_enc [d_sae, d_in], b_enc [d_sae], threshold [] or [d_sae] -> values [..., k_max], indices
    [..., k_max] int64.

    Ordered as in `topk_encode`; behind the last both are 0. A token with a NaN as there.
    """
    pre_acts = x @ W_enc.T + b_enc
    return _largest(pre_acts, (pre_acts > threshold) & (pre_acts > 0), k_max)


def near_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int
) -> tuple[Tensor, Tensor]:
    """As `threshold_encode`, of the pre-activations v > 0 with |v - threshold| < bandwidth / 2."""
    pre_acts = x @ W_enc.T + b_enc
    near = (pre_acts > threshold - bandwidth / 2) & (pre_acts < threshold + bandwidth / 2)
    return _largest(pre_acts, near & (pre_acts > 0), k_max)


def _largest(pre_acts: Tensor, taking_part: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """The k_max largest of those that take part, which are positive, [..., d_sae] -> values, indices [..., k_max]."""
    feature_acts = torch.where(taking_part, pre_acts, 0)
    indices = feature_acts.sort(dim=-1, descending=True, stable=True).indices[..., :k_max]
    values = feature_acts.gather(-1, indices)
    indices = torch.where(values > 0, indices, 0)
    broken = pre_acts.isnan().any(dim=-1, keepdim=True)
    values = torch.where(broken, torch.full_like(values, math.nan), values)
    indices = torch.where(broken, torch.arange(k_max, device=pre_acts.device).expand_as(indices), indices)
    return values, indices


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, k_max: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the n tokens in the mask the n k largest positive pre-activations together, up to k_max of one token.

    x [..., d_in], W_enc [d_sae, d_in], b_enc [d_sae], mask [...] bool -> values [..., k_max], indices [..., k_max]
    int64, threshold [].

    Of a token with more than k_max the k_max largest take part. Ordered as `threshold_encode`; equal ones at the border
    of the budget by lower token first, then by lower index. threshold: the smallest value selected, 0 where fewer
    than n k take part. A token with a NaN, in the mask, as in `threshold_encode`; it takes none of the budget.
    """
    values, indices = threshold_encode(x, W_enc, b_enc, x.new_zeros(()), k_max)
    mask = torch.ones_like(values[..., 0], dtype=torch.bool) if mask is None else mask
    values = torch.where(mask.unsqueeze(-1), values, 0)
    return _within_budget(values, indices, int(mask.sum()) * k)


def _within_budget(values: Tensor, indices: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices [..., k_max] -> the same with the `budget` largest positive ones; the threshold []."""
    flat = torch.where(values.isnan(), 0, values).flatten()
    order = flat.sort(descending=True, stable=True).indices[:budget]
    selected = torch.zeros_like(flat, dtype=torch.bool)
    selected[order] = flat[order] > 0
    enough = budget > 0 and int(selected.sum()) == budget
    threshold = flat[order[-1]] if enough else flat.new_zeros(())
    selected = selected.view_as(values) | values.isnan()
    return torch.where(selected, values, 0), torch.where(selected, indices, 0), threshold


def threshold_gradient(
    pre_acts: Tensor, threshold: Tensor, bandwidth: float, d_feature_acts: Tensor, d_active: Tensor
) -> Tensor:
    """JumpReLU's straight-through gradient of threshold [d_sae] (Rajamanoharan et al. 2024, arXiv 2407.14435).

    pre_acts [n, d_sae]; d_feature_acts and d_active [n, d_sae]: the gradients of v H(v - threshold) and of
    H(v - threshold). The kernel is a rectangle: d H / d threshold = -1 / bandwidth where v is within bandwidth / 2 of
    its threshold, for v > 0.
    """
    near = ((pre_acts - threshold).abs() < bandwidth / 2) & (pre_acts > 0)
    return -(near * (threshold * d_feature_acts + d_active)).sum(dim=0) / bandwidth


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """out_t = sum_i values_ti * W_dec[indices_ti], over the entries before the length of the row.

    values [..., k], indices [..., k] int64, W_dec [d_sae, d_out] -> [..., d_out].

    The length is the place after the last non-zero value (NaN is non-zero). What stands at or behind it takes no part:
    its index is not looked at, and its gradient is zero.
    """
    live = before_length(values)
    rows = torch.where(live.unsqueeze(-1), W_dec[torch.where(live, indices, 0)], 0)  # [..., k, d_out]
    return (torch.where(live, values, 0).unsqueeze(-1) * rows).sum(dim=-2)


def before_length(values: Tensor) -> Tensor:
    """values [..., k] -> [..., k] bool: which entries stand before the length of their row."""
    return (values != 0).flip(-1).cumsum(dim=-1).flip(-1) > 0


def document_starts(documents: Tensor) -> Tensor:
    """Where the document of each position begins: a document is a run of equal ids.

    documents [B, T] integer -> [B, T] int64, the index of the first position of the run.
    """
    T = documents.shape[1]
    position = torch.arange(T, device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(begins, position, 0).cummax(dim=1).values


def lookback_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    null: Tensor,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention to strictly earlier positions, with a log-distance bias and a null score.

    q, k [B, T, H, d_head], v [B, T, H, d_value], slope [H], null [H],
    mask [B, T] bool, True where a position takes part, documents [B, T] integer
    -> out [B, T, H, d_value].

    score(t, j) = <q_t, k_j> / sqrt(d_head) - slope * log(t - j), for j < t in the same document (a run of
    equal ids). The softmax runs over these and one null score a head, whose value is zero. A position out
    of the mask is not looked at, and its own output is zero.
    """
    T, d_head = q.shape[1], q.shape[3]
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position[None, :]  # [T, T]
    visible = (distance > 0)[None]  # [1, T, T]
    if documents is not None:
        visible = visible & (position[None, None, :] >= document_starts(documents)[:, :, None])
    if mask is not None:
        visible = visible & mask[:, None, :] & mask[:, :, None]
    scores = torch.einsum("bthd,bjhd->bhtj", q, k) / math.sqrt(d_head)
    scores = scores - slope[:, None, None] * distance.clamp(min=1).to(q.dtype).log()
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    nothing = null[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, nothing], dim=-1).softmax(dim=-1)[..., :-1]  # [B, H, T, T]
    return torch.einsum("bhtj,bjhd->bthd", weights, v)


def unit_heads(heads: Tensor, gain: Tensor | None = None) -> Tensor:
    """RMSNorm of each head, out = gain * h / sqrt(1e-6 + mean(h^2)): heads [..., H, d], gain [H] -> [..., H, d]."""
    out = heads / (1e-6 + heads.square().mean(dim=-1, keepdim=True)).sqrt()
    return out if gain is None else out * gain[:, None]


VALUE_BOUND = 4.0


def bounded_heads(values: Tensor) -> Tensor:
    """values [..., H, d_value] -> the same shape, the root mean square of each head below VALUE_BOUND."""
    return values / (1 + (values / VALUE_BOUND).square().mean(dim=-1, keepdim=True)).sqrt()


def active(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which slots of a code are active: values [..., k], mask [...] bool -> [..., k] bool.

    Those whose value is positive, and NaN, so that it is seen.
    """
    on = ~(values <= 0)
    return on if mask is None else on & mask.unsqueeze(-1)


def active_features(values: Tensor, indices: Tensor, mask: Tensor | None, d_sae: int) -> Tensor:
    """indices [..., k] of a code, and d_sae in the slots that are not active."""
    return torch.where(active(values, mask), indices, d_sae)


def fired(since: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    """since [d_sae], zero for the features that are active in the code."""
    here = indices[active(values, mask)]
    return torch.where(torch.isin(torch.arange(since.shape[0], device=since.device), here), 0, since)


def over_scale(acts: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """acts [..., d] / scale, a scalar; zero where the mask [...] is False, whatever stands there."""
    units = acts / scale
    return units if mask is None else torch.where(mask.unsqueeze(-1), units, 0)


def fvu(x: Tensor, x_hat: Tensor, weight: Tensor) -> Tensor:
    """The fraction of x's variance that x_hat leaves unexplained: x, x_hat [..., d], weight [...] -> [].

    The mean is by weight too. Without any weight it is NaN.
    """
    mean = (x * weight.unsqueeze(-1)).reshape(-1, x.shape[-1]).sum(dim=0) / weight.sum()
    missed, spread = ((of.square().sum(dim=-1) * weight).sum() for of in (x - x_hat, x - mean))
    return missed / spread


def feature_sums(features: Tensor, tokens: Tensor, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """The gradient of a table from its factors: out[f] = sum over the pairs p of feature f of weights_p rows[tokens_p].

    features, tokens [P] int64, weights [P], rows [N, d] -> [d_sae, d]. A pair with a feature out of [0, d_sae) takes no
    part.
    """
    out = rows.new_zeros(d_sae + 1, rows.shape[1])
    places = torch.where((features >= 0) & (features < d_sae), features, d_sae)
    return out.index_add(0, places, weights.unsqueeze(-1) * rows[tokens])[:d_sae]


def adam_numbers(t: int, lr: float, beta1: float, beta2: float, eps: float, lazy: bool) -> list[float]:
    """The six numbers of Adam's step t = 1, 2, ..., of which SparseAdam, which is lazy, adds eps to the root as it is.

    lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps or eps / sqrt(1 - beta2^t), 1 - beta1, beta2, 1 - beta2
    """
    correction = 1 / math.sqrt(1 - beta2**t)
    return [lr / (1 - beta1**t), correction, eps * correction if lazy else eps, 1 - beta1, beta2, 1 - beta2]


def adam_rows(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, numbers: list[float], unit_rows: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of Adam (Kingma and Ba 2015, arXiv 1412.6980) on a table and its moments, [d_sae, d] each.

    numbers: those of `adam_numbers`. unit_rows: the gradient is made orthogonal to each row, and each row is of norm
    one after; a row of zeros stays as it is.
    """
    step_size, correction, eps, one_minus_beta1, beta2, one_minus_beta2 = numbers
    if unit_rows:
        gradient = gradient - (gradient * param).sum(dim=1, keepdim=True) * param
    exp_avg = (1 - one_minus_beta1) * exp_avg + one_minus_beta1 * gradient
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * gradient.square()
    param = param - step_size * exp_avg / (exp_avg_sq.sqrt() * correction + eps)
    if unit_rows:
        param = param / param.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return param, exp_avg, exp_avg_sq


# --- the models ------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What a model makes of x [..., d_in]."""

    x_hat: Tensor  # [..., d_out] the reconstruction
    values: Tensor  # [..., k] the code: how active
    indices: Tensor  # [..., k] the code: which feature
    c: Tensor  # [..., d_out] what the look-back carried here, a part of x_hat
    suppressed: Tensor  # [..., d_in] what the encoder subtracted for it: c, but for a transcoder


class Selection(NamedTuple):
    """Which features a code has in its k_max slots, where the tokens of a batch have different numbers of them."""

    k: int  # on average
    k_max: int
    threshold: Tensor | None = None  # [] or [d_sae]: those above it; None: the n * k largest of n tokens together


def select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int | Selection, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The code of x [..., d_in]: its k largest features for each token, or as a `Selection` says.

    mask [...] bool: the tokens that share a budget.
    """
    if isinstance(k, int):
        return topk_encode(x, W_enc, b_enc, k)
    if k.threshold is None:
        return batch_topk_encode(x, W_enc, b_enc, k.k, k.k_max, mask)[:2]
    return threshold_encode(x, W_enc, b_enc, k.threshold, k.k_max)


def topk_sae(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int | Selection,
    mask: Tensor | None = None,
) -> Encoded:
    """The per-token TopK SAE (Gao et al. 2024, arXiv 2406.04093), on x [..., d_in]. Its `c` is zero."""
    values, indices = select(x - b_dec, W_enc, b_enc, k, mask)
    x_hat = sparse_decode(values, indices, W_dec) + b_dec
    return Encoded(x_hat, values, indices, torch.zeros_like(x), torch.zeros_like(x))


def topk_transcoder(
    x: Tensor,
    mean: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_skip: Tensor | None,
    k: int,
) -> Encoded:
    """The per-token TopK transcoder: it reads x [..., d_in], and x_hat [..., d_out] is its prediction of a target.

    mean [d_in], W_dec [d_sae, d_out], b_dec [d_out]. W_skip [d_out, d_in]: the skip connection of Paulo et al. 2025
    (arXiv 2501.18823), or None.
    """
    values, indices = topk_encode(x - mean, W_enc, b_enc, k)
    x_hat = sparse_decode(values, indices, W_dec) + b_dec
    if W_skip is not None:
        x_hat = x_hat + (x - mean) @ W_skip.T
    return Encoded(x_hat, values, indices, torch.zeros_like(x_hat), torch.zeros_like(x))


def matryoshka_fvus(
    x: Tensor, out: Encoded, W_dec: Tensor, prefixes: tuple[int, ...], mask: Tensor | None = None
) -> Tensor:
    """The fraction of x's variance that each prefix leaves unexplained, and the whole reconstruction: [m + 1].

    x [..., d_out]: what `out` rebuilds. Prefix p rebuilds with the features below p of the same code, and the same c,
    biases and skip connection. The training loss of an SAE with prefixes is their mean (Bussmann et al. 2025, arXiv
    2503.17547). mask [...] bool: which positions count.
    """
    counts = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    weight = torch.ones_like(x[counts][:, 0])
    fvus = []
    for prefix in (*prefixes, W_dec.shape[0]):
        left_out = sparse_decode(torch.where(out.indices >= prefix, out.values, 0), out.indices, W_dec)
        fvus.append(fvu(x[counts], (out.x_hat - left_out)[counts], weight))
    return torch.stack(fvus)


class ContextualWeights(NamedTuple):
    """The parameters of a contextual SAE, and for a transcoder three more."""

    W_enc: Tensor  # [d_sae, d_in]
    b_enc: Tensor  # [d_sae]
    W_dec: Tensor  # [d_sae, d_out]
    b_dec: Tensor  # [d_out]
    W_mem: Tensor  # [d_sae, d_memory]
    W_Q: Tensor  # [H * d_head, d_in], or d_out with query="past"
    W_K: Tensor  # [H * d_head, d_memory]
    W_V: Tensor  # [H * d_value, d_memory]
    W_O: Tensor  # [d_out, H * d_value]
    gain: Tensor  # [H]
    slope: Tensor  # [H]
    null: Tensor  # [H]
    W_I: Tensor | None = None  # [d_in, H * d_value]: what the encoder subtracts; W_O if None
    W_skip: Tensor | None = None  # [d_out, d_in]: the skip connection, if any
    mean: Tensor | None = None  # [d_in]: what is subtracted from x first; b_dec if None

    def centred(self, x: Tensor) -> Tensor:
        return x - (self.b_dec if self.mean is None else self.mean)


def contextual_sweeps(
    x: Tensor,
    weights: ContextualWeights,
    k: int | Selection,
    query: str,
    sweeps: int,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    k_mem: int | None = None,
    start: Encoded | None = None,
) -> Encoded:
    """The contextual SAE in parallel: sweep 0 does not look back, sweep s looks at the codes of sweep s - 1.

    x [B, T, d_in], mask [B, T] bool, documents [B, T] integer. After s sweeps the first s positions (and
    position s) are exact, so T sweeps are the recurrence.

    start: whose c, and what it suppressed, sweep 0 takes instead of zero. With what the recurrence gave each sweep
    gives that again.
    """
    nothing = x.new_zeros(*x.shape[:-1], weights.b_dec.shape[0]), torch.zeros_like(x)
    out = _encode(x, *(nothing if start is None else (start.c, start.suppressed)), weights, k, mask)
    for _ in range(sweeps):
        out = _encode(x, *_look_back(x, out, weights, query, mask, documents, k_mem), weights, k, mask)
    return out


def contextual_exact(
    x: Tensor,
    weights: ContextualWeights,
    k: int | Selection,
    query: str,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    k_mem: int | None = None,
) -> Encoded:
    """The contextual SAE as it is defined: a recurrence, position t looking at the final codes before it.

    x [B, T, d_in], mask [B, T] bool, documents [B, T] integer. Positions can't share a budget here.
    """
    B, T, d_in = x.shape
    d_out, slots = weights.b_dec.shape[0], k if isinstance(k, int) else k.k_max
    out = Encoded(
        x_hat=x.new_zeros(B, T, d_out),
        values=x.new_zeros(B, T, slots),
        indices=torch.zeros(B, T, slots, dtype=torch.int64, device=x.device),
        c=x.new_zeros(B, T, d_out),
        suppressed=x.new_zeros(B, T, d_in),
    )
    for t in range(T):
        # Positions from t on hold zeros here; nothing at t looks at them.
        here = _encode(x, *_look_back(x, out, weights, query, mask, documents, k_mem), weights, k, mask)
        out = Encoded(*(_at_position(t, new, old) for old, new in zip(out, here, strict=True)))
    return out


def _at_position(t: int, new: Tensor, old: Tensor) -> Tensor:
    """old [B, T, ...], with position t taken from new."""
    return torch.cat([old[:, :t], new[:, t : t + 1], old[:, t + 1 :]], dim=1)


def _encode(
    x: Tensor, c: Tensor, suppressed: Tensor, weights: ContextualWeights, k: int | Selection, mask: Tensor | None
) -> Encoded:
    """Encode x less `suppressed` [B, T, d_in], and add c [B, T, d_out]; out of the mask the code is empty."""
    values, indices = select(weights.centred(x) - suppressed, weights.W_enc, weights.b_enc, k, mask)
    if mask is not None:
        values = torch.where(mask[..., None], values, 0)
    x_hat = sparse_decode(values, indices, weights.W_dec) + c + weights.b_dec
    if weights.W_skip is not None:
        x_hat = x_hat + weights.centred(x) @ weights.W_skip.T
    return Encoded(x_hat, values, indices, c, suppressed)


def _look_back(
    x: Tensor,
    memory: Encoded,
    weights: ContextualWeights,
    query: str,
    mask: Tensor | None,
    documents: Tensor | None,
    k_mem: int | None,
) -> tuple[Tensor, Tensor]:
    """What the codes before each position, or their k_mem most active features, say about it.

    Two readings: c [B, T, d_out], which is added to the reconstruction, and what the encoder subtracts, [B, T, d_in].
    """
    H = weights.slope.shape[0]
    if query == "current":
        query_acts = weights.centred(x)
    elif query == "past":
        here = sparse_decode(memory.values, memory.indices, weights.W_dec) + memory.c  # no b_dec, no skip connection
        query_acts = torch.cat([torch.zeros_like(here[:, :1]), here[:, :-1]], dim=1)
    else:
        raise ValueError(f"query: given {query!r}; needed 'current' or 'past'")
    code = memory.values[..., :k_mem], memory.indices[..., :k_mem]
    remembered = sparse_decode(*code, weights.W_mem)  # [B, T, d_memory]
    q, k, v = (
        (acts @ W.T).unflatten(-1, (H, -1))
        for acts, W in ((query_acts, weights.W_Q), (remembered, weights.W_K), (remembered, weights.W_V))
    )
    a = lookback_attention(
        unit_heads(q, weights.gain),
        unit_heads(k),
        bounded_heads(v),
        weights.slope,
        weights.null,
        mask,
        documents,
    )
    a = a.flatten(-2)
    c = a @ weights.W_O.T
    return c, c if weights.W_I is None else a @ weights.W_I.T
