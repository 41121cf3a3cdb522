"""SAEs of dictionary_learning 0.1: ae.pt and config.json in a folder a trainer.

    acts  = topk(relu(encoder.weight (x - b_dec) + encoder.bias), k)
    x_hat = decoder.weight acts + b_dec                 encoder.weight: [d_sae, d_in], decoder.weight: [d_in, d_sae]

is its AutoEncoderTopK, and `TopKSAE` under other names. Beside it ae.pt holds a threshold, for a way of inference where
the number of active features varies; such a TopKSAE has none, and it is written as unset (-1).

In use BatchTopKSAE has all features above the threshold, MatryoshkaBatchTopKSAE too: `TopKSAE` with selection="batch",
the latter with prefixes, whose steps are its group_sizes. While the threshold is unset (-1), all positive features are
active, as in the library: `calibrate` finds one. JumpReluAutoEncoder has a threshold for each feature, and doesn't
subtract b_dec from its input, so that is folded into b_enc.

ae.pt is a pickle. It is read by torch's restricted loader (`weights_only=True`), which builds tensors and plain
containers and runs nothing that the file names.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csae.errors import UserError
from csae.files import read_json
from csae.interop.places import for_dictionary_learning, hook_of
from csae.interop.source import find, record, trained_on, write
from csae.interop.weights import (
    Asked,
    Weights,
    check_names,
    reading_plain,
    selection_record,
    subtracting_b_dec,
    threshold_sae,
    topk_sae,
    weights_and_threshold,
)
from csae.sae import SAE
from csae.topk_sae import TopKSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")  # in the order of `Weights`
PLAIN = Weights._fields
CLASSES = {
    "AutoEncoderTopK": LINEAR,
    "BatchTopKSAE": LINEAR,
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": PLAIN,
}


def load(name: str | Path, asked: Asked) -> TopKSAE:
    """What `load_dictionary` reads, as a TopKSAE. See `csae.interop.load`."""
    config_file = find(name, CONFIG)
    config = read_json(config_file).get("trainer")
    given = config.get("dict_class") if isinstance(config, dict) else None
    if not isinstance(config, dict) or given not in CLASSES:
        wanted = ", ".join(map(repr, CLASSES))
        raise UserError(f"{config_file}: trainer.dict_class is {given!r}; needed one of {wanted}")
    path = find(name, WEIGHTS)
    tensors = _read_pickle(path)
    threshold, groups = tensors.pop("threshold", None), tensors.pop("group_sizes", None)
    k = _whole_number(path, tensors.pop("k")) if "k" in tensors else config.get("k")
    if config.get("k") not in (k, None):
        raise UserError(f"{path}: k is {k}, and {config['k']} in {config_file.name}: copy the folder again")
    if k is None and given != "JumpReluAutoEncoder":
        raise UserError(f"{path}: without a k, as is {config_file.name}; needed it in one of them")
    check_names(path, tensors, CLASSES[given])
    weights = Weights(*(tensors[key] for key in CLASSES[given]))
    if CLASSES[given] is LINEAR:
        weights = weights._replace(W_dec=weights.W_dec.T)
    else:
        weights = weights._replace(W_enc=weights.W_enc.T)
    if given == "AutoEncoderTopK":
        asked.nothing(path)
        sae = topk_sae(path, weights, k)
    else:
        if threshold is None:
            raise UserError(f"{path}: without threshold; needed one, as a {given} has it")
        if given == "JumpReluAutoEncoder":
            weights = subtracting_b_dec(path, weights)
        k = config.get("target_l0") if k is None else k
        sae = threshold_sae(path, weights, threshold, k, asked, config, _prefixes(path, given, groups))
    sae.trained_on = trained_on(config, config, config_file)
    return sae


def save(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """What `load_dictionary` loads. See `csae.interop.save`."""
    weights, threshold = weights_and_threshold(sae, "dictionary_learning")
    if sae.selection == "topk":
        kind, trainer = "AutoEncoderTopK", "TopKTrainer"
    elif sae.selection == "jumprelu":
        kind, trainer = "JumpReluAutoEncoder", "JumpReluTrainer"
        weights = reading_plain(weights)
    elif sae.prefixes:
        kind, trainer = "MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"
    else:
        kind, trainer = "BatchTopKSAE", "BatchTopKTrainer"
    if CLASSES[kind] is LINEAR:
        weights = weights._replace(W_dec=weights.W_dec.T.contiguous())
    else:
        weights = weights._replace(W_enc=weights.W_enc.T.contiguous())
    tensors = dict(zip(CLASSES[kind], weights, strict=True))
    tensors["threshold"] = torch.tensor(-1.0) if threshold is None else threshold
    if kind != "JumpReluAutoEncoder":
        tensors["k"] = torch.tensor(sae.k, dtype=torch.int32)
    if kind == "MatryoshkaBatchTopKSAE":
        ends = (0, *sae.prefixes, sae.d_sae)
        tensors["group_sizes"] = torch.tensor([end - start for start, end in pairwise(ends)])
    sizes = {"activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": sae.k}
    on, hook = sae.trained_on, hook_of(sae)
    names = {} if hook is None else for_dictionary_learning(hook)
    if on is not None and on.model is not None:
        names["lm_name"] = on.model
    metadata = names | metadata | record(sae) | selection_record(sae)
    config = {"trainer": {**metadata, "trainer_class": trainer, "dict_class": kind, **sizes}}
    write(folder, WEIGHTS, lambda path: torch.save(tensors, path), CONFIG, config)


def _prefixes(path: Path, kind: str, groups: Tensor | None) -> tuple[int, ...]:
    """What the sizes of the groups of a Matryoshka SAE add up to, but for the last."""
    if (groups is not None) != (kind == "MatryoshkaBatchTopKSAE"):
        raise UserError(
            f"{path}: {'with' if groups is not None else 'without'} group_sizes, of a {kind}: copy it again"
        )
    if groups is None:
        return ()
    if groups.dim() != 1 or groups.dtype not in (torch.int32, torch.int64) or not bool((groups > 0).all()):
        raise UserError(f"{path}: group_sizes is {str(groups.tolist())[:80]}; needed whole numbers above zero")
    return tuple(groups.cumsum(0).tolist()[:-1])


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
