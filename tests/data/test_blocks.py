"""A model's blocks are recognised by what they do; a model without a residual stream between them is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from one_line import one_line
from torch import nn
from torch.nn import functional as F
from toys import Block, Toy

from csae.data.blocks import find_blocks
from csae.data.language_model import LanguageModel
from csae.errors import UserError

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 32}
LLAMA = transformers.LlamaConfig(**SMALL, hidden_size=16, intermediate_size=32)


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
