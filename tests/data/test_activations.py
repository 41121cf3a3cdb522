from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from csae.data.activations import (
    Batch,
    ModelActivations,
    ShardActivations,
    estimate_normalisation,
    follow_mask,
    held_out,
    sink_mask,
    window_order,
    write_cache,
)
from csae.data.language_model import LanguageModel
from csae.data.text import TokenWindows, tokenize
from csae.errors import UserError

T = 12


@pytest.fixture(scope="module")
def token_windows(tiny_lm: LanguageModel) -> TokenWindows:
    documents = [f"Letter {i}: the {'very ' * (i % 7)}long story of {i} days.\n" for i in range(30)]
    return tokenize(documents, tiny_lm.tokenizer, T, max_tokens=23 * T)


@pytest.fixture(scope="module")
def source(tiny_lm: LanguageModel, token_windows: TokenWindows) -> ModelActivations:
    return ModelActivations(tiny_lm, 2, token_windows, batch_size=4)


class Given:
    """A source of given activations."""

    def __init__(self, acts: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        self.acts = acts
        self.mask = torch.ones(acts.shape[:2], dtype=torch.bool) if mask is None else mask
        self.n_windows, self.n_ctx, self.d_in = acts.shape
        self.asked: list[int] = []

    def read(self, window_indices) -> Batch:
        self.asked += window_indices
        rows = list(window_indices)
        return Batch(self.acts[rows], self.mask[rows], torch.zeros(self.mask[rows].shape, dtype=torch.int64), None)

    def describe(self) -> dict:
        return {"given": True}


def assert_same(one: Batch, other: Batch) -> None:
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


# --- from a model ------------------------------------------------------------------------------------


def test_what_a_model_gives(tiny_lm: LanguageModel, source: ModelActivations, token_windows: TokenWindows) -> None:
    assert (source.n_windows, source.n_ctx, source.d_in) == (23, T, 16)
    indices = [5, 0, 22, 7, 7]
    batch = source.read(indices)
    assert [tensor.dtype for tensor in batch[:4]] == [torch.float32, torch.bool, torch.int64, torch.int64]
    assert batch.target is None
    assert torch.equal(batch.tokens, token_windows.tokens[indices].long())
    assert torch.equal(batch.documents, token_windows.documents[indices].long())
    assert torch.equal(batch.mask, sink_mask(batch.acts))
    torch.testing.assert_close(batch.acts, tiny_lm.activations(batch.tokens, 2))


def test_reading_again_gives_the_same_bits(tiny_lm, source: ModelActivations, token_windows: TokenWindows) -> None:
    first = source.read([3, 1, 9, 4, 20, 2])
    source.read([0, 1])
    assert_same(source.read([3, 1, 9, 4, 20, 2]), first)
    assert_same(ModelActivations(tiny_lm, 2, token_windows, batch_size=4).read([3, 1, 9, 4, 20, 2]), first)


def test_half_precision_models_give_float32(tiny_model_path: Path, token_windows: TokenWindows) -> None:
    lm = LanguageModel.load(tiny_model_path, device="cpu", dtype=torch.bfloat16)
    batch = ModelActivations(lm, 2, token_windows).read([1])
    assert batch.acts.dtype == torch.float32
    assert torch.equal(batch.acts, lm.activations(batch.tokens, 2).float())


def test_a_model_is_described(source: ModelActivations, tiny_lm: LanguageModel, token_windows: TokenWindows) -> None:
    about = source.describe()
    assert json.loads(json.dumps(about)) == about
    digest = about.pop("windows_sha256")
    assert about == {
        "model": tiny_lm.name,
        "layer": 2,
        "n_ctx": T,
        "n_windows": 23,
        "d_in": 16,
        "dtype": "float32",
        "batch_size": 4,
    }
    other = TokenWindows(token_windows.tokens.clone(), token_windows.documents)
    other.tokens[4, 4] += 1
    assert ModelActivations(tiny_lm, 2, other).describe()["windows_sha256"] != digest


def test_layer_and_context_are_checked_at_once(tiny_lm: LanguageModel, token_windows: TokenWindows) -> None:
    with pytest.raises(UserError, match="layer: given 9"):
        ModelActivations(tiny_lm, 9, token_windows)
    long = torch.zeros(1, 65, dtype=torch.int32)
    with pytest.raises(UserError, match="n_ctx: given 65"):
        ModelActivations(tiny_lm, 2, TokenWindows(long, long))
    with pytest.raises(ValueError, match="batch_size: given 0"):
        ModelActivations(tiny_lm, 2, token_windows, batch_size=0)


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.float32, "its weights may be broken"), (torch.bfloat16, "load it in float32")]
)
def test_a_model_that_gives_nan(
    tiny_model_path: Path, token_windows: TokenWindows, dtype: torch.dtype, advice: str
) -> None:
    lm = LanguageModel.load(tiny_model_path, device="cpu", dtype=dtype)
    token = int(token_windows.tokens[6, 8])
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[token] = torch.nan
    source = ModelActivations(lm, 2, token_windows)
    clean = [i for i in range(23) if not (token_windows.tokens[i] == token).any()]
    assert source.read(clean[:2]).acts.isfinite().all()
    with pytest.raises(
        UserError, match=rf"layer 2 \(resid.out:1\) of .* gives NaN or Inf in window 6, in {dtype}: {advice}"
    ) as error:
        source.read([clean[0], 6])
    assert "\n" not in str(error.value)


