"""Which places of a model names stand for, what is read there, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, D_IN, N_LAYERS
from torch import nn
from toys import Block, Toy

from csae.data.activations import ModelActivations, estimate_normalisation, estimate_normalisations, sink_mask
from csae.data.language_model import LanguageModel
from csae.data.places import Place, in_words, layer_of, our_name, places_in
from csae.data.text import TokenWindows
from csae.errors import UserError

transformers = pytest.importorskip("transformers")

# The MLP and the attention of block 1, by their paths behind the block; None where there is no module of that kind.
PARTS: dict[str, tuple[str | None, str | None]] = {
    "llama": ("mlp", "self_attn"),
    "mixtral": ("mlp", "self_attn"),
    "gemma2": ("mlp", "self_attn"),
    "gpt2": ("mlp", "attn"),
    "gpt-neox": ("mlp", "attention"),
    "gptj": ("mlp", "attn"),
    "falcon": ("mlp", "self_attention"),
    "opt": (None, "self_attn"),
    "mamba": (None, "mixer"),
    "mamba2": (None, "mixer"),
    "jamba": ("feed_forward", "self_attn"),
    "lfm2": ("feed_forward", "self_attn"),
    "llama4": ("feed_forward", "self_attn"),
    "recurrent-gemma": ("mlp_block", "temporal_block"),
    "ctrl": ("ffn", "multi_head_attention"),
    "qwen3-next": ("mlp", "self_attn"),
    "zamba2": (None, None),
}
if transformers.__version__.startswith("4."):
    PARTS["mixtral"] = ("block_sparse_moe", "self_attn")
HERE = [name for name in PARTS if name in ARCHITECTURES]


def made(name: str) -> LanguageModel:
    return LanguageModel(ARCHITECTURES[name](), None, name)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return made("llama")


def seen_by_hooks(lm: LanguageModel, tokens: torch.Tensor, paths: list[str]) -> dict[str, torch.Tensor]:
    """What modules give, and with .in are given, in a whole pass."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for path in paths:
        module = lm.model.get_submodule(path.removesuffix(".in"))

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            seen[path] = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)).clone()

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            seen[path] = (output[0] if isinstance(output, tuple) else output).clone()

        of_input = path.endswith(".in")
        handles.append(
            module.register_forward_pre_hook(before, with_kwargs=True)
            if of_input
            else module.register_forward_hook(after)
        )
    with torch.no_grad():
        lm.model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", HERE)
def test_the_parts_of_a_block_are_found_by_what_they_do(name: str, tokens: torch.Tensor) -> None:
    lm = made(name)
    block = lm.hook("resid.out:1").path
    for kind, child in zip(("mlp", "attn"), PARTS[name], strict=True):
        if child is None:
            with pytest.raises(UserError, match=rf"hook '{kind}.out:1': block 1 of {name} has no") as error:
                lm.hook(f"{kind}.out:1")
            assert "\n" not in str(error.value)
            assert "resid.out:1; `csae hooks" in str(error.value), "it says which places there are"
            continue
        point, path = lm.hook(f"{kind}.out:1"), f"{block}.{child}"
        assert (point.path, point.width, point.block, point.side) == (path, D_IN, 1, "out")
        assert lm.hook(path).name == point.name
        assert lm.hook(f"{path}.in").name == f"{kind}.in:1"
        seen = seen_by_hooks(lm, tokens, [path, f"{path}.in"])
        acts = lm.activations(tokens, f"{kind}.out:1")
        torch.testing.assert_close(acts, seen[path].view_as(acts))  # Llama 4's experts give [B * T, d]
        torch.testing.assert_close(lm.activations(tokens, f"{kind}.in:1"), seen[f"{path}.in"])


