"""The fastest tiles, warps and stages of each variant, on the devices where `make gpu` has measured them.

tuned.json maps a device's name and architecture to variants' default names, and each name to the settings that differ
in the fastest form. An entry for a variant that no longer exists is never read; a variant without an entry is launched
in its default form. A module that can be tuned has `candidates(variant)`: the other forms that its launcher accepts.
"""

import functools
import json
from pathlib import Path

import torch

from .variant import Variant

PATH = Path(__file__).with_name("tuned.json")


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """The content of tuned.json. A change to the returned dict lasts until the process ends."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


@functools.cache
def device_name(device: torch.device) -> str:
    """A device's name in the table. Its last word is the architecture, as `offline.TARGETS` names it."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", "").partition(":")[0]
    return f"{properties.name} {amd or f'sm_{properties.major}{properties.minor}'}"


def best(variant: Variant, device: torch.device) -> Variant:
    """The fastest form of `variant` on `device`; `variant` itself if none was measured."""
    of_device = table().get(device_name(device))
    return changed(variant, of_device.get(str(variant), {})) if of_device else variant


def changed(variant: Variant, changes: dict[str, int]) -> Variant:
    """`variant` with these constants, num_warps or num_stages changed."""
    constants = {name: changes.get(name, value) for name, value in variant.constants.items()}
    num_warps, num_stages = (changes.get(name, getattr(variant, name)) for name in ("num_warps", "num_stages"))
    return variant._replace(constants=constants, num_warps=num_warps, num_stages=num_stages)


def changes(default: Variant, other: Variant) -> dict[str, int]:
    """The changes by which `changed` makes `other` from `default`."""
    constants = {name: value for name, value in other.constants.items() if value != default.constants[name]}
    settings = {name: getattr(other, name) for name in ("num_warps", "num_stages")}
    return {**constants, **{name: value for name, value in settings.items() if value != getattr(default, name)}}


def tuned_variants(defaults: list[Variant]) -> list[tuple[Variant, str]]:
    """The tuned forms of `defaults`, each with the architecture that it is launched on."""
    return [
        (changed(default, entries[str(default)]), device.rpartition(" ")[2])
        for device, entries in table().items()
        for default in defaults
        if str(default) in entries
    ]
