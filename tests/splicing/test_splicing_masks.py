"""Which positions a splice treats as text: attention masks of all forms, and position ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from test_splicing_generation import ARCHS, LAYER, held, logits, make, tokens
from torch import Tensor
from torch.testing import assert_close

from csae import splice
from csae.splicing.visible import visible

T, PADDED = 9, 3
MASK = torch.ones(2, T, dtype=torch.int64)
MASK[1, :PADDED] = 0
POSITIONS = (MASK.cumsum(dim=1) - 1).clamp_min(0)
LEAST = torch.finfo(torch.float32).min


def pairs() -> Tensor:
    """MASK as a causal one, [2, 1, T, T] bool."""
    return torch.ones(T, T, dtype=torch.bool).tril() & MASK.bool()[:, None, None, :]


def added(sees: Tensor) -> Tensor:
    return torch.zeros(sees.shape).masked_fill(~sees, LEAST)


def all_for_padding() -> Tensor:
    """As some attention needs it: what sees nothing sees all."""
    sees = pairs()
    sees[1, :, :PADDED] = True
    return sees


FORMS: dict[str, Any] = {
    "bool": MASK.bool(),
    "floats": MASK.float(),
    "4d-bool": pairs(),
    "4d-added": added(pairs()),
    "4d-bool-all-for-padding": all_for_padding(),
    "4d-added-all-for-padding": added(all_for_padding()),
    "4d-of-heads": pairs().expand(2, 4, T, T),
    "3d": pairs()[:, 0],
    "by-kind-of-layer": {"full_attention": pairs(), "sliding_attention": pairs() & torch.ones(T, T).triu(-2).bool()},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return ARCHITECTURES["llama"]()


@pytest.mark.parametrize("arch", ARCHS)
def test_padding_on_the_left_changes_nothing(arch: str, llama: Any) -> None:
    ids = tokens(2, T)
    with torch.no_grad(), splice(llama, LAYER, make(arch)) as spliced:
        alone = logits(llama, ids[1:, PADDED:])
        by_name = logits(llama, ids, attention_mask=MASK, position_ids=POSITIONS)
        assert spliced.mask is not None
        assert spliced.mask.tolist() == [[False] + [True] * 8, [False] * 4 + [True] * 5]
        by_place = llama(ids, MASK, POSITIONS).logits
        of_pairs = logits(llama, ids, attention_mask=pairs(), position_ids=POSITIONS)
        base = llama.lm_head(llama.model(ids, MASK, POSITIONS).last_hidden_state)
    for found in (by_name, by_place, of_pairs, base):
        assert_close(found[1:, PADDED:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_padding_on_the_right_changes_nothing(arch: str, llama: Any) -> None:
    ids = tokens(2, T)
    with splice(llama, LAYER, make(arch)) as spliced:
        alone = logits(llama, ids[1:, : T - PADDED])
        found = logits(llama, ids, attention_mask=MASK.flip(1))
        assert spliced.mask is not None
        assert spliced.mask[1].tolist() == [False] + [True] * 5 + [False] * 3
    assert_close(found[1:, : T - PADDED], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_mask(form: str) -> None:
    text, _ = visible({"attention_mask": FORMS[form]}, 2, T, 0)
    assert text is not None
    assert torch.equal(text, MASK.bool())


@pytest.mark.parametrize("width", [T - 2, T, T + 5])
def test_masks_of_later_parts(width: int) -> None:
    """Of the new positions only, of all, and of a cache that has room for more."""
    sees = torch.ones(2, 1, T, T + 5, dtype=torch.bool).tril()[:, :, -3:]
    sees[1, ..., :PADDED] = False
    new = T - 3
    if width == T - 2:  # a sliding cache shows no more
        sees = sees[..., new - 2 : T] if False else torch.ones(2, 1, 3, width, dtype=torch.bool).tril(width - 3)
    elif width == T:
        sees = torch.ones(2, 1, 3, T, dtype=torch.bool).tril(T - 3)
    else:
        sees = torch.ones(2, 1, 3, T + 5, dtype=torch.bool).tril(T - 3)
    text, _ = visible({"attention_mask": sees}, 2, 3, T - 3)
    assert text is not None
    assert text.all()
    if width >= T:
        whole = torch.cat([MASK, torch.zeros(2, width - T, dtype=torch.int64)], dim=1)
        text, earlier = visible({"attention_mask": whole}, 2, 3, T - 3)
        assert text is not None
        assert earlier is not None
        assert torch.equal(earlier, MASK[:, : T - 3].bool())
        assert torch.equal(text, MASK[:, T - 3 :].bool())


def test_a_mask_without_an_order_is_all_text() -> None:
    """Attention both ways."""
    sees = torch.ones(2, 1, T, T, dtype=torch.bool)
    text, _ = visible({"attention_mask": sees}, 2, T, 0)
    assert text is not None
    assert text.all()
    text, _ = visible({"attention_mask": sees & MASK.bool()[:, None, None]}, 2, T, 0)
    assert text is not None
    assert torch.equal(text, MASK.bool())


DOCUMENTS = torch.tensor([0] * 4 + [1] * 5)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "several-texts-4d": (
        {"attention_mask": (pairs()[:1] & (DOCUMENTS[:, None] == DOCUMENTS)).expand(2, 1, T, T)},
        "attention_mask: position 4 of row 0 does not see the one before it",
    ),
    "several-texts-by-position": (
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
        "position_ids: numbered anew inside a row",
    ),
    "several-texts-by-length": (
        {"cu_seq_lens_q": torch.tensor([0, 4, 9, 14, 18])},
        "cu_seq_lens_q: 4 texts in 2 rows; needed one text a row",
    ),
    "too-narrow": ({"attention_mask": MASK[:, :5]}, "attention_mask: 5 positions wide; needed 9"),
    "other-rows": ({"attention_mask": MASK.expand(3, 2, T)[:, 0]}, r"attention_mask: given shape \[3, 9\]"),
    "no-tensor": ({"attention_mask": "all"}, "attention_mask: given a str; needed a tensor"),
    "4d-integers": ({"attention_mask": pairs().long()}, "attention_mask: given 4D torch.int64; needed bool"),
    "other-name": ({"padding_mask": MASK}, "padding_mask: a mask that a splice can't read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_read_is_refused(kind: str) -> None:
    arguments, message = REFUSED[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        visible(arguments, 2, T, 0)


def test_a_mask_that_changes_its_mind_is_refused(llama: Any) -> None:
    ids = tokens(2, T)
    with splice(llama, LAYER, make("past")):
        with torch.no_grad():
            cache = held(llama(input_ids=ids, use_cache=True))
        wider = torch.cat([MASK, MASK[:, -1:]], dim=1)
        with pytest.raises(ValueError, match="attention_mask: differs from earlier passes"):
            logits(llama, ids[:, :1], attention_mask=wider, **cache)


def test_a_pass_that_begins_in_the_middle_is_refused(llama: Any) -> None:
    """As where a model keeps what went before inside itself."""
    with splice(llama, LAYER, make("past")):
        logits(llama, tokens())
        with pytest.raises(ValueError, match="a pass begins at position 10, and no cache shows what went before"):
            logits(llama, tokens()[:, :1], position_ids=torch.full((2, 1), 10))
