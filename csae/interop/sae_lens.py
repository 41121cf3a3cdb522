"""SAEs of SAELens 6: cfg.json and sae_weights.safetensors in a folder; trained ones and checkpoints of training.

    feature_acts = relu(topk((x - b_dec) W_enc + b_enc, k))
    x_hat        = feature_acts W_dec + b_dec           W_enc: [d_in, d_sae], W_dec: [d_sae, d_in]

which is `TopKSAE`, but for three fields of its config. `rescale_acts_by_decoder_norm` selects by activation times
the norm of the decoder row, and `apply_b_dec_to_input: false` leaves b_dec out of the encoder: both are folded into
the weights, as SAELens itself folds the first. `normalize_activations` other than "none" depends on the token or on
a file beside, and is refused, as are transcoders and reshaped heads.

A `ContextualSAE` is written under an architecture of its own, "csae_contextual", which SAELens loads after
`csae.interop.sae_lens_class.register()`. Its file holds the parameters by their own names, W_enc as above.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from csae.contextual_sae import ContextualSAE
from csae.errors import UserError
from csae.files import read_json
from csae.interop.places import for_sae_lens, hook_of
from csae.interop.source import find, read_tensors, record, trained_on, write
from csae.interop.weights import (
    DTYPES,
    Weights,
    check_dtypes,
    check_names,
    topk_sae,
    topk_weights,
    unscaled,
    with_tensors,
)
from csae.sae import SAE
from csae.topk_sae import TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT = "6.54.0"  # the version of SAELens whose files these are
CONTEXTUAL = "csae_contextual"

# What a TopKSAE does, by SAELens's fields; a file that is without them means the same.
NEEDED = {"normalize_activations": "none", "reshape_activations": "none", "finetuning_scaling_factor": False}


def load(name: str | Path) -> TopKSAE | ContextualSAE:
    """What `SAE.load_from_disk` or `TrainingSAE.load_from_disk` reads, as an SAE of ours. See `csae.interop.load`."""
    config_file = find(name, CONFIG)
    config = _as_of_version_6(config_file, read_json(config_file))
    architecture = config.get("architecture")
    if architecture not in ("topk", CONTEXTUAL):
        raise UserError(f"{config_file}: architecture is {architecture!r}; needed 'topk' or {CONTEXTUAL!r}")
    for field, needed in NEEDED.items():
        if config.get(field, needed) != needed:
            foldable = config[field] == "expected_average_only_in"
            advice = ": call fold_activation_norm_scaling_factor in SAELens first" if foldable else ""
            raise UserError(f"{config_file}: {field} is {config[field]!r}; needed {needed!r}{advice}")
    path = find(name, WEIGHTS)
    tensors = _read_as(path, config.get("dtype", "float32"))
    sae: TopKSAE | ContextualSAE
    if architecture == CONTEXTUAL:
        sae = _contextual_sae(path, config, tensors)
    else:
        check_names(path, tensors, Weights._fields)
        weights = Weights(**tensors)
        weights = weights._replace(W_enc=_transposed(weights.W_enc))
        sae = topk_sae(path, _folded(weights, config), config.get("k", 100))
    metadata = _object(config_file, config, "metadata")
    sae.trained_on = trained_on(metadata, {**config, **metadata}, config_file)  # before version 6 the config was flat
    return sae


def save(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """What `SAE.load_from_disk` loads. See `csae.interop.save`."""
    if sae.is_transcoder:
        raise UserError("sae: given a transcoder; needed an SAE without d_out: SAELens has no TopK transcoder")
    if isinstance(sae, ContextualSAE):
        tensors = contextual_tensors(unscaled(sae))
        config = {**sae.config, "architecture": CONTEXTUAL}
    else:
        weights = topk_weights(sae, "SAELens")
        tensors = weights._replace(W_enc=weights.W_enc.T.contiguous())._asdict()
        sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k}
        config = {"architecture": "topk", **sizes, "rescale_acts_by_decoder_norm": False}
    on = sae.trained_on
    names: dict[str, Any] = {}
    if on is not None:
        known = {"model_name": on.model, "context_size": on.n_ctx, "prepend_bos": on.bos}
        names = {name: value for name, value in known.items() if value is not None}
    hook = hook_of(sae)
    if hook is not None and "hook_name" not in metadata:
        names |= for_sae_lens(hook)
    metadata = names | metadata | record(sae)
    config |= {
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**metadata, "sae_lens_version": FORMAT, "sae_lens_training_version": None},
    }
    write(folder, WEIGHTS, lambda path: save_file(tensors, path), CONFIG, config)


def contextual_tensors(sae: SAE) -> dict[str, Tensor]:
    """The parameters of a contextual SAE with a scale of one, as the file holds them."""
    tensors = {name: parameter.detach().cpu() for name, parameter in sae.named_parameters()}
    return {name: (tensor.T if name == "W_enc" else tensor).contiguous() for name, tensor in tensors.items()}


def _contextual_sae(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> ContextualSAE:
    tensors = {name: _transposed(tensor) if name == "W_enc" else tensor for name, tensor in tensors.items()}
    names = ("d_in", "d_sae", "k", "n_heads", "d_head", "d_value", "d_memory", "k_mem", "query", "sweeps")
    options = {name: config[name] for name in (*names, "k_aux", "aux_coef", "dead_after") if name in config}
    try:
        with torch.device("meta"):
            sae = ContextualSAE(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path.parent / CONFIG}: not a contextual SAE: {error}") from error
    check_names(path, tensors, dict(sae.named_parameters()))
    for name, parameter in sae.named_parameters():
        if tensors[name].shape != parameter.shape:
            raise UserError(f"{path}: {name} has shape {list(tensors[name].shape)}; needed {list(parameter.shape)}")
    return with_tensors(sae, tensors)


def _transposed(W_enc: Tensor) -> Tensor:
    return W_enc.mT if W_enc.dim() == 2 else W_enc  # the check of shapes reports it


def _as_of_version_6(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config of SAELens before 6.0, where top-k was an activation function, as SAELens 6 takes it."""
    version = _object(path, config, "metadata").get("sae_lens_version") or config.get("sae_lens_version")
    major = str(version).partition(".")[0]
    if major.isdigit() and int(major) >= 6:
        return config
    config = dict(config)
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":
        config["architecture"] = "topk"
        config["k"] = _object(path, config, "activation_fn_kwargs").get("k")
    normalize = config.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        config["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    if "hook_z" in str(config.get("hook_name", config.get("hook_point"))):
        config.setdefault("reshape_activations", "hook_z")
    return config


def _object(path: Path, config: dict[str, Any], field: str) -> dict[str, Any]:
    content = config.get(field) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: {field} is {content!r}; needed an object, or nothing")
    return content


def _read_as(path: Path, dtype: object) -> dict[str, Tensor]:
    """The tensors of a file in the dtype that the config names, as SAELens converts them."""
    known = {str(kind).removeprefix("torch."): kind for kind in DTYPES}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UserError(f"{path.parent / CONFIG}: dtype is {dtype!r}; needed one of {', '.join(known)}")
    tensors = read_tensors(path)
    # Old files hold a finetuned scale, of ones where there was none.
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]
    check_dtypes(path, tensors.values())
    return {key: tensor.to(known[name]) for key, tensor in tensors.items()}


def _folded(weights: Weights, config: dict[str, Any]) -> Weights:
    """The weights without the two fields that a TopKSAE hasn't; where they fold, half precision becomes float32."""
    subtracts_b_dec = config.get("apply_b_dec_to_input", True)
    rescales = config.get("rescale_acts_by_decoder_norm", False)
    if subtracts_b_dec and not rescales:
        return weights
    wide = torch.promote_types(weights.W_enc.dtype, torch.float32)
    W_enc, b_enc, W_dec, b_dec = (tensor.to(wide) for tensor in weights)
    if not subtracts_b_dec:
        b_enc = b_enc + W_enc @ b_dec
    if rescales:
        norms = W_dec.norm(dim=1).clamp_min(1e-8)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    return Weights(W_enc, b_enc, W_dec, b_dec)
