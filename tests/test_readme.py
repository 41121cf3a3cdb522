"""Every command and snippet of README.md and docs/*.md runs. Commands meet a tiny model in place of the one they name.

Links lead to files that are there, functions are where a page says they are.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from csae.cli import cli

OTHERS = ("sae_lens", "sparsify", "dictionary_learning", "sae_bench")
ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
STARTS = ("make ", "csae ", "pip install ")


def blocks(page, language):
    found = re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return [re.sub(r"\\\n\s*", "", block) for block in found] if language == "sh" else found


def small(text, model):
    """What a page says of block 11 of a real model, said of block 1 of the tiny one."""
    return text.replace("HuggingFaceTB/SmolLM2-135M", str(model)).replace(":11", ":1")


def commands(start):
    lines = [
        line.split("#")[0].strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith(start)]


SNIPPETS = {f"{page}-{place}": code for page in PAGES for place, code in enumerate(blocks(page, "python"))}


def test_every_block_is_run_by_a_test_here():
    for page, text in PAGES.items():
        assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) <= {"sh", "python", "yaml", ""}, page
        assert len(re.findall(r"^```$", text, re.MULTILINE)) == len(blocks(page, "(?:sh|python|yaml)")), page
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    assert [line for line in lines if not line.startswith(STARTS)] == []


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run(name, tiny_model_path, tmp_path, monkeypatch):
    for library in OTHERS:
        if re.search(rf"^\s*(import|from) {library}\b", SNIPPETS[name], flags=re.MULTILINE):
            pytest.importorskip(library, reason=f"{library} is not installed: `make test-peers` runs this")
    monkeypatch.chdir(tmp_path)
    exec(compile(small(SNIPPETS[name], tiny_model_path), name, "exec"), {})


def test_files_of_options_hold_options():
    options = {parameter.name for parameter in cli.commands["train"].params}
    for page in PAGES:
        for block in blocks(page, "yaml"):
            assert yaml.safe_load(block).keys() <= options


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_are_there(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_functions_are_where_a_page_says_they_are(page):
    for names, file in re.findall(r"((?:`\w+`(?:, | and )?)+) in \[?`?([\w/]+\.py)", PAGES[page]):
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(re.findall(r"`(\w+)`", names)) <= defined, f"{names} in {file}"


def test_what_pip_installs_is_declared():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands("pip install "):
        (wanted,) = re.fullmatch(r"pip install (?:-e )?'\.\[([\w,]+)\]'", command).groups()
        assert set(wanted.split(",")) <= extras.keys()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", sorted(set(commands("make "))))
def test_make_targets_do_what_they_say(command):
    plan = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    assert {"make demo": "csae demo", "make test": "pytest"}.get(command, "") in plan.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target", sorted({name for text in PAGES.values() for name in re.findall(r"`make ([a-z-]+)", text)})
)
def test_every_make_target_they_name_is_there(target):
    plan = subprocess.run(["make", target, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr


@pytest.mark.slow
def test_commands_run_in_their_order(tiny_model_path, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("It was the best of times, it was the worst of times. " * 300)
    (tmp_path / "letter.txt").write_text("It was the age of wisdom, it was the age of foolishness. " * 5)
    (tmp_path / "corpus.jsonl").write_text('{"text": "It was the season of Light, the season of Darkness."}\n' * 60)
    program = []
    for command in dict.fromkeys(commands("csae ")):
        args = shlex.split(small(command, tiny_model_path))[1:]
        if "--layer" in args:
            args[args.index("--layer") + 1] = "2"
        if args[0] in ("train", "cache") and "--model" in args:
            args += ["--n-ctx", "32"]
        if args[0] == "train":
            args = [*without(args, "--tokens"), "--tokens", "2048"]
        if args[0] == "train" and "topk" not in args:
            args += ["--heads", "2", "--d-head", "4", "--d-value", "4"]
        if args[0] == "bench":  # the shape of the figures would take minutes
            args = [*without(args, "--shape", "--rounds", "--case"), "--shape", "small", "--rounds", "1"]
            args += ["--case", "sparse_decode forward"]
        start = "from csae.cli import main; main()"
        if args[0] == "evidence":  # all that it does, in small
            args += ["--model", str(tiny_model_path), "--layer", "2", "--corpus", "english", "--k", "2", "--seeds", "1"]
            args += ["--tokens", "640", "--d-sae", "40", "--n-ctx", "32", "--limit", "4"]
            few = "synthetic.cases = partial(synthetic.cases, (16,)); synthetic.run = partial(synthetic.run, steps=3)"
            start = f"from functools import partial; from csae.bench.evidence import synthetic; {few}; {start}"
        if args not in [given for *_, given in program]:  # two may differ in what is replaced alone
            program.append((command, start, args))
    run_in_order = [sys.executable, Path(__file__).with_name("run_in_order.py")]
    done = subprocess.run(run_in_order, cwd=tmp_path, input=json.dumps(program), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def without(args, *options):
    """The arguments without these options and what follows each."""
    places = [place for place, arg in enumerate(args) if arg in options]
    return [arg for place, arg in enumerate(args) if place not in places and place - 1 not in places]