# --- from shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cache_holds_what_the_source_gives(source: ModelActivations, tmp_path: Path, dtype: torch.dtype) -> None:
    write_cache(source, tmp_path / "cache", dtype, shard_bytes=4000)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) > 2
    cache = ShardActivations(tmp_path / "cache")
    assert (cache.n_windows, cache.n_ctx, cache.d_in) == (23, T, 16)
    indices = [22, 3, 3, 0, 11]
    # Windows go to the cache in other batches, so the last bits may differ.
    expected, got = source.read(indices), cache.read(indices)
    torch.testing.assert_close(got.acts, expected.acts.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert_same(got._replace(acts=expected.acts), expected)
    assert_same(cache.read(indices), got)
    about = cache.describe()
    assert json.loads(json.dumps(about)) == about
    assert about == {
        **source.describe(),
        "folder": str(tmp_path / "cache"),
        "dtype": str(dtype).removeprefix("torch."),
    }


def test_the_size_of_shards(source: ModelActivations, tmp_path: Path) -> None:
    write_cache(source, tmp_path / "cache", torch.float32, shard_bytes=5000)
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in (tmp_path / "cache").glob("*.safetensors")]
    assert 4000 < max(sizes) <= 5000


def test_shards_that_someone_else_wrote(tmp_path: Path) -> None:
    """Without mask and documents: position 0 and outliers are masked, a window is one document."""
    torch.manual_seed(0)
    acts = torch.randn(4, 6, 3)
    acts[2, 3] *= 1000
    save_file({"activations": acts}, tmp_path / "x.safetensors")
    batch = ShardActivations(tmp_path).read([2, 0])
    assert torch.equal(batch.acts, acts[[2, 0]])
    expected = torch.ones(2, 6, dtype=torch.bool)
    expected[:, 0] = False
    expected[0, 3] = False
    assert torch.equal(batch.mask, expected)
    assert torch.equal(batch.documents, torch.zeros(2, 6, dtype=torch.int64))
    assert batch.tokens is None


def test_a_stored_mask_is_taken_as_it_is(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0, 1]], dtype=torch.uint8)
    save_file({"activations": torch.randn(1, 4, 3), "mask": mask}, tmp_path / "x.safetensors")
    assert ShardActivations(tmp_path).read([0]).mask.tolist() == [[True, True, False, True]]


