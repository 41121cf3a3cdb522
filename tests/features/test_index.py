"""An index of features against the SAE's own output; stopped, gone on, searched, and refused."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_line import one_line
from tiny_model import D_IN, PROSE

from csae import ContextualSAE, TopKSAE
from csae.attribution import attribute
from csae.data.activations import ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.text import TokenWindows, tokenize
from csae.errors import UserError
from csae.features.build import build_index
from csae.features.filler import is_filler
from csae.features.index import FeatureIndex
from csae.features.places import ACTIVITY, CARRIED, FRACTION
from csae.features.summary import BINS, PASSAGES, SIMILAR
from csae.sae import SAE

LAYER, N_CTX, D_SAE, K, BLOCK = 2, 24, 90, 5, 3


def make(kind: str, source: ModelActivations) -> SAE:
    torch.manual_seed(0)
    sae: Any = TopKSAE(D_IN, D_SAE, K)
    if kind == "contextual":
        sae = ContextualSAE(D_IN, D_SAE, K, n_heads=2, d_head=4, d_value=6, d_memory=8)
    acts, mask = source.read(range(source.n_windows))[:2]
    sae.initialise(acts[mask].mean(dim=0), float(acts[mask].std()))
    if kind == "contextual":
        with torch.no_grad():
            sae.W_O.mul_(8)
    return sae.eval()


@pytest.fixture(scope="module")
def source(tiny_lm: LanguageModel) -> ModelActivations:
    documents = [PROSE * 2, "Water came down; nobody heard it! " * 12, "=====\n\n" * 20 + PROSE]
    return ModelActivations(tiny_lm, LAYER, tokenize(documents, tiny_lm.tokenizer, N_CTX))


def build(path: Path, sae: SAE, source: ModelActivations, **given: Any) -> Path:
    options = {"run": "a run", "data": "a mill", "block_tokens": BLOCK * N_CTX} | given
    build_index(path, sae, source, options.pop("windows", range(source.n_windows)), source.lm, **options)
    return path


@pytest.fixture(scope="module", params=["contextual", "topk"])
def built(request: pytest.FixtureRequest, source: ModelActivations, tmp_path_factory) -> tuple[SAE, FeatureIndex]:
    sae = make(request.param, source)
    path = build(tmp_path_factory.mktemp("index") / "features.db", sae, source)
    return sae, FeatureIndex(path)


@torch.no_grad()
def presence(sae: SAE, source: ModelActivations) -> tuple[torch.Tensor, torch.Tensor]:
    """Activity and share of c of each feature at each position: [N * T, d_sae] each, by the SAE's own output."""
    acts, mask, documents = source.read(range(source.n_windows))[:3]
    new, carried = [], []
    for row in range(len(acts)):
        if isinstance(sae, ContextualSAE):
            found = attribute(sae, acts[row], mask[row], documents[row])
            code = found.output.code
            share = torch.zeros(N_CTX, D_SAE).index_add_(1, code.indices.flatten(), found.share.flatten(1))
        else:
            code, share = sae(acts[row]).code, torch.zeros(N_CTX, D_SAE)
        new.append(torch.zeros(N_CTX, D_SAE).scatter_(1, code.indices, code.values) * mask[row][:, None])
        carried.append(share * (share >= CARRIED))
    return torch.cat(new), torch.cat(carried)


def test_where_each_feature_is(built: tuple[SAE, FeatureIndex], source: ModelActivations) -> None:
    sae, index = built
    new, carried = presence(sae, source)
    _, mask, documents, tokens = source.read(range(source.n_windows))[:4]
    assert source.n_windows > 2 * BLOCK
    assert index.n_tokens == int(mask.sum())
    n_spans = 0
    for number in range(D_SAE):
        is_new, is_carried, stretches = index.where(number)
        at = new[:, number].nonzero().squeeze(1)
        assert is_new.positions.tolist() == at.tolist()
        assert is_new.amounts == pytest.approx((ACTIVITY * new[at, number]).numpy(), abs=1.01)
        assert is_new.tokens.tolist() == tokens.flatten()[at].tolist()
        at = carried[:, number].nonzero().squeeze(1)
        # A share at the threshold may fall on either side of it.
        clear = at[(carried[at, number] - CARRIED).abs() > 1e-5].tolist()
        assert set(clear) <= set(is_carried.positions.tolist())
        assert is_carried.amounts == pytest.approx((FRACTION * carried[is_carried.positions, number]).numpy(), abs=1.01)
        covered = [t for begin, end in zip(*stretches, strict=True) for t in range(begin, end)]
        assert covered == sorted({*is_new.positions.tolist(), *is_carried.positions.tolist()})
        for begin, end in zip(*stretches, strict=True):
            assert begin // N_CTX == (end - 1) // N_CTX, "nothing goes on in the next window"
            assert documents.flatten()[begin] == documents.flatten()[end - 1]
        assert len(set(stretches.begins.tolist()) & set(stretches.ends.tolist())) == sum(
            int(end) % N_CTX == 0 or bool(documents.flatten()[end] != documents.flatten()[end - 1])
            for end in set(stretches.begins.tolist()) & set(stretches.ends.tolist())
        ), "two stretches touch only where a window or a document begins"
        n_spans += len(stretches.begins)
    assert n_spans > 100
    assert bool(carried.any()) == isinstance(sae, ContextualSAE)


