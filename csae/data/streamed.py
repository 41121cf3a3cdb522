"""The activations of a data set that is streamed, for `csae cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from csae.data.activations import ActivationSource, ModelActivations
from csae.data.cache import windows_that_fit
from csae.data.kept_text import keep_windows, map_kept
from csae.data.places import Place
from csae.data.raw_text import open_stream
from csae.data.sources import asked_places, open_model
from csae.distributed.hosts import Hosts
from csae.distributed.ranks import Ranks
from csae.errors import UserError
from csae.progress import Progress, quiet


def open_streamed(
    origin: dict[str, Any],
    folder: Path,
    dtype: torch.dtype,
    max_bytes: int | None = None,
    device: str | None = None,
    progress: Progress = quiet,
    ranks: Ranks | None = None,
) -> ActivationSource:
    """The windows of a data set, in its order: as many as `origin`'s max_tokens says, or as fit in max_bytes.

    origin: as `csae.data.sources.open_source` takes it, with a data set. The windows are kept in `folder`, where their
    activations of this dtype are to be cached, until `csae.data.kept_text.remove_kept`. ranks: all call this; rank 0
    reads the data set. Raises UserError where it is endless, as far as is known, and nothing bounds it.
    """
    if max_bytes is None and origin.get("max_tokens") is None and not Path(origin["dataset"]).exists():
        raise UserError(
            "--max-tokens, --max-bytes: not given; needed one of them with a data set of the hub, which is streamed "
            "(--no-stream reads it whole)"
        )
    lm = open_model(origin["model"], device, None, origin.get("lm_dtype"), progress)
    asked = asked_places(origin)
    places = [place for one in asked for place in lm.hook_points.places(*(one if isinstance(one, Place) else (one,)))]
    stream = open_stream(origin, lm)
    max_tokens, n_ctx = origin.get("max_tokens"), origin["n_ctx"]
    bounds = []
    if max_tokens is not None:
        bounds.append(max_tokens // (n_ctx - len(stream.begin)))
        if not bounds[0]:
            raise UserError(f"--max-tokens: given {max_tokens}; needed at least one window of {n_ctx}")
    if max_bytes is not None:
        widths = [lm.hook(place.hook).width for place in dict.fromkeys(places)]
        bounds.append(max(1, windows_that_fit(max_bytes, widths, n_ctx, dtype)))
    Hosts(ranks).from_first(lambda: keep_windows(folder, stream, min(bounds, default=None), progress))
    windows = map_kept(folder, stream.begin)
    return ModelActivations(lm, places, windows, keep_first=bool(origin.get("keep_first")))
