from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from one_line import one_line
from streams import as_rows, chunks_of, texts_of, values, write_lines

from csae.data import row_datasets, row_files
from csae.data.rows import BadRow, open_rows
from csae.errors import UserError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquets = pytest.importorskip("pyarrow.parquet")
N = 700
COLUMNS = ("text",)


def lines(folder: Path) -> Path:
    write_lines(folder / "a.jsonl", as_rows(texts_of(N)))
    return write_lines(folder / "b.ndjson", as_rows(texts_of(5))).parent


def zipped(folder: Path) -> Path:
    return write_lines(folder / "a.jsonl.gz", as_rows(texts_of(N)))


def parquet(folder: Path) -> Path:
    for name, n in (("a.parquet", N), ("b.parquet", 5)):
        parquets.write_table(pyarrow.Table.from_pylist(as_rows(texts_of(n))), folder / name, row_group_size=300)
    return folder


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(as_rows(texts_of(N))).save_to_disk(folder / "saved")
    return folder / "saved"


def splits(folder: Path) -> Path:
    data = datasets.Dataset.from_list(as_rows(texts_of(N)))
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(folder / "saved")
    return folder / "saved"


def text_of(row: Any) -> str:
    return json.loads(row)["text"] if isinstance(row, bytes) else row["text"]


@pytest.mark.parametrize("make", [lines, zipped, parquet, saved, splits])
def test_rows_from_any_position_on(tmp_path: Path, make: Any) -> None:
    dataset = make(tmp_path)
    chunks = chunks_of(dataset, COLUMNS)
    found = [text_of(row) for row in values(chunks)]
    assert found == texts_of(N) + (texts_of(5) if dataset == tmp_path else [])
    assert len(chunks) > 2
    assert set(open_rows(dataset).columns) == {"text", "id"}
    done = 0
    for chunk in chunks:
        done += len(chunk.rows)
        position = json.loads(json.dumps(chunk.after))  # as a checkpoint keeps it
        assert [text_of(row) for row in values(chunks_of(dataset, COLUMNS, position))] == found[done:]


def from_the_hub(folder: Path) -> list[str]:
    """The files of a data set on the hub."""
    parquet(folder)
    return [str(folder / "a.parquet"), str(folder / "b.parquet")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The hub has the data set org/name; gives what is asked of it."""
    files, load, asked = from_the_hub(tmp_path), datasets.load_dataset, []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config))
        if name != "org/name":
            raise RuntimeError("no such data set:\non the hub")
        return load("parquet", data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(row_datasets.HubRows, "_file_names", lambda self, data: files)
    return asked


def test_rows_of_the_hub_from_any_position_on(hub: list[tuple[Any, ...]]) -> None:
    rows = open_rows("org/name:some-config")
    chunks = list(rows.read({}, COLUMNS))
    found = [row["text"] for row in values(chunks)]
    assert found == texts_of(N) + texts_of(5)
    done = 0
    for chunk in chunks:
        done += len(chunk.rows)
        position = json.loads(json.dumps(chunk.after))
        assert [row["text"] for row in values(rows.read(position, COLUMNS))] == found[done:]
    assert set(hub) == {("org/name", "some-config")}
    assert rows.describe().keys() == {"files_sha256"}


def test_no_such_data_set(hub: Any) -> None:
    with pytest.raises(
        UserError, match=r"'org/other' can't be loaded \(no such data set: on the hub\); give a file"
    ) as e:
        open_rows("org/other")
    one_line(e)


def test_a_plain_text_is_one_document_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "PART_BYTES", 100)
    text = "\ufeff" + "".join(f"line {i}, déjà vu\r\n\r\n  indented\n" for i in range(60)) + "é" * 1000
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.md").write_text("short")
    chunks = chunks_of(tmp_path, COLUMNS)
    assert len(chunks) > 10
    assert [chunk.goes_on for chunk in chunks] == [False] + [True] * (len(chunks) - 2) + [False]
    assert "".join(values(chunks)) == text[1:].replace("\r\n", "\n") + "short"
    assert all(part[0] == "l" for part in values(chunks)[1:10])  # cut where a line begins, before no space
    for number, chunk in enumerate(chunks):
        assert values(chunks_of(tmp_path, COLUMNS, chunk.after)) == values(chunks[number + 1 :])


def test_rows_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LONGEST_ROW", 50)
    long = json.dumps({"text": "x" * 120})
    file = write_lines(tmp_path / "a.jsonl", ['{"text": "one"}', long, '{"text": "three"}'])
    one, two, three = values(chunks_of(file, COLUMNS))
    assert two == BadRow("it is longer than 50 bytes")
    assert [text_of(row) for row in (one, three)] == ["one", "three"]
    (tmp_path / "b.txt").write_bytes(b"fine \xff")
    assert values(chunks_of(tmp_path / "b.txt", COLUMNS)) == [BadRow("byte 5 is not UTF-8")]


def cut_short(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n", r"a\.csv: no file of \.jsonl, .*: convert it"),
        ("a.jsonl", b"[1, 2]\n", "its first line is a JSON list; needed an object in each line"),
        ("a.json", b"[\n  {}\n]", "its first line is no JSON; needed JSON Lines"),
        ("a.jsonl", b"\n", "no row in it"),
        ("a.txt", b'{"text": "x"}\n', r"holds lines of JSON, and its name says plain text: name it \.jsonl"),
        ("a.txt", "wide".encode("utf-16-le"), "holds zero bytes, as UTF-16 does"),
        ("a.parquet", b"PAR1 and no more", r"not a whole Parquet file \(.*\): copy it again"),
        ("a.jsonl.gz", b"no gzip", r"not a whole \.gz file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_rows(tmp_path / name)
    one_line(error)


def test_folders_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no file of \.jsonl"):
        open_rows(tmp_path)


@pytest.mark.parametrize("make", [zipped, parquet])
def test_damaged_files(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    file = next(tmp_path.glob("a.*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 2000] = bytes(2000)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"copy (it|the file) again") as error:
        chunks_of(file, COLUMNS)
    assert str(file) in one_line(error)


def test_what_tells_data_sets_apart(tmp_path: Path) -> None:
    lines(tmp_path)
    before = open_rows(tmp_path).describe()
    assert before == open_rows(tmp_path).describe()
    write_lines(tmp_path / "c.jsonl", as_rows(texts_of(1)))
    assert open_rows(tmp_path).describe() != before
