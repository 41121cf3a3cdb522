"""SAEs of EleutherAI's sparsify 1.3: cfg.json and sae.safetensors in a folder a hookpoint.

    latents = topk(relu(encoder.weight (x - b_dec) + encoder.bias), k)
    x_hat   = latents W_dec + b_dec                     encoder.weight, W_dec: [d_sae, d_in]

which is `TopKSAE` under other names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from csae.errors import UserError
from csae.files import read_json
from csae.interop.source import find, read_tensors, record, trained_on, write
from csae.interop.weights import Weights, check_names, topk_sae, topk_weights
from csae.sae import SAE
from csae.topk_sae import TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")  # in the order of `Weights`

# What a TopKSAE does, by sparsify's fields, which have these values where a file is without them.
FIELDS = {"activation": "topk", "transcode": False, "skip_connection": False}
OLDER_FIELDS = {"signed": False}  # of versions before 1.3


def load(name: str | Path) -> TopKSAE:
    """What `SparseCoder.load_from_disk` reads, as a TopKSAE. See `csae.interop.load`."""
    config_file = find(name, CONFIG)
    config = read_json(config_file)
    for field, needed in (FIELDS | OLDER_FIELDS).items():
        if config.get(field, needed) != needed:
            raise UserError(f"{config_file}: {field} is {config[field]!r}; needed {needed!r}, as in a TopK SAE")
    path = find(name, WEIGHTS)
    tensors = read_tensors(path)
    check_names(path, tensors, NAMES)
    sae = topk_sae(path, Weights(*(tensors[key] for key in NAMES)), config.get("k", 32))
    sae.trained_on = trained_on(config, {}, config_file)
    return sae


def save(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """What `SparseCoder.load_from_disk` loads. See `csae.interop.save`."""
    if metadata:
        raise UserError(
            f"metadata: given {', '.join(metadata)}; sparsify's {CONFIG} has no place for any: leave it out"
        )
    weights = topk_weights(sae, "sparsify")
    tensors = dict(zip(NAMES, weights, strict=True))
    config = (
        FIELDS | {"k": sae.k, "num_latents": sae.d_sae, "d_in": sae.d_in} | record(sae)
    )  # it leaves out what is ours
    write(folder, WEIGHTS, lambda path: save_file(tensors, path), CONFIG, config)
