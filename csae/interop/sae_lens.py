"""SAEs of SAELens 6: cfg.json and sae_weights.safetensors in a folder; trained ones and checkpoints of training.

    feature_acts = relu(topk((x - b_dec) W_enc + b_enc, k))
    x_hat        = feature_acts W_dec + b_dec           W_enc: [d_in, d_sae], W_dec: [d_sae, d_in]

which is `TopKSAE`; of architecture "jumprelu" with a threshold [d_sae], one with selection="jumprelu". SAELens saves
its trained BatchTopK SAEs so too, with the same threshold for all features; their checkpoints ("batchtopk",
"matryoshka_batchtopk") hold one, and become selection="batch". Of ours, that is written as jumprelu.

Three fields of the config are not as in ours. `rescale_acts_by_decoder_norm` selects by activation times
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
    Asked,
    Weights,
    check_dtypes,
    check_names,
    selection_record,
    subtracting_b_dec,
    threshold_sae,
    topk_sae,
    unscaled,
    weights_and_threshold,
    with_tensors,
)
from csae.sae import SAE
from csae.topk_sae import TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT = "6.54.0"  # the version of SAELens whose files these are
CONTEXTUAL = "csae_contextual"

# What a TopKSAE does, by SAELens's fields; a file that is without them means the same.
THRESHOLDS = {"jumprelu": "threshold", "batchtopk": "topk_threshold", "matryoshka_batchtopk": "topk_threshold"}
NEEDED = {"normalize_activations": "none", "reshape_activations": "none", "finetuning_scaling_factor": False}


def load(name: str | Path, asked: Asked) -> TopKSAE | ContextualSAE:
    """What `SAE.load_from_disk` or `TrainingSAE.load_from_disk` reads, as an SAE of ours. See `csae.interop.load`."""
    config_file = find(name, CONFIG)
    config = _as_of_version_6(config_file, read_json(config_file))
    architecture = config.get("architecture")
    if architecture not in ("topk", CONTEXTUAL, *THRESHOLDS):
        wanted = ", ".join(map(repr, ("topk", CONTEXTUAL, *THRESHOLDS)))
        raise UserError(f"{config_file}: architecture is {architecture!r}; needed one of {wanted}")
    for field, needed in NEEDED.items():
        if config.get(field, needed) != needed:
            foldable = config[field] == "expected_average_only_in"
            advice = ": call fold_activation_norm_scaling_factor in SAELens first" if foldable else ""
            raise UserError(f"{config_file}: {field} is {config[field]!r}; needed {needed!r}{advice}")
    path = find(name, WEIGHTS)
    tensors = _read_as(path, config.get("dtype", "float32"))
    metadata = _object(config_file, config, "metadata")
    sae: TopKSAE | ContextualSAE
    if architecture == CONTEXTUAL:
        asked.nothing(path)
        sae = _contextual_sae(path, config, tensors)
    elif architecture == "topk":
        asked.nothing(path)
        check_names(path, tensors, Weights._fields)
        sae = topk_sae(path, _folded(path, _weights(tensors), config), config.get("k", 100))
    else:
        own = THRESHOLDS[architecture]
        check_names(path, tensors, (*Weights._fields, own))
        weights = _folded(path, _weights(tensors), config)
        widths = config.get("matryoshka_widths") or ()
        prefixes = tuple(width for width in widths if width != len(weights.b_enc))
        k = config.get("target_l0") if architecture == "jumprelu" else config.get("k", 100)
        sae = threshold_sae(path, weights, tensors[own], k, asked, metadata, prefixes)
    sae.trained_on = trained_on(metadata, {**config, **metadata}, config_file)  # before version 6 the config was flat
    return sae


def save(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """What `SAE.load_from_disk` loads. See `csae.interop.save`."""
    if sae.is_transcoder:
        raise UserError("sae: given a transcoder; needed an SAE without d_out: SAELens has no TopK transcoder")
    extra: dict[str, Any] = {}
    if isinstance(sae, ContextualSAE):
        tensors = contextual_tensors(unscaled(sae))
        config = {**sae.config, "architecture": CONTEXTUAL}
    else:
        weights, threshold = weights_and_threshold(sae, "SAELens")
        tensors = weights._replace(W_enc=weights.W_enc.T.contiguous())._asdict()
        config = {"architecture": "topk", "d_in": sae.d_in, "d_sae": sae.d_sae}
        if threshold is None:
            config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
        else:
            config |= {"architecture": "jumprelu"}
            extra = selection_record(sae)
            tensors["threshold"] = threshold.to(weights.b_enc.dtype).expand(sae.d_sae).contiguous()
    on = sae.trained_on
    names: dict[str, Any] = {}
    if on is not None:
        known = {"model_name": on.model, "context_size": on.n_ctx, "prepend_bos": on.bos}
        names = {name: value for name, value in known.items() if value is not None}
    hook = hook_of(sae)
    if hook is not None and "hook_name" not in metadata:
        names |= for_sae_lens(hook)
    metadata = names | metadata | record(sae) | extra
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
    """The parameters of a contextual SAE with a scale of one, and its threshold, as the file holds them."""
    tensors = {name: parameter.detach().cpu() for name, parameter in sae.named_parameters()}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold.detach().cpu()
    return {name: (tensor.T if name == "W_enc" else tensor).contiguous() for name, tensor in tensors.items()}


def _contextual_sae(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> ContextualSAE:
    tensors = {name: _transposed(tensor) if name == "W_enc" else tensor for name, tensor in tensors.items()}
    of_look_back = ("n_heads", "d_head", "d_value", "d_memory", "k_mem", "query", "sweeps")
    of_selection = ("k", "selection", "k_max", "l0_coef", "bandwidth", "prefixes")
    names = ("d_in", "d_sae", *of_selection, *of_look_back, "k_aux", "aux_coef", "dead_after")
    options = {name: config[name] for name in names if name in config}
    try:
        with torch.device("meta"):
            sae = ContextualSAE(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path.parent / CONFIG}: not a contextual SAE: {error}") from error
    own: dict[str, Tensor] = dict(sae.named_parameters())
    if sae.threshold is not None:
        own["threshold"] = sae.threshold
    check_names(path, tensors, own)
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(f"{path}: {name} has shape {list(tensors[name].shape)}; needed {list(parameter.shape)}")
    return with_tensors(sae, tensors)


def _weights(tensors: dict[str, Tensor]) -> Weights:
    weights = Weights(*(tensors[name] for name in Weights._fields))
    return weights._replace(W_enc=_transposed(weights.W_enc))


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
    check_dtypes(path, [tensor for name, tensor in tensors.items() if name not in THRESHOLDS.values()])
    return {key: tensor.to(known[name]) for key, tensor in tensors.items()}


def _folded(path: Path, weights: Weights, config: dict[str, Any]) -> Weights:
    """The weights without the two fields that a TopKSAE hasn't; where they fold, half precision becomes float32."""
    subtracts_b_dec = config.get("apply_b_dec_to_input", True)
    rescales = config.get("rescale_acts_by_decoder_norm", False)
    if not subtracts_b_dec:
        weights = subtracting_b_dec(path, weights)
    if not rescales:
        return weights
    wide = torch.promote_types(weights.W_enc.dtype, torch.float32)
    W_enc, b_enc, W_dec, b_dec = (tensor.to(wide) for tensor in weights)
    norms = W_dec.norm(dim=1).clamp_min(1e-8)
    return Weights(W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None], b_dec)