@pytest.mark.skipif("llama4" not in ARCHITECTURES, reason="needs a transformers with Llama 4")
def test_experts_that_give_one_row_a_position_are_replaced(tokens: torch.Tensor) -> None:
    lm = made("llama4")
    clean = lm.cross_entropy(tokens)
    torch.testing.assert_close(lm.cross_entropy(tokens, "mlp.out:1", lambda acts: acts), clean)
    zeros = lm.cross_entropy(tokens, "mlp.out:1", torch.zeros_like)
    experts = lm.hook("mlp.out:1").module
    handle = experts.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]), *output[1:]))
    torch.testing.assert_close(zeros, lm.cross_entropy(tokens))
    handle.remove()
    assert (zeros - clean).abs().max() > 1e-4


@pytest.mark.parametrize("name", [name for name in ("bloom", "mpt") if name in ARCHITECTURES])
def test_an_mlp_that_adds_the_stream_itself_is_refused(name: str) -> None:
    lm = made(name)
    with pytest.raises(
        UserError, match=f"the MLP of block 1 of {name} adds the stream to what it gives; name the module"
    ):
        lm.hook("mlp.out:1")
    assert lm.hook("mlp.in:1").width == D_IN


def test_blocks_are_numbered_as_the_model_does(llama: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        states = llama.model(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(llama.activations(tokens, "resid.out:1"), states[2])
    torch.testing.assert_close(llama.activations(tokens, 2), states[2], rtol=0, atol=0)
    torch.testing.assert_close(llama.activations(tokens, "resid.in:0"), states[0])
    assert llama.hook("resid.in:2") == llama.hook("resid.out:1") == llama.hook(2)
    assert llama.hook("model.layers.1").name == "resid.out:1"
    assert (layer_of("resid.out:1"), layer_of("resid.in:1"), layer_of("mlp.out:1")) == (2, None, None)
    assert in_words("resid.out:1", "lm") == "layer 2 of lm (resid.out:1)"
    assert in_words("mlp.out:1", "lm") == "mlp.out:1 of lm"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.1.hook_resid_post", "resid.out:1"),
        ("blocks.1.hook_resid_pre", "resid.out:0"),
        ("blocks.1.hook_mlp_out", "mlp.out:1"),
        ("blocks.1.hook_attn_out", "attn.out:1"),
        ("blocks.0.hook_resid_pre", "resid.in:0"),
        ("resid_pre_layer_0", "resid.in:0"),
        ("resid_in_layer_0", "resid.in:0"),
        ("resid_pre_layer_2", "resid.out:1"),
        ("mlp_in_layer_1", "mlp.in:1"),
        ("attn_in_layer_1", "attn.in:1"),
        ("resid_post_layer_1", "resid.out:1"),
        ("mlp_out_layer_1", "mlp.out:1"),
        ("layers.1.mlp", "mlp.out:1"),
        ("layers.1", "resid.out:1"),
    ],
)
def test_the_names_of_other_libraries(name: str, expected: str, llama: LanguageModel) -> None:
    assert llama.hook(name).name == expected


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
def test_the_names_of_other_libraries_say_the_same_without_a_model(kind: str, block: int, llama: LanguageModel) -> None:
    for name in (f"blocks.{block}.hook_{kind}", f"{kind}_layer_{block}"):
        point = llama.hook(name)
        assert our_name(name) == point.name
        assert our_name(point.name) == point.name
    assert our_name(llama.hook_points.others_name(point)) == point.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.hook_resid_mid", "the stream between attention and MLP; name the norm before the MLP by its path"),
        ("blocks.1.hook_mlp_in", "the stream before the norm; mlp.in:1 is what comes behind"),
        ("blocks.1.attn.hook_z", "what the heads give; name the projection that takes it by its path, with .in"),
        ("blocks.1.mlp.hook_post", "a part of the MLP; name the module"),
        ("blocks.1.ln2.hook_normalized", "a part of a norm"),
        ("blocks.1.attn.hook_pattern", "a part of attention"),
        ("ln_final.hook_normalized", "a part of the last norm"),
        ("hook_embed", "the embedding; resid.in:0"),
        ("blocks.9.hook_mlp_out", "has blocks 0 to 2"),
        ("mlp_out_layer_9", "has blocks 0 to 2"),
        ("blocks.3.hook_resid_pre", "has no such place"),
    ],
)
def test_other_names_of_transformer_lens_are_refused(name: str, message: str, llama: LanguageModel) -> None:
    with pytest.raises(UserError) as error:
        llama.hook(name)
    assert message in str(error.value)


