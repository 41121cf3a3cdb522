"""`splice`: the modules around a hook point run inside a `Spliced` while a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csae.contextual_sae import ContextualSAE
from csae.data.blocks import Blocks, find_blocks
from csae.data.hook_points import HookPoints
from csae.data.language_model import LanguageModel
from csae.data.places import in_words
from csae.sae import SAE
from csae.splicing.edit import Edit
from csae.splicing.spliced import Spliced
from csae.splicing.wrapping import wrapped
from csae.trained_on import check_place

COMPILED = "splice: inside a compiled function; needed outside of one, around its call"


def _name(model: Any) -> str | None:
    """What a model of transformers was loaded from; None where that does not name one model."""
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    folder_of_gguf_files = Path(name).is_dir() and not (Path(name) / "config.json").is_file()
    return None if folder_of_gguf_files else name


@contextmanager
def splice(
    model: Any,
    layer: int | str,
    sae: SAE,
    edits: Sequence[Edit] = (),
    keep_error: bool = False,
    look_back: int | None = None,
    elsewhere: bool = False,
    to: str | None = None,
) -> Iterator[Spliced]:
    """Put an SAE's reconstruction in the place of what a language model has at a hook point, while the context lasts.

    Forward passes over whole texts and `generate` work, of the model and of its base model, with caches of any kind,
    beams, rejected tokens, and copies of a prompt's cache; a contextual SAE runs in its exact form. Position 0,
    attention sinks and padding stay as they are, as in training (`csae.data.activations.sink_mask`; with a cache,
    norms are compared with those of the first pass). So do positions where what a transcoder predicts is a sink. A
    cache must have been filled inside the splice, from the first token on. What is compiled runs uncompiled in it, and
    a copy of the model is one without it. No gradient goes through the SAE. The first splice of a model runs it once on
    a few tokens, to see what its blocks are, and at hook points other than streams once more (`csae.data.probe`).

    Args:
        model: a causal language model of transformers, or a `LanguageModel`.
        layer: the residual stream after this many blocks, from 1; or the name of a hook point
            (`csae.data.hook_points`).
        sae: of the width of what is there.
        edits: what to do to features.
        keep_error: add what the SAE misses, so that without edits the model's output stays what it was.
        look_back: how many positions a contextual SAE remembers; all if not given.
        elsewhere: put it in also at another model or place than it was trained on (`sae.trained_on`).
        to: of a transcoder: the hook point where its prediction is put in; what is at `layer` is only read.

    Yields a `Spliced`, whose `output` is what the SAE made of the last pass.

    Raises ValueError or TypeError where the model, the hook point, the width or an edit does not fit, where the SAE
    was trained on another model or place, and where what a pass goes on with, or what is text in it, can't be followed.
    Leaving it raises RuntimeError where the hook point was never reached, and warns where nothing was replaced.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(COMPILED)
    name = model.name if isinstance(model, LanguageModel) else _name(model)
    model = model.model if isinstance(model, LanguageModel) else model
    with ExitStack() as stack:
        # Code compiled before would skip the splice, and code compiled inside would keep it.
        try:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise RuntimeError(COMPILED) from error
        blocks, d_in = find_blocks(model, type(model).__name__)
        points = HookPoints(model, name or type(model).__name__, Blocks(blocks, d_in))
        if sae.is_transcoder != (to is not None):
            needed = "not given; needed with" if to is None else "given; needed only with"
            raise ValueError(f"to: {needed} a transcoder, which predicts another place than it reads")
        places = points.places(layer, to)
        if len(places) > 1:
            raise ValueError(f"layer: given {layer!r}, {len(places)} places; needed one")
        source, target = points.one(places[0].hook), points.one(places[0].to or places[0].hook)
        for point, width in ((source, sae.d_in), (target, sae.d_out)):
            if point.width != width:
                raise ValueError(f"sae: {width} wide; needed {point.width}, as wide as {in_words(point.name)}")
        check_place(sae.trained_on, name, None, source.name, elsewhere, places[0].to, points.one_name)
        if look_back is not None and look_back < 1:
            raise ValueError(f"look_back: given {look_back}; needed at least 1")
        for edit in edits:
            if not 0 <= edit.feature < sae.d_sae:
                raise ValueError(f"edits: feature {edit.feature}; needed 0 to {sae.d_sae - 1}")
            if edit.part == "carried" and not isinstance(sae, ContextualSAE):
                raise ValueError(
                    "edits: part 'carried' with a per-token SAE; it carries nothing: needed 'new' or 'both'"
                )
        spliced = Spliced(sae, edits, keep_error, look_back, source, source if to is None else target)
        read, replaced = (getattr(point.module, "_orig_mod", point.module) for point in (source, target))
        in_blocks = {module for block in blocks for module in block.modules()}
        for module in model.modules():
            if module in in_blocks or isinstance(module, nn.ModuleList) or hasattr(module, "_orig_mod"):
                continue
            parts = set(module.modules()) - {module}
            if read in parts or replaced in parts:
                stack.enter_context(wrapped(module, spliced.around))
        if to is not None:
            stack.enter_context(wrapped(read, spliced.at_source))
        stack.enter_context(wrapped(replaced, spliced.at_hook))
        if target.block is not None:
            block = blocks[target.block]
            stack.enter_context(wrapped(getattr(block, "_orig_mod", block), spliced.at_block))
        stack.callback(sae.train, sae.training)
        sae.eval()
        yield spliced
    spliced.check_used()
