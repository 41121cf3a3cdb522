"""The piece of text that each token stands for.

Tokenizers don't tell: the bytes of one character may be several tokens, and a token's text may depend on the tokens
before it. So growing prefixes are decoded, and a token's piece is what it adds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile
from typing import Any

NO_CHARACTER = "\ufffd"
BYTES_OF_A_CHARACTER = 4
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how tokenizers with byte fallback write one
AGAIN, BEHIND = 48, 8  # tokens: after so many decoding starts anew, at least so many before what is new


def token_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token, such that they join to the text of all.

    A character of several tokens is shown at the first of them, and the others are empty. Bytes that are no
    whole character (where a window begins or ends inside of one) show as U+FFFD. A tokenizer that fails on the tokens
    shows them one by one, or by their numbers.
    """
    ids = [int(token) for token in tokens]
    try:
        broken, stand_in = _broken_bytes(tokenizer, ids)
        # A broken byte would spoil the whole run of bytes that is decoded with it.
        whole = [stand_in if at in broken else token for at, token in enumerate(ids)]
        pieces = _pieces(tokenizer, whole)
    except Exception:  # of a foreign class, which may raise anything
        return [_alone(tokenizer, token) for token in ids]
    return [NO_CHARACTER if at in broken else piece for at, piece in enumerate(pieces)]


def token_piece(tokenizer: Any, token: int) -> str:
    """The text of a token inside of a text: with its space, where it has one."""
    return token_pieces(tokenizer, [token, token])[1]


def text_pieces(tokenizer: Any, text: str, tokens: Sequence[int]) -> list[str]:
    """`token_pieces` of the first tokens of a text, such that they join to it, whatever the tokenizer forgets of it.

    Where tokens don't say the text (lower case, spaces that are dropped), pieces are cut out of it, if the tokenizer
    tells where; a space then goes to the token after it.
    """
    pieces, ids = token_pieces(tokenizer, tokens), [int(token) for token in tokens]
    if "".join(pieces) == text:
        return pieces
    try:
        found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        known, ends = list(found["input_ids"]), [int(end) for _, end in found["offset_mapping"]]
    except Exception:  # one that can't say, and raises anything
        return pieces
    if known[: len(ids)] != ids or (len(known) > len(ids) and text.startswith("".join(pieces))):
        return pieces
    ends = list(accumulate([0, *ends[: len(ids)]], max))
    if len(known) == len(ids) and ids:
        ends[-1] = len(text)
    return [text[start:end] for start, end in pairwise(ends)]


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    text = _decode(tokenizer, ids)
    pieces = [""] * len(ids)
    shown = 0  # characters of the text that have their piece
    owner: int | None = None  # the first token of a character that is not whole yet
    # ids[first:known] are decoded to so many characters, and the text up to their end is `before` long.
    first = known = lead = before = 0
    ends: list[int] = []  # where a token ends and no character is cut
    for at in range(len(ids)):
        added = text[before:] if at + 1 == len(ids) else _decode(tokenizer, ids[first : at + 1])[lead:]
        reached = max(shown, before + _common(added, text[before : before + len(added)]))
        new = text[shown:reached]
        if new and owner is not None:
            pieces[owner] += new[0]
            new, owner = new[1:], None
        pieces[at] += new
        shown = reached
        if before + len(added) != shown or not text.startswith(added, before):
            owner = at if owner is None else owner
            continue
        owner = None
        ends.append(at + 1)
        if at + 1 - known >= AGAIN:
            start = max(end for end in ends if end <= at + 1 - BEHIND)
            decoded = _decode(tokenizer, ids[start : at + 1])
            if text[:shown].endswith(decoded):
                first, known, lead, before, ends = start, at + 1, len(decoded), shown, [at + 1]
    return pieces


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _broken_bytes(tokenizer: Any, ids: list[int]) -> tuple[set[int], int]:
    """Of a tokenizer with byte fallback, the places of bytes that are no part of a whole character; and the token of
    a byte to decode in their place.
    """
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in set(ids)} if _has_names(tokenizer) else {}
    values = {
        token: int(match[1], 16)
        for token, name in names.items()
        if isinstance(name, str) and (match := BYTE.fullmatch(name)) and _decode(tokenizer, [token]) != name
    }
    if not values:
        return set(), 0
    broken: set[int] = set()
    at = 0
    while at < len(ids):
        if ids[at] not in values:
            at += 1
            continue
        run = takewhile(values.__contains__, ids[at : at + BYTES_OF_A_CHARACTER])
        length = _character(bytes(values[token] for token in run))
        if length == 0:
            broken.add(at)
        at += max(1, length)
    stand_in = tokenizer.convert_tokens_to_ids("<0x3F>")
    if not isinstance(stand_in, int) or _decode(tokenizer, [stand_in]) != "?":
        return set(), 0
    return broken, stand_in


def _character(run: bytes) -> int:
    """How many bytes the character takes that a run begins with; 0 where it begins with none."""
    for length in range(1, len(run) + 1):
        try:
            run[:length].decode()
            return length
        except UnicodeDecodeError:
            continue
    return 0


def _has_names(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "convert_ids_to_tokens") and hasattr(tokenizer, "convert_tokens_to_ids")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not isinstance(text, str):
        raise TypeError(f"tokenizer: decode gave {type(text).__name__}; needed a text")
    # Half a pair of surrogates can't be written to a file.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _alone(tokenizer: Any, token: int) -> str:
    try:
        return _decode(tokenizer, [token])
    except Exception:  # as above
        return f"<{token}>"
