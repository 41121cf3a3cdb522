"""Tiles, warps and stages that were the fastest on a device, where `make gpu` has measured them.

tuned.json: the device's name and architecture -> the name of a variant as its launcher makes it -> what is different
in the best form of it. So an entry for a variant that no longer exists is never read, and whatever isn't listed stays
as the launcher makes it. A module that can be tuned has `candidates(variant)`: other forms that its launcher may take.
"""

import functools
import json
from pathlib import Path

import torch

from .variant import Variant

PATH = Path(__file__).with_name("tuned.json")


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """What tuned.json holds; changes to it last as long as the process."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


@functools.cache
def device_name(device: torch.device) -> str:
    """The name that a device has in the table; its last word is what `offline` calls its architecture."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", "").partition(":")[0]
    return f"{properties.name} {amd or f'sm_{properties.major}{properties.minor}'}"


def best(variant: Variant, device: torch.device) -> Variant:
    """The form of `variant` that was the fastest on `device`; the variant itself where none was measured."""
    of_device = table().get(device_name(device))
    return changed(variant, of_device.get(str(variant), {})) if of_device else variant


def changed(variant: Variant, changes: dict[str, int]) -> Variant:
    """The variant with other tiles, num_warps or num_stages."""
    constants = {name: changes.get(name, value) for name, value in variant.constants.items()}
    num_warps, num_stages = (changes.get(name, getattr(variant, name)) for name in ("num_warps", "num_stages"))
    return variant._replace(constants=constants, num_warps=num_warps, num_stages=num_stages)


def changes(default: Variant, other: Variant) -> dict[str, int]:
    """What `changed` needs to make `other` of `default`."""
    constants = {name: value for name, value in other.constants.items() if value != default.constants[name]}
    settings = {name: getattr(other, name) for name in ("num_warps", "num_stages")}
    return {**constants, **{name: value for name, value in settings.items() if value != getattr(default, name)}}


def tuned_variants(defaults: list[Variant]) -> list[tuple[Variant, str]]:
    """The forms of `defaults` that the table names, each with the architecture that it is launched on."""
    return [
        (changed(default, entries[str(default)]), device.rpartition(" ")[2])
        for device, entries in table().items()
        for default in defaults
        if str(default) in entries
    ]
