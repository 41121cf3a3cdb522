"""Where an SAE reads, in the words of other libraries, as the model at hand has it (`csae.interop.places`)."""

from __future__ import annotations

from typing import Any

from csae.data.hook_points import HookPoint
from csae.data.language_model import LanguageModel
from csae.errors import UserError
from csae.interop.places import OF_MODULES, hook_of
from csae.sae import SAE


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
    return {"hook_name": point.path, **OF_MODULES}