def test_zeros_are_out_whatever_a_stored_mask_says(tmp_path: Path) -> None:
    acts = torch.randn(2, 5, 3)
    acts[:, 3:] = 0
    save_file({"activations": acts[:1], "mask": torch.ones(1, 5, dtype=torch.bool)}, tmp_path / "a.safetensors")
    save_file({"activations": acts[1:]}, tmp_path / "b.safetensors")
    assert torch.equal(ShardActivations(tmp_path).read([0, 1]).mask, text_of("ttt..", ".tt.."))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_shards_that_hold_nan(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    acts = torch.randn(4, 6, 3).to(dtype)
    save_file({"activations": acts}, tmp_path / "a.safetensors")
    acts[2, 0, 1] = value  # position 0 is masked out, but its NaN would spread
    save_file({"activations": acts}, tmp_path / "b.safetensors")
    source = ShardActivations(tmp_path)
    assert source.read([0, 5, 7]).acts.isfinite().all()  # only what is asked is looked at
    with pytest.raises(UserError, match=r"b\.safetensors, window 2: NaN or Inf in the activations") as error:
        source.read([0, 5, 6])
    assert "\n" not in str(error.value)


def test_shards_of_several_dtypes(tmp_path: Path) -> None:
    acts = torch.randn(3, 6, 3)
    for i, dtype in enumerate([torch.float16, torch.bfloat16, torch.float32]):
        save_file({"activations": acts[i : i + 1].to(dtype)}, tmp_path / f"{i}.safetensors")
    got = ShardActivations(tmp_path).read([2, 1, 0]).acts
    assert torch.equal(got, torch.stack([acts[2], acts[1].bfloat16().float(), acts[0].half().float()]))


def test_too_large_for_float16(tmp_path: Path) -> None:
    large = Given(torch.full((2, 4, 3), 70_000.0))
    with pytest.raises(UserError, match=r"an activation of 70000 is too large for torch\.float16; store bfloat16"):
        write_cache(large, tmp_path / "cache", torch.float16)
    assert not list(tmp_path.iterdir())
    write_cache(large, tmp_path / "cache", torch.bfloat16)
    assert ShardActivations(tmp_path / "cache").read([1]).tokens is None


def test_too_small_for_float16(tmp_path: Path) -> None:
    """Zeros would be taken for padding."""
    small = torch.ones(2, 4, 3)
    small[1, 2] = 1e-9
    with pytest.raises(UserError, match=r"so small that torch\.float16 rounds them to zero; store bfloat16 or float32"):
        write_cache(Given(small), tmp_path / "cache", torch.float16)
    assert not list(tmp_path.iterdir())
    write_cache(Given(small), tmp_path / "cache", torch.bfloat16)
    assert ShardActivations(tmp_path / "cache").read([1]).mask.all()


def test_dtype_of_a_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype: given torch\.int8; needed torch\.float16, "):
        write_cache(Given(torch.ones(2, 4, 3)), tmp_path, torch.int8)


# --- the mask ----------------------------------------------------------------------------------------


def test_position_0_and_outliers_are_masked() -> None:
    acts = torch.ones(3, 7, 4)
    acts[0, 2] = 9.9  # just below ten times the median
    acts[1, 4:6] = 10.1
    acts[2, 0] = 1e6  # does not count in the median
    mask = sink_mask(acts)
    expected = torch.ones(3, 7, dtype=torch.bool)
    expected[:, 0] = False
    expected[1, 4:6] = False
    assert torch.equal(mask, expected)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_the_mask_of_a_window_does_not_depend_on_the_batch(B: int, T: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (2 * torch.rand(B, T, 1, generator=generator))
    acts = torch.randn(B, T, 3, generator=generator) * scales
    mask = sink_mask(acts)
    assert not mask[:, 0].any()
    for row in range(B):
        assert torch.equal(sink_mask(acts[row : row + 1])[0], mask[row])


def text_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[mark == "t" for mark in row] for row in rows])


@pytest.mark.parametrize(
    ("text", "taking_part"),
    [
        ("ttttttttt", ".tttttttt"),
        ("....ttttt", ".....tttt"),
        ("ttttt....", ".tttt...."),
        ("..tt.tt..", "...t.tt.."),
        ("...t.....", "........."),
        (".........", "........."),
    ],
)
@pytest.mark.parametrize("padding", [0.0, 7.0, 1e6], ids=lambda size: f"padding={size:g}")
def test_padding_is_no_text(text: str, taking_part: str, padding: float) -> None:
    """Zeros are padding by themselves; any other value where `text` says so."""
    acts = torch.randn(1, 9, 8)
    acts[~text_of(text)] = padding
    given = None if padding == 0 else text_of(text)
    assert torch.equal(sink_mask(acts, given), text_of(taking_part))
    assert torch.equal(sink_mask(acts, text_of(text).long()), text_of(taking_part)), "an attention_mask of 0 and 1"


