from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from one_line import one_line
from safetensors.torch import load_file

from csae.data import shard_writer
from csae.data.activations import Batch, Place, sink_mask
from csae.data.cache import ABOUT_BYTES, HEADER_BYTES, write_cache
from csae.data.shard_activations import ShardActivations
from csae.data.shards import check_shards
from csae.errors import Stopped, UserError

T, D = 6, 4
WINDOW = T * (D * 2 + 9)  # bytes in float16


class Source:
    """Windows of made-up text: each position's activations follow from its token."""

    def __init__(self, words: list[int], weights: int = 0, places: tuple[Place, ...] = ()) -> None:
        """words: one a window."""
        generator = torch.Generator().manual_seed(weights)
        self.table = torch.randn(1000, D, generator=generator)
        self.words = words
        self.n_windows, self.n_ctx, self.d_in = len(words), T, D
        self.places = places or (Place("resid.out:1"),)
        self.reads: list[list[int]] = []

    def at(self, place: Place) -> Source:
        one = Source(self.words, places=(place,))
        one.table = self.table
        return one

    def tokens(self, windows) -> torch.Tensor:
        return torch.tensor([[self.words[i] + t for t in range(T)] for i in windows], dtype=torch.int32).reshape(-1, T)

    def batches(self, tokens, documents, special) -> dict[Place, Batch]:
        found = {}
        for number, place in enumerate(self.places):
            acts = self.table[tokens] * (number + 1) + number
            found[place] = Batch(acts, sink_mask(acts), documents, tokens)
        return found

    def read_all(self, windows) -> dict[Place, Batch]:
        self.reads.append(list(windows))
        tokens = self.tokens(windows).long()
        return self.batches(tokens, torch.zeros_like(tokens), None)

    def read(self, windows) -> Batch:
        (batch,) = self.read_all(windows).values()
        return batch

    def describe(self) -> dict:
        digest = hashlib.sha256(str(self.words).encode()).hexdigest()
        return {"model": "m", "hook": self.places[0].hook, "n_windows": self.n_windows, "windows_sha256": digest}


def words_in(folder: Path) -> list[int]:
    source = ShardActivations(folder)
    return source.tokens(range(source.n_windows))[:, 0].tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def small(source: Source, folder: Path, **options):
    """Four windows a file."""
    return write_cache(source, folder, shard_bytes=4 * WINDOW * len(source.places), **options)


# --- several hook points -----------------------------------------------------------------------------

PLACES = (Place("resid.out:1"), Place("mlp.out:1"), Place("model.layers.1.mlp.up"))


