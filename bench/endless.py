"""Training from a stream of text without end: memory along the way, and what kills leave of it.

    python -m csae.bench.endless [--tokens 50000000 --kills 3 --out endless]

A generator makes the text as it is read. A tiny language model reads it and a tiny SAE is trained on it, twice: once
unbroken, and once killed (SIGKILL) at random moments and started again each time. Both must end with the same bits.
Memory is what the system says is resident, of the training process and of the one that makes token ids.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from csae import TopKSAE
from csae.config import TrainConfig
from csae.data.activations import ModelActivations, estimate_normalisation
from csae.data.language_model import LanguageModel
from csae.data.row_tokens import RowTokens
from csae.data.rows import Chunk, grouped
from csae.data.stream import TokenStream
from csae.data.stream_batches import StreamBatches
from csae.parts import WEIGHTS
from csae.run import METRICS
from csae.tensors import checksum, load_tensors

TOKENS, KILLS = 50_000_000, 3
N_CTX, WINDOWS = 128, 64
HELD_OUT = 64
WORDS, WORDS_A_ROW = 4096, 400
SHOWN = (1, 2, 5, 10, 20, 30, 40, 50)  # million tokens
EVERY = 1.0  # seconds between two looks


class MadeRows:
    """Rows without end, each made of its number: words drawn so that some are far more frequent than others."""

    name = "text made by a generator"
    columns: tuple[str, ...] = ("text",)

    def __init__(self) -> None:
        self._words = np.array([f"w{number}" for number in range(WORDS)])

    def read(self, position: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
        done = position.get("row", 0)

        def rows() -> Iterator[tuple[Any, int]]:
            nonlocal done
            while True:
                generator = np.random.default_rng(done)
                length = int(generator.integers(1, 2 * WORDS_A_ROW))
                text = " ".join(self._words[(WORDS * generator.random(length) ** 3).astype(np.int64)])
                done += 1
                yield {"text": text}, len(text)

        return grouped(rows(), self.name, done, "row", lambda: {"row": done})

    def describe(self) -> dict[str, Any]:
        return {"words": WORDS, "words_a_row": WORDS_A_ROW}


def language_model() -> LanguageModel:
    """A Llama of width 16 with a token a word, and random weights that are always the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=N_CTX,
    )
    torch.manual_seed(0)
    return LanguageModel(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words), "tiny")


def train(run: Path, tokens: int, checkpoint_every: int) -> None:
    """Train an SAE on the stream; goes on where the run is."""
    from csae.train import Job, train_together

    lm = language_model()
    stream = TokenStream(MadeRows(), RowTokens(lm.tokenizer, ("text",)), N_CTX, held_out=HELD_OUT)
    held_out = ModelActivations(lm, 1, stream.first(HELD_OUT), batch_size=WINDOWS)
    torch.manual_seed(0)
    sae = TopKSAE(16, 64, 4)
    mean, scale, *_ = estimate_normalisation(held_out)
    sae.initialise(mean, scale)
    config = TrainConfig(
        steps=max(1, tokens // (N_CTX * WINDOWS)), batch_windows=WINDOWS, checkpoint_every=checkpoint_every
    )
    train_together([Job(sae, run, config)], StreamBatches(stream, held_out, WINDOWS))


class Look(NamedTuple):
    """At a process that trains."""

    tokens: int
    """trained on so far"""
    resident: int
    """bytes"""
    resident_workers: int
    """bytes, of the processes that make token ids"""


def watch(run: Path, tokens: int, checkpoint_every: int, kill_at: int | None = None) -> list[Look]:
    """Train in a process of its own, and look at it each second; kill it when it has trained on so many tokens."""
    command = [sys.executable, "-m", "csae.bench.endless", "--train", str(run)]
    how = ["--tokens", str(tokens), "--checkpoint-every", str(checkpoint_every)]
    looks: list[Look] = []
    with open(run.parent / f"{run.name}.log", "a") as log:
        process = subprocess.Popen(command + how, stderr=log, stdout=log)
        while process.poll() is None:
            time.sleep(EVERY if kill_at is None else EVERY / 10)
            done = trained(run)
            if kill_at is not None and done >= kill_at:
                process.send_signal(signal.SIGKILL)
            if done and (not looks or done > looks[-1].tokens):
                looks.append(Look(done, resident_of(process.pid), sum(map(resident_of, children_of(process.pid)))))
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{run}: training ended with status {process.returncode}; see {log.name}")
    return [look for look in looks if look.resident]


def trained(run: Path) -> int:
    """How many tokens a run has trained on, as the last whole line of its metrics says."""
    try:
        with open(run / METRICS, "rb") as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - 4096))
            whole = lines.read().split(b"\n")[:-1]
        return json.loads(whole[-1])["tokens"]
    except (OSError, IndexError, ValueError):
        return 0


def resident_of(pid: int) -> int:
    """Bytes of memory; 0 where there is no such process any more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)


def children_of(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def result_of(run: Path) -> dict[str, str]:
    """Hashes of what training gives: the weights, the windows trained on, and the metrics but for the speed."""
    metrics = [
        {name: value for name, value in json.loads(line).items() if not name.endswith("tokens_per_s")}
        for line in (run / METRICS).read_text().splitlines()
    ]
    contents = {"windows.bin": (run / "windows.bin").read_bytes(), METRICS: json.dumps(metrics).encode()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return {WEIGHTS: checksum(load_tensors(run / WEIGHTS)), **hashes}


def run(
    tokens: int = TOKENS,
    kills: int = KILLS,
    out: Path = Path("endless"),
    checkpoint_every: int = 500,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Both trainings, in the folder `out`. Returns memory along the way, kills, and hashes of the results."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    looks = watch(out / "unbroken", tokens, checkpoint_every)
    seconds = time.perf_counter() - began
    memory = along_the_way(looks, tokens)
    for look in memory:
        sizes = f"{_mb(look.resident)}, and {_mb(look.resident_workers)} to tokenize"
        say(f"{look.tokens / 1e6:6.2f} million tokens: {sizes}")
    say(f"{tokens / seconds:,.0f} tokens/s")
    generator = random.Random(seed)
    moments = sorted(generator.randrange(tokens // 50, tokens - tokens // 50) for _ in range(kills))
    seen = []
    for moment in moments:
        watch(out / "killed", tokens, checkpoint_every, kill_at=moment)
        seen.append(trained(out / "killed"))
        say(f"killed after {seen[-1] / 1e6:.2f} million tokens")
    watch(out / "killed", tokens, checkpoint_every)
    unbroken, killed = result_of(out / "unbroken"), result_of(out / "killed")
    say("the same bits" if unbroken == killed else f"NOT the same bits: {unbroken} and {killed}")
    return {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "memory": [look._asdict() for look in memory],
        "killed_at": seen,
        "same": unbroken == killed,
        "unbroken": unbroken,
        "killed": killed,
    }


def along_the_way(looks: Sequence[Look], tokens: int) -> list[Look]:
    """The looks nearest to a few amounts of tokens, and the last."""
    wanted = [million * 1e6 for million in SHOWN if million * 1e6 < tokens] + [float(tokens)]
    return list(dict.fromkeys(min(looks, key=lambda look: abs(look.tokens - amount)) for amount in wanted))


def _mb(n: int) -> str:
    return f"{n / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("endless"))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.tokens, args.checkpoint_every)
        return
    found = run(args.tokens, args.kills, args.out, args.checkpoint_every)
    (args.out / "endless.json").write_text(json.dumps(found, indent=2) + "\n")
    if not found["same"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
