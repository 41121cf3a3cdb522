"""Where an SAE reads, in the words of other libraries.

    ours                resid.out:11 (layer 12)       mlp.out:11                attn.out:11
    SAELens             blocks.11.hook_resid_post     blocks.11.hook_mlp_out    blocks.11.hook_attn_out
    sparsify, delphi    layers.11                     layers.11.mlp             layers.11.self_attn
    dictionary_learning resid_post_layer_11           mlp_out_layer_11          attn_out_layer_11

The names of modules are the model's own, from below the part that holds its blocks: `csae.export.places` reads them off
the model. What is here goes by our names alone.
"""

from __future__ import annotations

import re
from typing import Any

from csae.data.places import SHORT_FORM, layer_of, our_name
from csae.errors import UserError
from csae.sae import SAE

ADVICE = "give metadata with the hook_name that you mean"
OF_MODULES = {"model_class_name": "AutoModelForCausalLM"}
"""what SAELens needs beside a hook_name that is the path of a module of transformers"""


def hook_of(sae: SAE) -> str | None:
    """The hook point that an SAE reads, as it was trained; None where it is not known."""
    place = None if sae.trained_on is None else sae.trained_on.at()
    return None if place is None else our_name(place.hook)


def for_sae_lens(hook: str) -> dict[str, Any]:
    """hook_name, and what goes with it; nothing for a name that somebody gave to activations of their own.

    Raises UserError where SAELens has no name for the place.
    """
    found = SHORT_FORM.fullmatch(hook)
    if found and found[1] == "resid":
        return {"hook_name": f"blocks.{found[3]}.hook_resid_{'post' if found[2] == 'out' else 'pre'}"}
    if found and found[2] == "out":
        return {"hook_name": f"blocks.{found[3]}.hook_{found[1]}_out"}
    if found or hook.endswith(".in"):
        raise UserError(f"{hook}: SAELens has no name for what a module is given: {ADVICE}")
    if re.fullmatch(r"blocks\.\d+\..+", hook):  # TransformerLens's own
        return {"hook_name": hook}
    return {"hook_name": hook, **OF_MODULES} if re.search(r"\.\d+\.", f"{hook}.") else {}


def for_dictionary_learning(hook: str) -> dict[str, Any]:
    """layer and submodule_name; the names that its own scripts use."""
    found = SHORT_FORM.fullmatch(hook)
    if not found:
        return {"submodule_name": hook}
    layer = layer_of(hook)
    kind = "resid_post" if layer is not None else f"{found[1]}_{found[2]}"
    return {"layer": int(found[3]), "submodule_name": f"{kind}_layer_{found[3]}"}
