"""What features do to the next token's logits, by the direct path; and whether that is more than noise.

The direct path skips the blocks above, and is the model's own from there on (`LanguageModel.logit_effects`): the final
norm, projections, the unembedding, scales. What the norm divides by, the length of the stream, is left out: it is a
positive factor, and scores are relative. A score is in standard deviations from the mean of all tokens.

Any direction has tokens that it raises most. So the tokens are told only where they are raised more than those of a
random direction: where their mean score is above that of QUANTILE of NULL random directions (`noise_level`). In the
middle of a model few features pass (of the demo's, at layer 12 of 30 of SmolLM2-135M, 1 to 3 in 100; 1 in 100 would
pass by chance): what they do goes through the blocks above. Near the last layer most do.
"""

from __future__ import annotations

from typing import Any

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


def writes_to_stream(sae: SAE) -> bool:
    """Whether the directions of an SAE are directions of the residual stream, as far as it is known what it is of."""
    on = sae.trained_on
    place = None if on is None else getattr(on, "hook_to", None) or on.hook
    return place is None or place.startswith(STREAM)


def effect_map(lm: LanguageModel) -> Tensor:
    """[d_in, vocabulary] float32, on the model's device: what each dimension of the stream does to the logits.

    The mean over the vocabulary is taken out. It is as large as the unembedding in float32.
    """
    unit = torch.eye(lm.d_in, device=lm.device)
    found = torch.cat([lm.logit_effects(some) for some in unit.split(AT_ONCE)])
    return found - found.mean(dim=1, keepdim=True)


def scores(effects: Tensor, directions: Tensor) -> Tensor:
    """directions [m, d_in] -> [m, vocabulary]: their effect on each token, in standard deviations. `effect_map`'s."""
    found = nn.functional.normalize(directions.to(effects), dim=1) @ effects
    return found / found.std(dim=1, keepdim=True).clamp_min(1e-12)


def noise_level(effects: Tensor) -> float:
    """The mean of the LISTED strongest scores that QUANTILE of random directions stay below."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(NULL, effects.shape[0], generator=generator)
    strongest = [_strength(scores(effects, some)) for some in random.split(AT_ONCE)]
    return float(torch.cat(strongest).quantile(QUANTILE))


def _strength(found: Tensor) -> Tensor:
    return found.topk(min(LISTED, found.shape[1])).values.mean(dim=1)


def strongest_tokens(effects: Tensor, tokenizer: Any, directions: Tensor, noise: float) -> list[dict[str, list[Any]]]:
    """The tokens that directions [m, d_in] raise and lower most: m times {"up", "down"}.

    Each is a list [token, score, token, score, ...] of LISTED tokens, the strongest first; empty where it is noise.
    """
    pieces: dict[int, str] = {}

    def listed(tokens: Tensor, found: Tensor, sign: int) -> list[Any]:
        if float(found.mean()) <= noise:
            return []
        both: list[Any] = []
        for token, score in zip(tokens.tolist(), found.tolist(), strict=True):
            if token not in pieces:
                pieces[token] = token_piece(tokenizer, token)
            both += [pieces[token], round(sign * score, 1)]
        return both

    rows: list[dict[str, list[Any]]] = []
    for some in directions.split(AT_ONCE) if len(directions) else ():
        found = scores(effects, some)
        n = min(LISTED, found.shape[1])
        up, down = found.topk(n), (-found).topk(n)
        for row in range(len(some)):
            rows.append(
                {
                    "up": listed(up.indices[row], up.values[row], 1),
                    "down": listed(down.indices[row], down.values[row], -1),
                }
            )
    return rows


def raised_by(effects: Tensor, directions: Tensor, tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n directions [m, d_in] that raise each of these tokens [v] most: scores [v, n] and rows [v, n], descending.

    Fewer where there are fewer directions.
    """
    best = effects.new_zeros(len(tokens), 0)
    rows = tokens.new_zeros(len(tokens), 0)
    for start in range(0, len(directions), AT_ONCE):
        found = scores(effects, directions[start : start + AT_ONCE])[:, tokens].T  # [v, at most AT_ONCE]
        number = torch.arange(start, start + found.shape[1], device=rows.device).expand(len(tokens), -1)
        both = torch.cat([best, found], dim=1)
        best, at = both.topk(min(n, both.shape[1]), dim=1)
        rows = torch.cat([rows, number], dim=1).gather(1, at)
    return best, rows


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