@pytest.mark.parametrize("padding", [0.0, 1e-3, 1e3], ids=lambda size: f"padding={size:g}")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_no_median_counts_padding(padding: float, left: bool) -> None:
    """More padding than text, with a sink in it."""
    acts, alone = torch.full((1, 32, 8), padding), torch.randn(1, 9, 8)
    alone[0, 5] = 40
    text = torch.zeros(1, 32, dtype=torch.bool)
    where = slice(23, 32) if left else slice(0, 9)
    acts[:, where], text[:, where] = alone, True
    mask = sink_mask(acts, text)
    assert mask[:, where].tolist() == sink_mask(alone).tolist() == [[False, True, True, True, True, False] + [True] * 3]
    assert not mask[~text].any()


def test_keep_first_keeps_position_0_and_outliers() -> None:
    acts = torch.randn(2, 9, 8)
    acts[0, 4] *= 1e4
    acts[1, :3] = 0
    assert torch.equal(sink_mask(acts, keep_first=True), text_of("ttttttttt", "...tttttt"))
    text = text_of(".tttttttt", "ttttttt..")
    assert torch.equal(sink_mask(acts, text, keep_first=True), text_of(".tttttttt", "...tttt.."))
    assert torch.equal(sink_mask(acts, text, keep_first=True, bos=True), text_of("..ttttttt", "....ttt.."))
    assert torch.equal(sink_mask(acts, text, bos=True), sink_mask(acts, text))


def test_special_tokens_take_no_part_and_may_be_position_0() -> None:
    acts = torch.ones(3, 9, 8)
    acts[:, 1:4] = 20  # in the median they would hide the sink
    acts[1, 7] = 11
    acts[2, 0] = 0
    special = text_of(".ttt.....", "tttt.....", "..tt.....")
    assert torch.equal(sink_mask(acts, special=special), text_of("....ttttt", "....ttt.t", "....ttttt"))
    assert torch.equal(
        sink_mask(acts, special=special, keep_first=True), text_of("t...ttttt", "....ttttt", ".t..ttttt")
    )


def test_tiny_activations_are_no_zeros() -> None:
    """Their squares round to zero."""
    assert sink_mask(torch.full((1, 4, 8), 1e-30))[0].tolist() == [False, True, True, True]
    assert sink_mask(torch.full((1, 4, 8), -0.0)).sum() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_is_not_masked(value: float) -> None:
    acts = torch.randn(1, 9, 8)
    acts[0, 3, 2], acts[0, 5] = value, 1e3
    assert torch.equal(sink_mask(acts), text_of(".tttt.ttt"))
    acts[0, :, 0] = value
    assert torch.equal(sink_mask(acts), text_of(".tttttttt"))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 1, 3)])
