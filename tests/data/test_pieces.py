"""Pieces of text for tokens, of tokenizers of every kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, byte_fallback, byte_level, with_added, with_bos, word_piece

from csae.data.pieces import NO_CHARACTER, text_pieces, token_piece, token_pieces

TEXTS = {
    "plain": "The lower mill.\n\n  was  opened",
    "marks": "na\u00efve \u2014 \u201cq\u201d \u1e9e, it isn't",
    "characters of several tokens": "\u65e5\u672c\u8a9e \U0001f916\U0001f916x \u65e5the\u672c",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301",
    "U+FFFD": "a\ufffdb\ufffd",
    "added": "Wasserrad <|turn|> x<|tool|>\u65e5\u672c\u8a9e  <pad-left> the mill",
    "special": "<s>the mill</s>",
    "spaces": "  two  spaces ",
    "bytes as text": "<0xE6><0x97> \u65e5",
    "nothing": "",
}
# What keeps the text, whatever it is.
FAITHFUL = ("byte-level", "byte-fallback", "byte-fallback-no-strip")
MADE: dict[tuple[str, bool], Any] = {}


def made(kind: str, added: bool = False) -> Any:
    if (kind, added) not in MADE:
        MADE[kind, added] = with_added(KINDS[kind]()) if added else KINDS[kind]()
    return MADE[kind, added]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_the_text(kind: str, added: bool, text: str) -> None:
    tokenizer = made(kind, added)
    tokens = ids_of(tokenizer, text)
    pieces = token_pieces(tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == decoded(tokenizer, tokens)
    if kind in FAITHFUL and not added and "<s>" not in text:  # such tokens take spaces, or add one
        assert "".join(pieces) == text
    assert "".join(text_pieces(tokenizer, text, tokens)) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from("aeht ilm.\n\u65e5\u672c\u00ef\U0001f916\ufffd<0xE6>"), max_size=40))
@settings(max_examples=30, deadline=None)
def test_pieces_of_any_text(kind: str, text: str) -> None:
    tokenizer = made(kind)
    tokens = ids_of(tokenizer, text)
    assert "".join(token_pieces(tokenizer, tokens)) == decoded(tokenizer, tokens)
    assert "".join(text_pieces(tokenizer, text, tokens)) == (text if tokens else "")


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts(kind: str) -> None:
    """Decoding starts anew now and then: not inside of a character, and with no space lost."""
    tokenizer = made(kind, added=True)
    text = "".join(TEXTS.values()) * 20
    tokens = ids_of(tokenizer, text)
    pieces = token_pieces(tokenizer, tokens)
    assert len(tokens) > 900
    assert "".join(pieces) == decoded(tokenizer, tokens)
    assert max(map(len, pieces)) <= len("<pad-left>") + 4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("byte")])
def test_a_character_of_several_tokens_is_at_the_first(kind: str) -> None:
    tokenizer = made(kind)
    tokens = ids_of(tokenizer, "x\u65e5\u672cy\U0001f916")
    pieces = ["x", "\u65e5", "", "", "\u672c", "", "", "y", "\U0001f916", "", "", ""]
    assert token_pieces(tokenizer, tokens)[-len(pieces) :] == pieces


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("byte")])
@pytest.mark.parametrize("cut", range(1, 9))
def test_what_a_window_cuts_spoils_nothing_else(kind: str, cut: int) -> None:
    """Bytes in a row are many characters of which one is cut."""
    tokenizer = made(kind)
    tokens = ids_of(tokenizer, "\u65e5" * 5 + "the")
    start = next(at for at in range(len(tokens)) if token_pieces(tokenizer, tokens[at:])[0] == "\u65e5")
    tokens = tokens[start:]
    whole = 5 - -(-cut // 3)
    pieces = token_pieces(tokenizer, tokens[cut:])
    assert "".join(pieces).replace(NO_CHARACTER, "") == "\u65e5" * whole + "the"
    assert len(pieces) == len(tokens) - cut
    bytes_of_characters = tokens[:15]
    end = token_pieces(tokenizer, bytes_of_characters[:-cut])
    assert "".join(end).rstrip(NO_CHARACTER) == "\u65e5" * whole
    assert (NO_CHARACTER in end) == (NO_CHARACTER in pieces) == (cut % 3 > 0)


def test_bytes_of_one_character_with_others_between_are_none() -> None:
    tokenizer = made("byte-fallback")
    one, two, three = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\u65e5".encode())
    (the,) = tokenizer.convert_tokens_to_ids(["\u2581the"])
    assert token_pieces(tokenizer, [one, the, two, three]) == [NO_CHARACTER, " the", NO_CHARACTER, NO_CHARACTER]
    assert token_pieces(tokenizer, [the, one, two, three]) == ["the", "\u65e5", "", ""]


def test_a_byte_that_is_written_out_is_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<0xE6>"])
    assert token_pieces(tokenizer, ids_of(tokenizer, "a<0xE6>b")) == ["a", "<0xE6>", "b"]


def test_a_token_by_itself_has_its_space() -> None:
    for tokenizer in (made("byte-fallback"), made("metaspace"), made("byte-level")):
        token = ids_of(tokenizer, "the mill")[-1]
        assert token_piece(tokenizer, token).endswith(("mill", "l"))
    (the,) = made("byte-fallback").convert_tokens_to_ids(["\u2581the"])
    assert token_piece(made("byte-fallback"), the) == " the"


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_of_sequence_among_the_tokens(kind: str) -> None:
    tokenizer = with_bos(KINDS[kind]())
    tokens = tokenizer("the mill")["input_ids"]
    pieces = token_pieces(tokenizer, tokens)
    assert pieces[0] == "<s>"
    assert "".join(pieces) == decoded(tokenizer, tokens)


def test_pieces_are_cut_out_of_a_text_that_tokens_forget() -> None:
    tokenizer = word_piece(lower=True)
    text = "The Mill  isn't\nna\u00efve; 42 times! "
    tokens = ids_of(tokenizer, text)
    assert decoded(tokenizer, tokens) != text
    pieces = text_pieces(tokenizer, text, tokens)
    assert "".join(pieces) == text
    assert pieces[:4] == ["The", " Mill", "  isn", "'"]
    assert "".join(text_pieces(tokenizer, text, tokens[:4])) == "The Mill  isn'"


class DroppingTokenizer:
    """Like SentencePiece, drops the space that a text begins with."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join([" the", " mill", "s"][token] for token in tokens).removeprefix(" ")


