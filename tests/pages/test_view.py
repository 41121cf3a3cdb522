"""What `csae view` says of a text, against a float64 reference."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_model import D_IN, PROSE, make_tokenizer
from viewed import D_SAE, LAYER, N_CTX, TEXT, K, fitted, page, pairs

from csae import ContextualSAE, TopKSAE
from csae.attribution import attribute
from csae.data.language_model import LanguageModel
from csae.data.places import Place
from csae.errors import UserError
from csae.features.effects import effects_of
from csae.pages.view import ACTIVITY, CARRIED, FRACTION, PARTS_SHOWN, ROWS, Window, read_windows, view
from csae.sae import SAE
from csae.trained_on import TrainedOn


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