def test_what_is_known_of_a_feature(built: tuple[SAE, FeatureIndex], source: ModelActivations) -> None:
    sae, index = built
    new, carried = presence(sae, source)
    tokens = source.read(range(source.n_windows)).tokens
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = directions @ directions.T - 2 * torch.eye(D_SAE)
    times = [times for _, times, _ in index.features()]
    assert times == sorted((new > 0).sum(dim=0)[new.any(dim=0)].tolist(), reverse=True)
    for number in range(D_SAE):
        found = index.feature(number)
        if not new[:, number].any():
            assert found is None
            continue
        assert found is not None
        assert found.new == int((new[:, number] > 0).sum())
        is_new, is_carried, stretches = index.where(number)
        assert found.carried == len(set(is_carried.positions.tolist()) - set(is_new.positions.tolist()))
        assert found.spans == len(stretches.begins)
        assert found.largest == pytest.approx(float(new[:, number].max()), abs=0.011)
        counts, _ = np.histogram(is_new.amounts, bins=BINS, range=(0, is_new.amounts.max()))
        assert len(found.histogram) == BINS
        assert sum(found.histogram) == found.new
        assert np.abs(np.cumsum(found.histogram) - np.cumsum(counts)).max() <= (is_new.amounts % 5 == 0).sum()
        by_token: dict[int, float] = {}
        for at in is_new.positions:
            by_token[int(tokens.flatten()[at])] = by_token.get(int(tokens.flatten()[at]), 0) + float(new[at, number])
        words = dict(found.words)
        best = max(words, key=lambda word: (not is_filler(word), words[word]))
        assert found.words[0][0] == best, "fillers come last"
        assert words[best] == pytest.approx(
            max(
                (share / sum(by_token.values()) for token, share in by_token.items()
                 if is_filler(source.lm.tokenizer.decode([token])) == is_filler(best)), default=0), abs=0.02
        )  # fmt: skip
        passages = [passage for passage in found.passages if not is_filler(passage.token)]
        amounts = [passage.amount for passage in passages]
        assert amounts == sorted(amounts, reverse=True)
        assert len({passage.window for passage in passages}) == len(passages) <= PASSAGES
        for passage in found.passages[:3]:
            assert passage.amount == pytest.approx(float(new[passage.window * N_CTX + passage.t, number]), abs=0.011)
            assert passage.token == index.pieces(passage.window)[passage.t]
        assert len(found.similar) == SIMILAR
        assert [of for _, of in found.similar] == pytest.approx(cosine[number].topk(SIMILAR).values.tolist(), abs=1e-3)
        for passage in found.carried_passages:
            assert new[passage.window * N_CTX + passage.t, number] == 0
            assert passage.amount == pytest.approx(float(carried[passage.window * N_CTX + passage.t, number]), abs=1e-4)


def test_the_text_is_there(built: tuple[SAE, FeatureIndex], source: ModelActivations) -> None:
    index = built[1]
    tokens = source.token_windows.tokens
    for window in range(source.n_windows):
        assert "".join(index.pieces(window)) == source.lm.tokenizer.decode(tokens[window])
    found = index.texts("mill", 2)
    assert len(found) == 2
    for passage in found:
        assert "mill" in passage.token + passage.after
    assert index.texts("no such text") == []


def test_search(built: tuple[SAE, FeatureIndex], tiny_lm: LanguageModel) -> None:
    sae, index = built
    number, _, words = next(row for row in index.features() if row[2][0][0].strip().isalpha())
    found = index.find(f" {words[0][0].strip().upper()} ", 200)
    assert number in [other for other, *_ in found]
    wanted = words[0][0].strip().lower()
    exact = [word == wanted for _, word, *_ in found]
    assert exact == sorted(exact, reverse=True), "the token itself comes before what it is part of"
    assert index.find("no such token") == []

    scores = tiny_lm.logit_effects(torch.nn.functional.normalize(sae.W_dec.detach(), dim=1))
    scores = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True)
    active = [number for number, *_ in index.features()]
    token = tiny_lm.tokenizer.encode(" mill", add_special_tokens=False)[0]
    piece = tiny_lm.tokenizer.decode([token])
    raising = index.raising(piece)
    assert raising[0][0] == max(active, key=lambda number: float(scores[number, token]))
    assert raising[0][2] == pytest.approx(float(scores[active, token].max()), abs=0.006)
    with pytest.raises(UserError, match=r"no token of .* is that text"):
        index.raising("no such token")


