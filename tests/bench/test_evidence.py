"""`csae evidence` on a tiny model: it makes every part, and a second call makes nothing again."""

from __future__ import annotations

import json
import pydoc_data.topics
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from csae.bench.evidence import command, grid, summary, synthetic, texts
from csae.bench.evidence.grid import CURRENT, PAST, TOPK, WIDE, Budget, Cell
from csae.data.language_model import LanguageModel
from csae.errors import UserError

TINY = {"ks": (2,), "layers": (2,), "seeds": 1, "budget": Budget(d_sae=40, tokens=1024, distinct=1024, n_ctx=32)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = pydoc_data.topics.topics
    monkeypatch.setattr(texts, "python_prose", lambda: [topics[name] for name in sorted(topics)[:40]])
    monkeypatch.setattr(grid, "HELD_OUT", 8)
    monkeypatch.setattr(command, "SWITCH_WINDOWS", 8)
    monkeypatch.setattr(command, "LONGER", 2)
    monkeypatch.setattr(command, "REGION_TOKENS", 8)
    monkeypatch.setattr(synthetic, "run", partial(synthetic.run, steps=3))
    monkeypatch.setattr(synthetic, "cases", lambda: [synthetic.Case(16, query, d_in=32) for query in (None, "current")])


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    """Two languages that share no letter."""
    for name, letters in (("one", "abcde"), ("two", "vwxyz")):
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for number in range(30):
            words = [letters[(number + i) % 5] * (1 + (i * number) % 6) for i in range(60)]
            (folder / f"{number}.txt").write_text("\n\n".join(" ".join(words[i : i + 12]) for i in range(0, 60, 12)))
    return tmp_path / "texts"


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Without the page and the figures, which take longer than all the rest."""
    patch.setattr(command.page, "write_page", lambda path, evidence: None)
    patch.setattr(command.page, "write_figures", lambda folder, evidence: [])


def test_from_nothing_to_a_report_and_on_from_there(
    small: None, languages: Path, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "evidence"
    run = partial(command.run_evidence, out, tiny_model_path, languages=languages, device="cpu", **TINY)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        undrawn(patch)
        first = run(corpora=("english",), limit=2)
    assert [entry["arch"] for entry in first["runs"]] == [TOPK, WIDE]
    whole = run()
    assert json.loads((out / "evidence.json").read_text()) == json.loads(json.dumps(whole))
    assert whole["runs"][:2] == first["runs"]
    archs = {entry["arch"] for entry in whole["runs"]}
    assert archs == {TOPK, WIDE, CURRENT, PAST, "batch-topk", "temporal-features", "temporal-sae"}
    wanted = "arch query k d_sae n_params model layer corpus tokens seed fvu fvu_exact l0 loss_recovered bits_per_token"
    for entry in whole["runs"]:
        assert set(wanted.split()) <= set(entry)
        assert (entry["bits_per_token"] is None) == (entry["arch"] == "temporal-features")
        assert entry["tokens"] == 1024
    size = {entry["arch"]: entry["n_params"] for entry in whole["runs"] if entry["k"] == 2}
    assert size[TOPK] < size[CURRENT] == size[PAST] <= size[WIDE] < 1.1 * size[CURRENT]
    assert {row["query"] for row in whole["headline"]} == {"current", "past"}
    assert {entry["corpus"] for entry in whole["redundancy"]} == {"english", "multilingual"}
    assert {(entry["query"], entry["k_mem"]) for entry in whole["power"]} == {
        ("current", None), ("past", None), ("current", 1)
    }  # fmt: skip
    assert [entry["arch"] for entry in whole["switches"]] == [TOPK, CURRENT, PAST]
    assert [entry["arch"] for entry in whole["long"]] == [TOPK, CURRENT, PAST]
    assert [entry["query"] for entry in whole["synthetic"]] == [None, "current"]
    assert "</html>" in (out / "report.html").read_text()
    assert list((out / "figures").glob("*.png"))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("made twice")

    for module, name in ((grid, "train"), (grid, "write_cache"), (synthetic, "run"), (command.power, "measure")):
        monkeypatch.setattr(module, name, refuse)
    undrawn(monkeypatch)
    assert run()["runs"] == whole["runs"]
    with pytest.raises(UserError, match=r"holds other evidence \(it differs in budget\)"):
        command.run_evidence(out, tiny_model_path, **TINY | {"budget": Budget()})  # type: ignore[arg-type]


def test_a_model_that_wants_a_beginning_is_refused(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "beginning", lambda tokenizer: (0,))
    with pytest.raises(
        UserError, match="wants texts to begin with a beginning of sequence, and these windows begin with"
    ):
        command.run_evidence(tmp_path / "out", tiny_model_path, device="cpu", **TINY)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": ()}, "ks: none given; needed at least one"),
        ({"ks": (0,)}, "ks: given 0; needed at least 1"),
        ({"corpora": ("latin",)}, "corpora: given 'latin'; needed some of english, multilingual"),
        ({"seeds": 0}, "seeds: given 0; needed at least 1"),
        ({"limit": 0}, "limit: given 0; needed at least 1"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        command.run_evidence(tmp_path, **options)


def test_a_folder_of_something_else_is_refused(tiny_model_path: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty, and no evidence of csae: give another --out"):
        command.run_evidence(tmp_path, tiny_model_path, **TINY)  # type: ignore[arg-type]


def test_the_grid_is_whole_and_begins_with_what_tells_most() -> None:
    cells = grid.cells((4, 8, 16, 32, 64), (6, 12, 20), ("english", "multilingual"), range(3))
    assert len(set(cells)) == len(cells)
    first = cells[: 3 * (4 + 2) + 3 + 2]  # ours, TopK with more features, baselines
    assert {(cell.layer, cell.corpus) for cell in first} == {(12, "english")}
    assert {(cell.arch, cell.k) for cell in first if cell.k != 16} == {(TOPK, 24), (TOPK, 32)}
    assert {cell.seed for cell in first} == {0, 1, 2}
    assert len({cell.arch for cell in first}) == 7
    for seed in range(3):
        for arch in (TOPK, WIDE, CURRENT, PAST):
            for k in (4, 8, 16, 32, 64):
                for layer in (6, 12, 20):
                    for corpus in ("english", "multilingual"):
                        assert Cell(arch, k, corpus, layer, seed) in cells


def test_hook_points_in_the_grid_are_known_by_one_name(tiny_lm: LanguageModel) -> None:
    assert command._places(tiny_lm, (1,), ("mlp.out:*", "resid.out:0", "model.layers.1", "model.layers.2.mlp")) == [
        1, "mlp.out:0", "mlp.out:1", "mlp.out:2", 2
    ]  # fmt: skip
    cells = grid.cells((4,), ["mlp.out:1", 2, 1], ("english",), range(1))
    assert {cell.layer for cell in cells[:6]} == {2}, "layers come before other places"
    names = [cell.name for cell in cells if cell.layer == "mlp.out:1"]
    assert names[0] == "english-mlp.out-1-topk-k4-seed0"
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_evidence_at_a_hook_point(
    small: None, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    monkeypatch.setattr(synthetic, "cases", lambda: [])
    given = {name: value for name, value in TINY.items() if name != "layers"}
    run = partial(command.run_evidence, tmp_path / "a", tiny_model_path, corpora=("english",), device="cpu", **given)
    found = run(hooks=("mlp.out:1",), limit=1)
    assert [(entry["name"], entry["layer"]) for entry in found["runs"]] == [
        ("english-mlp.out-1-topk-k2-seed0", "mlp.out:1")
    ]
    assert grid.trained(tmp_path / "a", grid.Cell(TOPK, 2, "english", "mlp.out:1", 0)).trained_on.hook == "mlp.out:1"
    assert summary.in_words("mlp.out:1") == "mlp.out:1"
    assert summary.in_words(12) == "layer 12"
    assert (tmp_path / "a" / "activations" / "english-mlp.out-1").is_dir()
    with pytest.raises(UserError, match="no such place"):
        run(hooks=("mlp.outs:1",))


def test_the_k_that_matches() -> None:
    curve = [(k, k**-0.5) for k in (4, 16, 32)]
    for k, beyond in ((8, False), (16, False), (20, False), (48, True), (3, True)):
        found = grid.matching_k(curve, k**-0.5)
        assert found == (pytest.approx(k), beyond)


def test_the_headline_compares_like_with_like() -> None:
    same = {"query": None, "k_mem": None, "model": "m", "corpus": "c", "layer": 1}
    runs = [
        {**same, "arch": arch, "k": k, "seed": seed, "fvu": (seed + 1) * (2 if arch == TOPK else 1.5) / k}
        for arch in (TOPK, WIDE)
        for k in (4, 8)
        for seed in (0, 1)
    ]
    runs += [
        {**same, "arch": CURRENT, "query": "current", "k": 4, "seed": seed, "fvu": (seed + 1) / 4} for seed in (0, 1)
    ]
    runs += [{**same, "arch": CURRENT, "query": "current", "k": 4, "seed": 0, "fvu": 1.0, "k_mem": 1}]
    first, second = grid.headline(runs)
    assert (first["topk"], first["topk_ratio"], first["topk_beyond"]) == (pytest.approx(8), pytest.approx(2), False)
    assert (first["wide"], first["wide_ratio"]) == (pytest.approx(6), pytest.approx(1.5))
    assert second["topk"] == pytest.approx(8)
    assert "topk" not in grid.headline(runs[:1] + runs[-2:-1])[0]
