"""Checkpoints both ways: SAEs of SAELens, sparsify, dictionary_learning and Gemma Scope as ours, and ours as theirs.

    sae = csae.interop.load("sae_lens", "a folder, or org/repo/folder on the hub")
    csae.interop.save("sparsify", sae, "folder")

| ours                | SAELens                             | dictionary_learning      | Gemma Scope | sparsify |
|---------------------|-------------------------------------|--------------------------|-------------|----------|
| selection "topk"    | topk                                | AutoEncoderTopK          |             | topk     |
| "batch"             | jumprelu, one threshold for all     | BatchTopKSAE             | params.npz  |          |
| "batch", prefixes   | jumprelu, one threshold for all     | MatryoshkaBatchTopKSAE   | params.npz  |          |
| "jumprelu"          | jumprelu                            | JumpReluAutoEncoder      | params.npz  |          |

Checkpoints of SAELens's training (batchtopk, matryoshka_batchtopk) are read too. How `k_max` and theirs differ:
`csae.interop.weights`.

A module here for each library knows its files; none of them needs the library. What a library can express and a
`TopKSAE` can't, or the other way round, is refused with the field that is in the way.

A `ContextualSAE` is written for SAELens only, which loads it as a class of ours (`csae.interop.sae_lens_class`).
SAEBench takes both kinds as they are: `csae.interop.sae_bench`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from csae.contextual_sae import ContextualSAE
from csae.data.places import our_name
from csae.interop.weights import Asked
from csae.sae import SAE
from csae.topk_sae import TopKSAE
from csae.trained_on import check_place, named_in

LIBRARIES = ("sae_lens", "sparsify", "dictionary_learning", "gemma_scope")


def load(library: str, name: str | Path, k: int | None = None, k_max: int | None = None) -> TopKSAE | ContextualSAE:
    """An SAE that another library saved, as `TopKSAE` in evaluation mode, on the CPU.

    A `ContextualSAE` where it was saved for SAELens.

    It gives what the library's own forward gives, to float32 rounding, and where nothing had to be folded its
    weights are the file's, to the bit. What only training needs (dead features, AuxK) starts anew.

    Args:
        library: "sae_lens", "sparsify", "dictionary_learning" or "gemma_scope".
        name: the folder that holds the SAE's files, or "org/repo" or "org/repo/path/of/the/folder" on the hub.
        k: the mean number of active features a token, of an SAE with thresholds whose file doesn't say it (JumpReLU):
            training and calibration aim at it. In use it changes nothing.
        k_max: of an SAE with thresholds, how many features a token can have; d_sae if not given, as in the library. A
            smaller one, such as eight times k, takes less memory; of a token that has more, it takes the largest.

    Raises ValueError for another library, UserError where nothing is there, or nothing that a TopKSAE can express.
    """
    return _module(library).load(name, Asked(k, k_max))


def save(
    library: str, sae: SAE, folder: str | Path, metadata: dict[str, Any] | None = None, elsewhere: bool = False
) -> None:
    """Write an SAE so that the library's own loader reads it; files of the same names are replaced.

    The libraries know no scale of the activations, so the biases are multiplied by ours: feature activations are
    then in units of the activations. Where the scale is one, loading gives the same SAE, to the bit, unless b_dec was
    folded: Gemma Scope and JumpReluAutoEncoder don't subtract it.

    Args:
        library: "sae_lens", "sparsify", "dictionary_learning" or "gemma_scope".
        sae: a `TopKSAE`; for SAELens also a `ContextualSAE`.
        folder: where to; made where it is not there.
        metadata: what else the library's config is to say, such as which model the activations come from.
            SAELens: model_name, hook_name, context_size, prepend_bos and the like. dictionary_learning: lm_name,
            layer, submodule_name. sparsify and Gemma Scope have no place for it. What the SAE was trained on
            (`sae.trained_on`) is written in any case, but for Gemma Scope, and comes back with `load`; it fills in
            these names where they are not given (`csae.interop.places`). Of MLPs and attention these are the usual
            ones; where a model has norms behind those, as Gemma 2, TransformerLens's hook_mlp_out is another tensor:
            `csae export`, which looks at the model, names the right one.
        elsewhere: write it also where metadata names another model, layer or hook point than it was trained on. Their
            layers count from 0: our layer 12 is their block 11.

    Raises ValueError for another library, UserError where it can't express the SAE, metadata is not JSON or the folder
    can't be written; what was there is still there then.
    """
    module, metadata = _module(library), metadata or {}
    named = named_in(metadata)
    if named is not None:
        check_place(sae.trained_on, named.model, named.layer, named.hook, elsewhere, names=our_name)
    module.save(sae, Path(folder), metadata)


def _module(library: str) -> ModuleType:
    if library not in LIBRARIES:
        raise ValueError(f"library: given {library!r}; needed one of {', '.join(map(repr, LIBRARIES))}")
    return importlib.import_module(f"csae.interop.{library}")
