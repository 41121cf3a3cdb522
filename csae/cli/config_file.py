"""`csae train --config FILE`: options in YAML or TOML, by their names; and the file that each run keeps of its own.

Options of the command line win. What may be given several times may be a list.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from csae.cli.no_effect import OF_LOOK_BACK, OF_STREAM
from csae.cli.options import Numbers
from csae.data.places import PLACE_KEYS
from csae.errors import UserError, first_line, shown
from csae.files import reading
from csae.versions import pip_install

PLACE = ("layer", "hook", "hook_from", "hook_to")
# Where a run lies, and on which devices, is not part of what it is.
NOT_KEPT = ("out", "config", "device", "lm_device", "timeout", "data_ranks")


def read_config(file: Path, names: dict[str, str]) -> dict[str, Any]:
    """The options in a file, by the names that click has for them. names: those, by the names in the file.

    Raises UserError where it can't be read, is neither YAML nor TOML, or has a key that is no option.
    """
    with reading(file):
        content = file.read_bytes()
    try:
        if file.suffix == ".toml":
            found: Any = tomllib.loads(content.decode())
        else:
            try:
                import yaml
            except ImportError as error:
                raise UserError(f"reading {file} needs PyYAML: {pip_install('cli')}") from error
            found = yaml.load(content, _loader(yaml))
    except UserError:
        raise
    except Exception as error:
        kind = "TOML" if file.suffix == ".toml" else "YAML"
        raise UserError(f"{file}: not {kind} ({' '.join(first_line(error).split())})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: needed options and their values, such as `k: 32`")
    by_key = {str(key).replace("-", "_"): value for key, value in found.items()}
    if len(by_key) < len(found):
        raise UserError(f"{file}: an option is given both with - and with _: leave one of them out")
    unknown = sorted(key for key in by_key if key not in names)
    if unknown:
        raise UserError(
            f"{file}: {shown(', '.join(unknown))}: no option of csae train; needed some of {', '.join(sorted(names))}"
        )
    return {names[key]: value for key, value in by_key.items() if value is not None}


def _loader(yaml: Any) -> Any:
    """PyYAML's safe loader, but for keys that are given twice: it takes the last one and says nothing."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ValueError(f"{shown(twice)} is given twice")
            return super().construct_mapping(node, deep)

    return Loader


def _check_values(file: Path, name: str, of: click.Parameter, values: list[Any]) -> None:
    """Raises UserError where click would take a value for another one, or end in an error of its own."""
    needed = "one value or more" if isinstance(of, click.Option) and of.multiple else "one value"
    if not values or any(value is None or isinstance(value, (list, dict)) for value in values):
        given = values[0] if len(values) == 1 else values
        raise UserError(f"{file}: {name}: given {shown(given)[:60]}; needed {needed}")
    for value in values:
        whole = not isinstance(value, float) or value.is_integer()
        if isinstance(of.type, click.types.IntParamType) and (isinstance(value, bool) or not whole):
            raise UserError(f"{file}: {name}: given {shown(value)}; needed a whole number")
        if isinstance(of.type, click.types.FloatParamType) and isinstance(value, bool):
            raise UserError(f"{file}: {name}: given {shown(value)}; needed a number")


def _take(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    if file is None:
        return None
    options = [of for of in context.command.params if of.name not in ("out", "config")]
    # --from is `hook_from` in the code, and `from` in a file.
    names = {max(of.opts, key=len).lstrip("-").replace("-", "_"): str(of.name) for of in options}
    found = read_config(file, names)
    in_file = {name: key for key, name in names.items()}
    for of in options:
        if of.name not in found:
            continue
        value = found[of.name]
        several = isinstance(of, click.Option) and of.multiple
        if isinstance(of.type, Numbers):
            continue  # it takes a list as one value, and checks it
        values = value if several and isinstance(value, list) else [value]
        _check_values(file, in_file[of.name], of, values)
        found[of.name] = values if several else value
    context.default_map = {**(context.default_map or {}), **found}
    return file


def place_of_the_command_line(context: click.Context) -> dict[str, Any]:
    """The options of a place in the file, emptied, where the command line gives a place: it wins as a whole."""
    by = {of.name: context.get_parameter_source(str(of.name)) for of in context.command.params if of.name in PLACE}
    if click.core.ParameterSource.COMMANDLINE not in by.values():
        return {}
    in_file = [name for name, source in by.items() if source is click.core.ParameterSource.DEFAULT_MAP]
    return {str(name): () if isinstance(context.params[str(name)], tuple) else None for name in in_file}


CONFIG_FILE = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    callback=_take,
    help="Options from a YAML or TOML file, such as the config.yaml of a run; others win.",
)


def config_of(
    context: click.Context, origin: dict[str, Any], varied: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """What config.yaml of a run holds: the options by their names in a file, as they are for this SAE.

    origin: of its activations, as run.json has it. varied: options that were given several times.
    """
    asked = {**options, **varied}
    for name in ("activations", "model", "text", "dataset", "lm_dtype", "layer", "hook", "hook_from", "hook_to"):
        asked[name] = None
    asked |= {name: value for name, value in origin.items() if name not in PLACE_KEYS and name in asked}
    if origin.get("hook_to") is not None:
        asked |= {"hook_from": origin.get("hook"), "hook_to": origin["hook_to"]}
    else:
        asked |= {name: origin.get(name) for name in ("layer", "hook")}
    if "activations" in origin:
        asked["lm_dtype"] = None
    left_out = (*NOT_KEPT, *(OF_LOOK_BACK if asked["arch"] == "topk" else ()))
    left_out += () if origin.get("stream") else OF_STREAM
    kept = {}
    for of in context.command.params:
        value = asked.get(str(of.name))
        if of.name not in left_out and value not in (None, (), []):
            kept[max(of.opts, key=len).lstrip("-").replace("-", "_")] = (
                list(value) if isinstance(value, tuple) else value
            )
    return kept
