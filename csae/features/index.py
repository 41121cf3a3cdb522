"""The index of features: one SQLite file, made by `csae.features.build`, read here.

A position counts through all windows of the index: position t of window w is w * n_ctx + t.

    about(name, value)      what the index is of, as JSON: the keys of `ABOUT`, and `finished`
    blocks(block, first, n_windows, counted, starts)
                            a run of windows that was read in one go. counted: its positions in the mask. starts: where
                            a window or a document begins, `<i8` compressed by zlib
    windows(window, pieces) the text of each token, a JSON list compressed by zlib
    places(feature, block, kind, n, packed)
                            where a feature is NEW (kind 0; of a per-token SAE: active) and CARRIED (kind 1) in a block,
                            as `csae.features.places.Places.pack` has it; a share of CARRIED or more of c is carried
    features(feature, ...)  of each feature in one row, see `Feature`
    words(word, feature, share)
                            the tokens at which a feature is new most, in lower case and without spaces around, with
                            their share of all its activity
    raised(word, features)  for each token of the vocabulary, as it is written in a text, the features that raise its
                            logit most: a JSON list [feature, score, feature, score, ...], the highest score first

The tables up to `places` are written block by block, each in one transaction, so that a build which was stopped goes
on. The others are made of them at the end.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from csae.errors import UserError, shown
from csae.features.places import ACTIVITY, FRACTION, Places, Spans, spans
from csae.files import check_readable
from csae.sae import SAE

FEATURES = "features.db"  # in the folder of a run
SCHEMA = 1
NEW, CARRIED_KIND = 0, 1
ABOUT = ("schema", "weights", "arch", "k", "d_in", "d_sae", "run", "model", "place", "data", "n_ctx", "windows", "text")
RARE = 5.0
BEFORE, AFTER = 10, 6  # tokens of a passage around its own
TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE blocks (
    block INTEGER PRIMARY KEY, first INTEGER NOT NULL, n_windows INTEGER NOT NULL, counted INTEGER NOT NULL,
    starts BLOB NOT NULL);
CREATE TABLE windows (window INTEGER PRIMARY KEY, pieces BLOB NOT NULL);
CREATE TABLE places (
    feature INTEGER, block INTEGER, kind INTEGER, n INTEGER NOT NULL, packed BLOB NOT NULL,
    PRIMARY KEY (feature, block, kind)) WITHOUT ROWID;
CREATE TABLE features (
    feature INTEGER PRIMARY KEY, new INTEGER NOT NULL, carried INTEGER NOT NULL, spans INTEGER NOT NULL,
    largest INTEGER NOT NULL, histogram TEXT NOT NULL, words TEXT NOT NULL, passages TEXT NOT NULL,
    carried_passages TEXT NOT NULL, logits TEXT NOT NULL, similar TEXT NOT NULL);
CREATE TABLE words (word TEXT, feature INTEGER, share REAL NOT NULL, PRIMARY KEY (word, feature)) WITHOUT ROWID;
CREATE TABLE raised (word TEXT PRIMARY KEY, features TEXT NOT NULL) WITHOUT ROWID;
"""
REBUILD = "make it again with `csae features`"


class Passage(NamedTuple):
    """A token at which a feature is new or carried, in its text."""

    before: str
    token: str
    after: str
    amount: float
    """activity in units of normalised activations, or share of c"""
    window: int
    """of the index"""
    t: int
    """position in the window"""


class Feature(NamedTuple):
    """A feature in the text of an index."""

    feature: int
    new: int
    """at how many positions it is new; of a per-token SAE: active"""
    carried: int
    """at how many others it is carried"""
    spans: int
    """over how many stretches it is present, new or carried, without a gap"""
    largest: float
    """its largest activity"""
    histogram: list[int]
    """how often its activity lies in each of BINS equal parts of 0 to the largest"""
    words: list[tuple[str, float]]
    """the tokens at which it is new most, with their share of all its activity"""
    passages: list[Passage]
    """where it is new, strongest first, one a window"""
    carried_passages: list[Passage]
    """where it is only carried, the largest share first, one a window"""
    logits: dict[str, list[Any]]
    """{"up": [token, score, ...], "down": ...}: the tokens it raises and lowers most; empty where that is noise"""
    similar: list[tuple[int, float]]
    """the features whose decoder rows are nearest, with the cosines"""


