"""`csae cache` on a tiny language model."""

import json

import pytest
import torch
from test_cli import csae

from csae.cli.cache import bytes_of
from csae.data.activations import Place
from csae.data.language_model import LanguageModel
from csae.data.shard_activations import ShardActivations
from csae.errors import UserError

TEXT = " ".join(f"{number} quick brown foxes jump over {number * 7} lazy dogs." for number in range(60))


@pytest.fixture
def of_model(tiny_model_path, tmp_path):
    (tmp_path / "fox.txt").write_text(TEXT)
    return ["--model", tiny_model_path, "--text", tmp_path / "fox.txt", "--n-ctx", "16", "--device", "cpu"]


def test_more_text_is_added_and_checked(of_model, tmp_path, capsys):
    acts = tmp_path / "acts"
    cache = ["cache", "-o", acts, *of_model, "--layer", "2"]
    code, out, err = csae(*cache, "--max-tokens", "320", capsys=capsys)
    assert code == 0, err
    assert out.startswith("cached: 20 windows of 16 positions, 320 tokens, in ")
    code, _, err = csae(*cache, "--max-tokens", "640", capsys=capsys)
    assert code == 2
    assert "--append adds to a folder that is whole" in err
    code, out, err = csae(*cache, "--max-tokens", "640", "--append", capsys=capsys)
    assert code == 0, err
    added, cached = out.splitlines()
    number = int(added.removeprefix("added: ").removesuffix(" windows"))
    assert 0 < number <= 20
    assert cached.startswith(f"cached: {20 + number} windows")
    code, out, err = csae("cache", "--check", acts, capsys=capsys)
    assert code == 0, err
    assert out.startswith(f"checked: {20 + number} windows in 2 files")
    assert ShardActivations(acts).places == (Place("resid.out:1"),)


def test_a_bound_and_a_drawn_order(of_model, tmp_path, capsys):
    cache = ["cache", *of_model, "--layer", "2"]
    code, out, err = csae(*cache, "-o", tmp_path / "a", "--max-bytes", "20kB", "--shuffle", "1", capsys=capsys)
    assert code == 0, err
    left, cached = out.splitlines()
    assert left.startswith("--max-bytes 20kB: no room for ")
    begun = next(line for line in err.splitlines() if line.startswith("--max-bytes 20,000: "))
    n_bytes = int(begun.split(", ")[2].removesuffix(" bytes").replace(",", ""))
    assert sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) <= n_bytes <= 20_000
    n_windows = int(cached.removeprefix("cached: ").split()[0])
    assert csae(*cache, "-o", tmp_path / "b", capsys=capsys)[0] == 0
    drawn, all_of_them = ShardActivations(tmp_path / "a"), ShardActivations(tmp_path / "b")
    assert drawn.n_windows == n_windows < all_of_them.n_windows
    assert f": {n_windows} of {all_of_them.n_windows} windows fit, {16 * n_windows} tokens, " in begun
    assert not torch.equal(drawn.tokens(range(n_windows)), all_of_them.tokens(range(n_windows)))


def test_several_hook_points_are_those_of_the_model(of_model, tiny_model_path, tmp_path, capsys):
    acts, names = tmp_path / "acts", ("resid.out:1", "mlp.out:1", "attn.out:0")
    hooks = [part for name in names for part in ("--hook", name)]
    code, _, err = csae("cache", "-o", acts, *of_model, *hooks, capsys=capsys)
    assert code == 0, err
    source = ShardActivations(acts)
    assert source.places == tuple(map(Place, names))
    lm = LanguageModel.load(tiny_model_path, device="cpu")
    for place, batch in source.read_all([3, 0]).items():
        (expected,) = lm.read(batch.tokens, [lm.hook(place.hook)])
        torch.testing.assert_close(batch.acts, expected.half().float(), rtol=2e-3, atol=1e-6)
        assert json.loads((acts / place.hook.replace(":", "-") / "activations.json").read_text())["model"]


def test_what_a_transcoder_needs(of_model, tmp_path, capsys):
    acts = tmp_path / "acts"
    code, _, err = csae("cache", "-o", acts, *of_model, "--from", "mlp.in:1", "--to", "mlp.out:1", capsys=capsys)
    assert code == 0, err
    pair = ShardActivations(acts).at(Place("mlp.in:1", "mlp.out:1"))
    assert pair.read([0]).target.shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out, --check: needed one of them"),
        (["-o", "x", "--check", "x"], "--out, --check: needed one of them"),
        (["--check", "nothing"], "activations 'nothing': no such folder"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = csae("cache", *options, capsys=capsys)
    assert code == 2
    assert not out
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "n_bytes"),
    [("20GB", 20 * 10**9), ("500 MiB", 500 * 2**20), ("1.5kb", 1500), ("4096", 4096), ("1e9", 10**9), ("2T", None)],
)
def test_sizes(given, n_bytes):
    if n_bytes is None:
        with pytest.raises(UserError, match="--max-bytes: given 2T; needed a number of bytes"):
            bytes_of(given)
    else:
        assert bytes_of(given) == n_bytes


