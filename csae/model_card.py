"""The model card of an SAE that is pushed: what it is, its figures, its data, how it was trained, and how to use it."""

from __future__ import annotations

import re
from typing import Any

from csae.data.places import layer_of
from csae.sae import SAE
from csae.trained_on import TrainedOn, card, data_name, table_cell
from csae.versions import pip_install

TEXT = "The sluice at the lower mill was opened on the third morning."
# What eval.json holds, in the words of a reader.
FIGURES = {
    "fvu": ("fraction of variance unexplained (FVU)", "{:.4f}"),
    "fvu_sweeps": ("FVU in sweeps, as training runs it", "{:.4f}"),
    "l0": ("active features a token (L0)", "{:.1f}"),
    "cosine": ("cosine of reconstruction and activation", "{:.4f}"),
    "ce_clean": ("next-token cross-entropy of the language model, nats", "{:.3f}"),
    "ce_sae": ("with the reconstruction in place", "{:.3f}"),
    "ce_zero": ("with zeros in place", "{:.3f}"),
    "loss_recovered": ("loss recovered", "{:.1%}"),
    "dead": ("features that training left dead", "{:.1%}"),
    "silent": ("features that are never active here", "{:.1%}"),
}
TRAINING = ("steps", "batch_windows", "lr", "look_back_lr", "warmup", "decay", "precision", "moments", "seed")
KINDS = {
    "topk": "It is a TopK SAE (Gao et al. 2024, arXiv 2406.04093): each token by itself, its k most active features.",
    "contextual": (
        "It is a contextual SAE: its encoder attends to the feature activations of earlier positions and leaves out "
        "what they account for. A feature is active where something is new. Give it whole windows, in order."
    ),
}

TRANSCODER = " It is a transcoder: it reads activations at one place, and predicts those at another."


def model_card(sae: SAE, repo_id: str, job: dict[str, Any], figures: dict[str, Any]) -> str:
    """README.md for the hub, in Markdown.

    Args:
        repo_id: ORG/NAME, which the snippet loads from.
        job: the content of run.json; empty where there is none.
        figures: the content of eval.json; empty where there is none.
    """
    parts = [card(sae).rstrip("\n"), KINDS[sae.arch] + (TRANSCODER if sae.is_transcoder else "")]
    if figures:
        parts += ["## Figures", _figures(figures)]
    parts += ["## Data", _data(sae.trained_on or TrainedOn(), job)]
    if job.get("train"):
        rows = [(name, job["train"][name]) for name in TRAINING if name in job["train"]]
        parts += ["## Training", _table([*rows, ("parameters", job.get("n_params"))])]
    parts += ["## Use", f"```sh\n{pip_install('cli')}\n```", f"```python\n{snippet(sae, repo_id)}```"]
    return "\n\n".join(parts) + "\n"


def snippet(sae: SAE, name: str) -> str:
    """A program that loads the SAE from `name`, a hub id or a folder, and shows its features on a text."""
    on = sae.trained_on or TrainedOn()
    place = on.at()
    x_hat = "the prediction" if sae.is_transcoder else "the reconstruction"
    shown = f"# x_hat: {x_hat}; code: values and indices of the active features"
    if on.model is None or place is None:
        return "\n".join(
            [
                "import torch",
                "from csae.checkpoint import load_sae",
                "",
                f"sae = load_sae({name!r})",
                f"acts = torch.randn(1, {on.n_ctx or 64}, {sae.d_in})  # in their place: activations, whole windows",
                f"out = sae(acts)  {shown}",
                "print(out.code.indices[0])",
                "",
            ]
        )
    return "\n".join(
        [
            "from csae.checkpoint import load_sae",
            "from csae.data.activations import sink_mask",
            "from csae.data.language_model import LanguageModel",
            "",
            f"lm = LanguageModel.load({on.model!r})",
            f"sae = load_sae({name!r}, lm.device)",
            f"tokens = lm.tokenizer({TEXT!r}, return_tensors='pt').input_ids",
            f"acts = lm.activations(tokens, {layer_of(place.hook) or repr(place.hook)}).float()  # [1, T, {sae.d_in}]",
            "mask = sink_mask(acts, None, *sae.masking)  # what takes part, as in training",
            f"out = sae(acts, mask)  {shown}",
            "for t in mask[0].nonzero().flatten().tolist():",
            "    active = out.code.indices[0, t][out.code.values[0, t] > 0]",
            "    print(repr(lm.tokenizer.decode(tokens[0, t])), active.tolist())",
            "",
        ]
    )


def _figures(figures: dict[str, Any]) -> str:
    from csae.evaluate import data_in_words  # it needs rich

    rows = [
        (words, how.format(figures[name])) for name, (words, how) in FIGURES.items() if figures.get(name) is not None
    ]
    said = f"Measured {data_in_words(figures)}, {figures['tokens']:,} tokens."
    return f"{table_cell(said)}\n\n{_table(rows)}"


def _data(on: TrainedOn, job: dict[str, Any]) -> str:
    origin = job.get("origin") or {}
    name = on.data or data_name({**(job.get("data") or {}), **origin})
    tokens = None
    if job.get("train") and job.get("n_ctx"):
        tokens = f"{job['train']['steps'] * job['train']['batch_windows'] * job['n_ctx']:,}"
    hub = isinstance(name, str) and origin.get("dataset") == name and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)
    said = [
        (
            "text",
            None if name is None else f"[{name}](https://huggingface.co/datasets/{name})" if hub else table_cell(name),
        ),
        ("tokens trained on", tokens),
        ("windows held out", origin.get("held_out")),
    ]
    rows = [f"| {what} | {value} |" for what, value in said if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else "It is not known what it was trained on."


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {table_cell(value)} |" for name, value in rows if value is not None)]
    )
