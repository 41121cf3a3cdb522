"""The command line: `csae demo`, `train`, `eval`, `view`, `cache`, `info`, `bench`, `evidence`.

Each command opens its inputs, calls one function of the library, and prints the result. An error that the user can
mend ends in one line and exit code 2.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csae.__main__ import main
from csae.config import SAEConfig, TrainConfig
from csae.errors import UserError, shown
from csae.versions import DISTRIBUTION, check_name, pip_install

try:
    check_name()
    import click
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except UserError as error:
    sys.exit(f"csae: {error}")
except ImportError as error:  # the ops and modules don't need them
    sys.exit(f"csae: the command line needs {error.name}: {pip_install('cli')}")

import torch

import csae

__all__ = ["cli", "main"]

MODEL = click.option("--model", help="Language model: a Hugging Face id, a folder, or a .gguf file.")
LAYER = click.option("--layer", type=int, help="Read the residual stream after this many blocks.")
TEXT = click.option("--text", type=click.Path(), help="A text file, or a folder of *.txt, *.md, *.rst.")
DATASET = click.option(
    "--dataset", help="A tokenized Hugging Face dataset with a column input_ids: a folder, or a hub id."
)
N_CTX = click.option("--n-ctx", type=int, help="Positions a window; 256 if not given, or those of --activations.")
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


def options_of(config: type, *names: str) -> Callable[[Any], Any]:
    """The options that fill these fields of a dataclass of `csae.config`, in this order."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    kinds = typing.get_type_hints(config)

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            field, kind = fields[name], (typing.get_args(kinds[name]) or [kinds[name]])[0]  # int | None: int
            choices = field.metadata["choices"]
            how: dict[str, Any] = {"type": click.Choice(choices) if choices else kind}
            if kind is bool:
                how = {"is_flag": True}
            elif field.default is not None:
                how |= {"default": field.default, "show_default": True}
            command = click.option(f"--{name.replace('_', '-')}", help=field.metadata["help"], **how)(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(csae.__version__, message=f"%(prog)s %(version)s ({DISTRIBUTION})")
def cli() -> None:
    """Train sparse autoencoders fast; and the contextual one, which encodes only what is new."""


@cli.command()
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
@click.option("--model", help="Any other language model than SmolLM2-135M.")
@TEXT
@click.option("--layer", type=int, help="Read the residual stream after this many blocks.")
@click.option("--k", type=int, help="Active features a token.")
@click.option("--d-sae", type=int, help="Number of features.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of text to train on.")
@click.option("--epochs", type=int, help="How often each is seen.")
@click.option("--n-ctx", type=int, help="Positions a window.")
@click.option("--seed", type=int, help="Of initialisation and order.")
@DEVICE
def demo(**options: Any) -> None:
    """Train a per-token and a contextual SAE on a real language model, compare them, write a report."""
    from csae.demo import run_demo

    run_demo(**{name: value for name, value in options.items() if value is not None})


@cli.command()
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the run; goes on if it is there."
)
@options_of(SAEConfig, "arch")
@ACTIVATIONS
@MODEL
@LAYER
@TEXT
@DATASET
@N_CTX
@BOS
@KEEP_FIRST
@click.option("--max-tokens", type=int, help="Use at most so many tokens of the text.")
@options_of(SAEConfig, "d_sae", "k", "heads", "d_head", "d_value", "d_memory", "k_mem", "query", "sweeps")
@options_of(TrainConfig, "early_sweeps", "exact_from", "gap_every")
@options_of(SAEConfig, "dead_after")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to train on; all of the data once if not given.")
@options_of(TrainConfig, "batch_windows", "lr", "look_back_lr", "warmup", "decay")
@options_of(TrainConfig, "lazy", "moments", "precision", "checkpoint_every")
@click.option(
    "--held-out", type=float, default=0.02, show_default=True, help="Share of the windows kept for `csae eval`."
)
@options_of(TrainConfig, "seed")
@DEVICE
def train(**options: Any) -> None:
    """Train an SAE on activations: of a language model on the fly, or saved ones."""
    from csae.data.activations import check_share, estimate_normalisation, held_out
    from csae.data.sources import check_said, open_source, remembered
    from csae.progress import track
    from csae.run import read_origin
    from csae.train import check_one_process
    from csae.train import train as run_training

    check_share(options["held_out"])
    check_one_process()
    device = _device(options["device"])
    origin = _origin(options, read_origin(options["out"]))
    source, _ = open_source(origin, device, track)
    check_said(origin, source)
    origin = remembered(origin, source)
    train_windows, _ = held_out(source.n_windows, options["held_out"])
    per_step = options["batch_windows"] * source.n_ctx
    tokens = len(train_windows) * source.n_ctx if options["tokens"] is None else options["tokens"]
    which, how = (
        {field.name: options[field.name] for field in dataclasses.fields(config) if field.name in options}
        for config in (SAEConfig, TrainConfig)
    )
    config = TrainConfig(steps=max(1, tokens // max(1, per_step)), **how)
    torch.manual_seed(options["seed"])
    sae = SAEConfig(**which).make(source.d_in)
    mean, scale = estimate_normalisation(source, train_windows)
    sae.to(device).initialise(mean.to(device), scale)
    run_training(sae, source, train_windows, options["out"], config, origin | {"held_out": options["held_out"]})
    print(f"trained: {shown(options['out'])} (look at it: csae eval {shown(options['out'])})")


@cli.command(name="eval")
@click.argument("runs", nargs=-1, required=True)
@ACTIVATIONS
@MODEL
@LAYER
@TEXT
@DATASET
@click.option("--n-ctx", type=int, help="Positions a window; as trained if not given.")
@BOS
@KEEP_FIRST
@click.option("--windows", type=int, default=256, show_default=True, help="Windows to evaluate on, at most.")
@click.option("--ce-windows", type=int, default=16, show_default=True, help="Windows to run the language model on.")
@click.option("--trained-windows", is_flag=True, help="Evaluate also on windows that the run trained on.")
@ELSEWHERE
@DEVICE
def evaluate(
    runs: tuple[str, ...], windows: int, ce_windows: int, trained_windows: bool, elsewhere: bool, **options: Any
) -> None:
    """Evaluate trained SAEs: a table, and eval.json in each run's folder.

    On the windows that a run held out; or on other activations or text if given, without the windows that the run
    trained on. With a language model also the next-token cross-entropy with the reconstruction spliced in.
    """
    from csae.checkpoint import load_sae
    from csae.evaluate import EVAL, table
    from csae.evaluate_run import evaluate_run, keep_held_out_fvu
    from csae.files import check_writable, write_json
    from csae.progress import track

    device = _device(options["device"])
    for name, count in (("--windows", windows), ("--ce-windows", ce_windows)):
        if count < 1:
            raise UserError(f"{name}: given {count}; needed at least 1")
    given, how = _given(options), {"trained_windows": trained_windows, "elsewhere": elsewhere}
    folders = [Path(run) for run in runs if Path(run).is_dir()]
    for folder in folders:
        check_writable(folder / EVAL)
    opened: dict[str, Any] = {}
    results = []
    for run in runs:
        sae = load_sae(run, device)
        found = evaluate_run(run, sae, given, windows, ce_windows, **how, device=device, progress=track, opened=opened)
        if Path(run) in folders:
            write_json(Path(run) / EVAL, found)
            keep_held_out_fvu(Path(run), sae, found)
        results.append({"name": Path(run).name or Path(run).resolve().name} | found)
    Console().print(table(results))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="A text file."
)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("view.html"), show_default=True, help="The page."
)
@click.option("--beside", type=click.Path(path_type=Path), help="A run of a per-token SAE, to compare with.")
@click.option("--model", help="As the run was trained on, if not given.")
@click.option("--layer", type=int, help="As the run was trained on, if not given.")
@click.option("--n-ctx", type=int, help="Positions a window at most; 8 times as trained on if not given.")
@BOS
@KEEP_FIRST
@click.option("--max-tokens", type=int, default=4000, show_default=True, help="Use at most so many tokens of the text.")
@ELSEWHERE
@DEVICE
def view(
    run: Path, text: Path, out: Path, beside: Path | None, max_tokens: int, elsewhere: bool, **options: Any
) -> None:
    """Show a text as an SAE sees it: a page with what is new at each token, and what is carried from where."""
    from csae.checkpoint import load_sae
    from csae.data.language_model import LanguageModel
    from csae.data.text import beginning, read_documents
    from csae.files import check_writable
    from csae.pages.view import LONGER, read_windows
    from csae.pages.view import view as view_text
    from csae.pages.view_page import write_view
    from csae.progress import track
    from csae.run import read_trained_on
    from csae.trained_on import check_place, model_name, same_model

    check_writable(out)
    device = _device(options["device"])
    sae = load_sae(run, device)
    of_config = {} if sae.trained_on is None else sae.trained_on.to_config()
    kept = ("model", "layer", "n_ctx", "bos", "keep_first")
    trained_on: dict[str, Any] = {name: of_config[name] for name in kept if name in of_config}
    of_run = read_trained_on(run)
    trained_on |= of_run
    given = {name: options[name] for name in ("model", "layer", "bos", "keep_first") if options[name] is not None}
    origin = trained_on | given
    for name in ("model", "layer"):
        if name not in origin:
            raise UserError(f"--{name}: not given, and {run} does not say what it was trained on")
    trained_beside = {} if beside is None else read_trained_on(beside)
    for name in ("model", "layer"):
        one, other = trained_on.get(name), trained_beside.get(name)
        alike = one == other or (name == "model" and same_model(str(one), str(other)))
        if one is not None and other is not None and not alike:
            raise UserError(
                f"--beside: {beside} is of {name} {trained_beside[name]}; needed {trained_on[name]}, as {run}"
            )
    for name, what in (("bos", "a beginning of sequence"), ("keep_first", "position 0")):
        if trained_on and trained_beside and bool(trained_beside.get(name)) != bool(trained_on.get(name)):
            with_it, without = (beside, run) if trained_beside.get(name) else (run, beside)
            raise UserError(f"--beside: {with_it} was trained with {what}, {without} without; needed two that agree")
    other_sae = None if beside is None else load_sae(beside, device)
    for loaded in (sae, other_sae):
        if loaded is not None:
            check_place(loaded.trained_on, origin["model"], origin["layer"], elsewhere=elsewhere)
    lm = LanguageModel.load(origin["model"], device=device)
    longest = LONGER * trained_on.get("n_ctx", 256)
    n_ctx = min(longest, lm.max_ctx or longest) if options["n_ctx"] is None else options["n_ctx"]
    known = ({} if sae.trained_on is None else sae.trained_on.to_config()) | origin
    begin = beginning(lm.tokenizer, known.get("bos", False if of_run else None), lm.n_vocab)
    keep_first = bool(known.get("keep_first"))
    windows, whole = read_windows(lm, origin["layer"], read_documents(text)[0], n_ctx, max_tokens, begin, keep_first)
    about = {
        "text": shown(text.name),
        "run": shown(run.resolve().name),
        "beside": None if beside is None else shown(beside.resolve().name),
        "model": model_name(lm.name),
        "layer": origin["layer"],
        "n_ctx": n_ctx,
        "trained_on": trained_on.get("n_ctx"),
        "whole": whole,
    }
    write_view(out, about, view_text(sae, windows, lm, trained_on.get("n_ctx"), other_sae, track, elsewhere))
    print(f"written: {shown(out)}")


