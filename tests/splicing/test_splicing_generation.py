"""Splicing while a model generates: with a cache the SAE puts in the same as without one."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, D_IN, MISSING
from torch import Tensor
from torch.testing import assert_close

from csae import SAE, ContextualSAE, TopKSAE, splice
from csae.data.blocks import find_blocks
from csae.splicing.following import Content, Text, content_of

LAYER = 2
ARCHS = ["topk", "current", "past"]
# Different ways to keep what went before; the others are slow together.
KINDS = ["llama", "mistral-sliding-window", "gemma3", "gpt2", "bloom", "lfm2", "falcon-mamba", "jamba"]
OTHERS = [name for name in ARCHITECTURES if name not in KINDS and name != "rwkv"]
# Without a splice, transformers' own tokens with a cache are others than without one.
BROKEN_WITH_PADDING = {"minimax"}
BROKEN = {("beams", "minimax"), ("beams", "recurrent-gemma"), ("guidance", "recurrent-gemma"), ("guidance", "bamba")}
OLD = transformers.__version__.startswith("4.")


def make(arch: str) -> SAE:
    torch.manual_seed(1)
    if arch == "topk":
        return TopKSAE(D_IN, 64, 4)
    sae = ContextualSAE(D_IN, 64, 4, n_heads=2, d_head=8, d_value=8, d_memory=16, query=arch)
    with torch.no_grad():  # what is carried is to matter
        sae.W_O.mul_(20)
        sae.W_mem.mul_(3)
        sae.null.sub_(2)
    return sae.eval()


def tokens(B: int = 2, T: int = 10, seed: int = 0) -> Tensor:
    ids = torch.randint(3, 310, (B, T), generator=torch.Generator().manual_seed(seed))
    ids[:, 6:] = ids[:, : T - 6]  # something to look up
    return ids


def generate(model: Any, ids: Tensor, padded: int = 0, **how: Any) -> Any:
    """8 more tokens; the last row begins with so much padding."""
    mask = torch.ones_like(ids)
    mask[-1, :padded] = 0
    torch.manual_seed(3)
    how = {"do_sample": False, "max_new_tokens": 8} | how
    return model.generate(ids, attention_mask=mask, **how)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    return model(input_ids=ids, **arguments).logits


def held(output: Any) -> dict[str, Any]:
    """The cache that a model gave, under the name that the model takes it by."""
    (found,) = [(name, value) for name, value in output.items() if value is not None and not isinstance(value, Tensor)]
    return dict([found])


@torch.no_grad()
def begun(model: Any, ids: Tensor) -> dict[str, Any]:
    return held(model(input_ids=ids, use_cache=True))


@pytest.fixture(scope="module")
def llama() -> Any:
    return ARCHITECTURES["llama"]()


def same_with_and_without_a_cache(model: Any, arch: str, ids: Tensor, padded: int, **how: Any) -> None:
    """The logits of each step, of a loop with a cache and one without."""
    made = []
    with splice(model, LAYER, make(arch)) as spliced:
        for use_cache in (True, False):
            given = {} if use_cache else {"use_cache": False}
            out = generate(model, ids, padded, output_logits=True, return_dict_in_generate=True, **how, **given)
            made.append(torch.stack(out.logits, dim=1))
            assert spliced.mask is not None
            assert spliced.mask[:, -1].any()
    scale = float(made[1].std())
    assert_close(made[0] / scale, made[1] / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_with_a_cache_as_without(name: str, arch: str) -> None:
    padded = 0 if name in BROKEN_WITH_PADDING else 3
    model = ARCHITECTURES[name]()
    if name == "mamba":  # norms that grow so much are sinks beside the first pass, and usual in the whole
        for parameter in model.parameters():
            parameter.data.div_(3 if parameter.dim() > 1 else 1)
    same_with_and_without_a_cache(model, arch, tokens(), padded)


def test_there_are_twenty_architectures_at_least() -> None:
    assert len(ARCHITECTURES) >= 20, MISSING


@pytest.mark.parametrize("arch", ARCHS)
def test_rwkv_goes_on_from_its_state(arch: str) -> None:
    model, ids = ARCHITECTURES["rwkv"](), tokens(1)  # its steps with a state are wrong for two texts
    with splice(model, LAYER, make(arch)) as spliced:
        whole = logits(model, ids, use_cache=False)
        state = begun(model, ids[:, :6])
        for t in range(6, 10):
            with torch.no_grad():
                output = model(input_ids=ids[:, t : t + 1], use_cache=True, **state)
            state = held(output)
            assert_close(output.logits, whole[:, t : t + 1], rtol=1e-4, atol=1e-4)
        assert spliced.mask is not None
    state = begun(model, ids[:, :6])
    with pytest.raises(ValueError, match="holds a state that did not go through"), splice(model, LAYER, make(arch)):
        logits(model, ids[:, 6:7], **state)


HOW: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several-samples": {"do_sample": True, "num_return_sequences": 3},
    "static-cache": {"cache_implementation": "static"},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "early-exit": {"assistant_early_exit": 1},
    "guidance": {"guidance_scale": 1.7},
}
ALONE = {"prompt-lookup", "early-exit", "guidance"}  # one text at a time
WITHOUT_A_CACHE: dict[str, dict[str, Any]] = {"prompt-lookup": {}, "early-exit": {}, "static-cache": {}}
SLOWER = ["gemma2", "gpt2", "mamba2", "bamba", "minimax", "recurrent-gemma", "gpt-oss", "falcon"]


def ways() -> Iterator[Any]:
    for name in ["llama", "mistral-sliding-window", *SLOWER]:
        for how in HOW:
            for arch in ARCHS:
                quick = name == "llama" or (how in ("beams", "prompt-lookup") and name not in SLOWER and arch == "past")
                yield pytest.param(name, how, arch, marks=() if quick else pytest.mark.slow, id=f"{name}-{how}-{arch}")


@pytest.mark.parametrize(("name", "how", "arch"), list(ways()))
def test_ways_to_generate(name: str, how: str, arch: str) -> None:
    model = ARCHITECTURES[name]()
    padded = 0 if how in ALONE or name in BROKEN_WITH_PADDING else 3
    ids = tokens(1 if how in ALONE else 2)
    if (how, name) in BROKEN:
        pytest.skip("wrong with a cache, or not the same at a position whatever follows it, without a splice either")
    try:
        generate(model, ids, padded, **HOW[how])
    except (ValueError, RuntimeError, TypeError, LookupError) as error:
        if name == "llama" and not (OLD and how == "prompt-lookup"):
            raise  # it can do all of them: something else is wrong
        pytest.skip(f"not without a splice either: {error}")
    with splice(model, LAYER, make(arch)):
        cached = generate(model, ids, padded, **HOW[how])
        plain = generate(model, ids, padded, use_cache=False, **WITHOUT_A_CACHE.get(how, HOW[how]))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("arch", ["current", "past"])
@pytest.mark.parametrize("how", ["beams", "prompt-lookup"])
def test_a_bounded_look_back_is_followed(how: str, arch: str, llama: Any) -> None:
    """What rejected tokens wrote over is put back."""
    ids = tokens(1)
    if how == "prompt-lookup" and OLD:
        pytest.skip("transformers 4 wants an end-of-sequence token for it")
    with splice(llama, LAYER, make(arch), look_back=4):
        cached = generate(llama, ids, **HOW[how])
        plain = generate(llama, ids, use_cache=False, **WITHOUT_A_CACHE.get(how, HOW[how]))
    assert torch.equal(cached, plain)


def test_a_bounded_memory_that_was_cut_too_far_is_refused(llama: Any) -> None:
    ids = tokens(1)
    with splice(llama, LAYER, make("past"), look_back=3):
        cache = begun(llama, ids[:, :6])
        for t in range(6, 10):
            logits(llama, ids[:, t : t + 1], **cache)
        crop(cache, 4)
        with pytest.raises(ValueError, match="look_back: the text was cut from 10 to 6 positions"):
            logits(llama, ids[:, 6:7], **cache)


def crop(cache: dict[str, Any], less: int) -> None:
    """So many positions less."""
    (cache_itself,) = cache.values()
    try:
        cache_itself.crop(-less)
    except (ValueError, RuntimeError):
        cache_itself.crop(cache_itself.get_seq_length() - less)


@pytest.mark.parametrize("arch", ARCHS)
def test_copies_repeated_rows_and_cut_ends_of_a_cache(arch: str, llama: Any) -> None:
    """A prompt that goes through once, and is gone on from in several ways."""
    prompt = tokens(1)
    with splice(llama, LAYER, make(arch)):
        cache = begun(llama, prompt)
        for seed in (1, 2):
            copied, ids = copy.deepcopy(cache), tokens(1, 6, seed)
            parts = [logits(llama, part, **copied) for part in ids.split(3, dim=1)]
            whole = logits(llama, torch.cat([prompt, ids], dim=1))[:, 10:]
            assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        (copied_itself,) = (copied := copy.deepcopy(cache)).values()
        copied_itself.batch_repeat_interleave(3)
        ids = tokens(3, 8, 3)
        logits(llama, ids[:, :5], **copied)
        crop(copied, 2)
        whole = logits(llama, torch.cat([prompt.expand(3, -1), ids[:, :3], ids[:, 5:]], dim=1))[:, 13:]
        assert_close(logits(llama, ids[:, 5:], **copied), whole, rtol=1e-4, atol=1e-4)
        copied_itself.batch_select_indices(torch.tensor([2, 0]))
        whole = torch.cat([prompt.expand(2, -1), ids[[2, 0], :3], ids[[2, 0], 5:], ids[[2, 0], :2]], dim=1)
        assert_close(logits(llama, ids[[2, 0], :2], **copied), logits(llama, whole)[:, 16:], rtol=1e-4, atol=1e-4)
        whole = logits(llama, torch.cat([prompt, ids[:1]], dim=1))[:, 10:]
        assert_close(logits(llama, ids[:1], **cache), whole, rtol=1e-4, atol=1e-4)  # the first goes on too


@pytest.mark.skipif(OLD, reason="transformers 4 makes such a cache in generate only")
@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_copies_of_a_recurrent_state(name: str) -> None:
    model, prompt = ARCHITECTURES[name](), tokens(1)
    with splice(model, LAYER, make("past")):
        state = begun(model, prompt)
        for seed in (1, 2):
            copied, ids = copy.deepcopy(state), tokens(1, 3, seed)
            for t in range(3):
                step = logits(model, ids[:, t : t + 1], **copied)
            whole = logits(model, torch.cat([prompt, ids], dim=1))[:, -1:]
            assert_close(step, whole, rtol=1e-3, atol=1e-3)


def test_two_texts_in_turns(llama: Any) -> None:
    texts = tokens(2, 9, 1), tokens(3, 9, 2)
    with splice(llama, LAYER, make("past")):
        caches = [begun(llama, ids[:, :5]) for ids in texts]
        for t in range(5, 9):
            for ids, cache in zip(texts, caches, strict=True):
                step = logits(llama, ids[:, t : t + 1], **cache)
                assert_close(step, logits(llama, ids[:, : t + 1])[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_base_model_by_itself(arch: str, llama: Any) -> None:
    ids = tokens()
    with torch.no_grad(), splice(llama, LAYER, make(arch)):
        whole = llama.model(input_ids=ids).last_hidden_state
        assert torch.equal(whole, llama.model(ids).last_hidden_state)
        output = llama.model(ids[:, :6], use_cache=True)
        (cache,) = [value for value in output.values() if not isinstance(value, Tensor)]
        (name,) = [name for name, value in output.items() if value is cache]
        second = llama.model(ids[:, 6:], **{name: cache}).last_hidden_state
    assert_close(second, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_outputs_as_tuples_and_texts_of_single_tokens(llama: Any) -> None:
    ids, name = tokens(), next(iter(begun(llama, tokens())))
    with torch.no_grad(), splice(llama, LAYER, make("past")):
        whole, steps, cache = llama(ids).logits, [], None
        for t in range(10):
            output = llama(ids[:, t : t + 1], use_cache=True, return_dict=False, **{name: cache})
            (cache,) = [value for value in output if not isinstance(value, Tensor)]
            steps.append(output[0])
    assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_cache_from_before_the_splice_is_refused(arch: str, llama: Any) -> None:
    """Of a per-token SAE too: which norms are usual in the text is not known."""
    cache = begun(llama, tokens())
    with splice(llama, LAYER, make(arch)):
        with pytest.raises(
            ValueError, match=r"\(a DynamicCache\) holds 10 positions that did not go through this splice"
        ):
            logits(llama, tokens()[:, :1], **cache)
        logits(llama, tokens())
        with pytest.raises(ValueError, match="did not go through this splice"):
            logits(llama, tokens()[:, :1], **cache)


def test_states_of_all_layers_in_one_tensor() -> None:
    class Stacked:
        def __init__(self, B: int) -> None:
            self.states = torch.randn(3, B, 8, 4)

    cache = Stacked(2)
    before = content_of(cache, 2)
    assert before is not None
    assert before.marks.shape == (2, 1)
    cache.states = cache.states[:, [1, 0, 1]]
    after = content_of(cache, 3)
    assert after is not None  # as many rows as layers: not told from them, so it fits nothing
    cache.states = cache.states[:, :2]
    after = content_of(cache, 2)
    assert after is not None
    assert torch.equal(after.marks, before.marks[[1, 0]])


def test_a_cache_that_shows_nothing_is_refused() -> None:
    class Blind:
        def get_seq_length(self) -> int:
            return 4

    with pytest.raises(ValueError, match=r"\(a Blind\) says that it holds 4 positions but shows none"):
        content_of(Blind(), 2)


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    text = Text()
    text.append({"marks": torch.tensor([[1, 5, 7], [3, 5, 7], [3, 5, 9]])})
    window = torch.tensor([[5, 9], [5, 7], [5, 7]])  # of a sliding cache
    with pytest.raises(ValueError, match="do not tell which of 3 texts each row is"):
        text.found_in(Content(3, 1, window))
    rows, kept = text.found_in(Content(3, 0, torch.tensor([[3, 5, 9], [1, 5, 7]]))) or (None, 0)
    assert rows is not None
    assert (rows.tolist(), kept) == ([2, 0], 3)
    assert text.found_in(Content(3, 1, torch.tensor([[5, 7], [5, 7], [5, 9]]))) == (None, 3)  # where they were
    assert text.found_in(Content(2, 0, torch.tensor([[1, 5], [3, 5], [3, 5]]))) == (None, 2)
    assert text.found_in(Content(4, 0, torch.tensor([[1, 5, 7, 9]] * 3))) is None
    assert text.found_in(Content(None, None, torch.tensor([[5], [5], [5]]))) == (None, 2)
    assert text.found_in(Content(None, None, torch.tensor([[5], [5], [4]]))) is None


@pytest.mark.parametrize(("arch", "look_back"), [("past", None), ("current", 6)])
def test_a_pass_that_fails_has_not_been(arch: str, look_back: int | None, llama: Any) -> None:
    ids = tokens()

    def fail(*_: Any) -> None:
        raise KeyError("in the last block")

    with splice(llama, LAYER, make(arch), look_back=look_back):
        cache = begun(llama, ids[:, :8])
        copied = copy.deepcopy(cache)
        handle = llama.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            logits(llama, ids[:, 8:], **copied)
        handle.remove()
        assert_close(logits(llama, ids[:, 8:], **cache), logits(llama, ids)[:, 8:], rtol=1e-4, atol=1e-4)


def test_inference_mode_and_no_grad_in_turns(llama: Any) -> None:
    ids = tokens()
    with splice(llama, LAYER, make("past")):
        with torch.inference_mode():
            cache = held(llama(ids[:, :6], use_cache=True))
            llama(ids[:, 6:7], **cache)
        assert_close(logits(llama, ids[:, 7:], **cache), logits(llama, ids)[:, 7:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """The block runs again in the backward pass, by itself."""
    model, ids, gradients = ARCHITECTURES["llama"](), tokens(), []
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with splice(model, LAYER, make("past")):
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[2].mlp.up_proj.weight.grad.clone())
    assert_close(gradients[0], gradients[1])


def test_a_block_that_runs_twice_is_refused(llama: Any) -> None:
    find_blocks(llama, "llama")  # it looks once, before the block runs twice
    first, second = llama.model.layers[LAYER - 1], llama.model.layers[LAYER]
    handle = second.register_forward_pre_hook(lambda _, args, kwargs: first(*args, **kwargs) and None, with_kwargs=True)
    with pytest.raises(ValueError, match=r"layers.1 ran twice in one pass"), splice(llama, LAYER, make("topk")):
        logits(llama, tokens(), use_cache=False)
    handle.remove()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_is_one_without_the_splice(how: str) -> None:
    """It runs its own weights, not those of the model that it was copied from."""
    model, ids = ARCHITECTURES["llama"](), tokens()
    plain = logits(model, ids)
    with splice(model, LAYER, make("past")):
        spliced = logits(model, ids)
        copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(logits(copied, ids), plain)
        assert torch.equal(logits(model, ids), spliced)
    copied.lm_head.weight.data.zero_()
    assert not logits(copied, ids).any()
    assert torch.equal(logits(model, ids), plain)
    with splice(copied, LAYER, make("past")):
        assert not logits(copied, ids).any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma3"])
def test_hidden_states_are_what_was_put_in(name: str) -> None:
    """Whether they were asked for before or not: transformers prepares for it once, at the first time."""
    model, ids = ARCHITECTURES[name](), tokens()

    def stream() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER]

    def asked_in_a_splice() -> None:
        with splice(model, LAYER, make("topk")) as spliced:
            found = stream()
        assert spliced.mask is not None
        assert spliced.output is not None
        assert torch.equal(found[spliced.mask], spliced.output.x_hat[spliced.mask])

    asked_in_a_splice()
    before = stream()
    asked_in_a_splice()
    assert torch.equal(stream(), before)


@pytest.mark.parametrize("how", ["wrapped", "method", "forward", "blocks", "inside"])
def test_compiled_models(how: str) -> None:
    torch._dynamo.reset()
    model, ids, sae = ARCHITECTURES["llama"](), tokens(), make("current")
    plain = logits(model, ids)
    with splice(model, LAYER, sae):
        right = logits(model, ids)
    called = model
    if how == "wrapped":
        called = torch.compile(model, backend="eager")
    elif how == "method":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "blocks":
        model.model.layers[0].compile(backend="eager")
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    if how != "inside":
        assert_close(logits(called, ids), plain)
    for _ in range(2):
        with splice(called, LAYER, sae):
            called = torch.compile(model, backend="eager") if how == "inside" else called
            assert_close(logits(called, ids), right)
            generate(called, ids)
        assert_close(logits(called, ids), plain)
    torch._dynamo.reset()


def test_a_splice_in_a_compiled_function_is_refused(llama: Any) -> None:
    torch._dynamo.reset()
    sae = make("topk")

    @torch.compile(backend="eager")
    def spliced(ids: Tensor) -> Tensor:
        with splice(llama, LAYER, sae):
            return llama(ids).logits

    with pytest.raises(RuntimeError, match="inside a compiled function"):
        spliced(tokens())
    torch._dynamo.reset()


def test_a_splice_that_replaced_nothing_says_so(llama: Any) -> None:
    nothing = "without having replaced anything: "
    with pytest.raises(RuntimeError, match=nothing + "model.layers.1 never ran"), splice(llama, LAYER, make("topk")):
        pass
    refused = pytest.raises(RuntimeError, match=nothing + "position_ids: numbered anew")
    with refused, splice(llama, LAYER, make("topk")), contextlib.suppress(ValueError):
        logits(llama, tokens(), position_ids=torch.zeros(2, 10, dtype=torch.int64))
    with pytest.warns(UserWarning, match=nothing + "all positions"), splice(llama, LAYER, make("topk")):
        logits(llama, tokens()[:, :1])
    with pytest.raises(KeyError, match="its own"), splice(llama, LAYER, make("topk")):
        raise KeyError("its own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with splice(llama, LAYER, make("topk")):
            logits(llama, tokens())
