"""Bits per token of a code: one unit for all SAEs, whatever their l0 and whatever they carry.

A sender has the activations, a receiver has the SAE. For each token the sender sends which features are active, and
their values in whole steps. For a contextual SAE with query="current" it also sends c, which the codes don't determine.
The step of an SAE is the largest power of sqrt(2) at which the receiver's FVU is at most 1% above that of the SAE
without rounding. So two SAEs are compared by (bits, FVU), as two image codecs are.

Code lengths are those of an ideal entropy coder: a symbol costs -log2 of its probability. The probabilities are
estimated on other windows than those that are sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from csae.attribution import attribute
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource, Batch
from csae.errors import UserError
from csae.evaluate import run_form
from csae.sae import SAE, Code, Output

# Windows encoded at once. The step is searched on the first batch.
BATCH_WINDOWS = 16
# The finest step that is tried, as a share of the largest value: the precision of float32.
FINEST = 2.0**-20
# How often a code of query="past" is encoded again, with the c that the receiver gets from the code before. On
# SmolLM2-135M one, two or none gave the same bits to 0.01%.
SWEEPS = 1
# Added to each count (Krichevsky and Trofimov 1981).
SMOOTHING = 0.5


class Windows(NamedTuple):
    """Windows, and the output of the SAE for them."""

    batch: Batch
    output: Output


class Sent(NamedTuple):
    """What is sent for the n tokens in the mask: integers."""

    levels: Tensor
    """[n, k] int64: values in steps; zero: not active, and not sent"""
    indices: Tensor
    """[n, k] int64"""


@torch.no_grad()
def account(
    sae: SAE,
    source: ActivationSource,
    windows_fit: Sequence[int],
    windows_score: Sequence[int],
    tolerance: float = 0.01,
    entropy_windows: int = 4,
) -> dict[str, Any]:
    """What the code of an SAE costs in bits per token, over the positions in the mask; the result is JSON.

    Args:
        sae: contextual, or one whose tokens don't see each other. It is left in the mode it was in.
        windows_fit: windows of the source on which the coder's models are estimated.
        windows_score: other windows, which are sent. Both are held in memory: 12 * d_in bytes a token.
        tolerance: by what share the FVU may rise through all rounding.
        entropy_windows: on how many windows bits_side_entropy is measured.

    Returns:
        tokens: how many were sent. step: of the values, in units of normalised activations. l0: active features a
            token, after rounding.
        fvu, fvu_quantised: of the SAE without rounding, and of what the receiver reconstructs.
        bits_indices_uniform: which features are active, if all sets were equally likely: log2 C(d_sae, l0) a token.
        bits_indices: the same if each feature is a Bernoulli variable with its own rate. Both include the number of
            active features, by its frequencies; that costs nothing where it is always the same.
        bits_values: the levels, by their frequencies among features of similar mean level (octaves).
        bits_side: what the receiver needs beside the code. Zero for a per-token SAE and for query="past". For
            query="current" it is c, sent as a Gaussian vector (`Channel`). This is an upper bound: what the receiver
            knows of c from earlier codes is not used.
        bits_per_token: bits_indices + bits_values + bits_side.
        With query="current" also bits_side_entropy: the entropy of the attention weights, summed over heads, the
            null included. It is the cost of one position drawn for each head: less than that of the weights.

    The code is the one that the encoder finds with the receiver's c. With query="past" that is the c rebuilt from
    rounded codes, with query="current" the c that came through the channel. With "current" half of the tolerance is
    for the values, the rest for c.

    Raises UserError where windows are in both parts, nothing is in the mask, or the activations are all the same;
    ValueError where an SAE that is not a ContextualSAE carries something (c): how to send that is not known.
    """
    if set(windows_fit) & set(windows_score):
        raise UserError("windows_fit, windows_score: they share windows; a code is sent by a model of other windows")
    was_training = sae.training
    sae.eval()
    try:
        fit, score = encode_all(sae, source, windows_fit), encode_all(sae, source, windows_score)
        return _account(sae, fit, score, tolerance, entropy_windows)
    finally:
        sae.train(was_training)


def _account(
    sae: SAE, fit: Sequence[Windows], score: Sequence[Windows], tolerance: float, entropy_windows: int
) -> dict[str, Any]:
    carried = isinstance(sae, ContextualSAE) and sae.query == "current"
    plain = fvu(score, [output.x_hat for _, output in score])
    few = score[:1]
    plain_few = fvu(few, [output.x_hat for _, output in few])
    channel, level = None, 0.0
    step = coarsest_step(sae, few, (1 + tolerance / (2 if carried else 1)) * plain_few)
    if carried:
        channel = channel_for(torch.cat([output.c[batch.mask] for batch, output in fit]))
        level = coarsest_level(sae, few, step, channel, (1 + tolerance) * plain_few)
    # They were found on a few windows. They must hold on all.
    codes, quantised = receive(sae, score, step, channel, level)
    while quantised > (1 + tolerance) * plain and step > FINEST:
        step, level = step / math.sqrt(2), level / math.sqrt(2)
        codes, quantised = receive(sae, score, step, channel, level)
    seen = sent(fit, [encoded(sae, windows, step, channel, level) for windows in fit], step)
    coming = sent(score, codes, step)
    tokens, l0 = len(coming.levels), (coming.levels > 0).sum(dim=1)
    counts = float(code_lengths((seen.levels > 0).sum(dim=1), l0).sum())
    result: dict[str, Any] = {
        "arch": sae.arch,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "tokens": tokens,
        "tolerance": tolerance,
        "fvu": plain,
        "fvu_quantised": quantised,
        "step": step,
        "l0": float(l0.double().mean()),
        "bits_indices_uniform": (counts + float(log2_choose(sae.d_sae, l0).sum())) / tokens,
        "bits_indices": (counts + index_bits(seen, coming, sae.d_sae)) / tokens,
        "bits_values": value_bits(seen, coming, sae.d_sae) / tokens,
        "bits_side": 0.0 if channel is None else channel.bits(level),
    }
    result["bits_per_token"] = result["bits_indices"] + result["bits_values"] + result["bits_side"]
    if isinstance(sae, ContextualSAE):
        result["query"] = sae.query
        if carried:
            result["bits_side_entropy"] = attention_entropy(sae, score, entropy_windows)
    return result


# --- the code, its rounding, and the receiver's reconstruction ----------------------------------------------


def encode(sae: SAE, source: ActivationSource, windows: Sequence[int]) -> Windows:
    """Windows of the source, and the output of the SAE in its exact form."""
    device = sae.W_dec.device
    acts, mask, documents = source.read(windows)[:3]
    batch = Batch(acts.to(device), mask.to(device), documents.to(device), None)
    output = run_form(sae, batch.acts, batch.mask, batch.documents, exact=True)
    if not isinstance(sae, ContextualSAE) and bool(output.c.any()):
        raise ValueError(f"sae: given a {type(sae).__name__} that carries something (c); needed one by token, or "
                         "a ContextualSAE: what the receiver needs to have c is not known")  # fmt: skip
    return Windows(batch, output)


def encode_all(sae: SAE, source: ActivationSource, windows: Sequence[int]) -> list[Windows]:
    """The same in batches."""
    starts = range(0, len(windows), BATCH_WINDOWS)
    return [encode(sae, source, windows[start : start + BATCH_WINDOWS]) for start in starts]


def rounded(code: Code, step: float) -> Code:
    """The code with its values in whole steps. A value below half a step becomes zero: not active."""
    return Code((code.values / step).round() * step, code.indices)


def encoded(sae: SAE, windows: Windows, step: float, channel: Channel | None = None, level: float = 0.0) -> Code:
    """The code that is sent, its values in whole steps: [B, T, k].

    The encoder uses the c that the receiver will have. With query="past" that is a recurrence, approximated by sweeps:
    the rounded code gives a c, and the activations minus that c give another code, to be rounded. The receiver's
    reconstruction is exact for any code (`rebuilt`); a sweep only finds a better code.
    """
    batch, output = windows
    code = rounded(output.code, step)
    if not isinstance(sae, ContextualSAE):
        return code
    if sae.query == "past":
        for _ in range(SWEEPS):
            c = sae.decode(code, None, batch.mask, batch.documents) - sae.decode(code, torch.zeros_like(batch.acts))
            code = rounded(encode_less(sae, batch, c), step)
    elif channel is not None:
        code = rounded(encode_less(sae, batch, channel.receive(output.c, level)), step)
    return code


def encode_less(sae: ContextualSAE, batch: Batch, c: Tensor) -> Code:
    """The code [B, T, k] of the activations minus a given c [B, T, d_in]; each position is a window of its own."""
    B, T = batch.mask.shape
    alone = sae((batch.acts - c).flatten(0, 1).unsqueeze(1), batch.mask.flatten().unsqueeze(1), exact=True).code
    return Code(alone.values.reshape(B, T, -1), alone.indices.reshape(B, T, -1))


def rebuilt(sae: SAE, windows: Windows, code: Code, channel: Channel | None = None, level: float = 0.0) -> Tensor:
    """The receiver's reconstruction, [B, T, d_in]. With query="current" c comes through the channel, if given."""
    batch, output = windows
    if not isinstance(sae, ContextualSAE):
        return sae.decode(code)  # type: ignore[operator]
    if sae.query == "current":
        return sae.decode(code, output.c if channel is None else channel.receive(output.c, level))
    return sae.decode(code, None, batch.mask, batch.documents)


