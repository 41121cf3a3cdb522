"""Matryoshka prefixes (Bussmann et al. 2025, arXiv 2503.17547): the first features rebuild alone, and more, and all.

The loss of an SAE with prefixes p_1 < ... < p_m is the mean of m + 1 FVUs: of what the features below p_1 rebuild, of
what those below p_2 do, and so on, and of the whole reconstruction. So low features learn what is general, and high
ones don't take it from them.

All are of one code and one decode. The features from one prefix to the next are a group, and each row of W_dec that a
code names is gathered once, into the sum of its group:

    S_g       = sum of value * W_dec[index] over the code's features in group g
    x_hat_p_j = S_0 + ... + S_j + c + b_dec (+ the skip connection)

What the look-back carried, c, comes from the whole code before, and is part of every reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from csae.losses import Total, energy, here, spread
from csae.ops.adam_rows import Pairs

Prefixes = tuple[int, ...]


def checked_prefixes(prefixes: Sequence[int], d_sae: int) -> Prefixes:
    """The prefixes as a tuple. Raises TypeError or ValueError where they are not ascending numbers, 1 to d_sae - 1."""
    if isinstance(prefixes, str) or not isinstance(prefixes, Sequence):
        raise TypeError(f"prefixes: given {prefixes!r}; needed a tuple of numbers of features")
    for prefix in prefixes:
        if isinstance(prefix, bool) or not isinstance(prefix, int):
            raise TypeError(f"prefixes: given {prefix!r}; needed whole numbers")
    found = tuple(prefixes)
    if list(found) != sorted(set(found)) or (found and not (found[0] >= 1 and found[-1] < d_sae)):
        raise ValueError(
            f"prefixes: given {', '.join(map(str, found))}; needed ascending numbers from 1 to d_sae - 1 = {d_sae - 1} "
            "(all features are one in any case)"
        )
    return found


def by_group(values: Tensor, indices: Tensor, prefixes: Prefixes) -> tuple[Tensor, Tensor]:
    """A code [..., k] -> the code of each group, [..., G, k], in the order of the code; the rest is zero, of feature 0.

    A group's features stand at the front. So what is made of a group costs its features, not k.
    """
    k, groups = indices.shape[-1], len(prefixes) + 1
    group = torch.zeros_like(indices)
    for prefix in prefixes:
        group += indices >= prefix
    is_in = group.unsqueeze(-2) == torch.arange(groups, device=indices.device).unsqueeze(-1)  # [..., G, k]
    place = is_in.cumsum(dim=-1).gather(-2, group.unsqueeze(-2)).squeeze(-2) - 1
    slot = group * k + place
    shape = *indices.shape[:-1], groups * k
    apart = (of.new_zeros(shape).scatter(-1, slot, of).unflatten(-1, (groups, k)) for of in (values, indices))
    return next(apart), next(apart)


def prefix_fvus(x: Tensor, residual: Tensor, groups: Tensor, weight: Tensor, total: Total = here) -> Tensor:
    """The FVU of each prefix and of the whole, [G]: of x [..., d], each position by its weight [...].

    residual [..., d]: what the whole reconstruction misses of x. groups: the sums S_g, [..., G, d].
    """
    missed = _Missed.apply(residual, groups, weight)
    *of_prefixes, of_x = total(torch.cat([missed, spread(x, weight, total).view(1)])).unbind()
    return torch.stack(of_prefixes) / of_x


class _Missed(Function):
    """residual [..., d], groups [..., G, d], weight [...] -> the energy of what each prefix misses, [G].

    With r_g what the prefix up to group g misses, and e_g its energy:

        r_(G-1) = residual,  r_(g-1) = r_g + S_g                d S_g = sum over j < g of 2 weight r_j d e_j

    Autograd would keep every r_g, and add up a gradient for each.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, groups: Tensor, weight: Tensor) -> Tensor:
        missed = residual.to(torch.promote_types(residual.dtype, weight.dtype), copy=True)
        energies = [energy(missed, weight)]
        for group in reversed(groups.unbind(-2)[1:]):
            missed += group
            energies.append(energy(missed, weight))
        ctx.save_for_backward(missed, groups, weight)
        ctx.dtype = residual.dtype
        return torch.stack(energies[::-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_energies: Tensor) -> tuple[Tensor, Tensor, None]:
        of_first, groups, weight = ctx.saved_tensors
        missed, d_missed = of_first.clone(), torch.zeros_like(of_first)
        d_groups = torch.empty_like(groups)
        d_groups[..., 0, :].zero_()
        for g, d_energy in enumerate(d_energies.unbind()):
            if g > 0:
                d_groups[..., g, :] = d_missed
                missed -= groups[..., g, :]
            d_missed.addcmul_(missed, (2 * d_energy * weight).unsqueeze(-1).to(missed.dtype))
        return d_missed.to(ctx.dtype), d_groups, None


def pairs_by_group(pairs: Pairs, sizes: Sequence[tuple[int, bool]], prefixes: Prefixes) -> Pairs:
    """Pairs of features and tokens whose tokens have a row a group: the same pairs, by the numbers of these rows.

    sizes: of the codes that the pairs are of, one after another: how many tokens, and whether these have such rows.
    Row g of token t has number t * G + g, counted from the code's first row.
    """
    groups, device = len(prefixes) + 1, pairs.tokens.device
    rows, apart, first = [], [], 0
    for n, has_groups in sizes:
        each = groups if has_groups else 1
        rows.append(torch.arange(first, first + n * each, each, device=device))
        apart.append(torch.full((n,), int(has_groups), device=device))
        first += n * each
    # Sorted by feature, the pairs of a group are next to each other.
    place, group = torch.arange(pairs.tokens.numel(), device=device), torch.zeros_like(pairs.tokens)
    for prefix in prefixes:
        group += place >= pairs.ends[prefix]
    return pairs._replace(tokens=torch.cat(rows)[pairs.tokens] + torch.cat(apart)[pairs.tokens] * group)
