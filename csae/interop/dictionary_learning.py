"""SAEs of dictionary_learning 0.1: ae.pt and config.json in a folder a trainer.

    acts  = topk(relu(encoder.weight (x - b_dec) + encoder.bias), k)
    x_hat = decoder.weight acts + b_dec                 encoder.weight: [d_sae, d_in], decoder.weight: [d_in, d_sae]

which is `TopKSAE` under other names. Beside it ae.pt holds a threshold, for a way of inference where the number of
active features varies; a TopKSAE has none, and it is written as unset (-1).

ae.pt is a pickle. It is read by torch's restricted loader (`weights_only=True`), which builds tensors and plain
containers and runs nothing that the file names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csae.errors import UserError
from csae.files import read_json
from csae.interop.places import for_dictionary_learning, hook_of
from csae.interop.source import find, record, trained_on, write
from csae.interop.weights import Weights, check_names, topk_sae, topk_weights
from csae.sae import SAE
from csae.topk_sae import TopKSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")  # in the order of `Weights`
CLASS = "AutoEncoderTopK"


def load(name: str | Path) -> TopKSAE:
    """What `load_dictionary` reads, as a TopKSAE. See `csae.interop.load`."""
    config_file = find(name, CONFIG)
    config = read_json(config_file).get("trainer")
    given = config.get("dict_class") if isinstance(config, dict) else None
    if not isinstance(config, dict) or given != CLASS:
        raise UserError(f"{config_file}: trainer.dict_class is {given!r}; needed {CLASS!r}: a TopKSAE can't be others")
    path = find(name, WEIGHTS)
    tensors = _read_pickle(path)
    tensors.pop("threshold", None)
    k = _whole_number(path, tensors.pop("k")) if "k" in tensors else config.get("k")
    if config.get("k") not in (k, None):
        raise UserError(f"{path}: k is {k}, and {config['k']} in {config_file.name}: copy the folder again")
    if k is None:
        raise UserError(f"{path}: without a k, as is {config_file.name}; needed it in one of them")
    check_names(path, tensors, NAMES)
    W_enc, b_enc, W_dec, b_dec = (tensors[key] for key in NAMES)
    sae = topk_sae(path, Weights(W_enc, b_enc, W_dec.T, b_dec), k)
    sae.trained_on = trained_on(config, config, config_file)
    return sae


def save(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """What `load_dictionary` loads. See `csae.interop.save`."""
    W_enc, b_enc, W_dec, b_dec = topk_weights(sae, "dictionary_learning")
    tensors = dict(zip(NAMES, (W_enc, b_enc, W_dec.T.contiguous(), b_dec), strict=True))
    tensors |= {"k": torch.tensor(sae.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    sizes = {"activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": sae.k}
    on, hook = sae.trained_on, hook_of(sae)
    names = {} if hook is None else for_dictionary_learning(hook)
    if on is not None and on.model is not None:
        names["lm_name"] = on.model
    metadata = names | metadata | record(sae)
    config = {"trainer": {**metadata, "trainer_class": "TopKTrainer", "dict_class": CLASS, **sizes}}
    write(folder, WEIGHTS, lambda path: torch.save(tensors, path), CONFIG, config)


def _whole_number(path: Path, k: Tensor) -> int:
    if k.numel() != 1 or k.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{path}: k is a {k.dtype} of shape {list(k.shape)}; needed one whole number")
    return int(k)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader may raise anything on a file that is no pickle
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a whole file of tensors ({reason}): copy it again") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(
            f"{path}: something else than a state dict; needed tensors by name, as `torch.save` writes them"
        )
    for name, tensor in content.items():
        if not _is_ordinary(tensor):
            raise UserError(f"{path}: {name} is no ordinary tensor; needed a dense one with its numbers")
    return content


def _is_ordinary(tensor: object) -> bool:
    """Whether it is a tensor as safetensors could hold: a pickle may also hold sparse and nested ones, some without
    numbers, and a few numbers that stand for more than fit in memory."""
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout != torch.strided:
        return False
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= tensor.nbytes
