import errno
import json
import os
import resource
import signal
import stat
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from csae.errors import UserError, shown
from csae.files import (
    UNFINISHED,
    check_readable,
    check_writable,
    disk_problem,
    filled,
    parse_json,
    read_json,
    reading,
    write_file,
    write_json,
)


def test_a_file_is_whole_and_readable_as_others_are(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_json(tmp_path / "new" / "a.json", {"k": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"k": 1}
    assert stat.S_IMODE((tmp_path / "new" / "a.json").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), UserError, "the disk is full"),
        (RuntimeError("IoError: No space left on device (os error 28)"), UserError, "the disk is full"),
        (OSError(errno.EFBIG, "File too large"), UserError, "larger than this file system"),
        (PermissionError(errno.EACCES, "denied"), UserError, "no permission to write there"),
        (OSError(errno.EROFS, "Read-only file system"), UserError, "Read-only file system: choose another folder"),
        (ValueError("a bug"), ValueError, "a bug"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_failed_write_leaves_what_was_there(error, kind, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text("before")

    def write(path):
        path.write_text("hal")
        raise error

    with pytest.raises(kind) as raised:
        write_file(file, write)
    assert message in str(raised.value)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="a part of that path is a file, not a folder"):
        write_json(tmp_path / "taken" / "a.json", {})


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken: not written: it is a folder: give the name of a file"):
        write_json(tmp_path / "taken", {})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@contextmanager
def at_most(limit, soft):
    """A limit of this process, lowered for a while."""
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


SAVES = {
    "text": lambda path: path.write_text("x" * 5000),
    "safetensors": lambda path: save_file({"a": torch.zeros(5000)}, path),
    "torch.save": lambda path: torch.save({"a": torch.zeros(5000)}, path),
}


@pytest.mark.parametrize("save", SAVES)
def test_a_file_beyond_a_limit_of_the_system(save, tmp_path):
    with (
        pytest.raises(
            UserError, match=r"a\.bin: not written: .*(larger than this file system|the disk did not take all of it)"
        ),
        at_most(resource.RLIMIT_FSIZE, 1000),
    ):
        write_file(tmp_path / "a.bin", SAVES[save])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ESTALE, errno.ELOOP])
@pytest.mark.parametrize("doing", ["read", "write"])
@pytest.mark.parametrize("layer", ["python", "rust", "wrapped", "words"])
def test_a_disk_error_is_told_whichever_layer_reports_it(number, doing, layer):
    error = OSError(number, os.strerror(number))
    if layer == "rust":
        error = RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    elif layer == "wrapped":
        outer = ValueError("An error occurred while generating the dataset")
        outer.__cause__ = error
        error = outer
    elif layer == "words" and number != errno.ELOOP:
        error = RuntimeError(f"it failed: {os.strerror(number)}")
    reason = disk_problem(error, doing)
    assert reason is not None
    assert "\n" not in reason
    assert doing == "write" or number == errno.ENOSPC or "choose another folder" not in reason


def test_other_errors_are_no_disk_errors():
    assert disk_problem(ValueError("k: given 3")) is None
    assert disk_problem(KeyError("step"), "read") is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "no such file or folder"),
        ("folder", "it is a folder"),
        ("circle", "go round in a circle"),
        ("x" * 300, "the name is too long"),
        ("file/inside", "a part of that path is a file"),
    ],
    ids=["missing", "folder", "circle of links", "long name", "below a file"],
)
@pytest.mark.parametrize("read", [check_readable, read_json])
def test_why_a_file_can_not_be_read(name, reason, read, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"can't be read: .*{reason}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EACCES, "no permission to read it"), (errno.EIO, "input/output error")]
)
def test_a_file_that_the_system_refuses(number, reason, tmp_path):
    with pytest.raises(UserError, match=f"a: can't be read: .*{reason}"), reading(tmp_path / "a"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"k": NaN}', "NaN is no number of JSON"),
        (b'{"k": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"k": 1e999}', "1e999 is too large a number"),
        (b'{"k": ' + b"1" * 5000 + b"}", "a number of more than 4,300 digits"),
        (b"[]", "given a JSON list; needed an object"),
        (b"3", "given a JSON int; needed an object"),
        (b"null", "given a JSON NoneType; needed an object"),
    ],
    ids=lambda part: str(part)[:24],
)
def test_what_is_not_a_json_object_is_refused(content, reason, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: ") as raised:
        read_json(tmp_path / "a.json")
    assert reason in str(raised.value)
    assert "copy the folder again" in str(raised.value)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"k": 3}')
    assert read_json(tmp_path / "a.json") == {"k": 3}
    assert parse_json('{"k": 3}', "line 1", "") == {"k": 3}


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a\x1b[31mred\x1b[0m", "a\\x1b[31mred\\x1b[0m"),
        (os.fsdecode(b"run-\xff\xe9"), "run-\\xff\\xe9"),
        ("two\nlines\r\tand", "two\\nlines\\r\\tand"),
        ("right\u202eto left", "right\\u202eto left"),
        ("half \ud83d of a pair", "half \\ud83d of a pair"),
        ("a\x9bb\x00c\x7f", "a\\x9bb\\x00c\\x7f"),
        ("Grüße, 世界 👩‍💻 a\u00a0b", "Grüße, 世界 👩‍💻 a\u00a0b"),
    ],
    ids=["escape sequence", "not UTF-8", "line breaks", "direction", "lone surrogate", "controls", "ordinary"],
)
def test_text_is_shown_safely(text, safe):
    assert shown(text) == safe
    shown(text).encode("utf-8")


def test_what_can_not_be_written_is_told_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "page.html")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match="it is a folder: give the name of a file"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"page.html: can't be written: a part of that path is a file"):
        check_writable(tmp_path / "file" / "page.html")


def fill(folder):
    with filled(folder) as working:
        (working / "first").touch()
        (folder / "first").unlink()  # it is not there yet


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path):
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(FileNotFoundError):
            fill(folder)
    assert list(tmp_path.iterdir()) == []
    with filled(tmp_path / "new") as working:
        (working / "first").touch()
        with pytest.raises(UserError, match="another process is writing to it"), filled(tmp_path / "new"):
            pass
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["first"]
    with pytest.raises(UserError, match="not empty"), filled(tmp_path / "new"):
        pass


def test_what_a_kill_left_in_a_folder_goes_when_it_is_filled(tmp_path):
    process = os.fork()
    if not process:
        with filled(tmp_path / "new") as working:
            (working / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert [file.name for file in (tmp_path / "new").iterdir()] == [UNFINISHED]
    with filled(tmp_path / "new") as working:
        (working / "whole").touch()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["whole"]
