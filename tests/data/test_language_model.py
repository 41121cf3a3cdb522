"""What a language model gives: its activations, its sizes and its loss, with and without a replaced layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, D_IN, N_LAYERS, VOCABULARY
from torch.nn import functional as F
from toys import LogitsOfTheLastTokenOnly, Toy

from csae.data.language_model import LanguageModel
from csae.errors import UserError

transformers = pytest.importorskip("transformers")

# transformers gives what is after the first block of these as hidden_states[0]
AFTER_THE_BLOCK = {"mamba", "mamba2", "falcon-mamba", "rwkv"}


@pytest.fixture(params=ARCHITECTURES, scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(ARCHITECTURES[request.param](), tokenizer=None, name=request.param)


def test_attributes(lm: LanguageModel) -> None:
    assert (lm.d_in, lm.n_layers, lm.n_vocab) == (D_IN, N_LAYERS, VOCABULARY)
    assert lm.max_ctx is None or lm.max_ctx >= 128


@pytest.mark.parametrize("layer", [1, 2])
def test_activations_are_the_hidden_states_of_the_whole_model(
    lm: LanguageModel, tokens: torch.Tensor, layer: int
) -> None:
    with torch.no_grad():
        states = lm.model(input_ids=tokens, output_hidden_states=True).hidden_states
    expected = states[layer - 1 if lm.name in AFTER_THE_BLOCK else layer]
    acts = lm.activations(tokens, layer)
    assert acts.shape == (4, 20, D_IN)
    torch.testing.assert_close(acts, expected)


def test_activations_of_the_last_layer_are_not_normed(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        expected = tiny_lm.model(input_ids=tokens, output_hidden_states=True).hidden_states[3]
        acts = tiny_lm.activations(tokens, 3)
        torch.testing.assert_close(tiny_lm.model.model.norm(acts), expected)
    assert not torch.allclose(acts, expected)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_no_block_above_the_layer_runs(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    ran = []
    handles = [
        lm.block(above).register_forward_pre_hook(lambda *_, above=above: ran.append(above)) for above in (1, 2, 3)
    ]
    handles.append(lm.model.get_output_embeddings().register_forward_pre_hook(lambda *_: ran.append("head")))
    lm.activations(tokens, layer)
    for handle in handles:
        handle.remove()
    assert ran == list(range(1, layer + 1))


def test_activations_leave_the_model_as_it_was(lm: LanguageModel, tokens: torch.Tensor) -> None:
    before = lm.cross_entropy(tokens)
    acts = lm.activations(tokens, 2)
    assert not acts.requires_grad
    assert not acts.is_inference()  # a training step may save it for backward
    torch.testing.assert_close(lm.cross_entropy(tokens), before, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_layer_out_of_range(tiny_lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    with pytest.raises(UserError, match=rf"layer: given {layer}; .* has layers 1 to 3"):
        tiny_lm.activations(tokens, layer)


def test_window_longer_than_the_context(tiny_lm: LanguageModel) -> None:
    tiny_lm.check_tokens(torch.zeros(2, 64, dtype=torch.int32))
    with pytest.raises(UserError, match=r"n_ctx: given 65; the context of .* is 64 tokens at most"):
        tiny_lm.check_tokens(torch.zeros(2, 65, dtype=torch.int32))


@pytest.mark.parametrize("token", [-1, 300])
def test_tokens_of_another_tokenizer(tiny_lm: LanguageModel, token: int) -> None:
    with pytest.raises(UserError, match="another model's tokenizer"):
        tiny_lm.check_tokens(torch.tensor([[5, token]]))


@pytest.mark.parametrize(
    ("name", "longest"), [("gpt2", 256), ("mpt", 256), ("rwkv", 256), ("mamba", None), ("bloom", None)]
)
def test_the_longest_window(name: str, longest: int | None) -> None:
    assert LanguageModel(ARCHITECTURES[name](), None, name).max_ctx == longest


@pytest.mark.parametrize("length", [None, -1, 0, True, "long"])
def test_a_length_that_says_nothing(length: Any) -> None:
    model = Toy()
    model.config.max_position_embeddings = length
    assert LanguageModel(model, None, "any length").max_ctx is None
    model.config.n_positions = 32
    assert LanguageModel(model, None, "of 32").max_ctx == 32


def test_cross_entropy_is_the_loss_of_the_next_token(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        logits = lm.model(input_ids=tokens).logits
    expected = -logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    loss = lm.cross_entropy(tokens.int())
    assert loss.dtype == torch.float32
    assert loss.shape == (4, 19)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_residual_stream_is_replaced_after_the_layer(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    """What runs above a block depends on its output alone, so swapped windows give swapped predictions."""
    if lm.name == "zamba2" and layer == 1:
        pytest.skip("its shared block reads the embeddings too")
    seen = []

    def swap(acts: torch.Tensor) -> torch.Tensor:
        seen.append(acts.clone())
        return acts.flip(0)

    with torch.no_grad():
        swapped = lm.model(input_ids=tokens).logits.flip(0)
    expected = F.cross_entropy(swapped[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = lm.cross_entropy(tokens, layer, swap)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(seen, [lm.activations(tokens, layer)])


def test_only_positions_under_the_mask_are_replaced(lm: LanguageModel, tokens: torch.Tensor) -> None:
    mask = torch.zeros(4, 20, dtype=torch.bool)
    plain = lm.cross_entropy(tokens)
    torch.testing.assert_close(lm.cross_entropy(tokens, 2, torch.zeros_like, mask), plain, rtol=0, atol=0)
    mask[1, 10] = True
    changed = lm.cross_entropy(tokens, 2, torch.zeros_like, mask) != plain
    assert not changed[[0, 2, 3]].any()
    if lm.name == "zamba2":  # sums within chunks, in another order
        changed = ~torch.isclose(lm.cross_entropy(tokens, 2, torch.zeros_like, mask), plain)
    assert not changed[1, :10].any()
    assert changed[1, 10]


def test_the_hook_is_removed_when_replace_fails(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    before = tiny_lm.cross_entropy(tokens)
    with pytest.raises(ZeroDivisionError):
        tiny_lm.cross_entropy(tokens, 2, lambda acts: acts * (1 / 0))
    torch.testing.assert_close(tiny_lm.cross_entropy(tokens), before, rtol=0, atol=0)


def test_replace_gives_the_wrong_shape(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"replace: gave \(4, 20, 15\); needed the shape of acts, \(4, 20, 16\)"):
        tiny_lm.cross_entropy(tokens, 2, lambda acts: acts[..., 1:])


def test_layer_without_replace(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="layer and replace"):
        tiny_lm.cross_entropy(tokens, layer=2)


def test_logits_of_the_last_token_only_are_no_loss(tokens: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"gives logits \[4, 50\] for 4 windows of 20 tokens; needed \[4, 20, voc"):
        LanguageModel(LogitsOfTheLastTokenOnly(), None, "odd").cross_entropy(tokens)