def test_several_hook_points_from_one_pass(tmp_path: Path) -> None:
    source = Source(list(range(10)), places=PLACES)
    assert small(source, tmp_path / "cache") == (10, 10, 0)
    assert sum(map(len, source.reads)) == 10
    cache = ShardActivations(tmp_path / "cache")
    assert cache.places == PLACES
    assert (cache.n_windows, cache.n_ctx) == (10, T)
    chosen = [7, 0, 7]
    for place, batch in cache.read_all(chosen).items():
        alone = write_and_read(source.at(place), tmp_path / place.hook, chosen)
        ours = source.read_all(chosen)[place]
        torch.testing.assert_close(batch.acts, ours.acts.half().float(), rtol=0, atol=0)
        assert torch.equal(batch.mask, ours.mask)
        assert torch.equal(batch.tokens, ours.tokens)
        assert torch.equal(cache.at(place).read(chosen).acts, batch.acts)
        assert alone.mask.shape == batch.mask.shape
    folders = {"resid.out-1", "mlp.out-1", "model.layers.1.mlp.up"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {*folders, "activations.json"}
    plain = ShardActivations(tmp_path / "cache" / "mlp.out-1")  # a folder of shards like any other
    assert plain.places == (Place("mlp.out:1"),)
    assert torch.equal(plain.read([3]).acts, cache.at(Place("mlp.out:1")).read([3]).acts)


def write_and_read(source: Source, folder: Path, windows: list[int]) -> Batch:
    small(source, folder)
    return ShardActivations(folder).read(windows)


def test_a_transcoder_reads_two_hook_points(tmp_path: Path) -> None:
    source = Source(list(range(10)), places=PLACES)
    source.table[5] = 1000  # an outlier at both
    small(source, tmp_path)
    cache, place = ShardActivations(tmp_path), Place("resid.out:1", "mlp.out:1")
    pair = cache.at(place)
    assert (pair.d_in, pair.d_out, pair.n_windows) == (D, D, 10)
    batch, given, wanted = pair.read([3, 4]), *(cache.at(Place(hook)).read([3, 4]) for hook in place)
    assert torch.equal(batch.acts, given.acts)
    assert torch.equal(batch.target, wanted.acts)
    assert torch.equal(batch.mask, given.mask & wanted.mask)
    assert json.loads(json.dumps(pair.describe())) == pair.describe()
    assert pair.describe()["hook_to"] == "mlp.out:1"
    places = (place, Place("mlp.out:1"))
    several = ShardActivations(tmp_path, places=places)
    assert several.places == places
    assert several.tokens([3]).shape == (1, T)
    read = several.read_all([3, 4])
    assert all(torch.equal(one, other) for one, other in zip(read[place], batch, strict=True))
    assert torch.equal(read[places[1]].mask, wanted.mask)
    assert read[places[1]].target is None
    assert several.at(place).describe() == pair.describe()


def test_a_hook_point_that_is_not_there(tmp_path: Path) -> None:
    small(Source(list(range(10)), places=PLACES), tmp_path)
    cache = ShardActivations(tmp_path)
    for place in (Place("mlp.in:1"), Place("mlp.out:1", "mlp.in:1")):
        with pytest.raises(UserError, match=r"hold resid\.out:1, mlp\.out:1, .*; not mlp\.in:1: give another") as error:
            cache.at(place)
        one_line(error)
    with pytest.raises(UserError, match=r"not mlp\.in:1: give another"):
        ShardActivations(tmp_path, places=[Place("mlp.in:1")])
    for one in (lambda: cache.read([0]), lambda: cache.d_in):
        with pytest.raises(UserError, match="needed one: name it"):
            one()


def test_one_hook_point_is_a_plain_folder(tmp_path: Path) -> None:
    small(Source([1, 2, 3]), tmp_path)
    cache = ShardActivations(tmp_path)
    assert cache.places == (Place("resid.out:1"),)
    assert torch.equal(cache.at(cache.places[0]).read([1]).acts, cache.read([1]).acts)


def test_a_transcoder_is_no_hook_point(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a transcoder's two are places each"):
        small(Source([1], places=(Place("a"), Place("a", "b"))), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_hook_point_without_its_last_windows(tmp_path: Path) -> None:
    source = Source(list(range(10)), places=PLACES)
    small(source, tmp_path)
    before = contents(tmp_path)
    (tmp_path / "mlp.out-1" / "activations-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="2 of 3 shards are there"):
        ShardActivations(tmp_path)
    source.reads.clear()
    small(source, tmp_path)
    assert contents(tmp_path) == before
    assert max(map(max, source.reads)) == 9
    other = Source(list(range(12)), places=PLACES[:1])
    for file in (tmp_path / "resid.out-1").iterdir():
        file.unlink()
    small(other, tmp_path / "resid.out-1")
    with pytest.raises(UserError, match=r"mlp\.out-1 and resid\.out-1 hold other windows"):
        ShardActivations(tmp_path)


def test_hook_points_whose_folders_were_swapped(tmp_path: Path) -> None:
    small(Source(list(range(10)), places=PLACES), tmp_path)
    one, other = (tmp_path / name for name in ("resid.out-1", "mlp.out-1"))
    for old, new in ((one, tmp_path / "kept"), (other, one), (tmp_path / "kept", other)):
        old.rename(new)
    for read in (ShardActivations, check_shards):
        with pytest.raises(UserError, match=r"is to hold resid\.out:1, and says that it holds mlp\.out:1") as error:
            read(tmp_path)
        one_line(error)


def test_a_hook_point_with_two_shards_swapped(tmp_path: Path) -> None:
    small(Source(list(range(10)), places=PLACES), tmp_path)
    one, other = sorted((tmp_path / "mlp.out-1").glob("*.safetensors"))[:2]
    for old, new in ((one, tmp_path / "kept"), (other, one), (tmp_path / "kept", other)):
        old.rename(new)
    for place in (Place("resid.out:1", "mlp.out:1"), None):
        source = ShardActivations(tmp_path, places=None if place is None else [place])
        with pytest.raises(UserError, match=r"the windows of mlp\.out:1 have other tokens than those of resid\.out:1"):
            source.read_all([0])
    ShardActivations(tmp_path, places=[Place("mlp.out:1")]).read_all([0])


@pytest.mark.parametrize("places", ["[]", '{"a": 1}', '{"a": "../b"}', '{"a": "b/c"}', '"x"'])
def test_damaged_places(tmp_path: Path, places: str) -> None:
    (tmp_path / "activations.json").write_text(f'{{"places": {places}}}')
    with pytest.raises(UserError, match="needed an object of hook points and folders") as error:
        ShardActivations(tmp_path)
    one_line(error)


# --- going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [(), PLACES], ids=["one", "several"])
@pytest.mark.parametrize("shuffle", [None, 3])
def test_a_cache_that_was_cut_short_goes_on_to_the_same_bytes(tmp_path: Path, places, shuffle) -> None:
    words = list(range(0, 180, 10))
    small(Source(words, places=places), tmp_path / "whole", shuffle=shuffle)
    source = Source(words, places=places)
    source.batches = stopping(source, 3)
    with pytest.raises(Stopped, match="2 of 5 shards are whole and stay in"):
        small(source, tmp_path / "cut", shuffle=shuffle)
    small(Source(words, places=places), tmp_path / "cut", shuffle=shuffle)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def stopping(source: Source, at: int):
    calls, batches = [], source.batches

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return batches(*arguments)

    return stop


KILLED = """
    import sys
    sys.path[:0] = [{tests!r}, {parent!r}]
    from pathlib import Path
    from test_cache import Source, small, PLACES
    from csae.data import shard_writer
    import csae.tensors, os, signal
    calls = []
    save = csae.tensors.save_file
    def killed(tensors, file, metadata):
        calls.append(file)
        if len(calls) == {at}:
            with open(file, "wb") as half:
                half.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, file, metadata)
    csae.tensors.save_file = killed
    small(Source(list(range(0, 180, 10)), places=PLACES), Path({folder!r}), append={append})
"""


@pytest.mark.parametrize("at", [1, 2, 8])
@pytest.mark.parametrize("append", [False, True])
def test_a_kill_leaves_nothing_that_is_read_as_whole(tmp_path: Path, at: int, append: bool) -> None:
    words, folder = list(range(0, 180, 10)), tmp_path / "killed"
    for each in (folder, tmp_path / "whole"):
        if append:
            small(Source(words[:5], places=PLACES), each)
    places = dict(tests=str(Path(__file__).parent), parent=str(Path(__file__).parents[1]), folder=str(folder))
    program = textwrap.dedent(KILLED.format(at=at, append=append, **places))
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    if append and at == 1:
        assert words_in(folder) == words[:5]  # nothing was added yet
    else:
        with pytest.raises(UserError) as error:
            ShardActivations(folder)
        one_line(error)
    small(Source(words, places=PLACES), folder, append=append)
    small(Source(words, places=PLACES), tmp_path / "whole", append=append)
    assert contents(folder) == contents(tmp_path / "whole")
    assert words_in(folder) == words


def test_a_kill_before_the_first_file(tmp_path: Path) -> None:
    source = Source([1, 2, 3], places=PLACES)
    small(source, tmp_path / "whole")
    for left in (0, 1, 3):  # folders that have their activations.json, of three; the one that they are in has none
        folder = tmp_path / str(left)
        for number, name in enumerate(sorted(path.name for path in (tmp_path / "whole").iterdir() if path.is_dir())):
            (folder / name).mkdir(parents=True)
            if number < left:
                shutil.copy(tmp_path / "whole" / name / "activations.json", folder / name)
        small(source, folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_two_processes_at_once(tmp_path: Path) -> None:
    with shard_writer.claimed(tmp_path / "cache"):
        with pytest.raises(UserError, match="another process is writing these activations: wait until") as error:
            small(Source([1, 2]), tmp_path / "cache")
        one_line(error)
        assert (tmp_path / "cache").is_dir()
    small(Source([1, 2]), tmp_path / "cache")
    small(Source([1, 2]), tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission to write there"):
        small(Source([1, 2]), tmp_path / "cache")
    tmp_path.chmod(0o700)


def test_a_whole_cache_needs_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(Source([1, 2]), tmp_path)
    monkeypatch.setattr(shard_writer, "write_file", None)
    monkeypatch.setattr(shard_writer, "write_json", None)
    assert small(Source([1, 2]), tmp_path) == (2, 2, 0)


# --- appending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [(), PLACES], ids=["one", "several"])
def test_more_of_the_same_text_and_another_text(tmp_path: Path, places) -> None:
    assert small(Source([10, 20, 30, 40, 50], places=places), tmp_path) == (5, 5, 0)
    first = contents(tmp_path)
    more = Source([10, 20, 30, 40, 50, 60, 70], places=places)
    assert small(more, tmp_path, append=True) == (7, 2, 0)
    assert small(more, tmp_path, append=True) == (7, 0, 0)
    assert small(Source([80, 20, 90], places=places), tmp_path, append=True) == (9, 2, 0)
    assert words_in(tmp_path) == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    now = contents(tmp_path)
    assert all(now[name] == content for name, content in first.items() if name.endswith(".safetensors"))
    cache = ShardActivations(tmp_path)
    for place in cache.places:
        about = json.loads((Path(cache.at(place).describe()["folder"]) / "activations.json").read_text())
        assert about["n_windows"] == 9
        table = Source(list(range(100)), places=places).read_all([10, 80, 90])
        got = cache.at(place).read([0, 7, 8])
        assert torch.equal(got.acts, table[place].acts.half().float())


def test_appending_to_nothing_is_writing(tmp_path: Path) -> None:
    small(Source([1, 2, 3]), tmp_path / "a", append=True)
    small(Source([1, 2, 3]), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_without_append_another_text_is_refused(tmp_path: Path) -> None:
    small(Source([1, 2, 3]), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"it holds others .*; --append adds to a folder that is whole") as error:
        small(Source([1, 2, 4]), tmp_path)
    one_line(error)
    assert contents(tmp_path) == before


def test_appending_to_another_job_is_refused(tmp_path: Path) -> None:
    small(Source([10, 20, 30]), tmp_path)
    before = contents(tmp_path)
    refused = [
        (Source([40], places=(Place("mlp.out:1"),)), {}, "hook: 'resid.out:1', now 'mlp.out:1'"),
        (Source([40]), {"dtype": torch.float32}, "dtype: 'float16', now 'float32'"),
        (Source([40], weights=1), {}, "it has other weights"),
        (Source([40], places=PLACES), {}, "is not empty"),
    ]
    for source, options, message in refused:
        with pytest.raises(UserError, match=message) as error:
            small(source, tmp_path, append=True, **options)
        assert "--append adds" not in one_line(error)
    source = Source([40])
    source.tokens = lambda windows: None
    with pytest.raises(UserError, match="the source gives no token ids"):
        small(source, tmp_path, append=True)
    assert contents(tmp_path) == before


def test_an_append_that_was_cut_short_is_finished_first(tmp_path: Path) -> None:
    words = list(range(0, 200, 10))
    small(Source(words[:5]), tmp_path)
    source = Source(words)
    # One call looks at the weights, a further one for each shard.
    source.batches = stopping(source, 4)
    with pytest.raises(Stopped, match="2 of 4 shards are whole"):
        small(source, tmp_path, append=True)
    before = contents(tmp_path)
    for other in ([*words[:12], 300, *words[13:]], words[:12], words[:5], [300]):
        with pytest.raises(UserError, match="other windows were being added when it was cut short") as error:
            small(Source(other), tmp_path, append=True)
        one_line(error)
    with pytest.raises(UserError, match="2 of 4 shards are there"):
        ShardActivations(tmp_path)
    assert contents(tmp_path) == before
    assert small(Source(words), tmp_path, append=True) == (20, 15, 0)
    assert words_in(tmp_path) == words


def test_a_part_that_is_gone(tmp_path: Path) -> None:
    small(Source([10, 20]), tmp_path)
    for words in ([30], [40]):
        small(Source(words), tmp_path, append=True)
    (tmp_path / "activations-part003-00001-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match="3 of 4 windows are there"):
        ShardActivations(tmp_path)
    (tmp_path / "activations-part002-00001-of-00001.safetensors").rename(
        tmp_path / "activations-part003-00001-of-00001.safetensors"
    )
    with pytest.raises(UserError, match="files of part 2 are missing"):
        small(Source([50]), tmp_path, append=True)


def test_appending_to_some_of_the_hook_points_is_refused(tmp_path: Path) -> None:
    small(Source([10, 20], places=PLACES), tmp_path)
    before = contents(tmp_path)
    for places in (PLACES[:1], PLACES[:2], (*PLACES, Place("attn.out:1"))):
        with pytest.raises(UserError, match="it holds others") as error:
            small(Source([30], places=places), tmp_path, append=True)
        one_line(error)
    assert contents(tmp_path) == before


def words_cut(words: torch.Tensor, n_ctx: int = 64) -> Source:
    """A text of words in windows of n_ctx."""
    windows = words[: len(words) // n_ctx * n_ctx].reshape(-1, n_ctx)
    source = Source([0] * len(windows))
    source.n_ctx = n_ctx
    source.tokens = lambda chosen: windows[torch.as_tensor(chosen)]
    return source


def test_the_same_text_cut_otherwise_is_not_added(tmp_path: Path) -> None:
    words = torch.randint(1000, (64 * 300,), generator=torch.Generator().manual_seed(0))
    small(words_cut(words[: 64 * 200]), tmp_path)
    before = contents(tmp_path)
    for anew in (words[5:], words[64 * 90 + 3 :][: 64 * 60], words.reshape(3, -1).flip(0).flatten()[7:]):
        with pytest.raises(UserError, match=r"--append: [0-9]+% of the shorter text, .*, is in both") as error:
            small(words_cut(anew), tmp_path, append=True)
        assert 55 < int(one_line(error).split("append: ")[1].split("%")[0]) < 95  # phrases are cut as well
    assert contents(tmp_path) == before
    assert small(words_cut(words), tmp_path, append=True) == (300, 100, 0)
    assert small(words_cut(words.flip(0)), tmp_path, append=True) == (600, 300, 0)


# --- a bound and an order ----------------------------------------------------------------------------


@pytest.mark.parametrize("places", [(), PLACES], ids=["one", "several"])
@pytest.mark.parametrize("max_bytes", [20_000, 30_001, 47_000])
def test_a_bound_is_kept_and_used(tmp_path: Path, places, max_bytes: int) -> None:
    source = Source(list(range(900)), places=places)
    n_windows, n_added, n_left = small(source, tmp_path, max_bytes=max_bytes)
    assert (n_added, n_left) == (n_windows, 900 - n_windows)
    assert ShardActivations(tmp_path).n_windows == n_windows
    size = sum(map(len, contents(tmp_path).values()))
    n = len(source.places)
    shards = -(-n_windows // 4)
    assert size <= max_bytes < size + ABOUT_BYTES * (n + 1) + n * (WINDOW + HEADER_BYTES * (shards + 1))
    before = contents(tmp_path)
    assert small(source, tmp_path, max_bytes=max_bytes) == (n_windows, n_added, n_left)
    assert contents(tmp_path) == before


def test_a_bound_of_what_is_appended_to(tmp_path: Path) -> None:
    source = Source(list(range(900)))
    first = small(source, tmp_path, max_bytes=20_000)
    full = sum(map(len, contents(tmp_path).values()))
    assert small(source, tmp_path, max_bytes=full, append=True) == (first.n_windows, 0, 900 - first.n_windows)
    more = small(source, tmp_path, max_bytes=60_000, append=True)
    assert more.n_windows > first.n_windows
    assert words_in(tmp_path) == list(range(more.n_windows))
    assert 25_000 < sum(map(len, contents(tmp_path).values())) <= 60_000


def test_no_room_for_one_window(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max-bytes: given 100; needed [0-9]+ for one window") as error:
        small(Source([1, 2]), tmp_path / "cache", max_bytes=100)
    needed = int(one_line(error).split("needed ")[1].split()[0])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError):
        small(Source([1, 2]), tmp_path / "cache", max_bytes=needed - 1)
    assert small(Source([1, 2]), tmp_path / "cache", max_bytes=needed).n_windows == 1


def test_too_little_disk_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    usage = shutil_usage(free=100)
    monkeypatch.setattr("csae.data.cache.shutil.disk_usage", usage)
    small(Source([1, 2]), tmp_path)
    assert "MB are free" in capsys.readouterr().err
    small(Source([1, 2]), tmp_path)  # nothing is left to be written
    assert not capsys.readouterr().err


def shutil_usage(free: int):
    class Usage:
        pass

    usage = Usage()
    usage.free = free
    return lambda folder: usage


def test_shuffled_by_a_seed(tmp_path: Path) -> None:
    words = list(range(0, 300, 10))
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        small(Source(words), tmp_path / name, shuffle=seed)
    a, c = words_in(tmp_path / "a"), words_in(tmp_path / "c")
    assert sorted(a) == sorted(c) == words
    assert words != a != c
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(UserError, match=r"shuffle: 1, now 2"):
        small(Source(words), tmp_path / "a", shuffle=2)
    drawn = small(Source(words), tmp_path / "d", shuffle=1, max_bytes=20_000)
    assert words_in(tmp_path / "d") == a[: drawn.n_windows]


# --- checksums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [(), PLACES], ids=["one", "several"])
def test_a_checksum_finds_a_bit(tmp_path: Path, places) -> None:
    small(Source(list(range(10)), places=places), tmp_path)
    found = check_shards(tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert (found.n_files, found.n_windows, found.unknown) == (len(files), 10, [])
    assert found.n_bytes == sum(file.stat().st_size for file in files)
    damaged = bytearray(files[-1].read_bytes())
    damaged[-100] ^= 1
    files[-1].write_bytes(damaged)
    with pytest.raises(UserError, match="their checksum differs") as error:
        check_shards(tmp_path)
    assert files[-1].name in one_line(error)


def test_shards_without_a_checksum(tmp_path: Path) -> None:
    small(Source(list(range(10))), tmp_path)
    file = tmp_path / "activations-00002-of-00003.safetensors"
    from safetensors.torch import save_file

    save_file(load_file(file), file)
    assert check_shards(tmp_path).unknown == [file]
