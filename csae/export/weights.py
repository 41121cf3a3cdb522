"""The weights of an SAE in another library's files (`csae.interop`), at the place that the run says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from csae import interop
from csae.contextual_sae import ContextualSAE
from csae.data.language_model import LanguageModel
from csae.data.places import layer_of
from csae.errors import UserError
from csae.export.places import for_sae_lens, module_path, needed_hook
from csae.files import filled
from csae.interop.places import hook_of
from csae.sae import SAE

LIBRARIES = interop.LIBRARIES


def export_weights(sae: SAE, to: str, folder: Path, model: Callable[[], LanguageModel]) -> Path:
    """Writes a folder that the library's own loader reads, and gives it. `model` is called where its names are needed.

    Raises UserError where the library can't express the SAE.
    """
    if sae.is_transcoder and to != "sparsify":
        raise UserError(
            f"--to {to}: it has no class for this kind of transcoder; export its feature activations to neuronpedia or "
            "delphi, or one without look-back to sparsify"
        )
    if isinstance(sae, ContextualSAE) and to != "sae_lens":
        raise UserError(
            f"--to {to}: it runs each token by itself, and this SAE looks back: what it carries would be lost; "
            "export it to sae_lens, or its feature activations to neuronpedia or delphi"
        )
    if to == "sparsify":
        folder = folder / _sparsify_name(sae, model())
        with filled(folder) as working:
            interop.save(to, sae, working)
        return folder
    hook, metadata = hook_of(sae), {}
    if hook is not None and to == "sae_lens" and layer_of(hook) is None:
        metadata = for_sae_lens(model(), hook)  # as the model has it
    with filled(folder) as working:
        interop.save(to, sae, working, metadata, elsewhere=True)  # the place is the run's own, in other words
    return folder


def _sparsify_name(sae: SAE, lm: LanguageModel) -> str:
    """The hook point in sparsify's words: the module whose output an SAE reads, or that a transcoder stands for."""
    point = lm.hook(needed_hook(sae))
    to = None if sae.trained_on is None else sae.trained_on.hook_to
    if to is None and point.side == "in":
        raise UserError(f"--to sparsify: it reads what a module gives, and {point.name} is what one is given")
    if to is not None:
        target = lm.hook(to)
        if (point.side, target.side, point.path) != ("in", "out", target.path):
            raise UserError(
                f"--to sparsify: its transcoders read what a module is given and predict what it gives; this one reads "
                f"{point.name} and predicts {target.name}"
            )
    return module_path(lm, point)