def test_a_tokenizer_that_drops_the_first_space() -> None:
    assert token_pieces(DroppingTokenizer(), [0, 1, 2, 0]) == ["the", " mill", "s", " the"]


class Failing:
    """A tokenizer that decodes as given, or raises."""

    def __init__(self, decode: Any) -> None:
        self._decode = decode

    def decode(self, tokens: list[int], **options: Any) -> Any:
        return self._decode(tokens)


def raises(tokens: list[int]) -> str:
    raise RuntimeError("no such token")


@pytest.mark.parametrize(
    ("decode", "pieces"),
    [
        (raises, ["<5>", "<6>", "<7>"]),
        (lambda tokens: None, ["<5>", "<6>", "<7>"]),
        (lambda tokens: raises(tokens) if 6 in tokens else "x" * len(tokens), ["x", "<6>", "x"]),
        (lambda tokens: "-".join(map(str, tokens)), ["5", "-6", "-7"]),
        (lambda tokens: "".join(map(str, sorted(tokens, reverse=True))), None),
        (lambda tokens: "\ud83d" * len(tokens), [NO_CHARACTER] * 3),
        (lambda tokens: "", [""] * 3),
    ],
    ids=["raises", "no text", "one unknown", "between", "out of order", "half a pair", "nothing"],
)
def test_a_tokenizer_that_cannot_say(decode: Any, pieces: list[str] | None) -> None:
    found = token_pieces(Failing(decode), [5, 6, 7])
    assert found == pieces or (pieces is None and "".join(found) == "765")
    json.dumps(found).encode()
    "".join(found).encode()
    assert text_pieces(Failing(decode), "some text", [5, 6, 7]) == found


def test_pieces_of_a_numbers_array() -> None:
    tokenizer = byte_fallback()
    torch = pytest.importorskip("torch")
    tokens = torch.tensor(ids_of(tokenizer, "the mill"))
    assert token_pieces(tokenizer, tokens) == ["the", " mill"]