def test_a_build_that_was_stopped_goes_on(source: ModelActivations, tmp_path: Path, monkeypatch) -> None:
    sae = make("contextual", source)
    whole = build(tmp_path / "whole.db", sae, source)
    read, reads = source.read, []

    def stop(windows):
        reads.append(list(windows))
        if len(reads) == 3:
            raise KeyboardInterrupt
        return read(windows)

    monkeypatch.setattr(source, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped.db", sae, source)
    with pytest.raises(UserError, match="not finished: run `csae features` again"):
        FeatureIndex(tmp_path / "stopped.db")
    build(tmp_path / "stopped.db", sae, source)
    assert reads[2] == reads[3], "goes on with the block that was stopped, not with the first"
    dumps = [list(sqlite3.connect(path).iterdump()) for path in (whole, tmp_path / "stopped.db")]
    assert dumps[0] == dumps[1]
    n_reads = len(reads)
    build(tmp_path / "stopped.db", sae, source)
    assert len(reads) == n_reads, "a finished index is left as it is"


def test_what_is_refused(source: ModelActivations, tiny_lm: LanguageModel, tmp_path: Path, monkeypatch) -> None:
    sae = make("topk", source)
    path = build(tmp_path / "features.db", sae, source, windows=range(4))
    for changed in ({"windows": range(5)}, {"sae": make("contextual", source)}, {"data": "another"}):
        with pytest.raises(UserError, match="an index of something else") as error:
            build(path, changed.pop("sae", sae), source, **({"windows": range(4)} | changed))
        one_line(error)
    with FeatureIndex(path) as index:
        index.check(sae, index.about["model"])
        with pytest.raises(UserError, match=r"of the model .*; needed another"):
            index.check(sae, "another")
        with torch.no_grad():
            sae.W_enc[0, 0] += 1e-3
        with pytest.raises(UserError, match="of another SAE"):
            index.check(sae)
    no_index = tmp_path / "text.db"
    no_index.write_text("not a database, though long enough to be taken for one" * 20)
    other = tmp_path / "other.db"
    sqlite3.connect(other).execute("CREATE TABLE t (x)").connection.commit()
    for file in (no_index, other):
        with pytest.raises(UserError, match="no index of features") as error:
            FeatureIndex(file)
        one_line(error)
        with pytest.raises(UserError, match="no index of features"):
            build(file, sae, source)
    with pytest.raises(UserError, match="no such file"):
        FeatureIndex(tmp_path / "none.db")
    holding = sqlite3.connect(path, isolation_level=None)
    holding.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="another process is writing it"):
        FeatureIndex(path)
    holding.close()
    read = source.read
    monkeypatch.setattr(source, "read", lambda windows: read(windows)._replace(tokens=None))
    with pytest.raises(UserError, match="without token ids"):
        build(tmp_path / "new.db", sae, source)


def test_features_stay_in_their_documents(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    windows = TokenWindows(torch.randint(5, 100, (4, 8)), torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 4))
    source = ModelActivations(tiny_lm, LAYER, windows, keep_first=True)
    sae = make("contextual", source)
    with FeatureIndex(build(tmp_path / "features.db", sae, source)) as index:
        touching = 0
        for number in range(D_SAE):
            for begin, end in zip(*index.where(number)[2], strict=True):
                assert {0, 3, 6, 8}.isdisjoint(range(begin % 8 + 1, (end - 1) % 8 + 1))
                touching += (end - 1) % 8 in (2, 5, 7)
        assert touching
        json.dumps(index.about)


@pytest.mark.parametrize("kind", ["contextual", "topk"])
def test_each_window_is_shown_as_progress(kind: str, source: ModelActivations, tmp_path: Path) -> None:
    shown: dict[str, int] = {}

    def count(items: Any, description: str, total: int | None = None) -> Any:
        assert len(items) if total is None else total
        for item in items:
            shown[description] = shown.get(description, 0) + 1
            yield item

    build(tmp_path / "a.db", make(kind, source), source, progress=count)
    assert shown["a run: features, windows of text"] == source.n_windows
    assert shown["a run: features, one by one"] >= 1
