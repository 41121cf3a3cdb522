"""The latent cache of EleutherAI's delphi (PyPI eai-delphi 0.1.3), which explains and scores features.

FOLDER/latents/layers.11/0_459.safetensors ...   a part of the features each:
    locations    [n, 3] uint16 or uint32: window, position, feature less the first of the part; in that order
    activations  [n] float32
    tokens       [N, T] int64
FOLDER/latents/layers.11/config.json             what delphi's CacheConfig holds, and model_name

LatentDataset(FOLDER/latents, sampler_cfg, constructor_cfg, modules=["layers.11"])
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from csae.data.language_model import LanguageModel
from csae.errors import UserError
from csae.export.codes import About, Codes
from csae.export.places import module_path, needed_hook
from csae.files import write_file, write_json
from csae.progress import Progress, quiet
from csae.sae import SAE

SPLITS = 5  # delphi's own number


def folders(out: Path, sae: SAE, lm: LanguageModel) -> tuple[Path, Path]:
    """The folder of the hook point, which `write` fills, and the one that `LatentDataset` takes."""
    return out / "latents" / module_path(lm, lm.hook(needed_hook(sae))), out / "latents"


def write(folder: Path, sae: SAE, lm: LanguageModel, codes: Codes, about: About, progress: Progress = quiet) -> None:
    """Writes the cache of a hook point to its folder."""
    features, places, values = codes.active()
    if not len(features):
        raise UserError("no feature is active on this text: give another text, or more --windows")
    N, T = codes.tokens.shape
    tokens = codes.tokens.numpy()
    bounds = torch.linspace(0, sae.d_sae, min(SPLITS, sae.d_sae) + 1).long().tolist()
    for first, end in progress(list(pairwise(bounds)), "writing"):
        start, stop = torch.searchsorted(features, torch.tensor([first, end])).tolist()
        # In the order of places: delphi counts on those of a feature being so.
        order = places[start:stop].argsort(stable=True)
        place = places[start:stop][order]
        columns = (place // T, place % T, features[start:stop][order] - first)
        small = max(N, T, end - first) <= 2**16
        parts = {
            "locations": torch.stack(columns, dim=1).numpy().astype(np.uint16 if small else np.uint32),
            "activations": values[start:stop][order].numpy(),
            "tokens": tokens,
        }
        write_file(folder / f"{first}_{end - 1}.safetensors", partial(save_file, parts))
    config = {
        "dataset_repo": about.data,
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": T,
        "n_tokens": N * T,
        "n_splits": len(bounds) - 1,
        "model_name": lm.name,
    }
    write_json(folder / "config.json", config)
