"""Every command and snippet of the README runs. Commands meet a tiny model in place of the one they name."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OTHERS = ("sae_lens", "sparsify", "dictionary_learning", "sae_bench")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(start):
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


def test_every_line_of_shell_is_run_by_a_test_here():
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(lines) == len(commands("make ")) + len(commands("csae "))
    assert commands("make ") == ["make demo", "make test"]


@pytest.mark.parametrize("block", range(len(blocks("python"))))
def test_snippets_run(block, tmp_path, monkeypatch):
    for library in OTHERS:
        if re.search(rf"^\s*(import|from) {library}\b", blocks("python")[block], flags=re.MULTILINE):
            pytest.importorskip(library, reason=f"{library} is not installed: `make test-peers` runs this")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[block], f"README.md, snippet {block}", "exec"), {})


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", commands("make "))
def test_make_targets_do_what_they_say(command):
    plan = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    assert {"make demo": "csae demo", "make test": "pytest"}[command] in plan.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)`", README))))
def test_every_make_target_it_names_is_there(target):
    plan = subprocess.run(["make", target, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr


@pytest.mark.slow
def test_commands_run_in_their_order(tiny_model_path, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("It was the best of times, it was the worst of times. " * 300)
    (tmp_path / "letter.txt").write_text("It was the age of wisdom, it was the age of foolishness. " * 5)
    for command in commands("csae "):
        args = shlex.split(command.replace("HuggingFaceTB/SmolLM2-135M", str(tiny_model_path)))[1:]
        if "--layer" in args:
            args[args.index("--layer") + 1] = "2"
            args += ["--n-ctx", "32"]
        if args[0] == "train":
            args += ["--heads", "2", "--d-head", "4", "--d-value", "4"]
        start = "from csae.cli import main; main()"
        if args[0] == "evidence":  # all that it does, in small
            args += ["--model", str(tiny_model_path), "--layer", "2", "--corpus", "english", "--k", "2", "--seeds", "1"]
            args += ["--tokens", "640", "--d-sae", "40", "--n-ctx", "32", "--limit", "4"]
            few = "synthetic.cases = partial(synthetic.cases, (16,)); synthetic.run = partial(synthetic.run, steps=3)"
            start = f"from functools import partial; from csae.bench.evidence import synthetic; {few}; {start}"
        program = [sys.executable, "-c", start, *args]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
