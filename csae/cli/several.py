"""The SAEs that one `csae train` asks for: a combination of hook points and settings each, in a folder of its own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from csae.cli.config_file import config_of
from csae.cli.no_effect import OF_LOOK_BACK
from csae.config import SAEConfig, TrainConfig
from csae.data.activations import (
    ActivationSource,
    Normalisation,
    d_out_of,
    estimate_normalisation,
    estimate_normalisations,
)
from csae.data.batches import SOMEWHERE
from csae.data.places import Place
from csae.data.sources import remembered
from csae.distributed import Ranks, sharded
from csae.distributed.hosts import Hosts
from csae.errors import UserError, shown
from csae.memory import Need, check_memory
from csae.run import RUN, read_origin
from csae.sae import SAE
from csae.training import Job

SEVERAL = ("arch", "d_sae", "k", "selection", "query", "lr")
WIDE = 2**17  # a width above any model's


class Setting(NamedTuple):
    """What is asked for one SAE, whatever it reads."""

    sae: SAEConfig
    train: dict[str, Any]
    """fields of TrainConfig, but its steps"""
    varied: dict[str, Any]
    """those of SEVERAL"""


def settings_of(options: dict[str, Any]) -> list[Setting]:
    """A setting for each combination of the options that were given several times."""
    found: dict[SAEConfig, dict[str, Setting]] = {}
    for values in itertools.product(*(options[name] or (None,) for name in SEVERAL)):
        varied = dict(zip(SEVERAL, values, strict=True))
        if varied["arch"] == "topk":
            varied["query"] = options["query"][0]  # it has none
        given = options | varied
        if varied["selection"] == "topk" and len(options["selection"]) > 1:
            given["k_max"] = None  # it is the others'
        which, how = (
            {field.name: given[field.name] for field in dataclasses.fields(config) if field.name in given}
            for config in (SAEConfig, TrainConfig)
        )
        sae = SAEConfig(**which)
        found.setdefault(sae, {}).setdefault(str(varied["lr"]), Setting(sae, how, varied))
    return [setting for by_lr in found.values() for setting in by_lr.values()]


def check_settings(settings: Sequence[Setting], options: dict[str, Any]) -> None:
    """Raises UserError where sizes don't fit each other, before the activations and their width are known."""
    for setting in settings:
        TrainConfig(steps=1, **setting.train)
        if not options["init"]:
            with torch.device("meta"):
                setting.sae.make(WIDE, WIDE if options["hook_from"] else None)


def check_folders(out: Path) -> dict[str, Any]:
    """Where the activations came from of the run in this folder, or of one of the runs in it; empty where none is."""
    runs = [out, *(sorted(out.iterdir()) if out.is_dir() else [])]
    return next((read_origin(run) for run in runs if run.is_dir() and (run / RUN).is_file()), {})


def jobs_of(
    context: click.Context,
    settings: Sequence[Setting],
    source: ActivationSource,
    windows: Sequence[int],
    origin: dict[str, Any],
    options: dict[str, Any],
    steps: int,
    device: str,
    ranks: Ranks | None = None,
) -> list[Job]:
    """A job for each place of the source and each setting, with its SAE, initialised. Reads some of the windows.

    ranks: each SAE is sharded over them, and rank 0 reads.
    """
    hosts = Hosts(ranks)
    places: tuple[Place, ...] = getattr(source, "places", (SOMEWHERE,))
    several = len(places) * len(settings) > 1
    out: Path = options["out"]
    if several and hosts.from_first(lambda: (out / RUN).is_file()):
        raise UserError(
            f"--out: {out} holds one run; needed a folder for the runs of {len(places) * len(settings)} SAEs"
        )
    if options["init"] and several:
        raise UserError(f"--init: given for {len(places) * len(settings)} SAEs; needed with one")
    of_places = {place: source if len(places) == 1 else source.at(place) for place in places}  # type: ignore[attr-defined]
    if not options["init"]:
        makers = [
            (partial(_made, setting.sae, of_places[place], place), TrainConfig(steps=steps, **setting.train))
            for place, setting in itertools.product(places, settings)
        ]
        check_memory([Need.of(*one, source.n_ctx, ranks) for one in makers], device, options["moments"], ranks)
    measured: dict[Place, Normalisation] | None = None
    if not options["init"] and len(places) == 1:
        measured = hosts.from_first(lambda: {places[0]: _on_cpu(estimate_normalisation(source, windows))})
    elif not options["init"]:
        all_places: Any = source
        measured = hosts.from_first(
            lambda: {place: _on_cpu(of) for place, of in estimate_normalisations(all_places, windows).items()}
        )
    jobs = []
    for place, setting in itertools.product(places, settings):
        config = TrainConfig(steps=steps, **setting.train)
        run = out / _name(place, setting, settings) if several else out
        init = None
        if measured is None:
            sae, init = _begun(context, options["init"], of_places[place], hosts)
        else:
            torch.manual_seed(options["seed"])
            make = partial(_made, setting.sae, of_places[place], place)
            sae = make() if ranks is None else sharded(make, ranks)
            mean, scale, *of_target = measured[place]
            sae.initialise(mean, scale, *(of_target if place.to is not None else ()))
        kept = remembered(origin, of_places[place]) | {"held_out": options["held_out"]}
        of_all = "activations" in kept and len(places) > 1  # it was read by a command that named no hook point
        asked = config_of(context, kept | {"hook": place.hook} if of_all else kept, setting.varied, options)
        jobs.append(Job(sae.to(device), run, config, kept, place, options["logs"], init, asked))
    return jobs