@pytest.mark.parametrize("given", ["", "GB", "-1GB", "0", "nan", "inf", "1 GBB", "0.5"])
def test_no_sizes(given):
    with pytest.raises(UserError, match="needed a number of bytes"):
        bytes_of(given)


@pytest.fixture
def of_dataset(tiny_model_path, tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXT.split(". "))
    (tmp_path / "fox.jsonl").write_text(rows)
    data = ["--dataset", tmp_path / "fox.jsonl", "--n-ctx", "16", "--device", "cpu"]
    return ["cache", "--model", tiny_model_path, *data, "--layer", "2"]


def test_a_data_set_of_text_is_streamed(of_dataset, tmp_path, capsys, monkeypatch):
    acts = tmp_path / "acts"
    code, out, err = csae(*of_dataset, "-o", acts, "--max-tokens", "320", capsys=capsys)
    assert code == 0, err
    assert out.startswith("cached: 20 windows of 16 positions, 320 tokens, in ")
    assert {path.suffix for path in acts.iterdir()} == {".safetensors", ".json"}
    # More of the same data set begins with the same windows.
    code, out, err = csae(*of_dataset, "-o", acts, "--max-tokens", "640", "--append", capsys=capsys)
    assert code == 0, err
    assert 0 < int(out.splitlines()[0].removeprefix("added: ").split()[0]) <= 20  # some windows are alike
    assert csae(*of_dataset, "-o", tmp_path / "all", capsys=capsys)[0] == 0
    whole = ShardActivations(tmp_path / "all")
    assert whole.n_windows > 40
    assert torch.equal(ShardActivations(acts).tokens(range(20)), whole.tokens(range(20)))
    # Read whole, its documents are shuffled.
    assert csae(*of_dataset, "-o", tmp_path / "shuffled", "--no-stream", capsys=capsys)[0] == 0
    shuffled = ShardActivations(tmp_path / "shuffled")
    assert not torch.equal(shuffled.tokens(range(40)), whole.tokens(range(40)))


def test_a_stream_is_bounded_by_bytes(of_dataset, tmp_path, capsys):
    code, out, err = csae(*of_dataset, "-o", tmp_path / "a", "--max-bytes", "20kB", capsys=capsys)
    assert code == 0, err
    n_windows = int(out.removeprefix("cached: ").split()[0])
    assert f"--max-bytes 20,000: {n_windows} windows fit, " in err
    assert 10_000 < sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) <= 20_000
    code, _, err = csae(*of_dataset, "-o", tmp_path / "b", "--max-bytes", "200", capsys=capsys)
    assert code == 2
    assert "needed" in err.splitlines()[-1]
    assert not (tmp_path / "b" / ".text").exists()


def test_a_stream_that_was_cut_short_is_not_read_again(of_dataset, tmp_path, capsys, monkeypatch):
    from csae.data import cache, kept_text

    acts = tmp_path / "acts"
    with monkeypatch.context() as cut:
        cut.setattr(cache, "write_files", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert csae(*of_dataset, "-o", acts, capsys=capsys)[0] == 130
    assert [path.name for path in acts.iterdir()] == [".text"]
    monkeypatch.setattr(kept_text, "_make", None)
    code, _, err = csae(*of_dataset, "-o", acts, capsys=capsys)
    assert code == 0, err
    assert not (acts / ".text").exists()


def test_a_data_set_of_the_hub_needs_a_bound(of_dataset, tmp_path, capsys, monkeypatch):
    from csae.data import raw_text

    monkeypatch.setattr(raw_text, "is_text", lambda origin: True)
    of_hub = [part if "fox" not in str(part) else "some/name" for part in of_dataset]
    code, _, err = csae(*of_hub, "-o", tmp_path / "a", capsys=capsys)
    assert code == 2
    assert err.splitlines()[-1].startswith("csae: --max-tokens, --max-bytes: not given; needed one of them")
    code, _, err = csae(*of_dataset[:3], "--stream", "--layer", "2", "-o", tmp_path / "a", capsys=capsys)
    assert code == 2
    assert "--stream: given without --dataset" in err
