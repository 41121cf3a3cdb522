"""What a token is, to probe for: its part of speech, its place in a sentence, code or prose, its language.

A label is [N, T] int8: 1 where it holds, 0 where it doesn't, -1 where nobody can say.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csae.bench.evidence.texts import Switching
from csae.errors import UserError

# Tags of the British National Corpus's set C5 (Leech et al. 1994), which HanTa's English model gives.
PARTS_OF_SPEECH = {
    "noun": ("NN",),
    "name": ("NP0",),
    "verb": ("VV",),
    "adjective": ("AJ",),
    "preposition": ("PRP", "PRF"),
    "pronoun": ("PN",),
}
FIRST_WORDS = 2
"""of a sentence"""
Tag = Callable[[Sequence[str]], Sequence[str]]
"""The tags of the words of a sentence."""


def hanta() -> Tag:
    """The Hanover Tagger (Wartena 2019, "A Probabilistic Morphology Model for German Lemmatization"), for English."""
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        raise UserError("parts of speech take the package HanTa: pip install 'contextual-sae[evidence]'") from error
    tagger = HanoverTagger("morphmodel_en.pgz")
    return lambda words: [tag for _, _, tag in tagger.tag_sent(list(words))]


def of_words(tokens: Tensor, tokenizer: Any, tag: Tag) -> dict[str, Tensor]:
    """The labels of English tokens [N, T]: PARTS_OF_SPEECH, and "sentence start" for the FIRST_WORDS of a sentence.

    A token has the label of the word that it is a part of. Tokens of no word (blanks, punctuation) can't be labelled,
    nor words before the first end of a sentence in a window.
    """
    names = [*PARTS_OF_SPEECH, "sentence start"]
    labels = {name: torch.full(tokens.shape, -1, dtype=torch.int8) for name in names}
    for n, row in enumerate(tokens.tolist()):
        pieces = [tokenizer.decode([token]) for token in row]
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        word_at = dict.fromkeys(range(ends[-1] if ends else 0), -1)
        words = list(_words("".join(pieces)))
        for number, (start, end, _, _) in enumerate(words):
            word_at |= dict.fromkeys(range(start, end), number)
        tags = _tags(words, tag)
        for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
            number = next((word_at[i] for i in range(start, end) if word_at[i] >= 0), -1)
            place = words[number][3] if number >= 0 else None
            if place is None:
                continue
            for name, wanted in PARTS_OF_SPEECH.items():
                labels[name][n, t] = tags[number].startswith(wanted)
            labels["sentence start"][n, t] = place < FIRST_WORDS
    return labels


def _words(text: str) -> list[tuple[int, int, str, int | None]]:
    """Start, end, text and number in its sentence of each word; None before the first end of a sentence."""
    found: list[tuple[int, int, str, int | None]] = []
    number: int | None = None
    for match in re.finditer(r"[^\W\d_][\w'’-]*|[.!?](?=\s)|\n\s*\n", text):
        piece = match[0]
        if not piece[0].isalpha():
            number = 0
            continue
        found.append((match.start(), match.end(), piece, number))
        number = None if number is None else number + 1
    return found


def _tags(words: Sequence[tuple[int, int, str, int | None]], tag: Tag) -> list[str]:
    """A tag for each word, sentence by sentence."""
    sentences: list[list[str]] = []
    for _, _, piece, number in words:
        if number == 0 or not sentences:
            sentences.append([])
        sentences[-1].append(piece)
    return [each for sentence in sentences for each in tag(sentence)]


def of_switches(held: Switching) -> dict[str, Tensor]:
    """A label for each of the languages of `held`; one for the second, where there are two."""
    names = held.names if len(held.names) > 2 else held.names[1:]
    return {name: (held.languages == held.names.index(name)).to(torch.int8) for name in names}


def python_code() -> list[str]:
    """The source of Python's standard library, without its docstrings and comments on lines of their own."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(library.glob("*.py")):
        source = re.sub(r'"""[\s\S]*?"""', "", file.read_text(encoding="utf-8", errors="replace"))
        found.append("\n".join(line for line in source.splitlines() if not line.strip().startswith("#")) + "\n")
    return found
