"""`csae view`: its facts against a float64 reference, and the page: in a browser, with the keyboard, and offline."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_model import D_IN, PROSE, make_tokenizer

from csae import ContextualSAE, TopKSAE
from csae.attribution import attribute
from csae.cli import main
from csae.data.language_model import LanguageModel
from csae.data.places import Place
from csae.errors import UserError
from csae.features.effects import Effects, effects_of
from csae.pages.view import ACTIVITY, CARRIED, FRACTION, PARTS_SHOWN, ROWS, Window, read_windows, view
from csae.pages.view_page import running_mean, write_view
from csae.sae import SAE
from csae.trained_on import TrainedOn

LAYER, N_CTX, D_SAE, K = 2, 40, 90, 5
TEXT = PROSE + "Quelqu'un ouvrit la vanne — « enfin » !\n\n日本語も。\n" + PROSE[:60]


def fitted(sae: SAE, windows: list[Window]) -> SAE:
    """With weights that make it carry a lot, unequally."""
    acts = torch.cat([window.acts[window.mask] for window in windows])
    sae.initialise(acts.mean(dim=0), float(acts.std()))
    if isinstance(sae, ContextualSAE):
        with torch.no_grad():
            sae.W_O.mul_(8)
            sae.W_mem.mul_(torch.linspace(0.1, 3, D_SAE)[:, None])
    return sae.eval()


@pytest.fixture(scope="module")
def windows(tiny_lm: LanguageModel) -> list[Window]:
    found, whole = read_windows(tiny_lm, LAYER, TEXT, N_CTX)
    assert whole
    return found


@pytest.fixture(scope="module", params=["current", "past"])
def contextual(request: pytest.FixtureRequest, windows: list[Window]) -> ContextualSAE:
    torch.manual_seed(0)
    sae = ContextualSAE(D_IN, D_SAE, K, n_heads=2, d_head=4, d_value=6, d_memory=8, query=request.param)
    return fitted(sae, windows)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def per_token(windows: list[Window]) -> SAE:
    torch.manual_seed(1)
    return fitted(TopKSAE(D_IN, D_SAE, K), windows)


@pytest.fixture(scope="module")
def effects(tiny_lm: LanguageModel) -> Effects:
    """Of the model, with nothing taken for noise: what directions of 16 dimensions do is never clear."""
    return effects_of(tiny_lm)._replace(noise=0)


@pytest.fixture(scope="module")
def facts(contextual: SAE, per_token: SAE, windows: list[Window], tiny_lm: LanguageModel, effects) -> dict[str, Any]:
    found = view(contextual, windows, tiny_lm, trained_on=10, beside=per_token, effects=effects)
    return json.loads(json.dumps(found, allow_nan=False))


def pairs(flat: list[int]) -> dict[int, int]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def test_windows_are_the_text(tiny_lm: LanguageModel, windows: list[Window], facts: dict[str, Any]) -> None:
    lengths = [len(window.tokens) for window in windows]
    assert len(lengths) > 2
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= N_CTX
    assert "".join(facts["tokens"]) == TEXT
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    assert facts["cuts"] == starts[1:]
    assert set(starts) <= set(facts["left_out"])
    for t in facts["left_out"]:
        assert facts["new"][t] == facts["carried"][t] == facts["parts"][t] == []
        assert facts["c"][t] == facts["missed"][t] == 0
    cut, whole = read_windows(tiny_lm, LAYER, TEXT, N_CTX, max_tokens=50)
    assert not whole
    assert sum(len(window.tokens) for window in cut) == 50
    one, _ = read_windows(tiny_lm, LAYER, "mill", N_CTX, max_tokens=2)
    assert len(one) == 1


def test_what_is_said_of_each_token(contextual: ContextualSAE, windows: list[Window], facts: dict[str, Any]) -> None:
    exact = copy.deepcopy(contextual).double()
    start = 0
    for window in windows:
        T = len(window.tokens)
        acts = window.acts.double()
        found = attribute(exact, acts, window.mask)
        x_hat, code, c = found.output
        b = (exact.b_dec * exact.scale).detach()
        for t in range(T):
            at = start + t
            if not window.mask[t]:
                continue
            active = {int(f): float(v) for f, v in zip(code.indices[t], code.values[t], strict=True) if v > 0}
            assert list(pairs(facts["new"][at])) == list(active)
            assert pairs(facts["new"][at]) == pytest.approx({f: ACTIVITY * v for f, v in active.items()}, abs=0.51)
            parts = found.parts(t)  # [T, k, d_in]
            share = parts @ c[t] / c[t].square().sum().clamp_min(1e-30)  # [T, k]
            by_feature = torch.zeros(D_SAE, dtype=torch.float64)
            by_feature.index_add_(0, code.indices.flatten(), share.flatten())
            listed = pairs(facts["carried"][at])
            wanted = {f: FRACTION * float(by_feature[f]) for f in listed}
            assert listed == pytest.approx(wanted, abs=0.51)
            assert list(listed.values()) == sorted(listed.values(), reverse=True)
            assert {f for f in range(D_SAE) if by_feature[f] > CARRIED + 1e-6} <= set(listed)
            n_parts = torch.zeros(D_SAE).index_add_(0, code.indices.flatten(), (share != 0).float().flatten())
            assert facts["gathered"][at] == n_parts[list(listed)].int().tolist()
            n_rest, rest = facts["rest"][at]
            assert n_rest == int((n_parts > 0).sum()) - len(listed)
            assert rest == pytest.approx(FRACTION * (float(by_feature.sum()) - sum(wanted.values()) / FRACTION), abs=1)
            triples = [facts["parts"][at][i : i + 3] for i in range(0, len(facts["parts"][at]), 3)]
            count, others = facts["others"][at]
            assert len(triples) == min(PARTS_SHOWN, len(triples) + count)
            assert count + len(triples) == int((share != 0).sum())
            if count:
                assert min(abs(part) for *_, part in triples) + 1 >= FRACTION * float(
                    share.abs().flatten().sort(descending=True).values[len(triples)]
                )
            for j, feature, part in triples:
                assert start <= j < at, "from an earlier position of this window"
                slot = (code.indices[j - start] == feature).nonzero()
                assert part == pytest.approx(FRACTION * float(share[j - start, slot]), abs=0.51)
            if triples:
                assert sum(part for *_, part in triples) + others == pytest.approx(FRACTION, abs=len(triples))
                assert 0 <= facts["remainder"][at] < 1e-5
            rebuilt = x_hat[t] - b
            carried, missed = c[t] @ rebuilt / rebuilt.square().sum(), (acts[t] - x_hat[t]).square().sum()
            assert facts["c"][at] == pytest.approx(FRACTION * float(carried), abs=0.6)
            assert facts["missed"][at] == pytest.approx(
                FRACTION * float(missed / (acts[t] - b).square().sum()), abs=0.6
            )
        start += T
    assert sum(map(len, facts["carried"])) > 100
    assert any(count for count, _ in facts["others"])


@torch.no_grad()
def test_figures_and_rows(
    contextual: ContextualSAE, per_token: SAE, windows: list[Window], facts: dict[str, Any]
) -> None:
    for sae, figures in ((contextual, facts["figures"]), (per_token, facts["beside"]["figures"])):
        runs = at_all = fresh = 0
        mass, errors, kept, beyond = [], [], [], []
        for window in windows:
            acts, mask = window.acts, window.mask
            if isinstance(sae, ContextualSAE):
                found = attribute(sae, acts, mask)
                x_hat, code, c = found.output
                share = torch.zeros(len(acts), D_SAE).index_add_(1, code.indices.flatten(), found.share.flatten(1))
            else:
                x_hat, code, c = sae(acts)
                share = torch.zeros(len(acts), D_SAE)
            new = torch.zeros(len(acts), D_SAE).scatter_(1, code.indices, code.values) * mask[:, None]
            carried = share * (share >= CARRIED)
            present = (new > 0) | (carried > 0)
            runs += int(present[0].sum() + (present[1:] & ~present[:-1]).sum())
            at_all += int(present.sum())
            fresh += int((new > 0).sum())
            mass.append(new + carried * (c.norm(dim=1) / sae.scale)[:, None])
            errors.append((acts - x_hat)[mask].square().sum(dim=1))
            kept.append(acts[mask])
            beyond.append((torch.arange(len(acts)) >= 10)[mask])
        assert figures["mean_run"] == pytest.approx(at_all / runs)
        assert figures["new_in_run"] == pytest.approx(fresh / runs)
        for name, chosen in (("fvu", torch.ones(len(torch.cat(beyond))) > 0), ("fvu_beyond", torch.cat(beyond))):
            acts = torch.cat(kept)[chosen]
            fvu = torch.cat(errors)[chosen].sum() / (acts - acts.mean(dim=0)).square().sum()
            assert figures[name] == pytest.approx(float(fvu), rel=1e-4)
        rows = facts["rows"] if sae is contextual else facts["beside"]["rows"]
        total = torch.cat(mass).sum(dim=0)
        # Numbers are rounded in the page, so that features which add nearly the same may change places.
        assert float(total[rows].sum()) == pytest.approx(float(total.topk(ROWS).values.sum()), rel=1e-3)
        added = torch.cat(mass)[:, rows].cumsum(dim=0)
        earliest, latest = ((added < share * total[rows]).sum(dim=0) for share in (0.49, 0.51))
        assert (earliest[:-1] <= latest[1:]).all()
        assert int(latest[-1]) > int(earliest[0]) + 50
    assert set(facts["beside"]["rows"]) >= {f for new in facts["beside"]["new"] for f in new[::2]}


def test_a_per_token_sae_carries_nothing(per_token: SAE, windows: list[Window], tiny_lm: LanguageModel) -> None:
    found = view(per_token, windows, tiny_lm)
    assert found["beside"] is None
    assert found["figures"]["fvu_beyond"] is None
    assert found["figures"]["mean_run"] == found["figures"]["new_in_run"]
    assert not any(found["carried"] + found["parts"])
    assert set(map(tuple, found["others"])) == {(0, 0)}
    assert all(set(effect) == {"new", "similar"} for effect in found["features"].values())


@pytest.mark.parametrize("kind", [TopKSAE, ContextualSAE])
def test_a_transcoder(kind: Any, per_token: SAE, tiny_lm: LanguageModel) -> None:
    windows, _ = read_windows(tiny_lm, Place("mlp.in:1", "mlp.out:1"), TEXT, N_CTX)
    torch.manual_seed(0)
    sae = kind(D_IN, D_SAE, K, d_out=D_IN)
    acts, targets = (torch.cat([of[window.mask] for of, window in zip(some, windows, strict=True)]) for some in (
        [window.acts for window in windows], [window.wanted for window in windows]))  # fmt: skip
    sae.initialise(acts.mean(dim=0), float(acts.std()), targets.mean(dim=0), float(targets.std()))
    found = view(sae.eval(), windows, tiny_lm)
    errors = 0.0
    for window in windows:
        x_hat = sae(window.acts[None], window.mask[None]).x_hat[0]
        errors += float((window.target - x_hat)[window.mask].square().sum())
    assert found["figures"]["fvu"] == pytest.approx(errors / float((targets - targets.mean(dim=0)).square().sum()))
    assert any(found["parts"]) == (kind is ContextualSAE)
    with pytest.raises(UserError, match="is an SAE of 16 numbers; needed a transcoder"):
        view(per_token, windows, tiny_lm)
    plain, _ = read_windows(tiny_lm, "mlp.in:1", TEXT, N_CTX)
    with pytest.raises(UserError, match="is a transcoder to 16 numbers; needed 16 numbers a position, its input"):
        view(sae, plain, tiny_lm)


def test_what_does_not_fit(tiny_lm: LanguageModel, contextual: SAE, windows: list[Window]) -> None:
    with pytest.raises(UserError, match="17 wide; needed 16, as wide as the activations"):
        view(TopKSAE(17, 40, 3), windows, tiny_lm)
    with pytest.raises(UserError, match="is a contextual one; needed one per token"):
        view(contextual, windows, tiny_lm, beside=contextual)
    for options in ({"n_ctx": 1}, {"max_tokens": 1}):
        with pytest.raises(UserError, match="given 1; needed 2 or more"):
            read_windows(tiny_lm, LAYER, TEXT, **{"n_ctx": N_CTX, **options})
    with pytest.raises(UserError, match="the text is 1 tokens long"):
        read_windows(tiny_lm, LAYER, "a", N_CTX)
    with pytest.raises(UserError, match=r"context of .* is 64 tokens at most"):
        read_windows(tiny_lm, LAYER, TEXT, 100)


def test_weights_that_are_broken(per_token: SAE, windows: list[Window], tiny_lm: LanguageModel) -> None:
    broken = copy.deepcopy(per_token)
    with torch.no_grad():
        broken.b_dec[0] = torch.nan
    with pytest.raises(UserError, match="the topk SAE gives NaN or Inf on this text"):
        view(broken, windows, tiny_lm)


@pytest.mark.parametrize("text", ["ab", "abc", "a" * 50, "<|endoftext|>" * 30, "\0\x01\x02" * 20])
def test_texts_in_which_little_happens(
    text: str, contextual: SAE, per_token: SAE, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    windows, _ = read_windows(tiny_lm, LAYER, text, N_CTX)
    for sae in (contextual, per_token):
        facts = view(sae, windows, tiny_lm, trained_on=10, beside=per_token)
        says = page(tmp_path / "view.html", facts)
        varies = text not in ("ab", "a" * 50, "<|endoftext|>" * 30)
        assert (facts["figures"]["fvu"] is not None) == (facts["beside"]["figures"]["fvu"] is not None) == varies
        assert ("Nothing varies along this text" in says) == ("unexplained (FVU)" not in says) == (not varies)


def test_an_sae_that_finds_nothing(contextual: SAE, windows: list[Window], tiny_lm: LanguageModel) -> None:
    silent = copy.deepcopy(contextual)
    with torch.no_grad():
        silent.b_enc.fill_(-1e4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        facts = view(silent, windows, tiny_lm)
    assert facts["rows"] == []
    assert facts["features"] == {}
    assert facts["figures"]["mean_run"] == 0


def test_no_windows(contextual: SAE, tiny_lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="windows: given none; needed those of a text"):
        view(contextual, [], tiny_lm)


# ---- the effect on the next token ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_effects_of_any_model(name: str) -> None:
    """Narrow unembeddings, capped and scaled logits among them, and tables of more tokens than the tokenizer knows."""
    lm = LanguageModel(ARCHITECTURES[name](), make_tokenizer(), name)
    windows, _ = read_windows(lm, LAYER, PROSE, 100, max_tokens=24)
    torch.manual_seed(0)
    sae = fitted(ContextualSAE(32, D_SAE, K, n_heads=2, d_head=4, d_value=6), windows)
    found = view(sae, windows, lm, effects=effects_of(lm)._replace(noise=0))
    json.dumps(found, allow_nan=False)
    scores = lm.logit_effects(sae.W_dec)
    for feature, effect in list(found["features"].items())[:5]:
        of_this = scores[int(feature)]
        wanted = (of_this - of_this.mean()) / of_this.std()
        assert effect["new"]["up"][1::2] == pytest.approx(wanted.topk(6).values.tolist(), abs=0.051)
        assert effect["new"]["down"][1::2] == pytest.approx(wanted.topk(6, largest=False).values.tolist(), abs=0.051)


def test_effects(contextual: ContextualSAE, windows: list[Window], tiny_lm: LanguageModel, facts: dict) -> None:
    written = torch.zeros(D_SAE, D_IN)
    for window in windows:
        features, sums = attribute(contextual, window.acts, window.mask).written()
        written.index_add_(0, features, sums)
    model = tiny_lm.model
    W_U = model.get_output_embeddings().weight.double() * model.model.norm.weight.double()
    mentioned = {feature for new in facts["new"] for feature in new[::2]}
    assert {int(feature) for feature in facts["features"]} == mentioned
    vocabulary = [tiny_lm.tokenizer.decode([token]) for token in range(len(W_U))]
    for feature, effect in facts["features"].items():
        directions = {"new": contextual.W_dec[int(feature)], "carried": written[int(feature)]}
        for name in {"new", "carried"} & set(effect):
            scores = W_U @ directions[name].detach().double()
            scores = (scores - scores.mean()) / scores.std()
            order = scores.argsort(descending=True)
            for end, tokens in (("up", order[:6]), ("down", order.flip(0)[:6])):
                assert effect[name][end][1::2] == pytest.approx(scores[tokens].tolist(), abs=0.051)
            assert effect[name]["up"][0] == vocabulary[int(order[0])]
        if "carried" in effect:
            cosine = torch.cosine_similarity(directions["new"].detach(), directions["carried"], dim=0)
            assert effect["cosine"] == pytest.approx(float(cosine), abs=0.006)
    assert any("carried" in effect for effect in facts["features"].values())
    unit = torch.nn.functional.normalize(contextual.W_dec.detach(), dim=1)
    cosines = unit @ unit.T - 3 * torch.eye(D_SAE)
    for feature, effect in facts["features"].items():
        assert effect["similar"][1::2] == pytest.approx((100 * cosines[int(feature)].topk(6).values).tolist(), abs=0.51)
    assert set(facts["raises"]) <= set(facts["tokens"])
    scores = tiny_lm.logit_effects(unit)
    scores = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True)
    token = tiny_lm.tokenizer.encode("mill", add_special_tokens=False)[0]
    assert facts["raises"][tiny_lm.tokenizer.decode([token])][0] == int(scores[:, token].argmax())


def test_effects_that_are_noise(
    per_token: SAE, windows: list[Window], tiny_lm: LanguageModel, effects, tmp_path
) -> None:
    found = view(per_token, windows, tiny_lm, effects=effects._replace(noise=99))
    assert found["raises"] == {}
    assert all(effect["new"] == {"up": [], "down": []} for effect in found["features"].values())
    elsewhere = copy.deepcopy(per_token)
    elsewhere.trained_on = TrainedOn(model=tiny_lm.name, hook="mlp.in:1")
    found = view(elsewhere, windows, tiny_lm)
    assert found["noise"] is None
    assert all(set(effect) == {"similar"} for effect in found["features"].values())


# ---- the page ----

ABOUT = {"text": "mill & <b>.txt", "run": "strict", "beside": "topk", "model": "tiny", "place": f"layer {LAYER}"}
ABOUT |= {"n_ctx": N_CTX, "trained_on": 10, "whole": True}


def page(path: Path, facts: dict[str, Any], **about: Any) -> str:
    write_view(path, ABOUT | about, facts)
    return path.read_text(encoding="utf-8")


def test_one_file_that_fetches_nothing(tmp_path: Path, facts: dict[str, Any]) -> None:
    text = page(tmp_path / "view.html", facts)
    names = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # namespaces are names
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= names
    assert not re.search(r"\ssrc=|<link|<iframe|@import|url\((?!#)|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    assert all(reference.startswith("#") for reference in re.findall(r"href=\"([^\"]*)", text))
    assert text == page(tmp_path / "again.html", facts), "the same facts should give the same page"


def test_text_never_becomes_markup(tmp_path: Path, facts: dict[str, Any]) -> None:
    nasty = copy.deepcopy(facts)
    nasty["tokens"][3] = "</script><script>alert(1)</script>\u2028<!--"
    text = page(tmp_path / "view.html", nasty)
    assert text.count("<script") == 2
    assert "alert(1)</" not in text
    assert "<h1>mill &amp; &lt;b&gt;.txt</h1>" in text
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == nasty | {"about": ABOUT, "index": None, "labels": {}}


def test_what_the_page_says(tmp_path: Path, facts: dict[str, Any], per_token: SAE, windows, tiny_lm) -> None:
    text = " ".join(re.sub(r"<[^>]+>", "", page(tmp_path / "view.html", facts)).split())
    percent = f"{100 * facts['figures']['fvu']:.1f} %"
    assert f"Of this text’s variance it leaves {percent} unexplained (FVU); " in text
    assert "goes on beyond the 10 tokens of those that it was trained on. topk, the per-token SAE beside it" in text
    assert "a new window: nothing is carried over" in text
    alone = view(per_token, windows[:1], tiny_lm)
    text = page(tmp_path / "view.html", alone, beside=None, trained_on=None, whole=False)
    assert "tokens, where the text was cut" in text
    assert "a new window: nothing" not in text
    assert "said again" in text


def test_size(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    """4,000 tokens and k = 32 are under 5 MB."""
    torch.manual_seed(0)
    n, times = 500, 8
    windows = [Window(torch.randint(5, 300, (n,)), torch.randn(n, D_IN), torch.arange(n) > 0)]
    sae = fitted(ContextualSAE(D_IN, D_SAE, 32, n_heads=2, d_head=4, d_value=6), windows)
    facts = view(sae, windows, tiny_lm, 256, fitted(TopKSAE(D_IN, D_SAE, 32), windows))
    # The same text some times over.
    parts = [
        [number + at * n * (i % 3 == 0) for i, number in enumerate(p)] for at in range(times) for p in facts["parts"]
    ]
    for name in ("tokens", "new", "carried", "gathered", "rest", "others", "remainder", "c", "missed"):
        facts[name] = facts[name] * times
    facts["parts"], facts["cuts"] = parts, list(range(n, n * times, n))
    for name in ("new", "missed"):
        facts["beside"][name] = facts["beside"][name] * times
    facts["features"] = {str(f): facts["features"]["0"] for f in range(4000)}
    assert 1_000_000 < len(page(tmp_path / "view.html", facts).encode()) < 5_000_000


def test_running_mean() -> None:
    assert running_mean([0, 3, 6, 0, 0], 3) == pytest.approx([1.5, 3, 3, 2, 0])
    assert running_mean([2], 15) == [2]


# ---- in a browser ----

STEPS = """
<script>
addEventListener("load", async () => {
  const seen = [];
  const $ = (selector) => document.querySelector(selector);
  const note = (name, value) => seen.push([name, value]);
  const settled = () => new Promise((resolve) => setTimeout(resolve, 50));
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  try {
    await settled();
    note("width", innerWidth);
    note("wide", document.documentElement.scrollWidth - innerWidth);
    note("tokens", document.querySelectorAll("#text .t").length);
    const painted = (canvas) => {
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      let count = 0;
      for (let i = 3; i < pixels.length; i += 4) count += pixels[i] > 20;
      return count;
    };
    note("lines", [...document.querySelectorAll(".here")].map((line) => line.hidden));
    note("painted", [...document.querySelectorAll("canvas")].map(painted));
    $("#text .t[tabindex='0']").focus();
    press("Home");
    note("home", document.activeElement.dataset.at);
    note("left out", $("#detail").textContent);
    for (let i = 0; i < TOKEN; i++) press("ArrowRight");
    note("at", document.activeElement.dataset.at);
    const amounts = (selector) => [...document.querySelectorAll(`${selector} .amount`)].map((of) => of.textContent);
    note("parts", amounts("#parts"));
    note("by feature", amounts("#by-feature"));
    note("sum by feature", [...document.querySelectorAll("#sum-by-feature > *")].map((line) => line.textContent));
    note("sum", [...document.querySelectorAll("#sum > *")].map((line) => line.textContent));
    note("sources", [...document.querySelectorAll("#text .source")].map((span) => span.dataset.at));
    press("Enter");
    const link = document.activeElement.getAttribute("href");
    note("link", link);
    press("Escape");
    note("escaped", document.activeElement.dataset.at);
    location.hash = link;
    await settled();
    note("feature", [$("#reading").hidden, $("#feature").hidden, $("#feature h1").textContent]);
    note("passages", [...document.querySelectorAll("#feature .passages.new a")].map((a) => a.textContent));
    note("held out", $("#feature").textContent);
    note("bars", [...document.querySelectorAll("#feature .bars i")].map((bar) => bar.title));
    $("#feature details.more").open = true;
    await settled();
    note("all passages", document.querySelectorAll("#feature .passages.new a").length);
    note("similar", [...document.querySelectorAll("#feature .similar a")].map((a) => a.hash));
    const field = $("#label");
    note("label", field.value);
    field.value = "  of <b>mills ";
    field.dispatchEvent(new InputEvent("input", { bubbles: true }));
    note("download", [$("a.save").hidden, $("a.save").download, decodeURIComponent($("a.save").href)]);
    note("wide feature", document.documentElement.scrollWidth - innerWidth);
    press("Escape");
    await settled();
    note("back", [$("#reading").hidden, $("#feature").hidden, document.activeElement.dataset.at]);
    const canvas = $("#timeline canvas");
    canvas.focus();
    canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    note("readout", $("#timeline .readout").textContent);
    press("Enter");
    await settled();
    note("row", $("#feature h1").textContent);
    location.hash = $("#beside .names a").hash;
    await settled();
    note("beside", $("#feature").textContent);
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "/", bubbles: true }));
    note("searching", document.activeElement.id);
    const find = (words) => {
      $("#query").value = words;
      $("#query").dispatchEvent(new FocusEvent("focus"));
      return [...document.querySelectorAll("#results > li")].map((of) => [of.className, of.querySelector("a")?.hash,
        of.textContent]);
    };
    for (const words of ["#7", "mills", "the lower", "promotes mill", "lowers mill", "no such words"]) {
      note(`find ${words}`, find(words));
    }
    note("wide results", document.documentElement.scrollWidth - innerWidth);
    find("mill");
    press("ArrowDown");
    note("first result", document.activeElement.hash);
    press("Escape");
    note("results", $("#results").hidden);
    location.hash = "find-mill";
    await settled();
    note("found", [$("#query").value, $("#results").hidden]);
    location.hash = "token-3";
    await settled();
    note("token", document.activeElement.dataset.at);
    const from = $("#text .t[data-at='9']");
    from.dispatchEvent(new PointerEvent("pointerover", { pointerType: "mouse", bubbles: true }));
    note("hover", $("#detail h3").textContent);
    note("focusable", [...document.querySelectorAll("a")].every((a) => a.href && a.textContent.trim()));
  } catch (error) {
    note("error", String(error));
  }
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>
"""
# A window of chromium is 500 pixels wide at least, a frame in it as wide as is asked for.
FRAME = """<body><pre id="seen"></pre>
<script>addEventListener("message", (event) => { document.getElementById("seen").textContent = event.data; });</script>
<iframe src="view.html" width="WIDTH" height="900"></iframe></body>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(tmp_path: Path, facts: dict[str, Any], width: int) -> None:
    t = facts["cuts"][0] - 1
    number = facts["new"][t][0]
    held = {"new": 12, "carried": 3, "spans": 10, "largest": 250, "histogram": [9, 0, 0, 3], "words": [" mill", "\n"]}
    held |= {"passages": [["before", " mill", " after", 250], ["", "\n", "", 100]], "similar": [1, 50]}
    held |= {"logits": {"up": [], "down": []}}
    index = {"data": "all mills", "tokens": 1000, "names": {"3": [" mill"]}, "features": {str(number): held}}
    write_view(tmp_path / "view.html", ABOUT, facts, index=index, labels={number: "mills", 4: "dams"})
    text = (tmp_path / "view.html").read_text(encoding="utf-8")
    (tmp_path / "view.html").write_text(text.replace("</body>", STEPS.replace("TOKEN", str(t)) + "</body>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = dict(json.loads(html.unescape(found[1])))
    assert "error" not in seen, seen["error"]
    assert seen["width"] == width
    assert seen["wide"] <= 0, "the page scrolls sideways"
    assert seen["wide feature"] <= 0
    assert seen["tokens"] == len(facts["tokens"])
    assert seen["lines"] == [True, True], "a line could be taken for something in the text"
    assert len(seen["painted"]) == 2
    assert min(seen["painted"]) > 500
    assert seen["home"] == "0"
    assert "Left out" in seen["left out"]
    assert seen["at"] == seen["escaped"] == str(t)

    # The parts that are listed, and the others, are all of c; and the page says what they miss.
    number = [float(part.replace("−", "-").removesuffix(" %")) for part in seen["parts"]]
    assert number == [part / 100 for part in facts["parts"][t][2::3]]
    others, n_others, total, _, remainder, _ = seen["sum"]
    assert n_others == f"{facts['others'][t][0]} other parts"
    assert sum(number) + float(others.replace("−", "-").removesuffix(" %")) == pytest.approx(
        float(total.removesuffix(" %")), abs=0.005
    )
    assert float(total.removesuffix(" %")) == pytest.approx(100, abs=0.07)
    assert float(remainder.replace("−", "-")) == facts["remainder"][t]
    assert {int(j) for j in seen["sources"]} <= set(facts["parts"][t][0::3])

    by_feature = [float(part.removesuffix(" %")) for part in seen["by feature"]]
    assert by_feature == [round(part / 100, 1) for part in facts["carried"][t][1::2]]
    rest, n_rest, total, _ = seen["sum by feature"]
    assert n_rest.startswith(f"{facts['rest'][t][0]} other feature")
    assert total == "100.0 %"
    assert sum(facts["carried"][t][1::2]) / 100 + float(rest.replace("−", "-").removesuffix(" %")) == pytest.approx(
        100, abs=0.2
    )

    feature = facts["new"][t][0]
    assert seen["link"] == f"#feature-{feature}"
    assert seen["feature"][:2] == [True, False]
    assert seen["feature"][2].startswith(f"Feature #{feature} mill ")
    assert "↵" not in seen["feature"][2], "blanks are no name where there is another"
    about = "In all mills New at 1.20 % of 1,000 tokens (12 times), carried at 0.30 % more, for 1.5 tokens in a row"
    assert about in seen["held out"].replace("In all millsNew", "In all mills New")
    assert "2.5…before mill after…1.0…↵…" in seen["held out"]
    assert seen["bars"] == [
        "0.0 to 0.6: 9 tokens",
        "0.6 to 1.3: 0 tokens",
        "1.3 to 1.9: 0 tokens",
        "1.9 to 2.5: 3 tokens",
    ]
    where = [i for i, new in enumerate(facts["new"]) if feature in new[::2]]
    plain = [i for i in where if facts["tokens"][i].strip()]
    strongest = max(plain, key=lambda i: pairs(facts["new"][i])[feature])
    assert facts["tokens"][strongest].strip() in seen["passages"][0]
    assert len(seen["passages"]) == min(8, len(where))
    assert seen["all passages"] == len(where)
    assert seen["similar"] == [f"#feature-{other}" for other in facts["features"][str(feature)]["similar"][::2]]
    assert seen["label"] == "mills"
    labels = {"4": "dams", str(feature): "of <b>mills"}
    hidden, name, url = seen["download"]
    assert (hidden, name) == (False, "labels.json")
    assert json.loads(url.partition(",")[2]) == labels
    assert seen["back"] == [False, True, str(t)]
    assert f"token {t + 2}" in seen["readout"]
    assert seen["row"].startswith(f"Feature #{facts['rows'][0]} ")
    assert seen["token"] == "2"
    assert f"token 10 of {len(facts['tokens'])}" in seen["hover"]
    assert seen["focusable"]

    assert f"Feature #{facts['beside']['rows'][0]} " in seen["beside"]
    assert "of topk, the per-token SAE" in seen["beside"]
    assert seen["searching"] == "query"
    assert seen["find #7"][:2] == [["title", None, "Feature"], ["", "#feature-7", seen["find #7"][1][2]]]
    assert ["title", None, "Labels"] in seen["find mills"]
    assert f"#feature-{feature}" in [link for _, link, _ in seen["find mills"]]
    titles = [title for kind, _, title in seen["find the lower"] if kind == "title"]
    assert titles[0].startswith("New here at “the lower”")
    assert titles[-1].startswith("In the text")
    shown = [link for _, link, _ in seen["find the lower"] if link]
    begins = TEXT.lower().index("the lower")
    ends = [sum(map(len, facts["tokens"][: i + 1])) for i in range(len(facts["tokens"]))]
    assert f"#token-{next(i for i, end in enumerate(ends) if end > begins) + 1}" in shown
    raising = [link for _, link, _ in seen["find promotes mill"][1:]]
    assert f"#feature-{facts['raises'][' mill'][0]}" in raising if " mill" in facts["raises"] else raising is not None
    assert seen["find lowers mill"]
    assert seen["find no such words"] == [["small", None, "nothing found"]]
    assert seen["wide results"] <= 0
    assert seen["first result"].startswith("#")
    assert seen["results"] is True
    assert seen["found"] == ["mill", False]


# ---- the command ----


@pytest.fixture
def runs(tmp_path: Path, tiny_model_path: Path, windows: list[Window], per_token: SAE) -> tuple[Path, Path]:
    torch.manual_seed(0)
    sae = fitted(ContextualSAE(D_IN, D_SAE, K, n_heads=2, d_head=4, d_value=6), windows)
    data = {"model": str(tiny_model_path), "layer": LAYER, "n_ctx": 8}
    for name, one in (("contextual", sae), ("topk", per_token)):
        one.save_pretrained(tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps({"sae": {}, "train": {}, "data": data, "origin": None}))
    return tmp_path / "contextual", tmp_path / "topk"


def command(*args: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["csae", "view", *map(str, args), "--device", "cpu"])
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_command(runs: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "mill.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    args = ["--text", text, "-o", tmp_path / "view.html"]
    code, printed = command(runs[0], "--beside", runs[1], *args, **options)
    assert code == 0, printed
    written = (tmp_path / "view.html").read_text()
    assert "topk, the per-token SAE beside it" in written
    data = re.search(r'id="data">(.*?)</script>', written, re.DOTALL)
    assert data is not None
    found = json.loads(data[1])
    assert len(found["cuts"]) == math.ceil(len(found["tokens"]) / 64) - 1, "8 times the 8 that were trained on"
    assert command(runs[1], *args, "--max-tokens", 30, "--n-ctx", 10, **options)[0] == 0
    assert "30 tokens, where the text was cut" in (tmp_path / "view.html").read_text()
    assert command(runs[1], *args, "--n-ctx", 0, **options) == (2, "csae: n_ctx: given 0; needed 2 or more\n")
    assert command(runs[1], *args[:2], "-o", tmp_path, "--max-tokens", 5, **options)[0] == 2

    (runs[1] / "run.json").write_text(json.dumps({"sae": {}, "train": {}, "data": {"layer": 1}, "origin": None}))
    code, printed = command(runs[0], "--beside", runs[1], *args, **options)
    assert code == 2
    assert f"topk is of layer 1 (resid.out:0); needed layer {LAYER} (resid.out:1)" in printed
    code, printed = command(runs[1], *args, **options)
    assert code == 2
    assert "--model: not given, and" in printed
    (runs[1] / "run.json").unlink()  # what says nothing may stand beside anything
    assert command(runs[0], "--beside", runs[1], *args, **options)[0] == 0
    assert command(runs[0], "--text", tmp_path / "none.txt", **options)[0] == 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such folder" in command(tmp_path / "nowhere", *args, **options)[1]
