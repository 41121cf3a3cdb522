"""The effects of directions of the residual stream on the logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, D_IN, N_LAYERS, VOCABULARY
from one_line import one_line
from torch import nn
from torch.nn import functional as F
from toys import LogitsOfTheLastTokenOnly, Toy

from csae.data.language_model import LanguageModel
from csae.errors import UserError

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_effects_are_the_derivative_of_the_logits_where_the_stream_is_zero(name: str) -> None:
    lm = LanguageModel(ARCHITECTURES[name](), None, name)
    directions = F.normalize(torch.randn(4, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)

    def logits_at(stream: torch.Tensor) -> torch.Tensor:
        def put_in(module: nn.Module, args: Any, output: Any) -> Any:
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        handle = lm.block(N_LAYERS).register_forward_hook(put_in)
        with torch.no_grad():
            logits = lm.model(input_ids=torch.full((4, 1), 5), use_cache=False).logits[:, 0]
        handle.remove()
        return logits

    step = 1e-5 * directions.unsqueeze(1)
    expected = (logits_at(step) - logits_at(-step)) / 2e-5
    hooks = list(lm.block(N_LAYERS)._forward_hooks)
    effects = lm.logit_effects(directions)
    assert effects.shape == (4, VOCABULARY)
    assert list(lm.block(N_LAYERS)._forward_hooks) == hooks
    torch.testing.assert_close(effects, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gpt2", "cohere", "granite", "opt-narrow"])
def test_effects_are_what_the_unembedding_says(name: str) -> None:
    lm = LanguageModel(ARCHITECTURES[name](), None, name)
    model, directions = lm.model, torch.randn(5, D_IN)
    after = {"gpt2": "transformer.ln_f", "opt-narrow": "model.decoder.final_layer_norm"}
    norm = model.get_submodule(after.get(name, "model.norm"))
    nn.init.normal_(norm.weight)
    if getattr(norm, "bias", None) is not None:
        nn.init.normal_(norm.bias)
    centred = directions - directions.mean(dim=1, keepdim=True)
    given = centred if name in ("gpt2", "cohere", "opt-narrow") else directions
    given = given * (norm.weight + (name.startswith("gemma")))
    if name == "opt-narrow":
        given = model.model.decoder.project_out(given)
    expected = given @ model.get_output_embeddings().weight.T
    effects = lm.logit_effects(directions)
    ratio = effects.norm() / expected.norm()
    torch.testing.assert_close(effects / ratio, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("opt-narrow", torch.bfloat16), ("llama", torch.float16)],
)
def test_effects_in_half_precision(name: str, dtype: torch.dtype) -> None:
    directions = F.normalize(torch.randn(5, D_IN), dim=1)
    exact = LanguageModel(ARCHITECTURES[name](), None, name).logit_effects(directions)
    found = LanguageModel(ARCHITECTURES[name]().to(dtype), None, name).logit_effects(directions)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02 * float(exact.std()))


@pytest.mark.parametrize("shape", [(2, D_IN + 1), (D_IN,), (0, D_IN), (2, 2, D_IN)])
def test_directions_that_do_not_fit(shape: tuple[int, ...]) -> None:
    lm = LanguageModel(ARCHITECTURES["llama"](), None, "llama")
    with pytest.raises(ValueError, match=r"directions: given shape \[.*\]; needed \[m, 32\], m >= 1"):
        lm.logit_effects(torch.randn(shape))


def test_a_derivative_that_half_precision_has_not() -> None:
    lm = LanguageModel(ARCHITECTURES["gpt2"]().half(), None, "gpt2")
    with pytest.raises(UserError, match=r"no finite derivative .* in torch.float16: load it in float32 or bfloat16"):
        lm.logit_effects(torch.randn(2, D_IN))


def test_a_head_that_wants_as_many_rows_as_went_in() -> None:
    config = transformers.GPTBigCodeConfig(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    lm = LanguageModel(transformers.GPTBigCodeForCausalLM(config), None, "gpt-bigcode")
    directions = torch.randn(5, 16)
    expected = (directions - directions.mean(dim=1, keepdim=True)) @ lm.model.get_output_embeddings().weight.T
    effects = lm.logit_effects(directions)
    torch.testing.assert_close(effects / effects.norm() * expected.norm(), expected, rtol=1e-4, atol=1e-4)


class LogitsFromElsewhere(Toy):
    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        acts = self.embedding(input_ids)
        self.run(acts)
        return SimpleNamespace(logits=self.head(acts))


class Unfollowable(Toy):
    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        given = super().forward(input_ids).logits
        return SimpleNamespace(logits=torch.from_numpy(given.detach().numpy()).sqrt())


@pytest.mark.parametrize(
    ("toy", "message"),
    [
        (LogitsFromElsewhere, "logits do not follow from what its last block gives"),
        (Unfollowable, "can't be followed|do not follow"),
        (LogitsOfTheLastTokenOnly, r"gives logits \[1, 50\] for 5 windows of 2 tokens|gives logits \[5, 50\]"),
    ],
)
def test_effects_that_are_not_to_be_had(toy: type[Toy], message: str) -> None:
    lm = LanguageModel(toy(), None, "odd")
    with pytest.raises(UserError, match=message) as error:
        lm.logit_effects(torch.randn(5, 8))
    one_line(error)