def test_transformer_lens_s_names_only_where_they_are_the_same() -> None:
    gemma = made("gemma2")  # a norm comes between the MLP and the stream
    assert gemma.hook_points.others_name(gemma.hook("mlp.out:1")) is None
    with pytest.raises(UserError, match=r"a norm or a factor comes between here, so mlp.out:1 is not the same"):
        gemma.hook("blocks.1.hook_mlp_out")
    gpt = made("gpt2")
    assert gpt.hook_points.others_name(gpt.hook("mlp.out:1")) == "blocks.1.hook_mlp_out"
    assert gpt.hook_points.others_name(gpt.hook("mlp.in:1")) is None


def test_patterns(llama: LanguageModel) -> None:
    def names(pattern: str) -> list[str]:
        return [point.name for point in llama.hook_points.find(pattern)]

    assert names("model.layers.*.mlp") == names("mlp.out:*") == [f"mlp.out:{block}" for block in range(N_LAYERS)]
    assert names("resid.out:[12]") == ["resid.out:1", "resid.out:2"]
    assert names("*.in:1") == ["resid.out:0", "mlp.in:1", "attn.in:1"]
    assert names("model.layers.?.mlp.down_proj.in") == [f"model.layers.{n}.mlp.down_proj.in" for n in range(N_LAYERS)]
    with pytest.raises(UserError, match=r"hook 'model\.\*': model.layers of llama runs 0 times"):
        names("model.*")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp.out:3", "hook 'mlp.out:3': llama has blocks 0 to 2"),
        ("resid.out:3", "blocks 0 to 2; after the last is resid.out:2, which is layer 3"),
        ("model.layers.1.mpl", "llama has no such place; `csae hooks MODEL` lists what there is"),
        ("model.layers.*.mpl", "fits no place of llama"),
        ("mlp.out:*", "3 places of llama, mlp.out:0 to mlp.out:2; needed one"),
        ("model.rotary_emb", r"gives \[1, 4, 8\] for 2 windows of 4 tokens; needed \[2, 4, d\]"),
        ("model.embed_tokens.in", r"is given \[2, 4\] for 2 windows"),
        ("model.layers", "runs 0 times in a pass"),
        ("mlp.out:1\x1b[31m", r"mlp.out:1\\+x1b"),
    ],
)
def test_what_is_no_hook_point_is_refused_in_one_line(name: str, message: str, llama: LanguageModel) -> None:
    with pytest.raises(UserError, match=message) as error:
        llama.hook(name)
    assert "\n" not in str(error.value)


class RunsTwice(Block):
    def forward(self, acts: torch.Tensor) -> torch.Tensor:
        return acts + self.inner(self.inner(acts).tanh())


def test_a_module_that_runs_twice_is_refused() -> None:
    lm = LanguageModel(Toy(RunsTwice), None, "toy")
    with pytest.raises(UserError, match=r"blocks.1.inner of toy runs 2 times in a pass through the model; needed once"):
        lm.hook("blocks.1.inner")