@cli.command()
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="A new folder.")
@MODEL
@LAYER
@TEXT
@DATASET
@N_CTX
@BOS
@KEEP_FIRST
@click.option("--max-tokens", type=int, help="Use at most so many tokens of the text.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True)
@DEVICE
def cache(**options: Any) -> None:
    """Write a language model's activations to a folder of shards, for --activations."""
    from csae.data.activations import write_cache
    from csae.data.sources import open_source
    from csae.progress import track

    source, _ = open_source(_origin(options), _device(options["device"]), track)
    write_cache(source, options["out"], getattr(torch, options["dtype"]), track)
    print(f"cached: {source.n_windows} windows of {source.n_ctx} positions in {shown(options['out'])}")


@cli.command()
def info() -> None:
    """Show versions, devices, and which kernels each op runs on, or why not."""
    from csae.info import facts

    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for fact in facts():
        table.add_row(*map(Text, (fact.name, fact.value, fact.note)))  # plain text, not markup
    Console().print(table)


@cli.group(invoke_without_command=True)
@click.option("--shape", "shapes", multiple=True, help="small, cpu, A, B or C; may be repeated. [small; A B C on CUDA]")
@click.option("--case", "cases", multiple=True, help="A part of a case's name; may be repeated. [all cases]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of products. [bfloat16 on CUDA]")
@click.option("--rounds", type=click.IntRange(min=1), help="How often each is timed. [7, or 20 on CUDA]")
@click.option("--growth", is_flag=True, help="Instead: how cost grows with d_sae and k, beyond the product's.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="JSON; a plot beside it. [bench.json, growth.json]")
@DEVICE
@click.pass_context
def bench(context: click.Context, growth: bool, out: Path | None, device: str | None, **options: Any) -> None:
    """Measure the ops and training steps here, beside their floor, PyTorch, and the peers that are installed.

    What gives another result than the reference is not timed.
    """
    if context.invoked_subcommand is not None:
        return
    from csae.bench import growth as growing
    from csae.bench import harness, report

    out = out or Path("growth.json" if growth else "bench.json")
    plot = out.with_suffix(".svg")
    if growth:
        found = growing.run(device=_device(device), rounds=options["rounds"] or growing.ROUNDS)
        print(growing.table(found))
    else:
        found = harness.run(device=_device(device), **options)
        print(report.table(found))
    report.write(found, out)
    (growing if growth else report).draw(found, plot)
    print(f"written: {shown(out)}, {shown(plot)}")


@bench.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare(before: Path, after: Path) -> None:
    """What got faster or slower from one file of results to another."""
    from csae.bench import report

    print(report.compare(report.read(before), report.read(after)))


@cli.command()
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("evidence"), show_default=True, help="Folder."
)
@click.option("--model", help="Any other language model than SmolLM2-135M.")
@click.option("--k", "ks", type=int, multiple=True, help="Active features a token; may be repeated. [4 8 16 32 64]")
@click.option("--layer", "layers", type=int, multiple=True, help="May be repeated. [6 12 20]")
@click.option("--corpus", "corpora", multiple=True, help="english or multilingual; may be repeated. [both]")
@click.option("--seeds", type=int, help="How many. [3]")
@click.option("--tokens", type=click.IntRange(min=1), help="Each SAE is trained on. [840000, in two passes]")
@click.option("--d-sae", type=int, help="Number of features. [2304]")
@click.option("--n-ctx", type=int, help="Positions a window. [256]")
@click.option("--texts", "languages", type=click.Path(path_type=Path), help="A folder of *.txt for each language.")
@click.option("--limit", type=int, help="Train this many SAEs at most, the most telling first.")
@DEVICE
def evidence(tokens: int | None, d_sae: int | None, n_ctx: int | None, **options: Any) -> None:
    """Measure whether the contextual SAE works, beside other SAEs: figures, and a report. Goes on if stopped.

    Needs a checkout of the repository: an installation leaves the evidence out.
    """
    if importlib.util.find_spec("csae.bench.evidence") is None:
        raise UserError(
            "csae evidence: this installation does not have it; run it in a checkout of the repository, after `make`"
        )
    from csae.bench.evidence.command import run_evidence
    from csae.bench.evidence.grid import Budget

    sizes = {name: size for name, size in (("tokens", tokens), ("d_sae", d_sae), ("n_ctx", n_ctx)) if size is not None}
    if tokens is not None:
        sizes["distinct"] = max(1, tokens // 2)
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    run_evidence(budget=Budget(**sizes), **given)
    print(f"written: {shown(options['out'])}/evidence.json, {shown(options['out'])}/report.html")


def _origin(options: dict[str, Any], trained_on: dict[str, Any] | None = None) -> dict[str, Any]:
    """Where activations come from, for `open_source`, with absolute paths, since the run keeps it.

    trained_on: of a run: its bos and keep_first are the defaults. Without a run the tokenizer decides.
    """
    origin = _given(options)
    for name in ("bos", "keep_first"):
        if name not in origin and trained_on:
            origin[name] = bool(trained_on.get(name))
    if "activations" not in origin:
        origin.setdefault("n_ctx", 256)
    return {"bos": None} | origin


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, of those that `open_source` takes, with absolute paths."""
    names = ("activations", "model", "layer", "text", "dataset", "n_ctx", "max_tokens", "bos", "keep_first")
    given = {name: options[name] for name in names if options.get(name) is not None}
    if "activations" in given and "bos" in given:
        raise UserError("--bos, --no-bos: given with --activations, which are as they were made; needed with a text")
    for name in ("text", "dataset", "max_tokens"):
        if "activations" in given and name in given:
            raise UserError(f"--activations, --{name.replace('_', '-')}: both given; needed one of them")
    for name in ("activations", "text", "model", "dataset"):
        if name in given and (name in ("activations", "text") or Path(given[name]).exists()):
            given[name] = str(Path(given[name]).resolve())
    return given


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: given {name!r}; it can't be used here: give cpu") from error
    return name
