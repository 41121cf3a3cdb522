"""Where an SAE reads, in the words of the libraries that it is exported to.

    ours                resid.out:11 (layer 12)       mlp.out:11                attn.out:11
    SAELens             blocks.11.hook_resid_post     blocks.11.hook_mlp_out    blocks.11.hook_attn_out
    sparsify, delphi    layers.11                     layers.11.mlp             layers.11.self_attn
    dictionary_learning resid_post_layer_11           mlp_out_layer_11          attn_out_layer_11

The names of modules are the model's own, from below the part that holds its blocks.
"""

from __future__ import annotations

from typing import Any

from csae.data.hook_points import HookPoint
from csae.data.language_model import LanguageModel
from csae.data.places import SHORT_FORM, layer_of
from csae.errors import UserError
from csae.sae import SAE


def hook_of(sae: SAE) -> str | None:
    """The hook point that an SAE reads, as it was trained; None where it is not known."""
    place = None if sae.trained_on is None else sae.trained_on.at()
    return None if place is None else place.hook


def needed_hook(sae: SAE) -> str:
    """As `hook_of`. Raises UserError where it is not known."""
    hook = hook_of(sae)
    if hook is None:
        raise UserError("the SAE does not say which layer or hook point it was trained on, which this export names")
    return hook


def module_path(lm: LanguageModel, point: HookPoint) -> str:
    """The path of a hook point's module in the model that sparsify and delphi load, which has no head: layers.11."""
    prefix = getattr(lm.model, "base_model_prefix", "")
    return point.path.removeprefix(f"{prefix}.") if prefix else point.path


def for_sae_lens(lm: LanguageModel, hook: str) -> dict[str, Any]:
    """hook_name, in the words of TransformerLens, or else of transformers, where SAELens can read there."""
    point = lm.hook(hook)
    name = lm.hook_points.others_name(point)
    if name is not None:
        return {"hook_name": name}
    if point.side == "in":
        raise UserError(
            f"{hook}: SAELens has no name for what {point.path} is given: use `csae.interop.save` with the hook_name "
            "that you mean"
        )
    return {"hook_name": point.path, "model_class_name": "AutoModelForCausalLM"}


def for_dictionary_learning(hook: str) -> dict[str, Any]:
    """layer and submodule_name; the names that its own scripts use."""
    found = SHORT_FORM.fullmatch(hook)
    if not found:
        return {"submodule_name": hook}
    layer = layer_of(hook)
    kind = "resid_post" if layer is not None else f"{found[1]}_{found[2]}"
    return {"layer": int(found[3]), "submodule_name": f"{kind}_layer_{found[3]}"}
