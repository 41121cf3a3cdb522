"""`csae train --config FILE`: options in YAML or TOML, by their names; and the file that each run keeps of its own.

Options of the command line win. What may be given several times may be a list.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from csae.data.places import PLACE_KEYS
from csae.errors import UserError, first_line, shown
from csae.files import reading
from csae.versions import pip_install

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
            found = yaml.safe_load(content)
    except UserError:
        raise
    except Exception as error:
        kind = "TOML" if file.suffix == ".toml" else "YAML"
        raise UserError(f"{file}: not {kind} ({' '.join(first_line(error).split())})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: needed options and their values, such as `k: 32`")
    by_key = {str(key).replace("-", "_"): value for key, value in found.items()}
    unknown = sorted(key for key in by_key if key not in names)
    if unknown:
        raise UserError(
            f"{file}: {shown(', '.join(unknown))}: no option of csae train; needed some of {', '.join(sorted(names))}"
        )
    return {names[key]: value for key, value in by_key.items() if value is not None}


def _take(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    if file is None:
        return None
    options = [of for of in context.command.params if of.name not in ("out", "config")]
    # --from is `hook_from` in the code, and `from` in a file.
    names = {max(of.opts, key=len).lstrip("-").replace("-", "_"): str(of.name) for of in options}
    found = read_config(file, names)
    for of in options:
        if isinstance(of, click.Option) and of.multiple and of.name in found:
            value = found[of.name]
            found[of.name] = value if isinstance(value, list) else [value]
        elif of.name in found and isinstance(found[of.name], (list, dict)):
            raise UserError(f"{file}: {of.name}: given {shown(found[of.name])[:60]}; needed one value")
    context.default_map = {**(context.default_map or {}), **found}
    return file


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
    kept = {}
    for of in context.command.params:
        value = asked.get(str(of.name))
        if of.name not in NOT_KEPT and value not in (None, (), []):
            kept[max(of.opts, key=len).lstrip("-").replace("-", "_")] = (
                list(value) if isinstance(value, tuple) else value
            )
    return kept