def test_the_mask_of_little(shape: tuple[int, ...]) -> None:
    mask = sink_mask(torch.ones(shape))
    assert mask.shape == shape[:2]
    assert mask.sum() == 0


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_parts_of_a_text_are_masked_as_the_whole(sizes: list[int], B: int, keep_first: bool, seed: int) -> None:
    """Where the whole has no norm near the bound: the median of the first part stands for that of the whole."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(B, sum(sizes), 64, generator=generator)
    text = torch.rand(B, sum(sizes), generator=generator) > 0.4
    acts[torch.rand(B, sum(sizes), generator=generator) < 0.1] = 0
    seen, masks = None, []
    for part, part_text in zip(acts.split(sizes, dim=1), text.split(sizes, dim=1), strict=True):
        mask, seen = follow_mask(part, seen, part_text, keep_first)
        masks.append(mask)
    assert torch.equal(torch.cat(masks, dim=1), sink_mask(acts, text, keep_first))
    assert seen is not None
    assert torch.equal(seen.begun, (text & (acts != 0).any(dim=-1)).any(dim=1))


def test_later_parts_are_compared_with_the_first_norms() -> None:
    acts = torch.ones(2, 8, 4)
    acts[0, 5:] = 9.9
    acts[1, 5:] = 10.1
    _, seen = follow_mask(acts[:, :1])
    assert seen.begun.all()
    assert seen.usual_norm.isnan().all(), "position 0 is no usual one"
    _, seen = follow_mask(acts[:, 1:5], seen)
    assert torch.equal(seen.usual_norm, torch.full((2,), 2.0))
    assert follow_mask(acts[:, 5:], seen)[0].tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize(
    ("acts", "text", "error", "message"),
    [
        (torch.ones(4, 3), None, ValueError, r"acts: given shape \[4, 3\]; needed \[B, T, d_in\]"),
        (torch.ones(2, 4, 3), torch.ones(1, 4).bool(), ValueError, r"text: given shape \[1, 4\]; needed \[2, 4\]"),
        (torch.ones(2, 4, 3), torch.ones(2, 4), TypeError, r"text: given torch\.float32; needed bool or integers"),
    ],
    ids=["acts", "shape of text", "dtype of text"],
)
def test_what_no_mask_is_made_of(
    acts: torch.Tensor, text: torch.Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sink_mask(acts, text)


# --- order, split, normalisation ---------------------------------------------------------------------


def test_window_order_is_a_permutation_of_its_own_for_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(window_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 9
    assert window_order(50, 1, 2) == list(orders[1, 2])


@pytest.mark.parametrize(("amount", "count"), [(3, 3), (0.1, 2), (0.25, 5), (0.01, 1), (19, 19)])
def test_the_last_windows_are_held_out(amount: int | float, count: int) -> None:
    train, test = held_out(20, amount)
    assert list(train) + list(test) == list(range(20))
    assert len(test) == count


@pytest.mark.parametrize("amount", [-0.5, 0.0, 1.0, 1.5, float("nan"), float("inf"), -float("inf")])
def test_what_is_no_share(amount: float) -> None:
    with pytest.raises(UserError, match=rf"--held-out: given {amount}; needed a share of the windows, above 0 and"):
        held_out(20, amount)


@pytest.mark.parametrize("amount", [0, 20, 25, -1, 0.99])
def test_nothing_to_train_or_evaluate_on(amount: int | float) -> None:
    with pytest.raises(UserError, match="needed at least one each: give more text, or another amount"):
        held_out(20, amount)


def test_normalisation_makes_the_mean_squared_norm_d_in() -> None:
    torch.manual_seed(0)
    acts = 5 * torch.randn(40, 6, 8) * torch.arange(1, 9) + 1000
    mask = torch.rand(40, 6) > 0.4
    acts[~mask] = 1e9
    mean, scale = estimate_normalisation(Given(acts, mask))[:2]
    used = acts[mask].double()
    torch.testing.assert_close(mean, used.mean(dim=0).float())
    x = (used - mean.double()) / scale
    assert float(x.square().sum(dim=-1).mean()) == pytest.approx(8, rel=1e-6)


def test_normalisation_is_estimated_on_some_of_the_given_windows() -> None:
    source = Given(torch.randn(200, 4, 3))
    estimate_normalisation(source, windows=range(10, 110), n_windows=30, seed=1)
    assert len(source.asked) == len(set(source.asked)) == 30
    assert set(source.asked) <= set(range(10, 110))
    assert source.asked != sorted(source.asked)
    few = Given(torch.randn(5, 4, 3))
    estimate_normalisation(few)
    assert sorted(few.asked) == [0, 1, 2, 3, 4]


def test_windows_with_nothing_in_their_mask_are_not_normalised_by() -> None:
    acts = torch.randn(200, 4, 3)
    mask = torch.ones(200, 4, dtype=torch.bool)
    mask[::2] = False
    source = Given(acts, mask)
    found = estimate_normalisation(source, n_windows=30)
    with_text = [window for window in source.asked if window % 2]
    assert len(with_text) == 30
    torch.testing.assert_close(found.mean, acts[with_text].mean(dim=(0, 1)))
    one = Given(acts, mask & (torch.arange(200) == 77).unsqueeze(1))
    torch.testing.assert_close(estimate_normalisation(one).mean, acts[77].mean(dim=0))


def test_nothing_to_normalise() -> None:
    with pytest.raises(UserError, match="mask leaves out every position of the 3 windows"):
        estimate_normalisation(Given(torch.randn(3, 4, 2), torch.zeros(3, 4, dtype=torch.bool)))
    with pytest.raises(UserError, match="are all the same"):
        estimate_normalisation(Given(torch.full((3, 4, 2), 0.1)))
