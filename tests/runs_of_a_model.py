"""Small runs of `csae train` and `csae eval` on the tiny language model, for what is done with a run afterwards."""

from __future__ import annotations

from pathlib import Path

from csae.cli import cli

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the sun by the mill. " * 60
ARCHS = ("topk", "contextual")
LAYER, D_SAE, K, N_CTX = 2, 40, 4, 32


def make_runs(folder: Path, model: Path) -> dict[str, Path]:
    """A run of each architecture that is done and evaluated, on `text.txt` in the folder."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    small = ["--d-sae", D_SAE, "--k", K, "--selection", "topk"]  # of which each export knows what to make
    of_look_back = ["--heads", 2, "--d-head", 4, "--d-value", 4, "--d-memory", 8]
    source = ["--model", model, "--layer", LAYER, "--text", text, "--n-ctx", N_CTX, "--device", "cpu"]
    for arch in ARCHS:
        train = ["train", "-o", folder / arch, "--arch", arch, *source, *small, "--batch-windows", 4, "--tokens", 1280]
        train += of_look_back if arch == "contextual" else []
        csae(*train, "--held-out", 0.2, "--lm-dtype", "float32")
        csae("eval", folder / arch, "--windows", 4, "--ce-windows", 2, "--device", "cpu")
    return {arch: folder / arch for arch in ARCHS}


def csae(*arguments: object) -> None:
    """Runs the command line in this process; raises what it raises."""
    cli.main([str(argument) for argument in arguments], standalone_mode=False)
