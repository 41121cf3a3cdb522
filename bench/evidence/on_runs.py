"""What trained SAEs make of words, of code and prose, and of language switches: `probing` and `switches` on runs.

    python -m csae.bench.evidence.on_runs RUN [RUN ...] -o FILE [--only probing | --only switches]

The runs are of SmolLM2-135M, at one hook point. The English is that of Python's documentation, and the six languages
are of the sections of Debian's books that are held out: no SAE of `lead` was trained on either.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from csae.bench.evidence import labels, probing, switches, texts
from csae.checkpoint import load_sae
from csae.data.activations import ModelActivations
from csae.data.cache import write_cache
from csae.data.language_model import LanguageModel
from csae.data.loading import smollm2
from csae.data.shard_activations import ShardActivations
from csae.data.text import TokenWindows
from csae.files import write_json
from csae.progress import track

N_CTX = 256
WINDOWS = 96
REGION_TOKENS = 64


def english(tokenizer: Any, n_windows: int) -> tuple[TokenWindows, dict[str, Tensor]]:
    """English windows, and the labels of their words."""
    windows = texts.windows("english", tokenizer, N_CTX, n_windows * N_CTX)
    return windows, labels.of_words(windows.tokens, tokenizer, labels.hanta())


def code_and_prose(tokenizer: Any, n_windows: int) -> tuple[TokenWindows, dict[str, Tensor]]:
    """Windows of Python code and of prose about it in turn, and where it is code."""
    documents = {"prose": texts.english(), "code": labels.python_code()}
    held = texts.switching(documents, tokenizer, N_CTX, n_windows, REGION_TOKENS)
    return held.windows, labels.of_switches(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of SAEs of one hook point")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--hook", default="resid.out:11")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of each text")
    parser.add_argument("--only", choices=["probing", "switches"])
    given = parser.parse_args()
    lm = LanguageModel.load(smollm2(), device="cpu")
    with tempfile.TemporaryDirectory() as folder:

        def kept(name: str, windows: TokenWindows) -> ShardActivations:
            write_cache(ModelActivations(lm, given.hook, windows), Path(folder) / name, progress=track)
            return ShardActivations(Path(folder) / name)

        books = texts.split(texts.multilingual(progress=track))[1]
        held = texts.switching(books, lm.tokenizer, N_CTX, given.windows, REGION_TOKENS)
        switching = kept("languages", held.windows)
        probed = [(switching, labels.of_switches(held))]
        if given.only != "switches":
            for make in (english, code_and_prose):
                windows, told = make(lm.tokenizer, given.windows)
                probed.append((kept(make.__name__, windows), told))
        found = []
        for run in given.runs:
            sae = load_sae(run).eval()
            entry: dict[str, Any] = {"run": run.name, "arch": sae.arch, "k": sae.k, "n_params": sae.n_params}
            if given.only != "switches":
                entry["probes"] = [
                    row
                    for source, told in probed
                    for row in probing.measure(sae, source, range(source.n_windows), told, progress=track)
                ]
            if given.only != "probing":
                every = range(switching.n_windows)
                entry["switches"] = switches.measure(
                    sae, switching, every, held.regions, held.languages, held.names, progress=track
                )
            found.append(entry)
            write_json(given.out, found)


if __name__ == "__main__":
    main()
