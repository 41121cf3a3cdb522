"""Text from Debian's packages: downloaded without root, and the paragraphs of their HTML pages."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

from csae.errors import UserError
from csae.progress import Progress

SHORTEST_PARAGRAPH = 20  # characters; below are labels and captions
BLOCKS = {"p", "div", "li", "dt", "dd", "td", "th", "tr", "ul", "ol", "dl", "table", "body", "br", "hr"}
NO_PROSE = {"pre", "head", "script", "style", "h1", "h2", "h3", "h4", "h5", "h6"}
NO_PROSE_CLASSES = {"toc", "navheader", "navfooter", "docnav", "table", "example", "titlepage", "footnotes"}
CJK = "[\u3000-\u9fff\uff00-\uffef]"


def kept(name: str, cache_dir: str | Path | None, store: Callable[[Path], None], instead: str) -> Path:
    """cache_dir, by default csae/NAME in the user's cache folder, which `store` fills if it is not there.

    Raises UserError where it can't be written; `instead` says what else can be done.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csae" / name
    cache_dir = Path(cache_dir)
    if cache_dir.is_dir():
        return cache_dir
    try:
        cache_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir.parent) as folder:
            store(Path(folder) / "texts")
            try:
                os.rename(Path(folder) / "texts", cache_dir)  # only once it is complete
            except OSError:
                if not cache_dir.is_dir():  # another process may have been faster
                    raise
    except OSError as error:
        raise UserError(f"Debian's books can't be stored in {cache_dir.parent} ({error}); {instead}") from error
    return cache_dir


@contextmanager
def unpacked(names: Sequence[str], progress: Progress, instead: str) -> Iterator[Path]:
    """A temporary folder with a folder for each package, downloaded with apt-get and unpacked with dpkg-deb."""
    with tempfile.TemporaryDirectory() as temporary:
        packages = Path(temporary)
        for name in progress(names, "downloading Debian's books"):
            # In a folder of its own: the name of the file is not known, it holds the version.
            (packages / name).mkdir()
            _run(["apt-get", "download", name], packages / name, instead)
            archive = next((packages / name).glob("*.deb"))
            _run(["dpkg-deb", "--extract", str(archive), str(packages / name)], packages, instead)
            archive.unlink()
        yield packages


def _run(command: list[str], folder: Path, instead: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except FileNotFoundError as error:
        raise UserError(
            f"Debian's books are downloaded with {command[0]}, which this system lacks; {instead}"
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"`{' '.join(command[:2])}` failed for Debian's books ({reason}); check the network, run `apt-get update` "
            f"as root, or {instead}"
        )


def sections(html: str) -> list[list[str]]:
    """The paragraphs of a page of a book, a list for each section; without headings, tables of contents and code."""
    page = _Page()
    page.feed(html)
    page.close()
    return page.sections


class _Page(HTMLParser):
    """Text between two tags of block elements is a paragraph; an h2 begins a section."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[list[str]] = [[]]
        self.text = ""
        self.skipped: str | None = None  # the tag of the element that is left out, while inside it
        self.depth = 0  # elements of that tag that are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped is not None:
            self.depth += tag == self.skipped
        elif tag in NO_PROSE or not NO_PROSE_CLASSES.isdisjoint((dict(attrs).get("class") or "").split()):
            self._end_paragraph()
            self.skipped, self.depth = tag, 1
        elif tag in BLOCKS:
            self._end_paragraph()
        if tag == "h2" and self.sections[-1]:
            self.sections.append([])

    def handle_endtag(self, tag: str) -> None:
        if self.skipped is not None:
            self.depth -= tag == self.skipped
            if self.depth == 0:
                self.skipped = None
        elif tag in BLOCKS:
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if self.skipped is None:
            self.text += data

    def _end_paragraph(self) -> None:
        # A line break between two characters of a script without spaces is no space.
        text = re.sub(rf"(?<={CJK})\s*\n\s*(?={CJK})", "", self.text.strip())
        self.text = ""
        if len(text) >= SHORTEST_PARAGRAPH:
            self.sections[-1].append(" ".join(text.split()))
