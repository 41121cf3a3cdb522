from __future__ import annotations

import stat
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csae.bench.evidence import texts
from csae.bench.evidence.debian import sections
from csae.bench.evidence.documentation import PACKAGES, documentation
from csae.bench.evidence.texts import mix, multilingual, read_languages, split, switching, windows
from csae.errors import UserError

LETTERS = {"aa": "a", "bb": "b", "cc": "c"}


class Characters:
    """A tokenizer with a token for each character, so that tokens can be read back."""

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
        assert options["add_special_tokens"] is False
        if isinstance(text, str):
            return {"input_ids": list(map(ord, text))}
        return {"input_ids": [list(map(ord, part)) for part in text]}


def decode(tokens: Any) -> str:
    return "".join(map(chr, tokens))


def documents_of_three(n: int, seed: int = 0) -> dict[str, list[str]]:
    """Documents in which a language has one letter, and paragraph i of document d begins with its number."""
    rng = np.random.default_rng(seed)
    return {
        name: [
            "\n\n".join(f"<{d}.{i}>" + letter * int(rng.integers(5, 120)) for i in range(12)) + "\n" for d in range(n)
        ]
        for name, letter in LETTERS.items()
    }


# --- pages -------------------------------------------------------------------------------------------

PAGE = """<?xml version="1.0"?><html><head><title>The title of the page is no paragraph</title></head><body>
<div class="navheader"><table><tr><td>navigation is left out of the text<br></td></tr></table></div>
<div class="toc"><div>a list of contents, and <div>one within it</div></div><p>all of it is left out</p></div>
<div class="section"><h2 class="title"><a id="one"/>1.1. A heading that is long enough</h2>
<p>The first paragraph,
  with <code class="literal">code</code> &amp; a <a href="x">link</a>.</p>
<pre class="screen">$ a listing that is long enough<p>really</p></pre>
<div class="note"><table><tr><td>Note</td><td><p>The text of a note in a table.</p></td></tr></table></div>
<div class="para">Before a list there is text:<ul><li><div class="para">the only item of this list</div></li></ul>
and after the list, more of it</div>
<div class="table"><table><tr><td>a real table, which is left out</td></tr></table></div>
</div>
<h2>1.2. Another section</h2><p>short</p>
<p>日本語の文章が、ここで行を
変えて続く。英語の word
もある、長い段落である。</p>
</body></html>"""


def test_sections_hold_paragraphs_and_nothing_else() -> None:
    assert sections(PAGE) == [
        [
            "The first paragraph, with code & a link.",
            "The text of a note in a table.",
            "Before a list there is text:",
            "the only item of this list",
            "and after the list, more of it",
        ],
        ["日本語の文章が、ここで行を変えて続く。英語の word もある、長い段落である。"],
    ]


def test_untranslated() -> None:
    originals = {("see", "the", "manual"), ("the", "manual", "of"), ("manual", "of", "the")}
    assert texts.untranslated("See the manual of the Befehl", originals)
    assert not texts.untranslated("Siehe dazu see the manual of the Befehl im Anhang", originals)
    assert not texts.untranslated("zwei Wörter", originals)