def receive(
    sae: SAE, windows: Sequence[Windows], step: float, channel: Channel | None, level: float
) -> tuple[list[Code], float]:
    """The codes sent for these windows, and the FVU of the receiver's reconstruction."""
    codes = [encoded(sae, w, step, channel, level) for w in windows]
    x_hats = [rebuilt(sae, w, code, channel, level) for w, code in zip(windows, codes, strict=True)]
    return codes, fvu(windows, x_hats)


def fvu(windows: Sequence[Windows], x_hats: Sequence[Tensor]) -> float:
    """Fraction of variance unexplained over the positions in the mask, around their mean, in float64."""
    x = torch.cat([batch.acts[batch.mask] for batch, _ in windows]).double()
    x_hat = torch.cat([made[batch.mask] for made, (batch, _) in zip(x_hats, windows, strict=True)])
    if len(x) == 0:
        raise UserError("the mask leaves out every position: there is nothing to send")
    variance = float((x - x.mean(dim=0)).square().sum())
    if not variance > 1e-12 * float(x.square().sum()):
        raise UserError("the activations are all the same: there is no variance to explain")
    return float((x - x_hat).square().sum()) / variance


def coarsest_step(sae: SAE, windows: Sequence[Windows], allowed: float) -> float:
    """The largest power of sqrt(2) at which the receiver's FVU on these windows is at most `allowed`."""
    largest = max(float(output.code.values.max()) for _, output in windows)
    exponent = math.ceil(2 * math.log2(max(largest, 1e-30)))
    finest = exponent + 2 * math.log2(FINEST)
    if isinstance(sae, ContextualSAE):  # receive() is slow: find where to start with the true c
        while exponent > finest:
            codes = [rounded(output.code, 2 ** (exponent / 2)) for _, output in windows]
            x_hats = [sae.decode(code, output.c) for code, (_, output) in zip(codes, windows, strict=True)]
            if fvu(windows, x_hats) <= allowed:
                break
            exponent -= 1
        exponent += 1
    while exponent > finest and receive(sae, windows, 2 ** (exponent / 2), None, 0.0)[1] > allowed:
        exponent -= 1
    return 2 ** (exponent / 2)


