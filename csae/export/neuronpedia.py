"""Dashboards as SAEDashboard (PyPI sae-dashboard 0.8) writes them and Neuronpedia's importer reads them.

    FOLDER/batch-0.json ...      features, 128 a file: where each is most active, histograms, what it does to the logits
    FOLDER/skipped_indexes.json  the features that are not active on this text

A file holds what `sae_dashboard.neuronpedia.neuronpedia_dashboard.NeuronpediaDashboardBatch` takes. What differs from
SAEDashboard's own files: passages of one group are of different windows; those of the lowest interval have the feature
active; logits are in standard deviations from their mean over the vocabulary; positions that the mask leaves out are
not counted; the correlations of features and neurons are empty.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csae.data.language_model import LanguageModel
from csae.data.pieces import token_piece, token_pieces
from csae.errors import UserError
from csae.export.codes import About, Codes
from csae.export.places import needed_hook
from csae.files import write_file
from csae.progress import Progress, quiet
from csae.sae import SAE
from csae.trained_on import model_name

FEATURES_A_FILE = 128
TOP, INTERVALS, OF_AN_INTERVAL = 20, 5, 5  # passages with the largest activations, and random ones of each interval
PASSAGE = 128  # tokens
BINS, LOGITS, NEURONS = 50, 10, 3


def folders(out: Path, sae: SAE, lm: LanguageModel) -> tuple[Path, Path]:
    """The folder that `write` fills, and the one that Neuronpedia's converter takes: the same."""
    return out, out


def write(folder: Path, sae: SAE, lm: LanguageModel, codes: Codes, about: About, progress: Progress = quiet) -> None:
    """Writes the dashboards."""
    point = lm.hook(needed_hook(sae))
    reader = _Reader(codes, lm.tokenizer)
    alive = [feature for feature in range(sae.d_sae) if reader.count(feature)]
    if not alive:
        raise UserError("no feature is active on this text: give another text, or more --windows")
    head = {"model_id": model_name(lm.name).rpartition("/")[2], "layer": 0 if point.block is None else point.block}
    starts = range(0, len(alive), FEATURES_A_FILE)
    for number, start in enumerate(progress(starts, "dashboards")):
        of_file = alive[start : start + FEATURES_A_FILE]
        directions = sae.W_dec[of_file].detach().float()
        logits = _logits(lm, directions)
        features = [
            {
                "feature_index": feature,
                **_neurons(direction),
                "correlated_neurons_indices": [],
                "correlated_neurons_l1": [],
                "correlated_neurons_pearson": [],
                "correlated_features_indices": [],
                "correlated_features_l1": [],
                "correlated_features_pearson": [],
                **of_logits,
                **reader.activity(feature),
                "n_prompts_total": len(codes.tokens),
                "n_tokens_in_prompt": reader.length,
                "dataset": about.data,
                "decoder_weights_dist": [],
                "vector": [],
            }
            for feature, direction, of_logits in zip(of_file, directions, logits, strict=True)
        ]
        batch = {**head, "sae_set": about.name, "sae_id_suffix": None, "features": features}
        _write_json(folder / f"batch-{number}.json", batch)
    skipped = sorted(set(range(sae.d_sae)) - set(alive))
    said = {**head, "layer": str(head["layer"]), "sae_set": about.name, "log_sparsity": -6, "skipped_indexes": skipped}
    _write_json(folder / "skipped_indexes.json", said)


