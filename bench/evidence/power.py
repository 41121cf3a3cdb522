"""Is the look-back too powerful to interpret? What c consists of, how far back it comes from, what it depends on.

Three kinds of evidence, all in the exact form:

- Attribution: c at a position is a sum of parts, one for each earlier position and feature (`csae.attribution`). How
  few of them explain it, and how far back are they?
- Cuts: the FVU if the look-back reaches only a number of positions back.
- Wrong memories: the FVU if the memory is out of order, of another text, or empty. A look-back that does more than read
  its memory would not need the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csae.attribution import Attribution, attribute
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource, Batch
from csae.errors import UserError
from csae.outputs import Code

EXPLAINED = 0.9
# Positions of a window at which all parts are computed: [T, k, d_in] each.
PARTS_AT = 8
LOOK_BACKS = (1, 4, 16, 64, 256)


@torch.no_grad()
def measure(sae: ContextualSAE, source: ActivationSource, windows: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """How much the look-back does and by which parts, over the positions in the mask; the result is JSON.

    Args:
        windows: of the source; eight are enough, and two at least. Attribution takes about a second each.
        seed: of the orders of "shuffled".

    Returns:
        tokens: positions in the mask. carried_tokens: those among them where anything is carried (c is not zero).
        fvu: of the SAE. c_alone: the FVU of c with no feature active beside it.
        look_back: the FVU if a position sees only the last 0, 1, ... positions, {"0": ..., "1": ..., ...}; 0 is no
            look-back, each position a window of its own.
        pairs, distance, and the checks parts_error and share_error: see `pairs_and_distances`.
        c: {"own", "zero", "other window"}: the FVU if encoder and decoder use the right c, none, or the c of the same
            position in the next window (the last window takes that of the first).
        read: {"own", "shuffled", "other window"}: the FVU if a position reads the right memory, the same memory with
            its positions in another order within the document, or that of the next window up to the same position.
            Only this one read is wrong: what came before was encoded with the right memory, and the query is right.
        far: {"own", "shuffled", "other window", "empty"}: the FVU over the last quarter of each window, if the three
            quarters before are unchanged; permuted within each document (activations and mask together) and encoded in
            that order; replaced by those of the next window; or masked out. The scored positions always see each
            other unchanged, so this shows what they need from further back.

    Raises TypeError for an SAE that does not look back; UserError for fewer than two windows, or where nothing is in
    the mask of what is scored.
    """
    if not isinstance(sae, ContextualSAE):
        raise TypeError(f"sae: given a {type(sae).__name__}; needed a ContextualSAE: only that looks back")
    if len(windows) < 2:
        raise UserError(f"windows: given {len(windows)}; needed at least 2, so that one can have another's memory")
    was_training = sae.training
    sae.eval()
    try:
        device = sae.W_dec.device
        acts, mask, documents = source.read(windows)[:3]
        batch = Batch(acts.to(device), mask.to(device), documents.to(device), None)
        output = sae(batch.acts, batch.mask, batch.documents, exact=True)
        nothing = Code(torch.zeros_like(output.code.values), output.code.indices)
        found = [attribute(sae, *window) for window in zip(*batch[:3], strict=True)]
        return {
            "windows": len(windows),
            "tokens": int(batch.mask.sum()),
            "carried_tokens": int((output.c[batch.mask] != 0).any(dim=1).sum()),
            "fvu": fvu(batch, output.x_hat),
            "c_alone": fvu(batch, sae.decode(nothing, output.c)),
            "look_back": cut(sae, batch),
            "c": with_given_c(sae, batch, output.c),
            "read": wrong_reads(sae, batch, seed),
            "far": wrong_memories(sae, batch, seed),
            **pairs_and_distances(found, batch),
        }
    finally:
        sae.train(was_training)


def fvu(batch: Batch, x_hat: Tensor, scored: Tensor | None = None) -> float:
    """Fraction of variance unexplained at the positions `scored` [B, T] bool, around their mean, in float64.

    scored: the mask if not given.
    """
    scored = batch.mask if scored is None else scored
    x = batch.acts[scored].double()
    if len(x) < 2:
        raise UserError(f"the mask leaves {len(x)} positions to score; needed at least 2: give other windows")
    return float((x - x_hat[scored]).square().sum() / (x - x.mean(dim=0)).square().sum())


# --- cuts and wrong memories --------------------------------------------------------------------------------


def cut(sae: ContextualSAE, batch: Batch) -> dict[str, float]:
    """The FVU by how many earlier positions a position sees; "0": each position alone."""
    B = len(batch.mask)
    alone = sae(batch.acts.flatten(0, 1).unsqueeze(1), batch.mask.flatten().unsqueeze(1), exact=True).x_hat
    found = {"0": fvu(batch, alone.reshape(batch.acts.shape))}
    for reach in LOOK_BACKS:
        output, _ = sae.stream(batch.acts, sae.initial_state(B, look_back=reach), batch.mask, batch.documents)
        found[str(reach)] = fvu(batch, output.x_hat)
    return found


def with_given_c(sae: ContextualSAE, batch: Batch, c: Tensor) -> dict[str, float]:
    """The FVU with the right c [B, T, d_in], with none, and with that of the next window at the same position."""
    given = {"own": c, "zero": torch.zeros_like(c), "other window": c.roll(-1, dims=0)}
    return {name: fvu(batch, reconstruct_with(sae, batch, wrong)) for name, wrong in given.items()}


def reconstruct_with(sae: ContextualSAE, batch: Batch, c: Tensor) -> Tensor:
    """Encode the activations minus a given c [B, T, d_in], and decode with the same c: [B, T, d_in]."""
    B, T = batch.mask.shape
    left = (batch.acts - c).flatten(0, 1).unsqueeze(1)  # each position a window of its own: nothing else is carried
    code = sae(left, batch.mask.flatten().unsqueeze(1), exact=True).code
    return sae.decode(Code(code.values.reshape(B, T, -1), code.indices.reshape(B, T, -1)), c)


def wrong_reads(sae: ContextualSAE, batch: Batch, seed: int) -> dict[str, float]:
    """The FVU by the memory that each position reads; all earlier positions were encoded with the right one."""
    (B, T), rows = batch.mask.shape, torch.arange(len(batch.mask), device=batch.mask.device).unsqueeze(1)
    own, other = sae.initial_state(B), sae.initial_state(B)
    found: dict[str, list[Tensor]] = {"own": [], "shuffled": [], "other window": []}
    for t in range(T):
        acts, mask, documents = (part[:, t : t + 1] for part in batch[:3])
        # Row j of a memory is what position j left there.
        order = torch.arange(own.memory.shape[1], device=acts.device).repeat(B, 1)
        order[:, :t] = shuffled(batch.documents[:, :t], t, seed + t)
        wrong = {
            "shuffled": own._replace(memory=own.memory[rows, order], takes_part=own.takes_part[rows, order]),
            "other window": own._replace(memory=other.memory.clone(), takes_part=other.takes_part.clone()),
        }
        for name, state in wrong.items():
            found[name].append(sae.stream(acts, state, mask, documents)[0].x_hat)
        output, own = sae.stream(acts, own, mask, documents)
        found["own"].append(output.x_hat)
        next_acts, next_mask = (part.roll(-1, dims=0) for part in (acts, mask))
        _, other = sae.stream(next_acts, other, next_mask, documents)
    return {name: fvu(batch, torch.cat(x_hats, dim=1)) for name, x_hats in found.items()}


def wrong_memories(sae: ContextualSAE, batch: Batch, seed: int) -> dict[str, float]:
    """The FVU over the last quarter of each window, by what is before that quarter."""
    T = batch.mask.shape[1]
    first = T - max(1, T // 4)  # the first position that is scored
    scored = batch.mask & (torch.arange(T, device=batch.mask.device) >= first)
    order = shuffled(batch.documents, first, seed)
    memories = {
        "own": (batch.acts, batch.mask),
        "shuffled": (batch.acts.gather(1, order.unsqueeze(2).expand_as(batch.acts)), batch.mask.gather(1, order)),
        "other window": (
            torch.cat([batch.acts.roll(-1, dims=0)[:, :first], batch.acts[:, first:]], dim=1),
            torch.cat([batch.mask.roll(-1, dims=0)[:, :first], batch.mask[:, first:]], dim=1),
        ),
        "empty": (batch.acts, scored),
    }
    return {
        name: fvu(batch, sae(acts, mask, batch.documents, exact=True).x_hat, scored)
        for name, (acts, mask) in memories.items()
    }


def shuffled(documents: Tensor, n: int, seed: int) -> Tensor:
    """[B, T] int64: from where each position is taken, if the first n positions are permuted within their documents.

    A document is a run of equal ids in documents [B, T].
    """
    B, T = documents.shape
    changes = (documents[:, 1:] != documents[:, :-1]).long()
    run = torch.cat([changes.new_zeros(B, 1), changes], dim=1).cumsum(dim=1)
    draws = torch.rand(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(documents.device)
    order = torch.arange(T, device=documents.device).repeat(B, 1)
    order[:, :n] = (run + draws)[:, :n].argsort(dim=1)  # by run first, at random within
    return order


# --- attribution --------------------------------------------------------------------------------------------


def pairs_and_distances(found: Sequence[Attribution], batch: Batch) -> dict[str, Any]:
    """What c consists of, at each position in the mask where it is not zero. found: one attribution for each window.

    Returns:
        pairs: of (position, feature). `needed`: how many pairs, those with the largest share of c first, until their
            shares sum to `explained`. `available`: how many carry anything to this position. `needed_of_available`: the
            ratio. Each has mean, quarter, median, three_quarters over positions. `left_over`: the mean of
            |c - sum of the needed parts|^2 / |c|^2 at `parts_positions` positions; shares measure only along c, this
            also across it. `against`: the mean absolute sum of the negative shares.
        distance: of the positive shares, scaled to sum to one at each position: median (the smallest distance within
            which half of them is), and within (the share within 1, 2, 4, ... positions).
        parts_positions: at how many positions the parts were computed, evenly spread over each window.
        parts_error: the largest |sum of all parts - c| / |c| there. share_error: the largest |sum of shares - 1|
            at any position. Both are rounding errors.
    """
    T = batch.mask.shape[1]
    needed, available, against, left_over, parts_errors, share_errors = [], [], [], [], [], []
    by_distance = torch.zeros(T, dtype=torch.float64, device=batch.mask.device)  # entry d: at distance d
    position = torch.arange(T, device=batch.mask.device)
    for one, mask in zip(found, batch.mask, strict=True):
        carried = mask & (one.output.c != 0).any(dim=1)
        share = one.share.double()  # [T, T, k]
        greatest = share.flatten(1).sort(dim=1, descending=True)
        # Rounding may keep the sum of all shares just below EXPLAINED.
        count = ((greatest.values.cumsum(dim=1) < EXPLAINED).sum(dim=1) + 1).clamp_max(greatest.values.shape[1])
        positive = share.clamp_min(0).sum(dim=2)  # [T, T]
        weight = positive / positive.sum(dim=1, keepdim=True).clamp_min(1e-300)
        distance = (position[:, None] - position[None, :]).clamp_min(0)
        by_distance.index_add_(0, distance[carried].flatten(), weight[carried].flatten())
        needed.append(count[carried])
        available.append((one.norm > 0).sum(dim=(1, 2))[carried])
        against.append(-share.clamp_max(0).sum(dim=(1, 2))[carried])
        share_errors.append((share.sum(dim=(1, 2)) - 1).abs()[carried])
        at = carried.nonzero().squeeze(1)
        for t in at[torch.linspace(0, len(at) - 1, min(PARTS_AT, len(at))).long()].tolist():
            parts, c = one.parts(t).flatten(0, 1).double(), one.output.c[t].double()  # [T * k, d_in]
            chosen = parts[greatest.indices[t, : int(count[t])]].sum(dim=0)
            left_over.append(float((c - chosen).square().sum() / c.square().sum()))
            parts_errors.append(float((c - parts.sum(dim=0)).norm() / c.norm()))
    n, of, by = torch.cat(needed).double(), torch.cat(available).double(), by_distance / by_distance.sum()
    if len(n) == 0:
        raise UserError("nothing is carried at any position of these windows: there is no c to explain")
    within = by.cumsum(dim=0)
    reaches = [2**i for i in range(T.bit_length()) if 2**i < 2 * (T - 1)]
    return {
        "pairs": {
            "explained": EXPLAINED,
            "needed": spread(n),
            "available": spread(of),
            "needed_of_available": spread(n / of),
            "left_over": sum(left_over) / len(left_over),
            "against": float(torch.cat(against).mean()),
        },
        "distance": {
            "median": int((within >= 0.5).nonzero()[0]),
            "within": {str(reach): float(within[min(reach, T - 1)]) for reach in reaches},
        },
        "parts_positions": len(left_over),
        "parts_error": max(parts_errors),
        "share_error": float(torch.cat(share_errors).max()),
    }


def spread(x: Tensor) -> dict[str, float]:
    """Mean and quartiles of x [n]."""
    quarter, median, three_quarters = x.quantile(x.new_tensor([0.25, 0.5, 0.75])).tolist()
    return {"mean": float(x.mean()), "quarter": quarter, "median": median, "three_quarters": three_quarters}