def sent(windows: Sequence[Windows], codes: Sequence[Code], step: float) -> Sent:
    """The tokens in the mask, as integers. Narrower codes are padded with zeros, which are not sent."""
    width = max(code.values.shape[-1] for code in codes)
    levels, indices = [], []
    for code, (batch, _) in zip(codes, windows, strict=True):
        padding = (0, width - code.values.shape[-1])
        levels.append(pad((code.values / step).round().long()[batch.mask], padding))
        indices.append(pad(code.indices[batch.mask], padding))
    return Sent(torch.cat(levels), torch.cat(indices))


# --- code lengths -------------------------------------------------------------------------------------------


def code_lengths(
    seen: Tensor, coming: Tensor, seen_context: Tensor | None = None, coming_context: Tensor | None = None
) -> Tensor:
    """Bits for each of the integers `coming` [n], int64 of zero or more -> [n] float64.

    Probabilities are the frequencies among the integers `seen` [m] in the same context, with SMOOTHING added to each
    count. Contexts are int64 of zero or more; if not given, there is one. An integer above the largest seen is sent as
    "larger", and then by how much, in Elias' gamma code (1975).
    """
    here = torch.zeros_like(coming) if coming_context is None else coming_context
    there = torch.zeros_like(seen) if seen_context is None else seen_context
    larger = int(seen.max()) + 1 if len(seen) else 0
    contexts = 1 + max(int(context.max()) if len(context) else 0 for context in (here, there))
    flat = there * (larger + 1) + seen
    counts = torch.bincount(flat, minlength=contexts * (larger + 1)).view(contexts, larger + 1).double() + SMOOTHING
    bits = -(counts / counts.sum(dim=1, keepdim=True)).log2()
    beyond = (coming - larger + 1).clamp_min(1).double()
    gamma = torch.where(coming >= larger, 2 * beyond.log2().floor() + 1, 0.0)
    return bits[here, coming.clamp_max(larger)] + gamma