def _on_cpu(measured: Normalisation) -> Normalisation:
    """As it travels to other ranks: on a GPU it would arrive on the GPU that it was sent from."""
    target = measured.target_mean
    return measured._replace(mean=measured.mean.cpu(), target_mean=None if target is None else target.cpu())


def _made(config: SAEConfig, source: ActivationSource, place: Place) -> SAE:
    if place.to is None:
        return config.make(source.d_in)
    return config.make(source.d_in, d_out_of(source))


def _begun(context: click.Context, name: str, source: ActivationSource, hosts: Hosts) -> tuple[SAE, dict[str, Any]]:
    """The SAE to begin with, and what run.json says of it. Raises UserError where it is not as the options say."""
    from csae.checkpoint import load_sae
    from csae.distributed.checksum import whole_checksum
    from csae.trained_on import model_name

    sae = load_sae(name, ranks=hosts.ranks)
    hosts.from_first(lambda: _check_begun(context, name, sae, source))
    return sae, {"name": model_name(str(name)), "sha256": whole_checksum(sae)}


def _check_begun(context: click.Context, name: str, sae: SAE, source: ActivationSource) -> None:
    """Raises UserError where the SAE to begin with is not as the options say."""
    widths = [("d_in", source.d_in, sae.d_in), ("d_out", d_out_of(source), getattr(sae, "d_out", sae.d_in))]
    for what, wanted, has in widths:
        if wanted != has:
            raise UserError(f"--init: {shown(name)} has {what} {has}; needed {wanted}, as the activations")
    for field in dataclasses.fields(SAEConfig):
        asked = context.params.get(field.name)
        option = field.name.replace("_", "-")
        if context.get_parameter_source(field.name) in (None, click.core.ParameterSource.DEFAULT):
            continue
        if sae.arch == "topk" and field.name in OF_LOOK_BACK:
            raise UserError(f"--{option}: given with --init {shown(name)}, which is a topk SAE: leave it out")
        name_of = {"heads": "n_heads"}.get(field.name, field.name)
        unsaid = ("prefixes", "selection", "k_max")  # config.json mentions them only where they are given
        has = getattr(sae, name_of) if name_of in unsaid else sae.config.get(name_of)
        for value in asked if field.name in SEVERAL and isinstance(asked, tuple) else [asked]:
            if value != has:
                given, its = (",".join(map(str, of)) or "none" if isinstance(of, tuple) else of for of in (value, has))
                raise UserError(f"--{option}: given {given}; the SAE of --init has {its}: leave the option out")


def _name(place: Place, setting: Setting, settings: Sequence[Setting]) -> str:
    """The folder of a run among several: "resid.out-11-topk-k16"; other settings where they differ."""
    where = "" if place == SOMEWHERE else str(place).replace(":", "-").replace(" ", "-") + "-"
    name = f"{where}{setting.sae.arch}-k{setting.sae.k}"
    for option, short in (("d_sae", "d"), ("selection", ""), ("query", ""), ("lr", "lr")):
        if len({of.varied[option] for of in settings}) > 1 and (option != "query" or setting.sae.arch != "topk"):
            name += f"-{short}{setting.varied[option]}"
    return name