# --- Debian's books ----------------------------------------------------------------------------------


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt-get and dpkg-deb that make small books, and note each call in a file."""
    programs = tmp_path / "programs"
    programs.mkdir()
    log = tmp_path / "calls"
    scripts = {
        "apt-get": f'echo "$2" >> "{log}"; touch "$2_1.0_all.deb"; [ "$2" != "$BROKEN" ] || '
        '{ echo "first line" >&2; echo "E: no such package" >&2; exit 100; }',
        "dpkg-deb": """
            case "$2" in
            *handbook*) for l in en-US de-DE fr-FR es-ES ja-JP zh-CN; do
                d="$3/usr/share/doc/debian-handbook/html/$l"; mkdir -p "$d"
                echo "<p>the handbook $l speaks $l at $l length</p>" > "$d/apt.html"
                echo "<p>nobody has translated this paragraph of the book</p>" >> "$d/apt.html"; done;;
            *) name=$(basename "$(dirname "$2")"); l=${name#debian-reference-}
                d="$3/usr/share/debian-reference"; mkdir -p "$d"
                echo "<h2>1</h2><p>one $l one $l one $l $l</p><h2>2</h2><p>two $l two $l two $l $l</p>" \
                    > "$d/ch01.$l.html";;
            esac""",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return log


def test_multilingual_downloads_once(debian: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "books"
    found = multilingual(cache)
    assert list(found) == ["de", "en", "es", "fr", "ja", "zh-cn"]
    assert found["en"] == [
        "the handbook en-US speaks en-US at en-US length\n\nnobody has translated this paragraph of the book\n",
        "one en one en one en en\n",
        "two en two en two en en\n",
    ]
    assert found["fr"][0] == "the handbook fr-FR speaks fr-FR at fr-FR length\n"
    assert multilingual(cache) == found
    assert len(debian.read_text().split()) == 7
    assert [entry.name for entry in cache.parent.iterdir()] == ["books"]


def test_a_failed_download_leaves_nothing(debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "books"
    monkeypatch.setenv("BROKEN", "debian-reference-ja")
    with pytest.raises(UserError, match=r"`apt-get download` failed .*\(E: no such package\).*give --texts DIR"):
        multilingual(cache)
    assert list(cache.parent.iterdir()) == []
    monkeypatch.delenv("BROKEN")
    assert len(multilingual(cache)) == 6


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get, which this system lacks; give --texts DIR"):
        multilingual(tmp_path / "books")


def test_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    prose = "A paragraph of a manual that is long enough to be kept has more words than a label has. "
    scripts = {
        "apt-get": 'touch "$2_1.0_all.deb"',
        "dpkg-deb": f"""
            case "$2" in *handbook*) d="$3/usr/share/doc/en-US";; *) d="$3/usr/share/doc/en";; esac
            mkdir -p "$d/folder.html"
            for i in 1 2; do echo "<p>{prose * 5}$i</p><p>{prose}</p><p>Short label, left out</p>" > "$d/$i.html"; done
            echo "<p>{"name_" * 100}</p><p>{prose * 2}</p>" > "$d/too-little.html"
            """,
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    found = documentation(tmp_path / "manuals")
    first, second = f"{prose * 5}1\n\n{prose.strip()}\n", f"{prose * 5}2\n"
    assert found == [first, second] * len(PACKAGES)
    monkeypatch.setenv("PATH", "")
    assert documentation(tmp_path / "manuals") == found


def test_read_languages(tmp_path: Path) -> None:
    for name in ("xx", "yy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b.txt").write_text(f"second {name}")
        (tmp_path / name / "a.txt").write_text(f"first {name}")
    assert read_languages(tmp_path) == {"xx": ["first xx", "second xx"], "yy": ["first yy", "second yy"]}
    with pytest.raises(UserError, match=r"0 folders found; needed a folder of \.txt files for each"):
        read_languages(tmp_path / "xx")


def test_split() -> None:
    documents = {"aa": list(map(str, range(21))), "bb": ["x", "y"]}
    train, held_out = split(documents)
    assert held_out == {"aa": ["0", "10", "20"], "bb": ["x"]}
    assert sorted(train["aa"] + held_out["aa"], key=int) == documents["aa"]
    with pytest.raises(UserError, match="'aa': 1 document; needed two or more"):
        split({"aa": ["one"]})


# --- windows to train on -----------------------------------------------------------------------------


def test_mix_lays_pieces_of_whole_paragraphs() -> None:
    documents = documents_of_three(20)
    pieces = [decode(piece) for piece in mix(documents, Characters(), seed=1)]
    spoken = ["".join(sorted(set(piece) & set("abc"))) for piece in pieces]
    assert set(spoken) == set("abc")
    assert all(one != other for one, other in pairwise(spoken))
    counts = Counter(spoken)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(64 <= len(piece) < 256 + 130 for piece in pieces)
    assert len({len(piece) // 64 for piece in pieces}) >= 4
    whole = {f"{paragraph}\n\n" for texts in documents.values() for text in texts for paragraph in text.split("\n\n")}
    whole = {paragraph.replace("\n", "") for paragraph in whole}
    for piece in pieces:
        assert piece.endswith("\n\n")
        assert set(piece.split("\n\n")[:-1]) <= whole
    assert len(set(pieces)) == len(pieces)
    assert pieces == [decode(piece) for piece in mix(documents, Characters(), seed=1)]
    assert pieces[:9] != [decode(piece) for piece in islice(mix(documents, Characters(), seed=2), 9)]


def test_multilingual_windows_are_documents_that_switch(tmp_path: Path) -> None:
    documents = documents_of_three(20)
    for name, of_language in documents.items():
        (tmp_path / name).mkdir()
        for i, text in enumerate(of_language):
            (tmp_path / name / f"{i:02}.txt").write_text(text)
    made = windows("multilingual", Characters(), 256, 60 * 256, texts=tmp_path)
    assert made.tokens.shape == made.documents.shape == (60, 256)
    assert torch.equal(made.documents, torch.arange(60, dtype=torch.int32)[:, None].expand(60, 256))
    text = decode(made.tokens.flatten().tolist())
    assert "<0." not in text  # held out
    assert "<10." not in text
    assert "<11." in text
    assert sum(len(set(decode(row.tolist())) & set("abc")) > 1 for row in made.tokens) > 40


def test_english_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "python_prose", lambda: ["x" * 30, "y" * 30])
    made = windows("english", Characters(), 10)
    assert made.tokens.shape == (6, 10)
    assert made.documents[0, 0] != made.documents[-1, -1]
    with pytest.raises(ValueError, match="given 'klingon'; needed 'english', 'documentation' or 'multilingual'"):
        windows("klingon", Characters(), 10)


# --- windows that switch -----------------------------------------------------------------------------


def test_switching_every_so_many_tokens() -> None:
    documents = documents_of_three(20)
    made = switching(documents, Characters(), n_ctx=120, n_windows=12, region_tokens=40, seed=3)
    assert made.names == ["aa", "bb", "cc"]
    assert made.windows.tokens.shape == made.regions.shape == made.languages.shape == (12, 120)
    assert torch.equal(made.regions, (torch.arange(120) // 40).expand(12, 120))
    assert torch.equal(made.windows.documents, torch.arange(12, dtype=torch.int32)[:, None].expand(12, 120))
    passages = []
    for tokens, languages in zip(made.windows.tokens, made.languages, strict=True):
        for start in range(0, 120, 40):
            passage = decode(tokens[start : start + 40].tolist())
            language = set(languages[start : start + 40].tolist())
            assert language == {"abc".index(letter) for letter in set(passage) & set("abc")}
            assert passage.startswith("<")
            assert passage.endswith("\n\n")
            assert any(passage.rstrip("\n") in text for text in documents[made.names[language.pop()]])
            passages.append(passage)
    assert len(set(passages)) == len(passages) == 36
    regions = made.languages[:, ::40].flatten()
    assert (made.languages[:, 39:-1:40] != made.languages[:, 40::40]).all()
    assert torch.bincount(regions).tolist() == [12, 12, 12]
    again = switching(documents, Characters(), 120, 12, 40, seed=3)
    assert torch.equal(again.windows.tokens, made.windows.tokens)


def test_switching_ends_with_the_text_of_a_language() -> None:
    documents = documents_of_three(6)
    documents["bb"] = ["b" * 100 + "\n\n" + "b" * 90]
    made = switching(documents, Characters(), n_ctx=80, n_windows=1000, region_tokens=40)
    assert 2 <= len(made.languages) <= 4
    assert int((made.languages[:, ::40] == 1).sum()) <= 2


def test_bad_switching() -> None:
    documents = documents_of_three(2)
    with pytest.raises(ValueError, match="given 50; needed a divisor of n_ctx = 120"):
        switching(documents, Characters(), 120, 1, 50)
    with pytest.raises(UserError, match="a switch takes two languages; given aa"):
        switching({"aa": documents["aa"]}, Characters(), 120, 1, 40)
    with pytest.raises(UserError, match="don't fill one window of 3000 tokens in passages of 1500"):
        switching(documents, Characters(), 3000, 1, 1500)


@pytest.mark.slow
def test_debians_books(tmp_path: Path) -> None:
    try:
        found = multilingual(tmp_path / "books")
    except UserError as error:
        if "which this system has not" in str(error) or "check the network" in str(error):
            pytest.skip(str(error))
        raise
    assert set(found) == set(texts.LANGUAGES)
    assert all(sum(map(len, documents)) > 250_000 for documents in found.values())
    for language, letter in (("ja", "の"), ("zh-cn", "的"), ("de", "ü"), ("fr", "é"), ("es", "ó")):
        with_letter = sum(letter in text for text in found[language])
        assert with_letter > 0.9 * len(found[language]), language