class FeatureIndex:
    """A finished index, open for reading; a context manager. `about`: what it is of, a dictionary of ABOUT's keys."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where there is no such file, it is something else, or it is not finished."""
        check_readable(path)
        self.path = path
        self._rows = connect(path, read_only=True)
        try:
            with told(path):
                self.about = read_about(self._rows)
                finished = self.about.pop("finished", False)
                self.n_tokens = self._one("SELECT sum(counted) FROM blocks")[0] or 0
        except UserError:
            self._rows.close()
            raise
        if self.about.get("schema") != SCHEMA or not finished:
            self._rows.close()
            made = self.about.get("schema") == SCHEMA
            why = "it is not finished: run `csae features` again, it goes on" if made else f"another format: {REBUILD}"
            raise UserError(f"{path}: {why}")
        self._window = lru_cache(maxsize=512)(self._read_window)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()

    def check(self, sae: SAE, model: str | None = None) -> None:
        """Raises UserError where the index is of another SAE, or of another language model than `model`."""
        if self.about["weights"] != weights_sha256(sae):
            raise UserError(
                f"{self.path}: it is of another SAE ({shown(self.about['run'])}: {shown(self.about['arch'])}, "
                f"d_sae = {self.about['d_sae']}), or of these weights before they changed: {REBUILD}, or give another"
            )
        if model is not None and model != self.about["model"]:
            raise UserError(
                f"{self.path}: it is of the model {shown(self.about['model'])}; needed {shown(model)}: {REBUILD}"
            )

    def feature(self, number: int, passages: int | None = None) -> Feature | None:
        """What is known of a feature; None where it is nowhere new in the text. passages: at most so many."""
        with told(self.path):
            row = self._one("SELECT * FROM features WHERE feature = ?", number)
        if row is None:
            return None
        histogram, words, new, carried, logits, similar = map(json.loads, row[5:])
        return Feature(
            row[0],
            row[1],
            row[2],
            row[3],
            row[4] / ACTIVITY,
            histogram,
            [(word, share) for word, share in words],
            [self._passage(at, amount / ACTIVITY) for at, amount in new[:passages]],
            [self._passage(at, amount / FRACTION) for at, amount in carried[:passages]],
            logits,
            [(other, cosine) for other, cosine in similar],
        )

    def features(self) -> Iterator[tuple[int, int, list[tuple[str, float]]]]:
        """Each feature that is new somewhere: its number, at how many positions, and its words; most often first."""
        with told(self.path):
            for number, new, words in self._rows.execute("SELECT feature, new, words FROM features ORDER BY new DESC"):
                yield number, new, json.loads(words)

    def where(self, number: int) -> tuple[Places, Places, Spans]:
        """The positions at which a feature is new, those at which it is carried, and the stretches they make."""
        found: tuple[list[Places], list[Places]] = [], []
        stretches: list[Spans] = []
        for new, carried, starts in self.by_block(number):
            found[0].append(new)
            found[1].append(carried)
            stretches.append(spans(new, carried, starts))
        none = np.zeros(0, np.int64)
        joined = Spans(*map(np.concatenate, zip(*stretches, strict=True))) if stretches else Spans(none, none)
        return Places.joined(found[0]), Places.joined(found[1]), joined

    def by_block(self, number: int) -> Iterator[tuple[Places, Places, np.ndarray]]:
        """Where a feature is new, where it is carried, and where windows and documents begin, block by block."""
        with told(self.path):
            yield from read_places(self._rows, number, self.about["n_ctx"])

    def find(self, text: str, n: int = 20) -> list[tuple[int, str, float, int]]:
        """The features that are new most at a token: [feature, token, share of its activity there, new at so many].

        n at most. Tokens that are the text come first, then those that begin with it, then those that it is part of;
        among them by the share, which counts for less where the feature is rare: times n / (n + RARE). Case and spaces
        around don't count.
        """
        wanted = text.strip().lower()
        with told(self.path):
            return self._rows.execute(
                "SELECT feature, word, share, new FROM words JOIN features USING (feature) WHERE instr(word, ?1) "
                "ORDER BY word != ?1, instr(word, ?1) != 1, share * new / (new + ?2) DESC, feature LIMIT ?3",
                (wanted, RARE, n),
            ).fetchall()

    def raising(self, token: str, n: int = 20) -> list[tuple[int, str, float]]:
        """The features that raise a token's logit most: [feature, token, score], n at most; spaces count where given.

        Raises UserError where no token of the model is that text.
        """
        found = []
        with told(self.path):
            for word in [token] if token != token.strip() else [token, f" {token}"]:
                row = self._one("SELECT features FROM raised WHERE word = ?", word)
                flat = [] if row is None else json.loads(row[0])
                found += [(number, word, score) for number, score in zip(flat[::2], flat[1::2], strict=True)]
        if not found:
            raise UserError(
                f"{shown(token)!r}: no token of {shown(self.about['model'])} is that text, or no logits are known "
                "here: give a whole token, such as ' Paris'"
            )
        return sorted(found, key=lambda row: -row[2])[:n]

    def texts(self, text: str, n: int = 20) -> list[Passage]:
        """The first n places of the index at which a text is found, each with the token where it begins."""
        found: list[Passage] = []
        with told(self.path):
            for window, packed in self._rows.execute("SELECT window, pieces FROM windows ORDER BY window"):
                pieces = unpack_pieces(packed)
                whole, at = "".join(pieces), -1
                ends = np.cumsum([len(piece) for piece in pieces])
                while (at := whole.find(text, at + 1)) >= 0 and len(found) < n:
                    t = int(np.searchsorted(ends, at, side="right"))
                    found.append(self._around(pieces, window, t, 0.0))
                if len(found) == n:
                    break
        return found

    def pieces(self, window: int) -> list[str]:
        """The text of each token of a window."""
        return self._window(window)

    def _passage(self, position: int, amount: float) -> Passage:
        window, t = divmod(position, self.about["n_ctx"])
        return self._around(self._window(window), window, t, amount)

    @staticmethod
    def _around(pieces: list[str], window: int, t: int, amount: float) -> Passage:
        before, after = "".join(pieces[max(0, t - BEFORE) : t]), "".join(pieces[t + 1 : t + 1 + AFTER])
        return Passage(before, pieces[t], after, amount, window, t)

    def _read_window(self, window: int) -> list[str]:
        with told(self.path):
            return unpack_pieces(self._one("SELECT pieces FROM windows WHERE window = ?", window)[0])

    def _one(self, query: str, *given: Any) -> Any:
        return self._rows.execute(query, given).fetchone()


