"""Gemma Scope's files (Lieberum et al. 2024, arXiv 2408.05147): params.npz, of JumpReLU SAEs.

    pre          = x W_enc + b_enc                      W_enc: [d_in, d_sae], W_dec: [d_sae, d_in], all in float32
    feature_acts = pre where pre > threshold, else 0    threshold: [d_sae]
    x_hat        = feature_acts W_dec + b_dec

Activations are taken as they are, and b_dec is not subtracted from them: `TopKSAE` with selection="jumprelu", b_dec
folded into b_enc. The file says nothing else. Its folder does, of Google's repositories:

    google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71

average_l0 is k, and a residual SAE is of the block of that number. Those of MLPs and attention read what
TransformerLens calls hook_mlp_out and hook_z, and what such an SAE was trained on is left open. Transcoders, and SAEs
of embeddings, which expect another scale, are refused by the names of their folders.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csae.errors import UserError
from csae.files import write_file
from csae.interop.source import find
from csae.interop.weights import (
    Asked,
    Weights,
    check_names,
    reading_plain,
    subtracting_b_dec,
    threshold_sae,
    weights_and_threshold,
)
from csae.sae import SAE
from csae.topk_sae import TopKSAE
from csae.trained_on import TrainedOn, named_in

WEIGHTS = "params.npz"
THRESHOLD = "threshold"


def load(name: str | Path, asked: Asked) -> TopKSAE:
    """The SAE in a folder's params.npz. See `csae.interop.load`."""
    where = str(name)
    for kind in ("transcoder", "embedding"):
        if kind in where:
            raise UserError(f"{where}: of a folder that holds {kind}s by its name; needed an SAE of activations")
    path = find(name, WEIGHTS)
    tensors = _read(path)
    check_names(path, tensors, (*Weights._fields, THRESHOLD))
    weights = Weights(*(tensors[key] for key in Weights._fields))
    if weights.W_enc.dim() == 2:
        weights = weights._replace(W_enc=weights.W_enc.T)
    l0 = re.search(r"average_l0_(\d+)", where)
    k = None if l0 is None else int(l0[1])
    sae = threshold_sae(path, subtracting_b_dec(path, weights), tensors[THRESHOLD], k, asked, {})
    sae.trained_on = _trained_on(where)
    return sae


def save(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """params.npz, in float32. See `csae.interop.save`."""
    if metadata:
        raise UserError(f"metadata: given {', '.join(metadata)}; {WEIGHTS} has no place for any: leave it out")
    weights, threshold = weights_and_threshold(sae, "Gemma Scope")
    if threshold is None:
        raise UserError(
            'sae: given selection="topk"; needed "batch" or "jumprelu": Gemma Scope has SAEs with thresholds'
        )
    weights = reading_plain(weights)
    tensors = weights._replace(W_enc=weights.W_enc.T)._asdict() | {THRESHOLD: threshold.expand(sae.d_sae)}
    arrays = {key: tensor.float().contiguous().numpy() for key, tensor in tensors.items()}

    def save_arrays(path: Path) -> None:
        with path.open("wb") as file:  # given a name, numpy would add .npz to it
            np.savez(file, **arrays)

    write_file(folder / WEIGHTS, save_arrays)


def _read(path: Path) -> dict[str, Tensor]:
    """The arrays in an npz file, in float32; older ones call W_enc w_enc."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path}: not a whole npz file of numbers ({error}): copy it again") from error
    for key, array in found.items():
        if array.dtype.kind != "f":
            raise UserError(f"{path}: {key} holds {array.dtype}; needed floating-point numbers")
    named = {"W_" + key[2:] if key.startswith("w_") else key: array for key, array in found.items()}
    # Old files hold a finetuned scale, of ones where there was none.
    if "scaling_factor" in named and bool((named["scaling_factor"] == 1).all()):
        del named["scaling_factor"]
    return {key: torch.from_numpy(array.astype(np.float32)) for key, array in named.items()}


def _trained_on(where: str) -> TrainedOn | None:
    """What Google's names of repository and folder say: the model, and for the residual stream the block."""
    found = re.search(r"gemma-scope-(\d+b)-(pt|it)-res\b.*?\blayer_(\d+)\b", where)
    if found is None:
        return None
    model = f"google/gemma-2-{found[1]}" + ("-it" if found[2] == "it" else "")
    return named_in({"model_name": model, "hook_name": f"blocks.{found[3]}.hook_resid_post", "prepend_bos": True})
