"""The figures of csae.evaluate against direct formulas in float64."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from csae import ContextualSAE, TopKSAE
from csae.data.activations import Batch, ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.text import TokenWindows
from csae.errors import UserError
from csae.evaluate import evaluate, table

N, T, D, F, K = 7, 11, 16, 40, 4


@dataclasses.dataclass
class Windows:
    """A source of windows in memory."""

    acts: Tensor
    mask: Tensor
    documents: Tensor
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        self.n_windows, self.n_ctx, self.d_in = self.acts.shape

    def read(self, window_indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(window_indices)
        return Batch(
            self.acts[chosen],
            self.mask[chosen],
            self.documents[chosen],
            None if self.tokens is None else self.tokens[chosen],
        )

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def source() -> Windows:
    torch.manual_seed(0)
    mask = torch.rand(N, T) > 0.2
    mask[:, 0] = False
    documents = torch.randint(0, 3, (N, T)).sort(dim=1).values
    return Windows(3 + torch.randn(N, T, D) * torch.linspace(0.1, 2, D), mask, documents)


def make(arch: str) -> TopKSAE | ContextualSAE:
    torch.manual_seed(1)
    sae: TopKSAE | ContextualSAE
    sae = TopKSAE(D, F, K) if arch == "topk" else ContextualSAE(D, F, K, n_heads=2, d_head=4, d_value=6, sweeps=1)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.5)
        if arch == "contextual":
            sae.W_O.mul_(5)
    sae.initialise(torch.full((D,), 2.9), 1.3)
    sae.tokens_since_fired[:5] = sae.dead_after
    return sae


@torch.no_grad()
def directly(sae: TopKSAE | ContextualSAE, source: Windows, windows: Sequence[int], exact: bool) -> dict[str, float]:
    """The same figures, of all windows at once in float64."""
    sae = sae.double().eval()
    acts, mask, documents = source.read(windows)[:3]
    acts = acts.double()
    out = sae(acts, mask, documents, exact=exact) if isinstance(sae, ContextualSAE) else sae(acts)
    x, x_hat = acts[mask], out.x_hat[mask]
    fired = torch.zeros(F)
    fired[out.code.indices[mask][out.code.values[mask] > 0]] = 1
    return {
        "fvu": float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()),
        "l0": float((out.code.values[mask] > 0).double().sum(dim=1).mean()),
        "cosine": float(((x * x_hat).sum(dim=1) / (x.norm(dim=1) * x_hat.norm(dim=1))).mean()),
        "silent": float(1 - fired.mean()),
        "tokens": len(x),
    }


@pytest.mark.parametrize("arch", ["topk", "contextual"])
@pytest.mark.parametrize("batch_windows", [1, 2, 16])
def test_figures(source: Windows, arch: str, batch_windows: int) -> None:
    windows = [5, 1, 2, 3, 6]
    sae = make(arch).train()
    result = evaluate(sae, source, windows, batch_windows=batch_windows)
    assert sae.training
    assert result["dead"] == 5 / F
    assert result["n_params"] == sum(parameter.numel() for parameter in sae.parameters())
    assert (result["k"], result["d_sae"], result["windows"]) == (K, F, 5)
    expected = directly(make(arch), source, windows, exact=True)
    for name, figure in expected.items():
        assert result[name] == pytest.approx(figure, rel=1e-5), name
    if arch == "contextual":
        in_sweeps = directly(make(arch), source, windows, exact=False)
        for name in ("fvu", "l0", "cosine"):
            assert result[name + "_sweeps"] == pytest.approx(in_sweeps[name], rel=1e-5), name
        assert result["fvu_exact"] == result["fvu"]
        assert result["fvu_sweeps"] != pytest.approx(result["fvu"], rel=1e-4), "the two forms should differ here"
        assert result["gap"] == pytest.approx(expected["fvu"] / in_sweeps["fvu"] - 1, abs=1e-5)
    else:
        assert "fvu_exact" not in result
    json.dumps(result, allow_nan=False)


def test_a_large_mean_costs_no_digits(source: Windows) -> None:
    source.acts = torch.randn(N, T, D) + 1e3
    sae = make("topk")
    sae.initialise(torch.full((D,), 1e3), 1.0)
    assert evaluate(sae, source, range(N))["fvu"] == pytest.approx(
        directly(sae, source, range(N), exact=True)["fvu"], rel=1e-4
    )


def test_what_is_out_of_the_mask_does_not_count(source: Windows) -> None:
    before = evaluate(make("contextual"), source, range(N))
    source.acts[~source.mask] *= 1000
    after = evaluate(make("contextual"), source, range(N))
    for name in ("fvu", "fvu_sweeps", "l0", "cosine", "silent", "tokens"):
        assert after[name] == before[name], name


def splice_directly(lm: LanguageModel, source: ModelActivations, sae: Any, window: int, layer: int, **form: Any) -> Any:
    """Loss [T - 1] with the reconstruction (or zeros) spliced in by a hook of the test's own."""
    batch = source.read([window])

    def hook(module: Any, args: Any, output: Any) -> Any:
        acts = output[0] if isinstance(output, tuple) else output
        new = torch.zeros_like(acts) if sae is None else sae(acts, batch.mask, batch.documents, **form).x_hat
        new = torch.where(batch.mask[..., None], new, acts)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = lm.model.model.layers[layer - 1].register_forward_hook(hook)
    with torch.no_grad():
        logits = lm.model(batch.tokens).logits
    handle.remove()
    return torch.nn.functional.cross_entropy(logits[0, :-1], batch.tokens[0, 1:], reduction="none")


