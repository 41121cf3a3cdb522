"""Options that several commands take, and what they say together."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from csae.data.places import name_of_layer
from csae.errors import UserError

MODEL = click.option("--model", help="Language model: a Hugging Face id, a folder, or a .gguf file.")
LAYER = click.option("--layer", type=int, help="Read the residual stream after this many blocks.")
AT = "a hook point of the model: resid.out:11 (--layer 12), mlp.in:11, mlp.out:11, attn.out:11, or a module by its path"
TEXT = click.option("--text", type=click.Path(), help="A text file, or a folder of *.txt, *.md, *.rst.")
N_CTX = click.option(
    "--n-ctx", type=click.IntRange(2), help="Positions a window; 256 if not given, or those of --activations."
)
BOS = click.option(
    "--bos/--no-bos",
    default=None,
    help="Begin each window with a beginning of sequence; as the tokenizer does if not given.",
)
KEEP_FIRST = click.option(
    "--keep-first/--no-keep-first",
    default=None,
    help="Keep position 0 and outliers, which are left out as attention sinks: for what has none, such as images.",
)
ACTIVATIONS = click.option("--activations", type=click.Path(), help="A folder of activation shards instead of a model.")
ELSEWHERE = click.option("--elsewhere", is_flag=True, help="Even where the SAE was trained on another model or layer.")
DEVICE = click.option("--device", help="cuda or cpu; cuda where there is one, if not given.")
LONG = 7 * 24 * 3600.0  # seconds: of commands whose ranks meet only where they begin and end
TIMEOUT = click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Under torchrun: seconds after which a process gives up that waits for another one.",
)


class Numbers(click.ParamType):
    """Whole numbers with commas between them; in a file of options also a list."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        try:
            if any(isinstance(part, bool) or (isinstance(part, float) and not part.is_integer()) for part in parts):
                raise ValueError
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"given {value!r}; needed whole numbers with commas between them, such as 256,1024", param, ctx)


def DATASET(command: Any) -> Any:
    """--dataset, and how it is read."""
    options = [
        click.option(
            "--dataset",
            help="Text or token ids (input_ids): a file or folder of JSON Lines, Parquet or plain text, a folder of "
            "`datasets`, or a hub id, with :CONFIG behind it where it has several.",
        ),
        click.option("--text-column", help="The column of a data set's text; text if not given, or messages (--chat)."),
        click.option(
            "--chat", is_flag=True, default=None, help="Apply the model's chat template to a column messages."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def options_of(config: type, *names: str, several: bool = False) -> Callable[[Any], Any]:
    """The options that fill these fields of a dataclass of `csae.config`, in this order; several: with many values."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    kinds = typing.get_type_hints(config)

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            field, kind = fields[name], (typing.get_args(kinds[name]) or [kinds[name]])[0]  # int | None: int
            choices = field.metadata["choices"]
            how: dict[str, Any] = {"type": click.Choice(choices) if choices else kind}
            if kind is bool:
                how = {"is_flag": True}
            elif typing.get_origin(kinds[name]) is tuple:
                how = {"type": Numbers(), "default": ()}
            elif field.default is not None:
                how |= {"default": [field.default] if several else field.default, "show_default": True}
            if several:
                how |= {"multiple": True}
            command = click.option(f"--{name.replace('_', '-')}", help=field.metadata["help"], **how)(command)
        return command

    return decorate


def place_options(several: bool = False) -> Callable[[Any], Any]:
    """--layer, --hook, --from and --to: where activations are read; with `several`, more than one place."""
    more = " May be repeated." if several else ""
    pattern = " May be repeated, and hold *." if several else ""
    options = [
        click.option(
            "--layer",
            type=int,
            multiple=several,
            help=f"Read the residual stream after this many blocks: 12 is --hook resid.out:11.{more}",
        ),
        click.option("--hook", multiple=several, help=f"Read {AT}; `csae hooks MODEL` lists them.{pattern}"),
        click.option("--from", "hook_from", help="A transcoder: the hook point that it reads."),
        click.option("--to", "hook_to", help="A transcoder: the hook point that it predicts."),
    ]

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def place_of(options: dict[str, Any]) -> dict[str, Any]:
    """What --layer, --hook, --from and --to say, as `open_source` takes it. Raises UserError where they disagree."""
    layers, hooks = (
        [] if given is None else list(given) if isinstance(given, tuple) else [given]
        for given in (options.get("layer"), options.get("hook"))
    )
    from_, to = options.get("hook_from"), options.get("hook_to")
    if (from_ is None) != (to is None):
        raise UserError("--from, --to: given one without the other; a transcoder needs both, an SAE has --hook")
    if from_ is not None and (layers or hooks):
        raise UserError("--from and --to: given with --layer or --hook; needed either a transcoder's or an SAE's")
    if from_ is not None:
        return {"hook": from_, "hook_to": to}
    if len(layers) + len(hooks) > 1:
        if not isinstance(options.get("hook"), tuple):
            raise UserError("--layer, --hook: both given; needed one of them")
        if min(layers, default=1) < 1:
            raise UserError(f"--layer: given {min(layers)}; needed 1 or more")
        return {"hooks": [*map(name_of_layer, layers), *hooks]}
    return {"layer": layers[0]} if layers else {"hook": hooks[0]} if hooks else {}


def origin_of(options: dict[str, Any], trained_on: dict[str, Any] | None = None) -> dict[str, Any]:
    """Where activations come from, for `open_source`, with absolute paths, since the run keeps it.

    trained_on: of a run: its bos and keep_first are the defaults. Without a run the tokenizer decides.
    """
    origin = given_of(options)
    for name in ("bos", "keep_first"):
        if name not in origin and trained_on:
            origin[name] = bool(trained_on.get(name))
    if "activations" not in origin:
        origin.setdefault("n_ctx", 256)
    return {"bos": None} | origin


def given_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, of those that `open_source` takes, with absolute paths."""
    of_text = ("text", "dataset", "text_column", "chat", "n_ctx", "max_tokens", "bos")
    names = ("activations", "model", *of_text, "keep_first")
    given = {name: options[name] for name in names if options.get(name) is not None} | place_of(options)
    if "activations" in given and "bos" in given:
        raise UserError("--bos, --no-bos: given with --activations, which are as they were made; needed with a text")
    for name in ("text_column", "chat"):
        if name in given and "dataset" not in given:
            raise UserError(f"--{name.replace('_', '-')}: given without --dataset; needed with one")
    for name in ("text", "dataset", "max_tokens"):
        if "activations" in given and name in given:
            raise UserError(f"--activations, --{name.replace('_', '-')}: both given; needed one of them")
    for name in ("activations", "text", "model", "dataset"):
        if name in given and (name in ("activations", "text") or Path(given[name]).exists()):
            given[name] = str(Path(given[name]).resolve())
    return given


def device_of(name: str | None, option: str = "--device") -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{option}: given {name!r}; it can't be used here: give cpu") from error
    return name