class _Reader:
    """What codes say of one feature after the other."""

    def __init__(self, codes: Codes, tokenizer: Any) -> None:
        self._features, self._places, self._values = codes.active()
        self._tokens, self._tokenizer = codes.tokens, tokenizer
        self._counted = int(codes.mask.sum())
        self.length = min(PASSAGE, codes.tokens.shape[1])
        """tokens of a passage"""
        n_features = int(self._features.max()) + 2 if len(self._features) else 1
        self._bounds = torch.searchsorted(self._features, torch.arange(n_features + 1)).tolist()
        self._pieces = cache(self._pieces_of)

    def count(self, feature: int) -> int:
        """How often a feature is active."""
        return self._range(feature)[1] - self._range(feature)[0]

    def activity(self, feature: int) -> dict[str, Any]:
        """Its density, the histogram of its activations, and passages: the largest, and some of each interval."""
        start, end = self._range(feature)
        places, values = self._places[start:end], self._values[start:end]
        most = float(values.max())
        passages = [
            self._passage(places, values, at, -1, round(most, 3), -1)
            for at in self._of_different_windows(places, values.argsort(descending=True, stable=True), TOP)
        ]
        generator = torch.Generator().manual_seed(feature)
        edges = torch.linspace(0, most, INTERVALS + 1).tolist()
        for least, largest in reversed(list(pairwise(edges))):
            inside = (values >= least) & (values <= largest)
            count = int(inside.sum()) + (self._counted - len(values) if least == 0 else 0)
            drawn = inside.nonzero().squeeze(1)
            drawn = drawn[torch.randperm(len(drawn), generator=generator)]
            passages += [
                self._passage(places, values, at, round(least, 3), round(largest, 3), round(count / self._counted, 5))
                for at in self._of_different_windows(places, drawn, OF_AN_INTERVAL)
            ]
        heights, middles = _histogram(values)
        return {
            "frac_nonzero": round(len(values) / self._counted, 5),
            "freq_hist_data_bar_values": middles,
            "freq_hist_data_bar_heights": heights,
            "activations": passages,
        }

    def _range(self, feature: int) -> tuple[int, int]:
        if feature + 1 >= len(self._bounds):
            return 0, 0
        return self._bounds[feature], self._bounds[feature + 1]

    def _of_different_windows(self, places: Tensor, ordered: Tensor, n: int) -> list[int]:
        """The first n of these activations that are of different windows."""
        windows: dict[int, int] = {}
        for at, window in zip(ordered.tolist(), (places[ordered] // self._tokens.shape[1]).tolist(), strict=True):
            windows.setdefault(window, at)
            if len(windows) == n:
                break
        return list(windows.values())

    def _passage(
        self, places: Tensor, values: Tensor, at: int, least: float, most: float, contains: float
    ) -> dict[str, Any]:
        """The text around an activation, mostly what is before it, with all activations of the feature there."""
        T = self._tokens.shape[1]
        window, t = divmod(int(places[at]), T)
        first = max(0, min(t - 3 * self.length // 4, T - self.length))
        there = torch.zeros(self.length)
        near = (places >= window * T + first) & (places < window * T + first + self.length)
        there[places[near] - window * T - first] = values[near]
        return {
            "bin_min": least,
            "bin_max": most,
            "bin_contains": contains,
            "tokens": self._pieces(window)[first : first + self.length],
            "values": [round(value, 3) for value in there.tolist()],
            "qualifying_token_index": t - first,
        }

    def _pieces_of(self, window: int) -> list[str]:
        return token_pieces(self._tokenizer, self._tokens[window].tolist())


def _neurons(direction: Tensor) -> dict[str, Any]:
    """The dimensions that a feature writes to most."""
    top = direction.topk(min(NEURONS, len(direction)))
    return {
        "neuron_alignment_indices": top.indices.tolist(),
        "neuron_alignment_values": _rounded(top.values),
        "neuron_alignment_l1": _rounded(top.values.abs() / direction.abs().sum().clamp_min(1e-12)),
    }


def _logits(lm: LanguageModel, directions: Tensor) -> list[dict[str, Any]]:
    """What directions do to the next token, on the direct path; nothing where they are not of the stream's width."""
    if directions.shape[1] != lm.d_in:
        names = ["neg_str", "neg_values", "pos_str", "pos_values"]
        names += ["logits_hist_data_bar_heights", "logits_hist_data_bar_values"]
        return [{name: [] for name in names}] * len(directions)
    scores = lm.logit_effects(nn.functional.normalize(directions, dim=1)).cpu()
    scores -= scores.mean(dim=1, keepdim=True)
    scores /= scores.std(dim=1, keepdim=True).clamp_min(1e-12)
    piece = cache(lambda token: token_piece(lm.tokenizer, token))
    found = []
    for of in scores:
        up, down = of.topk(min(LOGITS, len(of))), of.topk(min(LOGITS, len(of)), largest=False)
        heights, middles = _histogram(of)
        found.append(
            {
                "neg_str": [piece(token) for token in down.indices.tolist()],
                "neg_values": _rounded(down.values),
                "pos_str": [piece(token) for token in up.indices.tolist()],
                "pos_values": _rounded(up.values),
                "logits_hist_data_bar_heights": heights,
                "logits_hist_data_bar_values": middles,
            }
        )
    return found


def _histogram(values: Tensor) -> tuple[list[int], list[float]]:
    """How many are in each of 50 equal bins, and the middles of the bins."""
    least, most = float(values.min()), float(values.max())
    edges = torch.linspace(least, most, BINS + 1)
    return torch.histc(values, bins=BINS).int().tolist(), _rounded((edges[:-1] + edges[1:]) / 2)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, allow_nan=False)
    write_file(file, lambda path: path.write_text(text, encoding="utf-8"))
