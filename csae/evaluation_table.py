"""The figures of `csae.evaluate` as a table for a terminal, and in words what they are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from csae.errors import shown
from csae.trained_on import TrainedOn

if TYPE_CHECKING:
    from rich.table import Table


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A row for each SAE, and for a contextual one a second row for the form in sweeps.

    results: as `evaluate` or `csae.evaluate_run` gives them; where there is a key `name`, it is shown instead of arch.
    Below it stands what was evaluated on.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    with_lm = any("ce_sae" in result for result in results)
    headers = ["SAE", "k", "d_sae", "params", "FVU", "L0", "dead", "cosine", "eval\ntokens/s"]
    rows = Table(box=box.SIMPLE_HEAD, padding=0, caption=Text(_evaluated_on(results)), caption_justify="left")
    for header in headers + (["CE", "loss\nrecovered"] if with_lm else []):
        # Where a terminal is narrow, a name breaks and keeps its end, which may be all that differs; a figure doesn't.
        if header == "SAE":
            rows.add_column(header, overflow="fold", min_width=11)
        else:
            rows.add_column(header, justify="right", no_wrap=True)
    for result in results:
        contextual = "fvu_sweeps" in result
        for form in ["", "_sweeps"] if contextual else [""]:
            name = shown(result.get("name", result["arch"]))
            if contextual:
                name += f", {result['sweeps']} sweeps" if form else ", exact"
            row = [
                escape(name),
                str(result["k"]),
                str(result["d_sae"]),
                f"{result['n_params'] / 1e6:.2f}M",
                f"{result['fvu' + form]:.4f}",
                f"{result['l0' + form]:.1f}",
                f"{result['dead']:.1%}",
                f"{result['cosine' + form]:.4f}",
                f"{result['tokens_per_s' + form]:,.0f}",
            ]
            if with_lm:
                recovered = result.get("loss_recovered" + form)
                row.append(f"{result['ce_sae' + form]:.3f}" if "ce_sae" in result else "-")
                row.append("-" if recovered is None else f"{recovered:.1%}")
            rows.add_row(*row)
    return rows


def _evaluated_on(results: Sequence[dict[str, Any]]) -> str:
    """What each SAE was evaluated on, once where it is the same for all."""
    said = [data_in_words(result) for result in results]
    if len(set(said)) <= 1:
        return said[0] if said else ""
    names = [shown(result.get("name", result["arch"])) for result in results]
    return "\n".join(f"{name}: {what}" for name, what in zip(names, said, strict=True))


def data_in_words(result: dict[str, Any]) -> str:
    """On which windows of what an SAE was evaluated, from its figures."""
    count, trained, left_out = result["windows"], result.get("trained_windows"), result.get("left_out_windows")
    which = {"held out": "held-out windows", "not trained on": "windows that it did not train on"}
    said = f"on {count} {which.get(result.get('which', ''), 'windows')} of {result.get('data') or 'activations'}"
    of = TrainedOn(model=result.get("model"), layer=result.get("layer"), hook=result.get("hook"))
    if of.model is not None or of.layer is not None:
        said += f", {dataclasses.replace(of, hook_to=result.get('hook_to')).place()}"
    if trained:
        said += f"; {trained} of them are windows that it trained on"
    if left_out:
        said += f"; {left_out} that it trained on were left out"
    if result.get("which") == "unknown":
        said += "; which it trained on can't be told"
    return said