def test_cross_entropy(tiny_lm: LanguageModel) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, tiny_lm.n_vocab, (6, 12))
    documents = torch.arange(12).expand(6, 12) // 7
    layer = 2
    source = ModelActivations(tiny_lm, layer, TokenWindows(tokens, documents))
    sae = make("contextual").eval()
    result = evaluate(sae, source, range(6), lm=tiny_lm, ce_windows=5)

    counted = source.read(range(5)).mask[:, :-1]
    expected = {}
    forms = {"ce_zero": (None, {}), "ce_sae": (sae, {"exact": True}), "ce_sae_sweeps": (sae, {"exact": False})}
    for name, (model, form) in forms.items():
        losses = torch.stack([splice_directly(tiny_lm, source, model, w, layer, **form) for w in range(5)])
        expected[name] = float(losses[counted].double().mean())
    logits = tiny_lm.model(tokens[:5]).logits[:, :-1]
    clean = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:5, 1:], reduction="none")
    expected["ce_clean"] = float(clean[counted].double().mean())

    assert result["ce_tokens"] == int(counted.sum())
    for name, figure in expected.items():
        assert result[name] == pytest.approx(figure, rel=1e-5), name
    assert len(set(expected.values())) == 4
    harm = expected["ce_zero"] - expected["ce_clean"]
    for form in ("", "_sweeps"):
        recovered = result["loss_recovered" + form]
        if harm > 0:
            assert recovered == pytest.approx((expected["ce_zero"] - expected["ce_sae" + form]) / harm, rel=1e-3)
        else:
            assert recovered is None
    assert any("recovered" in str(column.header) for column in table([result]).columns)


@pytest.mark.parametrize("name", ["W_enc", "b_dec", "W_mem"])
def test_weights_that_are_not_finite(source: Windows, name: str) -> None:
    sae = make("contextual")
    with torch.no_grad():
        getattr(sae, name).view(-1)[3] = float("nan")
    with pytest.raises(UserError, match=f"NaN or Inf in {name} of the SAE"):
        evaluate(sae, source, range(N))


def test_activations_that_are_not_finite(source: Windows) -> None:
    source.acts[3, 4, 5] = float("inf")
    with pytest.raises(UserError, match="NaN or Inf in the activations of windows 2 to 3"):
        evaluate(make("topk"), source, range(N), batch_windows=2)


def test_a_reconstruction_that_overflows(source: Windows) -> None:
    sae = make("topk")
    with torch.no_grad():
        sae.W_dec.mul_(3e38)
    with pytest.raises(UserError, match="overflows"):
        evaluate(sae, source, range(N))


def test_other_errors(source: Windows, tiny_lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="16 wide, the SAE 8"):
        evaluate(TopKSAE(8, 20, 2), source, range(N))
    with pytest.raises(UserError, match="don't say which layer"):
        evaluate(make("topk"), source, range(N), lm=tiny_lm)
    with pytest.raises(UserError, match="has layers 1 to 3"):
        evaluate(make("topk"), source, range(N), lm=tiny_lm, layer=4)
    with pytest.raises(UserError, match="without token ids"):
        evaluate(make("topk"), source, range(N), lm=tiny_lm, layer=1)
    source.mask[:] = False
    with pytest.raises(UserError, match="leaves out every position"):
        evaluate(make("topk"), source, range(N))
    source.mask[:] = True
    source.acts[:] = 0.3
    with pytest.raises(UserError, match="all the same"):
        evaluate(make("topk"), source, range(N))


def test_table(source: Windows) -> None:
    results = [evaluate(make(arch), source, range(N)) for arch in ("topk", "contextual")]
    results[0]["name"] = "[red]mine"
    for result in results:
        result |= {"ce_sae": 3.21, "loss_recovered": 0.9, "ce_sae_sweeps": 3.2, "loss_recovered_sweeps": None}
    shown = table(results)
    columns = [list(column.cells) for column in shown.columns]
    assert columns[0] == [r"\[red]mine", "contextual, exact", "contextual, 1 sweeps"]
    fvu = [results[0]["fvu"], results[1]["fvu"], results[1]["fvu_sweeps"]]
    assert columns[4] == [f"{figure:.4f}" for figure in fvu]
    assert columns[6] == ["12.5%"] * 3
    assert columns[-2:] == [["3.210", "3.210", "3.200"], ["90.0%", "90.0%", "-"]]

    narrow = Console(width=80, file=io.StringIO())
    narrow.print(shown)
    words = narrow.file.getvalue().split()
    assert "[red]mine" in words  # a name is no markup
    assert all(cell in words for column in columns[1:] for cell in column), "a figure was cut"


def test_table_keeps_the_end_of_a_long_name(source: Windows) -> None:
    names = ["mlp.out-11-topk-k8-batch", "mlp.out-11-topk-k8-jumprelu"]
    found = evaluate(make("topk"), source, range(N)) | {"ce_sae": 3.21, "loss_recovered": 0.9}
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(table([found | {"name": name} for name in names]))
    rows = [line for line in narrow.file.getvalue().splitlines() if line.startswith(" ")]
    shown = "".join(line.split()[0] for line in rows if line.strip())
    assert all(name in shown for name in names)


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_windows_with_nothing_in_their_mask_count_as_if_they_were_not_there(arch: str, source: Windows) -> None:
    sae = make(arch)
    source.mask[2:5] = False
    for batch_windows in (1, 3, 16):
        found = evaluate(sae, source, range(N), batch_windows=batch_windows)
        without = evaluate(sae, source, [0, 1, 5, 6], batch_windows=batch_windows)
        for name in found.keys() - {"windows"}:
            if isinstance(found[name], int | float) and not name.startswith("tokens_per_s"):
                assert found[name] == pytest.approx(without[name], rel=1e-5), name