def read_places(rows: sqlite3.Connection, number: int, n_ctx: int) -> Iterator[tuple[Places, Places, np.ndarray]]:
    """See `FeatureIndex.by_block`."""
    found: dict[int, dict[int, Places]] = {}
    begins: dict[int, np.ndarray] = {}
    query = (
        "SELECT block, kind, packed, first, starts FROM places JOIN blocks USING (block) WHERE feature = ? "
        "ORDER BY block, kind"
    )
    with closing(rows.execute(query, (number,))) as cursor:
        for block, kind, packed, first, starts in cursor:
            for before in [other for other in found if other != block]:
                both = found.pop(before)
                yield both.get(NEW, Places.none()), both.get(CARRIED_KIND, Places.none()), begins.pop(before)
            found.setdefault(block, {})[kind] = Places.unpack(packed, first * n_ctx)
            begins[block] = np.frombuffer(zlib.decompress(starts), "<i8")
    for block, both in found.items():
        yield both.get(NEW, Places.none()), both.get(CARRIED_KIND, Places.none()), begins[block]


def pack_pieces(pieces: list[str]) -> bytes:
    return zlib.compress(json.dumps(pieces, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def unpack_pieces(packed: bytes) -> list[str]:
    return json.loads(zlib.decompress(packed).decode("utf-8", "surrogatepass"))


def weights_sha256(sae: SAE) -> str:
    """A hash of the tensors of an SAE and of how it uses them: of what decides which features are where."""
    how = f"{sae.arch} {sae.k} {getattr(sae, 'k_mem', '')}"
    if sae.selection != "topk":
        how += f" {sae.selection} {sae.k_max}"
    digest = hashlib.sha256(how.encode())
    for name, tensor in sorted(sae.state_dict().items()):
        if name == "tokens_since_fired":
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    """A connection without transactions of its own: those who write begin and commit them."""
    with told(path):
        return sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}", uri=True, isolation_level=None, timeout=2
        )


def read_about(rows: sqlite3.Connection) -> dict[str, Any]:
    """What an index says that it is of; empty where the file has no tables. sqlite3.Error where it is no index."""
    if not rows.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return {}
    found = dict(rows.execute("SELECT name, value FROM about"))
    if not all(isinstance(value, str) for value in found.values()):  # of a damaged page
        raise sqlite3.DatabaseError("its table `about` holds no text")
    return {name: json.loads(value) for name, value in found.items()}


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What SQLite raises inside becomes a UserError in one line."""
    try:
        yield
    except (sqlite3.Error, zlib.error, json.JSONDecodeError) as error:
        text = str(error)
        if "locked" in text:
            raise UserError(f"{path}: another process is writing it: wait until it is done") from error
        if "full" in text or "disk I/O" in text or "readonly" in text or "unable to open" in text:
            raise UserError(f"{path}: {text}: free some space, check the folder, or choose another --out") from error
        raise UserError(f"{path}: no index of features, or a damaged one ({text}): delete it, and {REBUILD}") from error
