"""The commands of docs/scale.md: torchrun starts what it says, on the tiny model and this machine's processors."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from csae.cli import cli

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
# Indented blocks, since machines and GPUs are needed for them; a backslash at the end of a line joins the next one.
BLOCKS = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"^    (.*)$", PAGE, re.MULTILINE)))
COMMANDS = [line for line in BLOCKS.splitlines() if "torchrun" in line]


def split(command: str) -> tuple[list[str], list[str]]:
    """The options of torchrun, and what it starts."""
    words = shlex.split(command.removeprefix("srun "))
    at = words.index("-m")
    return words[1:at], words[at:]


def test_there_are_commands_for_one_node_and_several() -> None:
    assert len(COMMANDS) == 3
    options = {name for parameter in cli.commands["train"].params for name in parameter.opts}
    for command in COMMANDS:
        _, started = split(command)
        assert started[:3] == ["-m", "csae", "train"]
        assert {word for word in started if word.startswith("--")} <= options


def test_torchrun_takes_their_options() -> None:
    from torch.distributed.run import get_args_parser

    for command in COMMANDS:
        numbers = command.replace('"$SLURM_NNODES"', "2").replace('"$SLURM_JOB_ID"', "7")
        options, started = split(numbers)
        args = get_args_parser().parse_args([*options, *started])
        assert args.module
        assert args.nproc_per_node == "8"


@pytest.mark.slow
def test_the_command_of_one_node_trains(tiny_model_path: Path, tmp_path: Path) -> None:
    options, started = split(COMMANDS[0])
    options[options.index("--nproc-per-node") + 1] = "2"
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. "
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": text * 20}) + "\n" + f'{{"text": "{text * 30}"}}\n' * 20)
    small = {
        "--model": str(tiny_model_path),
        "--layer": "2",
        "--d-sae": "50",
        "--batch-windows": "4",
        "--tokens": "2048",
        "--out": str(tmp_path / "run"),
    }
    for name, value in small.items():
        started[started.index(name) + 1] = value
    started += ["--device", "cpu", "--n-ctx", "32", "--arch", "topk", "--k", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *started]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["d_sae"] == 50
    assert len(list((tmp_path / "run").glob("model-*.safetensors"))) == 2
