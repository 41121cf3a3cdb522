"""The main job: a contextual SAE against per-token SAEs on a real language model, from nothing to a report.

All in one folder:

    OUT/activations/      the activations of the language model, as shards; made once
    OUT/runs/NAME/        a run of csae.train for each SAE
    OUT/results.json      the figures
    OUT/report.html       the page to open

A second run of the same demo finds the activations and the runs, and makes only the figures and the page again.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import (
    ActivationSource,
    ModelActivations,
    estimate_normalisation,
    held_out,
)
from csae.data.batches import IndexedBatches
from csae.data.cache import write_cache
from csae.data.dtypes import resolved_dtype
from csae.data.language_model import LanguageModel
from csae.data.loading import smollm2
from csae.data.places import in_words, layer_of
from csae.data.shard_activations import ShardActivations
from csae.data.shards import ABOUT_FILE
from csae.data.text import beginning, python_prose, read_documents, tokenize
from csae.errors import UserError, shown
from csae.evaluate import EVAL, Subject, evaluate_together, table
from csae.evaluate_run import HELD_OUT, keep_held_out_fvu
from csae.features.build import build_index
from csae.features.effects import effects_of, writes_to_stream
from csae.features.index import FEATURES, FeatureIndex
from csae.features.labels import read_labels
from csae.files import write_json
from csae.pages.comparison import comparison
from csae.pages.from_index import from_index
from csae.pages.held_out import passages
from csae.pages.view import view
from csae.pages.view_page import write_view
from csae.progress import Progress, say, track
from csae.run import METRICS
from csae.sae import SAE
from csae.topk_sae import TopKSAE
from csae.train import Job, train_together
from csae.trained_on import model_name

TOKENS = 200_000
EPOCHS = 2
N_CTX = 256
LAYER = 12
K = 16
D_SAE = 2304
BATCH_WINDOWS = 8
# Tried 1e-3, 2e-3, 3e-3, 4e-3, 8e-3: the widened TopK SAE did best with 3e-3 and 4e-3, equally well.
LR = 4e-3
DEAD_AFTER = 200_000
EVAL_WINDOWS = 100
EVAL_BATCH_TOKENS = 12_800  # the exact form takes a quarter less time a token than at a third of that
CE_WINDOWS = 4  # each costs passes through the whole language model
PASSAGES = 3


def run_demo(
    out: Path | str = Path("demo"),
    model: str | None = None,
    text: Path | str | None = None,
    layer: int | None = None,
    k: int = K,
    d_sae: int = D_SAE,
    tokens: int = TOKENS,
    epochs: int = EPOCHS,
    n_ctx: int = N_CTX,
    batch_windows: int = BATCH_WINDOWS,
    eval_windows: int = EVAL_WINDOWS,
    seed: int = 0,
    device: str | None = None,
    lm_dtype: str = "auto",
    progress: Progress = track,
    hook: str | None = None,
) -> dict[str, Any]:
    """Trains a TopK SAE, a wider one and a contextual one on the same tokens; gives what is in results.json.

    Args:
        out: the folder for all that is made.
        model: what LanguageModel.load takes; by default SmolLM2-135M from its PyPI package.
        text: a file or folder of text; by default the prose that comes with Python.
        layer: the activations are the residual stream after this many blocks; LAYER if neither it nor `hook` is given.
        k, d_sae: of the TopK and the contextual SAE. The wider TopK SAE has the same k, and as many features
            as it takes to have as many parameters as the contextual one.
        tokens: to train on; each is seen `epochs` times. Less where the text is shorter.
        eval_windows: windows held out for the figures; no more than a fifth of all.
        device: of the language model and of training; CUDA where there is one, otherwise the CPU.
        lm_dtype: of the language model, one of `csae.data.dtypes.LM_DTYPES`.
        hook: the hook point of the activations (`csae.data.hook_points`), instead of `layer`.

    Raises UserError where the model or the text is missing or does not fit, or `out` holds another demo.
    """
    from rich.console import Console

    for name, size in {"tokens": tokens, "epochs": epochs, "eval_windows": eval_windows}.items():
        if size < 1:
            raise UserError(f"{name}: given {size}; needed at least 1")
    if layer is not None and hook is not None:
        raise UserError("--layer, --hook: both given; needed one of them")
    out = Path(out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    say("language model: loading")
    dtype = getattr(torch, resolved_dtype(lm_dtype, torch.device(device)))
    lm = LanguageModel.load(smollm2() if model is None else model, device=device, dtype=dtype)
    point = lm.hook(hook or (LAYER if layer is None else layer))
    documents = python_prose() if text is None else read_documents(text)
    wanted = tokens + eval_windows * n_ctx
    begin = beginning(lm.tokenizer)
    token_windows = tokenize(documents, lm.tokenizer, n_ctx, wanted, seed, progress, begin)
    # Before the long steps, so that sizes that do not fit are reported at once.
    n_windows = len(token_windows.tokens)
    train_windows, test_windows = held_out(n_windows, max(1, min(eval_windows, n_windows // 5)))
    activations = ModelActivations(lm, point.name, token_windows)
    config = TrainConfig(
        steps=max(1, epochs * (len(train_windows) // batch_windows)), batch_windows=batch_windows, lr=LR, seed=seed
    )
    saes = _make_saes(point.width, d_sae, k, seed)
    runs = {name: out / "runs" / name for name in saes}

    cached = out / "activations"
    source = _cached(activations, cached, progress)
    mean, scale = estimate_normalisation(source, train_windows, seed=seed)[:2]
    prose = "the prose that comes with Python" if text is None else shown(Path(text).name)
    origin = {"activations": str(cached.resolve()), "held_out": len(test_windows), "data": prose}
    for sae in saes.values():
        sae.to(device).initialise(mean.to(device), scale)
    sizes = ", ".join(f"{name} {sae.n_params / 1e6:.2f}M parameters" for name, sae in saes.items())
    say(f"training on {config.steps * batch_windows} windows: {sizes}")
    jobs = [Job(sae, runs[name], config, origin) for name, sae in saes.items()]
    train_together(jobs, IndexedBatches(source, train_windows, config))
    rows: list[dict[str, Any]] = []
    figures: list[dict[str, Any]] = []
    say(f"evaluating on {len(test_windows)} held-out windows")
    subjects = [Subject(sae, name) for name, sae in saes.items()]
    at_once = max(1, EVAL_BATCH_TOKENS // n_ctx)
    evaluated = evaluate_together(subjects, source, test_windows, lm, at_once, CE_WINDOWS, progress)
    for name, found in zip(saes, evaluated, strict=True):
        found |= {"data": prose, "which": HELD_OUT}
        keep_held_out_fvu(runs[name], saes[name], found)
        write_json(runs[name] / EVAL, found)
        rows.append(found | {"name": name})
        # In results.json tokens_per_s is the speed of training, of this SAE's steps alone.
        speeds = {"tokens_per_s": _training_speed(runs[name]), "eval_tokens_per_s": found["tokens_per_s"]}
        figures.append(found | {"arch": name} | speeds)

    results = {
        "model": model_name(lm.name),
        "lm_dtype": str(lm.model.dtype).removeprefix("torch."),
        "layer": layer_of(point.name),
        "hook": point.name,
        "place": in_words(point.name),
        "tokens": config.steps * batch_windows * n_ctx,
        "distinct_tokens": len(train_windows) * n_ctx,
        "n_ctx": n_ctx,
        "text": prose,
        "seed": seed,
        "saes": figures,
    }
    write_json(out / "results.json", results)
    say("report: which features are active where")
    _write_report(out / "report.html", results, runs, saes, source, test_windows, lm, progress)
    Console().print(table(rows))
    say(f"figures: {shown(out / 'results.json')}\nreport:  {shown(out / 'report.html')}")
    return results


def _write_report(
    path: Path,
    results: dict[str, Any],
    runs: dict[str, Path],
    saes: dict[str, SAE],
    source: ActivationSource,
    windows: Sequence[int],
    lm: LanguageModel,
    progress: Progress,
) -> None:
    """The page: the SAEs compared, and passages of held-out text under the contextual one, the TopK one beside it."""
    contextual, n_ctx = saes["contextual"], results["n_ctx"]
    chosen = passages(source, windows, lm.tokenizer, PASSAGES)
    effects = effects_of(lm) if writes_to_stream(contextual, lm) else None
    facts = view(contextual, chosen, lm, n_ctx, saes["topk"], progress, effects=effects)
    index_file = runs["contextual"] / FEATURES
    build_index(
        index_file, contextual, source, windows, lm, "contextual", "all held-out text", progress, effects=effects
    )
    with FeatureIndex(index_file) as index:
        indexed = from_index(index, [int(feature) for feature in facts["features"]])
    about = {name: results[name] for name in ("text", "model", "n_ctx", "place")}
    about |= {"run": "contextual", "beside": "topk", "trained_on": n_ctx, "whole": True}
    labels = read_labels(runs["contextual"], contextual.d_sae)
    write_view(path, about, facts, comparison(results, runs), indexed, labels)


def _make_saes(d_in: int, d_sae: int, k: int, seed: int) -> dict[str, SAE]:
    """The three SAEs, untrained, each from the same seed."""
    if d_sae < 1:
        raise UserError(f"d_sae: given {d_sae}; needed at least 1")
    if not 1 <= k <= d_sae:
        raise UserError(f"k: given {k}; needed 1 to d_sae = {d_sae}")
    torch.manual_seed(seed)
    contextual = ContextualSAE(d_in, d_sae, k, dead_after=DEAD_AFTER)
    torch.manual_seed(seed)
    topk = TopKSAE(d_in, d_sae, k, dead_after=DEAD_AFTER)
    torch.manual_seed(seed)
    wide = TopKSAE(d_in, wide_as(contextual.n_params, d_in), k, dead_after=DEAD_AFTER)
    return {"topk": topk, "topk-wide": wide, "contextual": contextual}


def wide_as(n_params: int, d_in: int) -> int:
    """The d_sae with which a TopK SAE has n_params parameters, or the fewest that are more."""
    return -(-(n_params - d_in) // (2 * d_in + 1))


def _cached(source: ModelActivations, folder: Path, progress: Progress) -> ActivationSource:
    """The activations of `source` from shards in the folder, written first where they are not there."""
    if not (folder / ABOUT_FILE).is_file():
        if folder.exists():
            raise UserError(f"{folder} is there, but holds no activations of a demo: give another --out, or delete it")
        unfinished = folder.with_name(folder.name + ".unfinished")
        if not (unfinished / ABOUT_FILE).is_file():
            shutil.rmtree(unfinished, ignore_errors=True)
        write_cache(source, unfinished, progress=progress)
        unfinished.rename(folder)
        return ShardActivations(folder)
    cached = ShardActivations(folder)
    made_from, wanted = cached.describe(), json.loads(json.dumps(source.describe()))
    # The dtype on disk is not the model's.
    differing = [key for key in wanted if key != "dtype" and made_from.get(key) != wanted[key]]
    if differing:
        changes = "; ".join(f"{key}: {made_from.get(key)}, wanted {wanted[key]}" for key in differing)
        raise UserError(f"{folder} holds the activations of another demo ({changes}): give another --out, or delete it")
    return cached


def _training_speed(run: Path) -> float:
    """Tokens a second of this SAE's steps, the median over the lines of metrics."""
    with open(run / METRICS, encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    # Runs of earlier versions were trained one by one, and say only that.
    return statistics.median(line.get("sae_tokens_per_s", line["tokens_per_s"]) for line in found)
