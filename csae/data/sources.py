"""Opening activations from a description that fits in JSON, so that a run can say where its own came from."""

from __future__ import annotations

from typing import Any

from csae.data.activations import ActivationSource, ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.shard_activations import ShardActivations
from csae.data.text import TokenWindows, beginning, load_token_dataset, read_documents, tokenize
from csae.errors import UserError, shown
from csae.progress import Progress, quiet
from csae.trained_on import same_model


def open_source(
    origin: dict[str, Any], device: str | None = None, progress: Progress = quiet
) -> tuple[ActivationSource, LanguageModel | None]:
    """The activations that `origin` describes, and the language model where one makes them.

    origin: {"activations": folder}, or {"model", "layer", "n_ctx", "max_tokens"} with one of {"text": file or
    folder} and {"dataset": name or folder}. Beside those "keep_first", true where position 0 and outliers take part
    (`csae.data.activations.sink_mask`), and with a model "bos", whether windows begin with a beginning of sequence:
    false if it is not there, null for the tokenizer's own convention (`csae.data.text.beginning`). Raises UserError
    where a part is missing or does not fit.
    """
    keep_first = bool(origin.get("keep_first"))
    if origin.get("activations") is not None:
        return ShardActivations(origin["activations"], keep_first), None
    for name in ("model", "layer"):
        if origin.get(name) is None:
            raise UserError(f"--{name}: not given; needed with --text or --dataset (or give --activations DIR)")
    if (origin.get("text") is None) == (origin.get("dataset") is None):
        raise UserError("--text, --dataset: needed one of them (or --activations DIR)")
    lm = LanguageModel.load(origin["model"], device=device)
    lm.block(origin["layer"])
    windows = _windows(origin, lm, progress)
    lm.check_tokens(windows.tokens)
    return ModelActivations(lm, origin["layer"], windows, keep_first=keep_first), lm


def check_said(given: dict[str, Any], source: ActivationSource) -> None:
    """Raises UserError where what was given beside --activations is not what those say of themselves."""
    if given.get("activations") is None:
        return
    said = source.describe()
    for name in ("model", "layer", "n_ctx"):
        one, other = given.get(name), said.get(name)
        if one is None or other is None or one == other:
            continue
        if name != "model" or not same_model(str(one), str(other)):
            raise UserError(
                f"--{name.replace('_', '-')}: given {shown(one)}, but the activations say {shown(other)}: "
                "leave the option out, or give other activations"
            )


def remembered(origin: dict[str, Any], source: ActivationSource) -> dict[str, Any]:
    """`origin` for a run to keep, with `bos` as the source resolved it: true or false, never "by convention"."""
    about = source.describe()
    kept = {name: value for name, value in origin.items() if name not in ("bos", "keep_first")}
    return kept | {name: True for name in ("bos", "keep_first") if about.get(name)}


def _windows(origin: dict[str, Any], lm: LanguageModel, progress: Progress) -> TokenWindows:
    n_ctx, max_tokens = origin["n_ctx"], origin.get("max_tokens")
    if lm.max_ctx is not None and n_ctx > lm.max_ctx:
        raise UserError(f"--n-ctx: given {n_ctx}; the context of {lm.name} is {lm.max_ctx} tokens at most")
    begin = beginning(lm.tokenizer, origin.get("bos", False), lm.n_vocab)
    if origin.get("dataset") is not None:
        return load_token_dataset(origin["dataset"], n_ctx, max_tokens, begin=begin, n_vocab=lm.n_vocab)
    documents = read_documents(origin["text"])
    return tokenize(documents, lm.tokenizer, n_ctx, max_tokens, progress=progress, begin=begin)
