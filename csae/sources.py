"""Opening activations from a description that fits in JSON, so that a run can say where its own came from."""

from __future__ import annotations

from typing import Any

from csae.activations import ActivationSource, ModelActivations, ShardActivations
from csae.errors import UserError
from csae.language_model import LanguageModel
from csae.progress import Progress, quiet
from csae.text import TokenWindows, load_token_dataset, read_documents, tokenize


def open_source(
    origin: dict[str, Any], device: str | None = None, progress: Progress = quiet
) -> tuple[ActivationSource, LanguageModel | None]:
    """The activations that `origin` describes, and the language model where one makes them.

    origin: {"activations": folder}, or {"model", "layer", "n_ctx", "max_tokens"} with one of {"text": file or
    folder} and {"dataset": name or folder}. Raises UserError where a part is missing or does not fit.
    """
    if origin.get("activations") is not None:
        return ShardActivations(origin["activations"]), None
    for name in ("model", "layer"):
        if origin.get(name) is None:
            raise UserError(f"--{name}: not given; needed with --text or --dataset (or give --activations DIR)")
    if (origin.get("text") is None) == (origin.get("dataset") is None):
        raise UserError("--text, --dataset: needed one of them (or --activations DIR)")
    lm = LanguageModel.load(origin["model"], device=device)
    lm.block(origin["layer"])
    windows = _windows(origin, lm, progress)
    lm.check_tokens(windows.tokens)
    return ModelActivations(lm, origin["layer"], windows), lm


def _windows(origin: dict[str, Any], lm: LanguageModel, progress: Progress) -> TokenWindows:
    n_ctx, max_tokens = origin["n_ctx"], origin.get("max_tokens")
    if lm.max_ctx is not None and n_ctx > lm.max_ctx:
        raise UserError(f"--n-ctx: given {n_ctx}; the context of {lm.name} is {lm.max_ctx} tokens at most")
    if origin.get("dataset") is not None:
        return load_token_dataset(origin["dataset"], n_ctx, max_tokens)
    return tokenize(read_documents(origin["text"]), lm.tokenizer, n_ctx, max_tokens, progress=progress)
