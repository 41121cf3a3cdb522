"""Options that would be ignored beside others: refused where they are given, so that nobody counts on them."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.core import ParameterSource

from csae.errors import UserError, shown
from csae.progress import say

OF_LOOK_BACK = (
    *("heads", "d_head", "d_value", "d_memory", "k_mem", "query", "sweeps"),
    *("look_back_lr", "early_sweeps", "exact_from", "gap_every"),
)
OF_STREAM = ("workers", "shuffle_buffer")


def check_effect(context: click.Context, names: Iterable[str], why: str) -> None:
    """Raises UserError where one of these options is on the command line. why: "with ..., which ...".

    In a file, which may be of a run of an earlier version, another value than the default one is told.
    """
    for option in context.command.params:
        if option.name not in names:
            continue
        source, name = context.get_parameter_source(option.name), max(option.opts, key=len)
        if source is ParameterSource.COMMANDLINE:
            raise UserError(f"{name}: given {why}: it has no effect there, leave it out")
        if source is ParameterSource.DEFAULT_MAP and context.params[option.name] != _default(option):
            say(f"{shown(context.params.get('config'))}: {name.lstrip('-')}: given {why}: it has no effect there")


def _default(option: click.Parameter) -> object:
    """The default value as a command gets it."""
    several = isinstance(option, click.Option) and option.multiple
    return tuple(option.default or ()) if several else option.default  # type: ignore[arg-type]
