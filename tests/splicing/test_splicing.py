"""An SAE inside a language model: its output, in whole passes and token by token, with and without edits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_model import D_IN
from torch import Tensor

from csae import SAE, ContextualSAE, Edit, TopKSAE, splice
from csae.attribution import attribute
from csae.data.language_model import LanguageModel
from csae.trained_on import TrainedOn

LAYER = 2


@pytest.fixture(scope="module")
def lm(tiny_model_path: str) -> LanguageModel:
    return LanguageModel.load(tiny_model_path, device="cpu")


def make(arch: str, lm: LanguageModel) -> SAE:
    torch.manual_seed(0)
    if arch == "topk":
        sae: SAE = TopKSAE(D_IN, 30, 3)
    else:
        sae = ContextualSAE(D_IN, 30, 3, n_heads=2, d_head=4, d_value=5, query=arch)
    acts = lm.activations(tokens(), LAYER)
    sae.initialise(acts.mean(dim=(0, 1)), float(acts.std()))
    if isinstance(sae, ContextualSAE):
        with torch.no_grad():
            sae.W_O.mul_(10)
            sae.W_mem.mul_(3)
            sae.null.sub_(2)
    return sae


def tokens(B: int = 2, T: int = 24) -> Tensor:
    return torch.randint(1, 290, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(lm: LanguageModel, ids: Tensor, **options: Any) -> Tensor:
    return lm.model(input_ids=ids, **options).logits


ARCHS = ["topk", "current", "past"]


@pytest.mark.parametrize("arch", ARCHS)
def test_with_the_error_added_back_the_logits_are_unchanged(arch: str, lm: LanguageModel) -> None:
    clean = logits(lm, tokens())
    with splice(lm.model, LAYER, make(arch, lm), keep_error=True) as spliced:
        assert torch.equal(logits(lm, tokens()), clean)
    assert spliced.output is not None
    assert spliced.output.code.values.shape == (2, 24, 3)
    with splice(lm, LAYER, make(arch, lm)):
        assert not torch.allclose(logits(lm, tokens()), clean, atol=1e-3)
    assert torch.equal(logits(lm, tokens()), clean)  # nothing is left behind


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stream", [torch.float16, torch.float32, torch.float64])
def test_the_error_is_added_back_whatever_the_weights_can_tell(
    stream: torch.dtype, weights: torch.dtype, lm: LanguageModel
) -> None:
    model = copy.deepcopy(lm.model).to(stream)
    with torch.no_grad():
        clean = model(input_ids=tokens()).logits
        with splice(model, LAYER, make("current", lm).to(weights), keep_error=True):
            assert torch.equal(model(input_ids=tokens()).logits, clean)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_reconstruction_is_what_evaluation_splices(arch: str, lm: LanguageModel) -> None:
    sae = make(arch, lm).eval()
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, 0] = False
    expected = lm.cross_entropy(tokens(), LAYER, lambda acts: sae(acts, mask).x_hat, mask)
    with splice(lm, LAYER, sae) as spliced:
        found = lm.cross_entropy(tokens())
    torch.testing.assert_close(found, expected)
    assert spliced.mask is not None
    assert torch.equal(spliced.mask, mask)


@pytest.mark.parametrize("arch", ARCHS)
def test_generation_follows_on_a_state(arch: str, lm: LanguageModel) -> None:
    """Token by token on a cache, the logits are those of whole passes."""
    sae = make(arch, lm)
    edits = [Edit(4, scale=3.0), Edit(9, part="new", set=2.0)]
    with splice(lm, LAYER, sae, edits):
        made = lm.model.generate(
            tokens(2, 6), max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        again = lm.model.generate(tokens(2, 6), max_new_tokens=12, do_sample=False)
        whole = logits(lm, made.sequences)
    assert torch.equal(made.sequences, again)  # a new text begins without the old one's memory
    steps = torch.stack(made.logits, dim=1)
    torch.testing.assert_close(steps, whole[:, 5 : 5 + steps.shape[1]], rtol=1e-4, atol=1e-4)


def put_in(lm: LanguageModel, sae: SAE, edits: list[Edit], keep_error: bool = False) -> Tensor:
    """The residual stream that the edits leave, [B, T, d_in]."""
    seen = []
    with splice(lm, LAYER, sae, edits, keep_error):
        handle = lm.block(LAYER).register_forward_hook(lambda module, args, output: seen.append(output))
        logits(lm, tokens())
        handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("query", ["current", "past"])
def test_edits_of_new_and_carried(query: str, keep_error: bool, lm: LanguageModel) -> None:
    sae = make(query, lm).eval()
    assert isinstance(sae, ContextualSAE)
    acts = lm.activations(tokens(), LAYER)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, 0] = False
    out = sae(acts, mask)
    feature = int(out.code.indices[0, 5, 0])  # active, and carried later
    new = torch.where(out.code.indices == feature, out.code.values, 0).sum(-1, keepdim=True) * sae.W_dec[feature]
    carried = torch.zeros_like(acts)
    for b in range(2):
        found = attribute(sae, acts[b], mask[b])
        for t in range(24):
            carried[b, t] = found.parts(t)[found.output.code.indices == feature].sum(dim=0)
    assert carried[0, 8].norm() > 0.01 * acts[0, 8].norm()
    new = new * sae.scale
    base = acts if keep_error else out.x_hat
    for part, factor, change in (("new", 0.0, -new), ("carried", 0.0, -carried), ("both", 2.5, 1.5 * (new + carried))):
        expected = torch.where(mask[..., None], base + change, acts)
        torch.testing.assert_close(
            put_in(lm, sae, [Edit(feature, part, scale=factor)], keep_error), expected, rtol=1e-4, atol=1e-4
        )
    direction = sum(sae.W_O[:, 5 * h : 5 * h + 5] @ sae.W_V[5 * h : 5 * h + 5] @ sae.W_mem[feature] for h in range(2))
    assert isinstance(direction, Tensor)
    wanted = {"new": 0.7 * sae.W_dec[feature] * sae.scale - new, "carried": 0.7 * direction * sae.scale - carried}
    for part, change in wanted.items():
        expected = torch.where(mask[..., None], base + change, acts)
        torch.testing.assert_close(
            put_in(lm, sae, [Edit(feature, part, set=0.7)], keep_error), expected, rtol=1e-4, atol=1e-4
        )


def test_the_codes_are_those_without_the_edits(lm: LanguageModel) -> None:
    sae = make("past", lm)
    codes = []
    for edits in ([], [Edit(1, set=50.0)]):
        with splice(lm, LAYER, sae, edits) as spliced:
            logits(lm, tokens())
        assert spliced.output is not None
        codes.append(spliced.output.code)
    assert torch.equal(codes[0].indices, codes[1].indices)


def test_padding_takes_no_part(lm: LanguageModel) -> None:
    sae = make("current", lm)
    ids, visible = tokens(), torch.ones(2, 24, dtype=torch.long)
    visible[1, :7] = 0
    with splice(lm, LAYER, sae) as spliced:
        logits(lm, ids, attention_mask=visible)
        assert spliced.mask is not None
        assert not spliced.mask[1, :8].any()  # nor does position 0, which is the first that is no padding
        assert spliced.mask[1, 8:].all()
        assert spliced.output is not None
        assert not spliced.output.code.values[1, :8].any()
        assert not spliced.output.c[1, :9].any()  # nothing was remembered of the padding


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("keep_first", [False, True])
def test_position_0_takes_part_where_it_did_in_training(keep_first: bool, bos: bool, lm: LanguageModel) -> None:
    sae = make("current", lm)
    sae.trained_on = TrainedOn(keep_first=keep_first, bos=bos)
    with splice(lm, LAYER, sae) as spliced:
        logits(lm, tokens())
        assert spliced.mask is not None
        assert spliced.mask[:, 1:].all()
        assert spliced.mask[:, 0].tolist() == [keep_first and not bos] * 2


def test_a_bounded_look_back(lm: LanguageModel) -> None:
    sae = make("current", lm)
    carried = []
    for look_back in (None, 2):
        with splice(lm, LAYER, sae, look_back=look_back) as spliced:
            logits(lm, tokens())
        assert spliced.output is not None
        carried.append(spliced.output.c)
    torch.testing.assert_close(carried[0][:, :3], carried[1][:, :3])
    assert not torch.allclose(carried[0][:, 4:], carried[1][:, 4:])


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda lm: Edit(1), "scale, set: given None and None; needed one of them"),
        (lambda lm: Edit(1, scale=1.0, set=2.0), "scale, set: given 1.0 and 2.0; needed one of them"),
        (lambda lm: Edit(1, scale=float("nan")), "given nan; needed a finite number"),
        (lambda lm: Edit(1, part="old", scale=0), "part: given 'old'; needed one of 'new', 'carried', 'both'"),
        (lambda lm: splice(lm, 4, make("topk", lm)).__enter__(), "layer: given 4; .* has layers 1 to 3"),
        (lambda lm: splice(lm, 1, TopKSAE(9, 9, 1)).__enter__(), "sae: 9 wide; needed 16, as wide as layer 1 "),
        (lambda lm: splice(lm, 1, make("topk", lm), look_back=0).__enter__(), "look_back: given 0; needed at least 1"),
        (lambda lm: splice(lm, 1, make("topk", lm), [Edit(30, scale=0)]).__enter__(), "feature 30; needed 0 to 29"),
        (
            lambda lm: splice(lm, 1, make("topk", lm), [Edit(3, "carried", scale=0)]).__enter__(),
            "part 'carried' with a per-token SAE",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make_it: Any, message: str, lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match=message):
        make_it(lm)
    assert not any("forward" in vars(module) for module in lm.model.modules())
