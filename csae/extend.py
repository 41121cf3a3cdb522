"""A run that goes on: as it began, or after its end, with more steps than it had.

A run that has ended is extended from its trained SAE: the learning rate rises, stays and falls again over the steps
that are added, with new moments of Adam (those of the end were not kept), on the windows that come next in the order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csae.checkpoint import remove_checkpoints, save_checkpoint
from csae.config import TrainConfig
from csae.data.seen import read_seen, settle
from csae.distributed.agreement import by_first, together
from csae.files import write_file, write_json, writing
from csae.run import RUN, SOURCE_STATE, as_json, read_run, sync_folder
from csae.sae import SAE
from csae.saving import CONFIG
from csae.tensors import load_tensors, save_tensors

SOURCE = "source/"  # before the names of the tensors of the batches' state
# How runs were trained by versions whose run.json does not say it.
OLDER = {"log_every": 1, "start": 0}
EXTENDED = "extended"


@dataclass
class Earlier:
    """What the folder of a run says of it, beside what is asked for now."""

    about: dict[str, Any]
    """the job, for run.json"""
    train: dict[str, Any] = field(default_factory=dict)
    """fields of TrainConfig as the run has them, whatever was asked"""
    before: dict[str, Any] | None = None
    """run.json of the run that has ended and is to be extended; None where it is not"""
    cut_short: bool = False
    """whether it is being extended, and the mark of its earlier end is still there"""

    @property
    def ends(self) -> list[int]:
        """After how many steps the run had ended, each time before it was extended."""
        return [end["steps"] for end in self.about.get(EXTENDED, [])]

    def seen_by(self, steps: int, config: TrainConfig) -> int:
        """How many hashes of windows there are after so many steps (`csae.data.seen`)."""
        last = self.about[EXTENDED][-1] if EXTENDED in self.about else {"steps": 0, "windows": 0}
        return last["windows"] + (steps - last["steps"]) * config.batch_windows


def earlier_job(run: Path, about: dict[str, Any]) -> Earlier:
    """What the folder `run` says, for the job `about` that is asked for now; nothing is written."""
    about = as_json(about)
    before = read_run(run) if run.is_dir() else {}
    if not before:
        return Earlier(about)
    had, wanted = before["train"].get("steps"), about["train"]["steps"]
    taken = {name: older for name, older in OLDER.items() if name not in before["train"]}
    unsaid = set(taken)
    if had == wanted and "start" in before["train"]:
        taken["start"] = before["train"]["start"]
    train = {name: value for name, value in (about["train"] | taken).items() if name not in unsaid}
    same = about | {"train": train} | ({EXTENDED: before[EXTENDED]} if EXTENDED in before else {})
    if had == wanted:
        marked = EXTENDED in before and (run / CONFIG).is_file()
        return Earlier(same, taken, cut_short=marked and (run / f"checkpoint-{before[EXTENDED][-1]['steps']}").is_dir())
    length = {name: before["train"][name] for name in ("steps", "start") if name in before["train"]}
    as_long = same | {"train": train | length}
    if isinstance(had, int) and wanted > had and (run / CONFIG).is_file() and as_long == before:
        taken["start"] = had
        longer = about | {"train": about["train"] | taken}
        longer[EXTENDED] = [*before.get(EXTENDED, []), {"steps": had, "windows": 0}]
        return Earlier(longer, taken, before)
    return Earlier(same, taken)


def extend(earlier: Earlier, run: Path, sae: SAE, optimizer: torch.optim.Optimizer) -> None:
    """Make a run that has ended one that goes on, if that is asked for. A kill on the way changes nothing of it.

    The folder is locked. Its checkpoint comes first, then run.json, and last the mark of its end goes. All ranks call
    it; the first writes what is not split.
    """
    group = None if sae.shard is None else sae.shard.ranks.hosts
    if earlier.before is not None:
        end = earlier.about[EXTENDED][-1]
        trained = type(sae).from_pretrained(str(run), shard=sae.shard)
        sae.load_state_dict(trained.state_dict())
        by_first(lambda: settle(run), group)
        seen = together(lambda: read_seen(run), group)
        # As many as there should be, where none were kept: then none are kept from here on.
        end["windows"] = end["steps"] * earlier.about["train"]["batch_windows"] if seen is None else len(seen.hashes)
        by_first(lambda: remove_checkpoints(run, earlier.about), group)
        source = run / SOURCE_STATE
        state = together(lambda: load_tensors(source) if source.is_file() else {}, group)
        save_checkpoint(run, end["steps"], sae, optimizer, earlier.about, of_source(state)).result()
        by_first(lambda: write_json(run / RUN, earlier.about), group)
    if earlier.before is not None or earlier.cut_short:
        by_first(lambda: _take_end_away(run), group)
        earlier.before, earlier.cut_short = None, False


def _take_end_away(run: Path) -> None:
    with writing(run):
        (run / CONFIG).unlink(missing_ok=True)
    sync_folder(run)


def keep_source(run: Path, state: dict[str, Tensor] | None) -> None:
    """Keep the state of the batches at a run's end, so that it can be extended."""
    if state:
        write_file(run / SOURCE_STATE, partial(save_tensors, state))


def of_source(state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The state of the batches by the names that a checkpoint has for it."""
    return {SOURCE + name: tensor for name, tensor in (state or {}).items()}


def source_of(beside: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The state of the batches in what a checkpoint kept; None where there is none."""
    return {name.removeprefix(SOURCE): of for name, of in beside.items() if name.startswith(SOURCE)} or None
