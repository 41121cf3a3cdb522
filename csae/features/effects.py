"""What features do to the next token's logits, by the direct path; and whether that is more than noise.

The direct path skips the blocks above, and is the model's own from there on (`LanguageModel.logit_effects`): the final
norm, projections, the unembedding, scales. What the norm divides by, the length of the stream, is left out: it is a
positive factor, and scores are relative. A score is in standard deviations from the mean of all tokens.

Any direction has tokens that it raises most. So the tokens are told only where they are raised more than those of a
random direction: where their mean score is above that of QUANTILE of NULL random directions (`Effects.noise`). In the
middle of a model few features pass (of the demo's, at layer 12 of 30 of SmolLM2-135M, 1 to 3 in 100; 1 in 100 would
pass by chance): what they do goes through the blocks above. Near the last layer most do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csae.data.language_model import LanguageModel
from csae.data.pieces import token_piece
from csae.sae import SAE

LISTED = 6  # tokens at either end
NULL, QUANTILE = 512, 0.99
AT_ONCE = 256  # directions: AT_ONCE scores for each token of the vocabulary are in memory
# Where features are added to the residual stream itself.
STREAM = ("resid_", "resid.", "mlp.out", "attn.out")


def writes_to_stream(sae: SAE, lm: LanguageModel) -> bool:
    """Whether the directions of an SAE are directions of the residual stream, as far as it is known what it is of."""
    if sae.W_dec.shape[1] != lm.d_in:
        return False
    on = sae.trained_on
    place = None if on is None else getattr(on, "hook_to", None) or on.hook
    return place is None or place.startswith(STREAM)


class Effects(NamedTuple):
    """What directions of a model's residual stream do to its logits."""

    by_dimension: Tensor
    """[d_in, vocabulary] float32, on the model's device: what each dimension does; the mean over the vocabulary is
    taken out. As large as the unembedding in float32"""
    spread: Tensor
    """[d_in, d_in]: the variance over the vocabulary of what a direction does is direction @ spread @ direction"""
    noise: float
    """the mean of the LISTED strongest scores that QUANTILE of random directions stay below"""


def effects_of(lm: LanguageModel) -> Effects:
    """See `Effects`. Raises UserError where the model's logits can't be followed."""
    unit = torch.eye(lm.d_in, device=lm.device)
    found = torch.cat([lm.logit_effects(some) for some in unit.split(AT_ONCE)])
    found -= found.mean(dim=1, keepdim=True)
    effects = Effects(found, found @ found.T / max(1, found.shape[1] - 1), 0.0)
    return effects._replace(noise=noise_level(effects))


def scores(effects: Effects, directions: Tensor, tokens: Tensor | None = None) -> Tensor:
    """directions [m, d_in] -> [m, vocabulary]: their effect on each token, in standard deviations.

    tokens: [v], the score of these only: [m, v].
    """
    unit = nn.functional.normalize(directions.to(effects.spread), dim=1)
    deviation = ((unit @ effects.spread) * unit).sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()
    return (unit / deviation) @ (effects.by_dimension if tokens is None else effects.by_dimension[:, tokens])


def noise_level(effects: Effects) -> float:
    """See `Effects.noise`."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(NULL, len(effects.spread), generator=generator)
    strongest = [_strongest(scores(effects, some)).values.mean(dim=1) for some in random.split(AT_ONCE)]
    return float(torch.cat(strongest).quantile(QUANTILE))


def _strongest(found: Tensor) -> Any:
    return found.topk(min(LISTED, found.shape[1]))


def strongest_tokens(effects: Effects, tokenizer: Any, directions: Tensor) -> list[dict[str, list[Any]]]:
    """The tokens that directions [m, d_in] raise and lower most: m times {"up", "down"}.

    Each is a list [token, score, token, score, ...] of LISTED tokens, the strongest first; empty where it is noise.
    """
    some = directions.split(AT_ONCE) if len(directions) else ()
    return [row for part in some for row in tokens_of(scores(effects, part), tokenizer, effects.noise)]


def tokens_of(found: Tensor, tokenizer: Any, noise: float) -> list[dict[str, list[Any]]]:
    """`strongest_tokens` of directions whose scores [m, vocabulary] are known."""
    rows: list[dict[str, list[Any]]] = [{} for _ in found]
    for end, sign in (("up", 1), ("down", -1)):
        best = _strongest(sign * found)
        for row, tokens, values in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
            row[end] = []
            if sum(values) > noise * len(values):
                for token, score in zip(tokens, values, strict=True):
                    row[end] += [token_piece(tokenizer, token), round(sign * score, 1)]
    return rows


class Best(NamedTuple):
    """The directions that raise each of v tokens most, n at most, the strongest first."""

    scores: Tensor
    """[v, n]"""
    rows: Tensor
    """[v, n] int64: which directions"""

    def joined(self, found: Tensor, start: int, n: int) -> Best:
        """With the directions start, start + 1, ..., whose scores [m, v] are found."""
        number = torch.arange(start, start + len(found), device=found.device).expand(found.shape[1], -1)
        best = torch.cat([self.scores, found.T], dim=1).topk(min(n, self.scores.shape[1] + len(found)), dim=1)
        return Best(best.values, torch.cat([self.rows, number], dim=1).gather(1, best.indices))

    @classmethod
    def of_none(cls, v: int, device: torch.device) -> Best:
        return cls(torch.zeros(v, 0, device=device), torch.zeros(v, 0, dtype=torch.int64, device=device))


def similar(directions: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n rows of directions [m, d] nearest to each of those chosen [c]: cosines [c, n] and rows [c, n]."""
    unit = nn.functional.normalize(directions.float(), dim=1)
    cosines, rows = [], []
    for some in chosen.split(AT_ONCE) if len(chosen) else ():
        found = unit[some] @ unit.T
        found[torch.arange(len(some)), some] = -2
        best = found.topk(min(n, len(directions) - 1), dim=1)
        cosines.append(best.values)
        rows.append(best.indices)
    return (torch.cat(cosines), torch.cat(rows)) if cosines else (directions.new_zeros(0, n), chosen.new_zeros(0, n))
