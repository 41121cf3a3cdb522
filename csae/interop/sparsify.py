"""SAEs of EleutherAI's sparsify 1.3: cfg.json and sae.safetensors in a folder a hookpoint.

    latents = topk(relu(encoder.weight (x - b_dec) + encoder.bias), k)
    x_hat   = latents W_dec + b_dec                     encoder.weight, W_dec: [d_sae, d_in]

which is `TopKSAE` under other names. A transcoder (`transcode`) reads x as it is, and with `skip_connection` adds
W_skip x, W_skip [d_in, d_in]: its target is as wide as its input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from csae.errors import UserError
from csae.files import read_json
from csae.interop.source import find, read_tensors, record, trained_on, write
from csae.interop.weights import (
    Asked,
    Weights,
    check_names,
    topk_sae,
    topk_transcoder,
    topk_weights,
    transcoder_weights,
)
from csae.sae import SAE
from csae.topk_sae import TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")  # in the order of `Weights`
SKIP = "W_skip"

# What a TopKSAE does, by sparsify's fields, which have these values where a file is without them.
FIELDS = {"activation": "topk"}
OLDER_FIELDS = {"signed": False}  # of versions before 1.3


def load(name: str | Path, asked: Asked) -> TopKSAE:
    """What `SparseCoder.load_from_disk` reads, as a TopKSAE, or a transcoder. See `csae.interop.load`."""
    config_file = find(name, CONFIG)
    config = read_json(config_file)
    for field, needed in (FIELDS | OLDER_FIELDS).items():
        if config.get(field, needed) != needed:
            raise UserError(f"{config_file}: {field} is {config[field]!r}; needed {needed!r}, as in a TopK SAE")
    transcode, skip = (config.get(field, False) for field in ("transcode", "skip_connection"))
    for field, given in (("transcode", transcode), ("skip_connection", skip)):
        if not isinstance(given, bool):
            raise UserError(f"{config_file}: {field} is {given!r}; needed true or false")
    if skip and not transcode:
        raise UserError(f"{config_file}: skip_connection without transcode; needed both: an SAE would copy its input")
    path = find(name, WEIGHTS)
    tensors = read_tensors(path)
    names = (*NAMES, SKIP) if skip else NAMES
    check_names(path, tensors, names)
    asked.nothing(path)
    weights, k = Weights(*(tensors[key] for key in NAMES)), config.get("k", 32)
    sae = topk_transcoder(path, weights, tensors.get(SKIP), k) if transcode else topk_sae(path, weights, k)
    sae.trained_on = trained_on(config, {}, config_file)
    return sae


def save(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """What `SparseCoder.load_from_disk` loads. See `csae.interop.save`."""
    if metadata:
        raise UserError(
            f"metadata: given {', '.join(metadata)}; sparsify's {CONFIG} has no place for any: leave it out"
        )
    if sae.d_out != sae.d_in:
        raise UserError(f"sae: given d_in = {sae.d_in}, d_out = {sae.d_out}; needed one width, as sparsify has it")
    weights, W_skip = (
        transcoder_weights(sae, "sparsify") if sae.is_transcoder else (topk_weights(sae, "sparsify"), None)
    )
    tensors = dict(zip(NAMES, weights, strict=True)) | ({} if W_skip is None else {SKIP: W_skip})
    kind = {"transcode": sae.is_transcoder, "skip_connection": sae.skip}
    config = (
        FIELDS | kind | {"k": sae.k, "num_latents": sae.d_sae, "d_in": sae.d_in} | record(sae)
    )  # it leaves out what is ours
    write(folder, WEIGHTS, lambda path: save_file(tensors, path), CONFIG, config)
