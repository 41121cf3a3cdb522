"""English prose at length: the manuals in Debian's packages, some four million tokens (Debian 12)."""

from __future__ import annotations

from pathlib import Path

from csae.bench.evidence import debian
from csae.data.text import read_documents
from csae.progress import Progress, quiet

# A package: where its English pages are.
PACKAGES = {
    "apache2-doc": "**/en/**/*.html",
    "debian-handbook": "**/en-US/*.html",
    "debian-reference-en": "**/*.html",
    "developers-reference": "**/*.html",
    "exim4-doc-html": "**/*.html",
    "gimp-help-en": "**/*.html",
    "git-doc": "**/*.html",
    "installation-guide-amd64": "**/en/*.html",
    "maint-guide": "**/*.html",
    "octave-doc": "**/*.html",
    "python-django-doc": "**/*.html",
    "sqlite3-doc": "**/*.html",
}
SHORTEST_PARAGRAPH = 80  # characters; below are labels, signatures and links
LONGEST_WORD = 12  # characters on average; above are lists of names
SHORTEST_PAGE = 400
INSTEAD = "leave the corpus 'documentation' out"


def documentation(cache_dir: str | Path | None = None, progress: Progress = quiet) -> list[str]:
    """A document for each page; an empty line separates its paragraphs, and none stands twice in a package.

    The first call downloads the packages with apt-get (130 MB); the text is kept in cache_dir, by default csae/manuals
    in the user's cache folder. Raises UserError where it can't be had.
    """
    folder = debian.kept("manuals", cache_dir, lambda texts: _store(texts, progress), INSTEAD)
    return read_documents(folder)


def _store(texts: Path, progress: Progress) -> None:
    texts.mkdir()
    with debian.unpacked(list(PACKAGES), progress, INSTEAD) as packages:
        for package in progress(PACKAGES, "reading the pages"):
            known: set[str] = set()
            for page in sorted(file for file in (packages / package).glob(PACKAGES[package]) if file.is_file()):
                paragraphs = []
                for section in debian.sections(page.read_text(encoding="utf-8", errors="replace")):
                    paragraphs += [text for text in section if text not in known and _is_prose(text)]
                    known.update(section)
                text = "\n\n".join(paragraphs) + "\n"
                if len(text) >= SHORTEST_PAGE:
                    name = "-".join(page.relative_to(packages / package / "usr" / "share").with_suffix("").parts)
                    (texts / f"{package}-{name}.txt").write_text(text, encoding="utf-8")


def _is_prose(paragraph: str) -> bool:
    return len(paragraph) >= SHORTEST_PARAGRAPH and paragraph.count(" ") * LONGEST_WORD >= len(paragraph)
