import errno
import json
import stat

import pytest

from csae.errors import UserError
from csae.files import check_writable, read_json, write_file, write_json


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


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_what_is_not_json_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: not JSON"):
        read_json(tmp_path / "a.json")


def test_what_can_not_be_written_is_told_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "page.html")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match="it is a folder: give the name of a file"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"page.html: can't be written: a part of that path is a file"):
        check_writable(tmp_path / "file" / "page.html")
