"""The texts of the evidence: English prose, six languages, and windows that switch language at known places.

The languages are those of two Debian books, "Debian Reference" and "The Debian Administrator's Handbook". The content
is the same in each language, so the texts differ in language only. Paragraphs that were not translated stand in the
books in English; they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from csae.bench.evidence import debian
from csae.bench.evidence.documentation import documentation
from csae.data.text import TokenWindows, pack, python_prose, read_documents, tokenize
from csae.errors import UserError
from csae.progress import Progress, quiet

# Our name for a language, and the handbook's. English first: the others are translated from it.
LANGUAGES = {"en": "en-US", "de": "de-DE", "fr": "fr-FR", "es": "es-ES", "ja": "ja-JP", "zh-cn": "zh-CN"}
INSTEAD = "give --texts DIR, with a folder of .txt files for each language"
HELD_OUT_EVERY = 10
PIECE_TOKENS = (64, 256)


def english() -> list[str]:
    """English prose that comes with CPython: `csae.data.text.python_prose`."""
    return python_prose()


def multilingual(cache_dir: str | Path | None = None, progress: Progress = quiet) -> dict[str, list[str]]:
    """Language -> documents. A document is a section of a Debian book; an empty line separates its paragraphs.

    The first call downloads the packages with apt-get (46 MB) and unpacks them with dpkg-deb, without root. The text is
    kept in cache_dir (by default csae/debian-books in the user's cache folder), in the form of `read_languages`.
    Raises UserError where it can't be had.
    """
    cache_dir = debian.kept("debian-books", cache_dir, lambda folder: _store_books(folder, progress), INSTEAD)
    return read_languages(cache_dir)


def read_languages(folder: str | Path) -> dict[str, list[str]]:
    """Language -> documents, from a folder that holds a folder for each language; see `csae.data.text.read_documents`.

    Raises UserError where there are fewer than two languages, or one has no text.
    """
    folder = Path(folder)
    languages = sorted(sub.name for sub in folder.iterdir() if sub.is_dir()) if folder.is_dir() else []
    if len(languages) < 2:
        raise UserError(
            f"texts {str(folder)!r}: {len(languages)} folders found; needed a folder of .txt files for each of two or "
            "more languages"
        )
    return {language: read_documents(folder / language) for language in languages}


def split(documents_by_language: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The documents to train on, and those held out: every tenth of each language, the first among them.

    Raises UserError where a language has a single document.
    """
    for language, documents in documents_by_language.items():
        if len(documents) < 2:
            raise UserError(f"language {language!r}: {len(documents)} document; needed two or more, to hold one out")
    train, held_out = (
        {
            language: [text for i, text in enumerate(documents) if (i % HELD_OUT_EVERY == 0) == held]
            for language, documents in documents_by_language.items()
        }
        for held in (False, True)
    )
    return train, held_out


def windows(
    name: str,
    tokenizer: Any,
    n_ctx: int,
    max_tokens: int | None = None,
    texts: str | Path | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> TokenWindows:
    """The windows of n_ctx tokens of a corpus to train on.

    "english", "documentation": documents shuffled and packed, as `csae.data.text.tokenize` does it.
    "multilingual": the training documents of `split`, cut into pieces of whole paragraphs, of about 64 to 256 tokens,
    and joined. The languages take turns in random order until one is used up, so most windows switch language at least
    once. A window is one document: an SAE can look back across the switches. texts: a folder for `read_languages`, in
    place of Debian's books.
    """
    if name == "english":
        return tokenize(english(), tokenizer, n_ctx, max_tokens, seed, progress)
    if name == "documentation":
        return tokenize(documentation(progress=progress), tokenizer, n_ctx, max_tokens, seed, progress)
    if name != "multilingual":
        raise ValueError(f"name: given {name!r}; needed 'english', 'documentation' or 'multilingual'")
    documents_by_language = multilingual(progress=progress) if texts is None else read_languages(texts)
    mixed = mix(split(documents_by_language)[0], tokenizer, seed, progress)
    return one_document_each(pack(mixed, n_ctx, max_tokens).tokens)


def mix(
    documents_by_language: Mapping[str, Sequence[str]], tokenizer: Any, seed: int = 0, progress: Progress = quiet
) -> Iterator[list[int]]:
    """The token ids of pieces of about 64 to 256 tokens; the languages take turns until one is used up."""
    rng = np.random.default_rng(seed)
    pieces: dict[str, list[list[int]]] = {}
    for language in progress(documents_by_language, "tokenizing"):
        found = list(_pieces(_paragraphs(documents_by_language[language], tokenizer), rng))
        pieces[language] = [found[i] for i in rng.permutation(len(found))]
    names = list(pieces)
    for turn in _turns(len(names), rng):
        if not pieces[names[turn]]:
            return
        yield pieces[names[turn]].pop()


class Switching(NamedTuple):
    """Windows of text that switch language every so many tokens, each window one document."""

    windows: TokenWindows
    regions: Tensor
    """[N, T] int64: the region of its window that a position is in, from 0"""
    languages: Tensor
    """[N, T] int64: the language of a position, an index into names"""
    names: list[str]


def switching(
    documents_by_language: Mapping[str, Sequence[str]],
    tokenizer: Any,
    n_ctx: int,
    n_windows: int,
    region_tokens: int = 64,
    seed: int = 0,
) -> Switching:
    """Up to n_windows windows that change language every region_tokens tokens; fewer once a language is used up.

    A region is a passage that begins with a paragraph and is made to end with a paragraph break. No passage is used
    twice. Neighbouring regions differ in language, and all languages are equally frequent. Raises UserError for fewer
    than two languages, or text that does not fill one window.
    """
    if region_tokens < 1 or n_ctx % region_tokens:
        raise ValueError(f"region_tokens: given {region_tokens}; needed a divisor of n_ctx = {n_ctx}")
    if len(documents_by_language) < 2:
        raise UserError(f"a switch takes two languages; given {', '.join(documents_by_language) or 'none'}")
    rng = np.random.default_rng(seed)
    names = list(documents_by_language)
    passages: list[list[list[int]]] = []
    for documents in documents_by_language.values():
        found = list(_passages(_paragraphs(documents, tokenizer), region_tokens, _break(tokenizer)))
        passages.append([found[i] for i in rng.permutation(len(found))])
    n_regions = n_ctx // region_tokens
    chosen: list[list[int]] = []
    spoken: list[int] = []
    for turn in _turns(len(names), rng):
        if not passages[turn] or len(chosen) == n_windows * n_regions:
            break
        chosen.append(passages[turn].pop())
        spoken.append(turn)
    N = len(chosen) // n_regions
    if N == 0:
        raise UserError(
            f"the texts to switch between don't fill one window of {n_ctx} tokens in passages of {region_tokens}: give "
            "more text in each language"
        )
    tokens = torch.tensor(chosen[: N * n_regions], dtype=torch.int32).reshape(N, n_ctx)
    languages = torch.tensor(spoken[: N * n_regions]).repeat_interleave(region_tokens).reshape(N, n_ctx)
    regions = torch.arange(n_regions).repeat_interleave(region_tokens).repeat(N, 1)
    return Switching(one_document_each(tokens), regions, languages, names)


def one_document_each(tokens: Tensor) -> TokenWindows:
    """Windows of tokens [N, T], each of them one document."""
    documents = torch.arange(len(tokens), dtype=torch.int32)[:, None].expand(tokens.shape)
    return TokenWindows(tokens, documents.contiguous())


def _turns(n: int, rng: np.random.Generator) -> Iterator[int]:
    """0 to n - 1 repeatedly, each time in a new random order; none twice in a row if n > 1."""
    last = None
    while True:
        order = rng.permutation(n).tolist()
        if order[0] == last:
            order.append(order.pop(0))
        yield from order
        last = order[-1]


def _break(tokenizer: Any) -> list[int]:
    return tokenizer("\n\n", add_special_tokens=False)["input_ids"]


def _paragraphs(documents: Iterable[str], tokenizer: Any) -> Iterator[list[list[int]]]:
    """For each document the token ids of its paragraphs, each with the break after it."""
    after = _break(tokenizer)
    for text in documents:
        paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if part]
        if paragraphs:
            token_lists = tokenizer(paragraphs, add_special_tokens=False, verbose=False)["input_ids"]
            yield [tokens + after for tokens in token_lists]


def _pieces(documents: Iterable[list[list[int]]], rng: np.random.Generator) -> Iterator[list[int]]:
    """Consecutive whole paragraphs of a document, until they reach a random length."""
    for paragraphs in documents:
        piece: list[int] = []
        wanted = rng.integers(*PIECE_TOKENS, endpoint=True)
        for paragraph in paragraphs:
            piece = piece + paragraph
            if len(piece) >= wanted:
                yield piece
                piece, wanted = [], rng.integers(*PIECE_TOKENS, endpoint=True)
        if len(piece) >= PIECE_TOKENS[0]:
            yield piece


def _passages(documents: Iterable[list[list[int]]], n_tokens: int, after: list[int]) -> Iterator[list[int]]:
    """Passages of n_tokens tokens that begin with a paragraph and end with a break; longer paragraphs are cut."""
    for paragraphs in documents:
        passage: list[int] = []
        for paragraph in paragraphs:
            passage = passage + paragraph
            if len(passage) >= n_tokens:
                yield (passage[: max(n_tokens - len(after), 0)] + after)[:n_tokens]
                passage = []


def _store_books(texts: Path, progress: Progress) -> None:
    """Write a folder of .txt files for each language."""
    names = [f"debian-reference-{language}" for language in LANGUAGES] + ["debian-handbook"]
    with debian.unpacked(names, progress, INSTEAD) as packages:
        _write_books(packages, texts)


def _write_books(packages: Path, texts: Path) -> None:
    share = Path("usr/share")
    originals: set[tuple[str, ...]] = set()
    for language, handbook in LANGUAGES.items():
        reference = packages / f"debian-reference-{language}" / share / "debian-reference"
        pages = [("reference", page) for page in sorted(reference.glob("ch*.html"))]
        html = packages / "debian-handbook" / share / "doc/debian-handbook/html" / handbook
        pages += [("handbook", page) for page in sorted(html.glob("*.html"))]
        (texts / language).mkdir(parents=True)
        for book, page in pages:
            for number, section in enumerate(debian.sections(page.read_text(encoding="utf-8"))):
                if language == "en":
                    originals.update(*map(_trigrams, section))
                    paragraphs = section
                else:
                    paragraphs = [paragraph for paragraph in section if not untranslated(paragraph, originals)]
                if paragraphs:
                    file = texts / language / f"{book}-{page.name.split(f'.{language}')[0]}-{number:02}.txt"
                    file.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
        if not any((texts / language).iterdir()):
            raise UserError(f"Debian's books hold no text in {language!r}, where it is looked for; {INSTEAD}")


def untranslated(paragraph: str, originals: set[tuple[str, ...]]) -> bool:
    """Whether most trigrams of words of a paragraph occur in the English books.

    Whole paragraphs can't be compared: an untranslated one may contain translated cross-references.
    """
    trigrams = _trigrams(paragraph)
    return 2 * len(trigrams & originals) > len(trigrams)


def _trigrams(paragraph: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", paragraph.lower())
    return set(zip(words, words[1:], words[2:], strict=False))