class InPlace(nn.Module):
    """A block that goes on to write into what its MLP gave."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, width))

    def forward(self, acts: torch.Tensor) -> torch.Tensor:
        out = self.mlp(acts)
        out += acts
        return out


def test_what_a_model_writes_into_later_is_read_as_it_was() -> None:
    toy = Toy(InPlace)
    lm, tokens = LanguageModel(toy, None, "toy"), torch.randint(0, 50, (2, 6))
    acts, stream = lm.read(tokens, [lm.hook("mlp.out:0"), lm.hook("resid.out:0")])
    with torch.no_grad():
        torch.testing.assert_close(acts, toy.blocks[0].mlp(toy.embedding(tokens)))
        torch.testing.assert_close(stream, acts + toy.embedding(tokens))


def test_several_are_read_in_one_pass_that_ends_behind_the_last(llama: LanguageModel, tokens: torch.Tensor) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in llama.model.named_modules()
        if path in ("model.layers.0", "model.layers.1.mlp", "model.layers.2", "lm_head")
    ]
    names = ["mlp.in:1", "resid.out:0", "mlp.in:1", "attn.out:1"]
    read = llama.read(tokens, [llama.hook(name) for name in names])
    for handle in handles:
        handle.remove()
    assert ran == ["model.layers.0"], "the MLP's own run is not needed either"
    for name, acts in zip(names, read, strict=True):
        assert torch.equal(acts, llama.activations(tokens, name))


# --- sources of several places ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def windows(llama: LanguageModel) -> TokenWindows:
    tokens = torch.randint(1, 300, (30, 12), generator=torch.Generator().manual_seed(3)).int()
    return TokenWindows(tokens, torch.zeros_like(tokens))


PLACES = [2, "mlp.out:*", Place("mlp.in:1", "mlp.out:1"), Place("resid.out:0", "model.layers.1.mlp.act_fn")]


def test_each_of_several_places_is_as_if_it_were_alone(llama: LanguageModel, windows: TokenWindows) -> None:
    together = ModelActivations(llama, PLACES, windows)
    assert [str(place) for place in together.places[:4]] == ["resid.out:1", "mlp.out:0", "mlp.out:1", "mlp.out:2"]
    read, given = together.read_all([4, 2, 9]), [part[[4, 2, 9]] for part in windows[:2]]
    for place, batch in read.items():
        alone = ModelActivations(llama, place, windows)
        for found in (alone.read([4, 2, 9]), together.at(place).read([4, 2, 9]), together.batches(*given)[place]):
            for one, other in zip(batch, found, strict=True):
                assert one is other is None or torch.equal(one, other)
        assert together.at(place).describe() == alone.describe()
        assert (alone.d_in, alone.d_out) == (
            batch.acts.shape[-1],
            (batch.acts if place.to is None else batch.target).shape[-1],
        )
    normalised = estimate_normalisations(together, range(3, 25), n_windows=7)
    for place, found in normalised.items():
        alone = estimate_normalisation(together.at(place), range(3, 25), n_windows=7)
        assert torch.equal(found.mean, alone.mean)
        assert (found.scale, found.target_scale) == (alone.scale, alone.target_scale)
        assert (found.target_mean is None) == (place.to is None)
    with pytest.raises(ValueError, match="6 places; needed one"):
        together.read([1])
    with pytest.raises(ValueError, match=r"needed one of resid.out:1"):
        together.at(Place("mlp.in:0"))


def test_a_transcoder_s_batch(llama: LanguageModel, windows: TokenWindows) -> None:
    source = ModelActivations(llama, Place("layers.1.mlp.in", "layers.1.mlp"), windows)
    assert source.places == (Place("mlp.in:1", "mlp.out:1"),)
    batch = source.read(range(6))
    tokens = windows.tokens[:6].long()
    assert batch.target is not None
    assert torch.equal(batch.acts, llama.activations(tokens, "mlp.in:1"))
    assert torch.equal(batch.target, llama.activations(tokens, "mlp.out:1"))
    with torch.no_grad():
        torch.testing.assert_close(batch.target, llama.model.model.layers[1].mlp(batch.acts))
    assert torch.equal(batch.mask, sink_mask(batch.acts) & sink_mask(batch.target))
    about = source.describe()
    assert (about["hook"], about["hook_to"], places_in(about)) == ("mlp.in:1", "mlp.out:1", list(source.places))
    mean = source.read(range(30)).target[source.read(range(30)).mask].mean(dim=0)
    torch.testing.assert_close(estimate_normalisation(source).target_mean, mean)


def test_pairs_of_patterns(llama: LanguageModel) -> None:
    assert llama.hook_points.places("mlp.in:*", "mlp.out:*") == tuple(
        Place(f"mlp.in:{block}", f"mlp.out:{block}") for block in range(N_LAYERS)
    )
    for from_, to, message in (
        ("mlp.in:*", "mlp.out:[01]", "3 and 2 places of llama; needed one of each"),
        ("mlp.in:1", "layers.1.mlp.in", "both are mlp.in:1"),
        ("mlp.out:1", "mlp.in:1", "llama reaches mlp.in:1 before mlp.out:1; needed the other order"),
        ("resid.out:2", "mlp.out:1", "reaches mlp.out:1 before resid.out:2"),
    ):
        with pytest.raises(UserError, match=message):
            llama.hook_points.places(from_, to)


# --- the loss where one is replaced -----------------------------------------------------------------


def test_the_loss_with_a_hook_point_replaced(llama: LanguageModel, tokens: torch.Tensor) -> None:
    clean = llama.cross_entropy(tokens)
    for name in ("mlp.in:1", "mlp.out:1", "attn.in:1", "resid.out:1", "model.layers.1.mlp.down_proj.in"):
        assert torch.equal(llama.cross_entropy(tokens, name, lambda acts: acts), clean)
        assert not torch.allclose(llama.cross_entropy(tokens, name, torch.zeros_like), clean)
    mlp = llama.model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda *_: torch.zeros(4, 20, D_IN))
    expected = llama.cross_entropy(tokens)
    handle.remove()
    assert torch.equal(llama.cross_entropy(tokens, "mlp.out:1", torch.zeros_like), expected)
    mask = torch.zeros(4, 20, dtype=torch.bool)
    assert torch.equal(llama.cross_entropy(tokens, "mlp.out:1", torch.zeros_like, mask), clean)


def test_the_loss_with_a_predicted_target(llama: LanguageModel, tokens: torch.Tensor) -> None:
    clean, mlp = llama.cross_entropy(tokens), llama.model.model.layers[1].mlp
    with torch.no_grad():
        torch.testing.assert_close(llama.cross_entropy(tokens, "mlp.in:1", mlp.forward, to="mlp.out:1"), clean)
    with pytest.raises(ValueError, match="needed the shape of acts"):
        llama.cross_entropy(tokens, "mlp.in:1", lambda acts: acts[..., 1:], to="mlp.out:1")
    with pytest.raises(UserError, match=r"reached mlp.in:1 after 0 runs of model.layers.1.mlp; needed one"):
        llama.cross_entropy(tokens, "mlp.out:1", lambda acts: acts, to="mlp.in:1")


def test_in_half_precision(tokens: torch.Tensor) -> None:
    model = ARCHITECTURES["gpt2"]().to(torch.bfloat16)
    lm = LanguageModel(model, None, "gpt2")
    assert lm.hook("mlp.out:1").path == "transformer.h.1.mlp"
    acts = lm.activations(tokens, "mlp.out:1")
    assert acts.dtype == torch.bfloat16
    windows = TokenWindows(tokens.int(), torch.zeros_like(tokens).int())
    batch = ModelActivations(lm, "mlp.out:1", windows, batch_size=4).read(range(4))
    assert torch.equal(batch.acts, acts.float())
    assert torch.equal(batch.mask, sink_mask(acts.float()))


def test_a_model_that_changed_is_looked_at_again() -> None:
    lm = made("gpt2")
    old = lm.hook("mlp.out:1").module
    lm.model.transformer.h[1].mlp = nn.Sequential(nn.Linear(D_IN, 8), nn.Tanh(), nn.Linear(8, D_IN))
    assert lm.hook("mlp.out:1").module is not old
    assert lm.hook("mlp.out:1").module is lm.model.transformer.h[1].mlp


def test_a_place_that_moved_away_is_noticed() -> None:
    toy = Toy(InPlace)
    lm = LanguageModel(toy, None, "toy")
    lm.hook("mlp.out:1")
    toy.run = lambda acts: acts  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"did not run blocks.1.mlp, which it did when it was looked at"):
        lm.activations(torch.zeros(2, 4, dtype=torch.int64), "mlp.out:1")
    toy.run = lambda acts: toy.blocks[1](acts[:1])  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"\[1, 4, 8\] is there; needed \[2, 4, 8\]"):
        lm.activations(torch.zeros(2, 4, dtype=torch.int64), "mlp.out:1")
