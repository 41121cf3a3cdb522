"""An SAE at any hook point of a language model, a transcoder in the place of an MLP: whole passes and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY
from torch import Tensor

from csae import SAE, ContextualSAE, Edit, TopKSAE, splice
from csae.data.activations import sink_mask
from csae.data.language_model import LanguageModel
from csae.trained_on import TrainedOn

KINDS = ["topk", "current", "past"]


@pytest.fixture(scope="module", params=[name for name in ("llama", "gpt2", "gptj", "jamba") if name in ARCHITECTURES])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(ARCHITECTURES[request.param](), None, request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return LanguageModel(ARCHITECTURES["llama"](), None, "llama")


def tokens(B: int = 2, T: int = 20) -> Tensor:
    return torch.randint(1, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))


def make(kind: str, lm: LanguageModel, hook: str, to: str | None = None, skip: bool = False) -> SAE:
    torch.manual_seed(0)
    acts, target = lm.read(tokens(8), [lm.hook(hook), lm.hook(to or hook)])
    widths: dict[str, Any] = {} if to is None else {"d_out": target.shape[-1], "skip": skip}
    d_in = acts.shape[-1]
    if kind == "topk":
        sae: SAE = TopKSAE(d_in, 40, 3, **widths)
    else:
        sae = ContextualSAE(d_in, 40, 3, n_heads=2, d_head=4, d_value=5, d_memory=8, query=kind, **widths)
    moments = [part for one in (acts, target) for part in (one.mean(dim=(0, 1)), float(one.std()))]
    sae.initialise(*moments[: 2 if to is None else 4])
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return sae.eval()


def mask_of(lm: LanguageModel, ids: Tensor, *hooks: str) -> Tensor:
    masks = [sink_mask(acts) for acts in lm.read(ids, [lm.hook(hook) for hook in hooks])]
    return torch.stack(masks).all(dim=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", ["mlp.out:1", "attn.out:1", "mlp.in:1", "attn.in:0", "resid.in:0"])
def test_at_a_hook_point_it_is_what_evaluation_splices(hook: str, kind: str, lm: LanguageModel) -> None:
    sae, mask = make(kind, lm, hook), mask_of(lm, tokens(), hook)
    assert bool(mask[:, 1:].any())
    how: dict[str, Any] = {} if kind == "topk" else {"exact": True}
    expected = lm.cross_entropy(tokens(), hook, lambda acts: sae(acts, mask, **how).x_hat, mask)
    clean = lm.cross_entropy(tokens())
    with splice(lm, hook, sae) as spliced:
        found = lm.cross_entropy(tokens())
    assert not torch.allclose(found, clean, atol=1e-3)
    torch.testing.assert_close(found, expected)
    assert spliced.mask is not None
    assert torch.equal(spliced.mask, mask)
    with splice(lm, hook, sae, keep_error=True):
        assert torch.equal(lm.cross_entropy(tokens()), clean)
    assert torch.equal(lm.cross_entropy(tokens()), clean)


PAIRS = [
    ("mlp.in:1", "mlp.out:1"),
    ("resid.out:0", "mlp.out:1"),
    ("mlp.out:0", "attn.out:2"),
    ("mlp.in:0", "resid.out:2"),
]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_transcoder_is_what_evaluation_splices(
    pair: tuple[str, str], kind: str, skip: bool, lm: LanguageModel
) -> None:
    hook, to = pair
    sae, mask = make(kind, lm, hook, to, skip), mask_of(lm, tokens(), hook, to)
    how: dict[str, Any] = {} if kind == "topk" else {"exact": True}
    expected = lm.cross_entropy(tokens(), hook, lambda acts: sae(acts, mask, **how).x_hat, mask, to)
    clean = lm.cross_entropy(tokens())
    with splice(lm, hook, sae, to=to) as spliced:
        found = lm.cross_entropy(tokens())
    assert not torch.allclose(found, clean, atol=1e-3)
    torch.testing.assert_close(found, expected)
    assert spliced.mask is not None
    assert torch.equal(spliced.mask, mask)
    with splice(lm, hook, sae, to=to, keep_error=True):
        assert torch.equal(lm.cross_entropy(tokens()), clean)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [None, "mlp.out:1"])
def test_generation_follows_on_a_state(to: str | None, kind: str, skip: bool, lm: LanguageModel) -> None:
    """Token by token on a cache, the logits are those of whole passes."""
    if skip and to is None:
        return
    sae = make(kind, lm, "mlp.in:1", to, skip)
    edits = [Edit(4, scale=3.0), Edit(9, part="new", set=2.0)]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad(), splice(lm, "mlp.in:1", sae, edits, to=to):
        made = lm.model.generate(tokens(2, 6), output_logits=True, return_dict_in_generate=True, **how)
        whole = lm.model(input_ids=made.sequences[:, :-1], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(torch.stack(made.logits, dim=1), whole, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        clean = lm.model(input_ids=made.sequences[:, :-1], use_cache=False).logits[:, 5:]
    assert not torch.allclose(clean, whole, atol=1e-3)


@pytest.mark.parametrize("kind", ["current", "past"])
def test_beams_of_a_transcoder(kind: str, llama: LanguageModel) -> None:
    sae, how = make(kind, llama, "mlp.in:1", "mlp.out:1", skip=True), {"max_new_tokens": 6, "do_sample": False}
    with splice(llama, "mlp.in:1", sae, to="mlp.out:1"):
        found = llama.model.generate(tokens(2, 6), num_beams=3, **how)
        expected = llama.model.generate(tokens(2, 6), num_beams=3, use_cache=False, **how)
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused(llama: LanguageModel) -> None:
    sae, transcoder = make("topk", llama, "mlp.out:1"), make("topk", llama, "mlp.in:1", "mlp.out:1")
    inner = TopKSAE(32, 40, 3, d_out=48)
    for args, to, message in (
        (("mlp.in:1", transcoder), None, "to: not given; needed with a transcoder"),
        (("mlp.in:1", sae), "mlp.out:1", "to: given; needed only with a transcoder"),
        (("mlp.out:*", sae), None, "3 places; needed one"),
        (("mlp.uot:1", sae), None, "has no such place"),
        (("mlp.out:1", transcoder), "mlp.in:1", "reaches mlp.in:1 before mlp.out:1"),
        (("model.layers.1.mlp.act_fn", sae), None, "sae: 32 wide; needed 48, as wide as model.layers.1.mlp.act_fn"),
        (("mlp.in:1", inner), "mlp.out:1", "sae: 48 wide; needed 32, as wide as mlp.out:1"),
    ):
        with pytest.raises(ValueError, match=message) as error, splice(llama, *args, to=to):
            pass
        assert "\n" not in str(error.value)


def test_at_another_place_than_it_was_trained_on(llama: LanguageModel) -> None:
    transcoder = make("topk", llama, "mlp.in:1", "mlp.out:1")
    transcoder.trained_on = TrainedOn(hook="mlp.in:1", hook_to="mlp.out:1")
    with splice(llama, "layers.1.mlp.in", transcoder, to="blocks.1.hook_mlp_out", keep_error=True):
        llama.cross_entropy(tokens())
    with (
        pytest.raises(ValueError, match=r"trained on mlp.in:1 to mlp.out:1, and this is mlp.in:2 to mlp.out:2"),
        splice(llama, "mlp.in:2", transcoder, to="mlp.out:2"),
    ):
        pass
    with splice(llama, "mlp.in:2", transcoder, to="mlp.out:2", elsewhere=True):
        llama.cross_entropy(tokens())