def index_bits(seen: Sent, coming: Sent, d_sae: int) -> float:
    """Bits for which features are active in `coming`, each with its rate among the tokens `seen`.

    Every feature costs bits at every token: -log2(rate) where it is active, -log2(1 - rate) elsewhere.
    """
    fired = torch.bincount(seen.indices[seen.levels > 0], minlength=d_sae).double()
    rate = (fired + SMOOTHING) / (len(seen.levels) + 2 * SMOOTHING)
    silence = -(1 - rate).log2()
    active = coming.indices[coming.levels > 0]
    return float(len(coming.levels) * silence.sum() + (-rate.log2() - silence)[active].sum())


def value_bits(seen: Sent, coming: Sent, d_sae: int) -> float:
    """Bits for the levels of the active features in `coming`, by frequencies among features of equal loudness.

    A feature's loudness is the octave of its mean level among the tokens `seen`. Features that never fired there have a
    loudness of their own.
    """
    there, here = seen.levels > 0, coming.levels > 0
    total = torch.zeros(d_sae, dtype=torch.float64, device=seen.levels.device)
    total.index_add_(0, seen.indices[there], seen.levels[there].double())
    mean = total / torch.bincount(seen.indices[there], minlength=d_sae)
    loudness = torch.where(mean >= 1, mean.clamp_min(1).log2().floor() + 1, 0).long()
    contexts = loudness[seen.indices[there]], loudness[coming.indices[here]]
    return float(code_lengths(seen.levels[there] - 1, coming.levels[here] - 1, *contexts).sum())


def log2_choose(n: int, m: Tensor) -> Tensor:
    """log2 of the number of ways to choose m [...] of n."""
    m = m.double()
    whole = torch.full_like(m, n + 1)
    return (torch.lgamma(whole) - torch.lgamma(m + 1) - torch.lgamma(whole - m)) / math.log(2)


# --- what query="current" carries beside its code -----------------------------------------------------------


class Channel(NamedTuple):
    """A lossy way to send vectors of d_in numbers: the coordinate along each axis is sent by itself."""

    mean: Tensor
    """[d_in] float64"""
    axes: Tensor
    """[d_in, d_in] float64, one axis in each column"""
    variances: Tensor
    """[d_in] float64, along each axis"""

    def bits(self, level: float) -> float:
        """Bits for a vector, if the mean squared error along each axis is at most `level`."""
        return float((self.variances / level).clamp_min(1).log2().sum()) / 2

    def receive(self, c: Tensor, level: float) -> Tensor:
        """What the receiver gets for c [..., d_in]. Each call draws noise from the same seed."""
        noise = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(c.device)
        kept = (1 - level / self.variances.clamp_min(1e-300)).clamp_min(0)
        along = (c.double() - self.mean) @ self.axes * kept + (kept * level).sqrt() * noise
        return (along @ self.axes.T + self.mean).to(c.dtype)


def channel_for(c: Tensor) -> Channel:
    """The channel for vectors like c [n, d_in], taken as Gaussian, along their principal axes.

    Its cost is the rate-distortion function of a Gaussian vector, by reverse water-filling (Cover and Thomas, Elements
    of Information Theory, section 10.3.3). No other distribution with this covariance needs more bits.
    """
    c = c.double()
    variances, axes = torch.linalg.eigh((c - c.mean(dim=0)).T @ (c - c.mean(dim=0)) / len(c))
    return Channel(c.mean(dim=0), axes, variances.clamp_min(0))


def coarsest_level(sae: SAE, windows: Sequence[Windows], step: float, channel: Channel, allowed: float) -> float:
    """The largest level of the channel, in powers of sqrt(2), at which the receiver's FVU is at most `allowed`."""
    largest = max(float(channel.variances.max()), 1e-30)
    coarse, fine = 0, math.ceil(-2 * math.log2(FINEST))  # exponents: the level is largest / sqrt(2) ** exponent
    while coarse < fine:  # the FVU grows with the level
        middle = (coarse + fine) // 2
        if receive(sae, windows, step, channel, largest * 2 ** (-middle / 2))[1] <= allowed:
            fine = middle
        else:
            coarse = middle + 1
    return largest * 2 ** (-fine / 2)


def attention_entropy(sae: ContextualSAE, windows: Sequence[Windows], n: int) -> float:
    """Bits a token: the entropy of the attention weights, null included, summed over heads; on the first n windows."""
    bits, tokens = 0.0, 0
    for batch, _ in windows:
        for acts, mask, documents in zip(batch.acts, batch.mask, batch.documents, strict=True):
            if n > 0:
                A = attribute(sae, acts, mask, documents).weights.double()  # [n_heads, T, T]
                A = torch.cat([A, (1 - A.sum(dim=-1, keepdim=True)).clamp_min(0)], dim=-1)
                bits -= float(torch.special.xlogy(A, A)[:, mask].sum()) / math.log(2)
                tokens += int(mask.sum())
            n -= 1
    return bits / tokens if tokens else 0.0
