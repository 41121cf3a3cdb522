"""`csae train`: several SAEs, config files, runs that begin with another's weights, the dtype of the model."""

import json

import pytest
import torch
import yaml
from test_cli import PLAIN, SMALL, csae, from_model, text  # noqa: F401

from csae.checkpoint import load_sae
from csae.data import dtypes
from csae.data.dtypes import multiplies_bfloat16, resolved_dtype
from csae.data.language_model import LanguageModel
from csae.evaluate_run import evaluate_run
from csae.run import read_run

SHORT = ["--tokens", "640", "--log-every", "4", "--lm-dtype", "float32"]
LITTLE, LITTLE_TOPK = [*SMALL, *SHORT], [*PLAIN, *SHORT, "--arch", "topk"]


def weights(run):
    return load_sae(run).state_dict()


def test_several_saes_from_one_pass_are_those_that_are_trained_alone(from_model, tmp_path, capsys):  # noqa: F811
    command = ["train", *from_model, *LITTLE, "--hook", "mlp.out:1"]
    code, _, err = csae(*command, "-o", tmp_path / "all", "--k", "2", "--arch", "topk", "--arch", "contextual",
                          capsys=capsys)  # fmt: skip
    assert code == 0, err
    assert "training 8 SAEs on 640 tokens: 10 steps of 4 windows of 16; to read the activations takes about" in err
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {
        f"{place}-{arch}-k{k}" for place in ("resid.out-1", "mlp.out-1") for arch in ("topk", "contextual")
        for k in (4, 2)
    }  # fmt: skip
    alone = ["train", *from_model[:2], *from_model[4:], *LITTLE, "--hook", "mlp.out:1", "--arch", "contextual"]
    assert csae(*alone, "-o", tmp_path / "alone", capsys=capsys)[0] == 0
    run = tmp_path / "all" / "mlp.out-1-contextual-k4"
    for name, tensor in weights(tmp_path / "alone").items():
        assert torch.equal(tensor, weights(run)[name]), name
    for file in ("run.json", "config.json", "windows.bin"):
        assert (run / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file

    # A run is repeated by its config.yaml.
    assert csae("train", "--config", run / "config.yaml", "-o", tmp_path / "again", capsys=capsys)[0] == 0
    for name, tensor in weights(tmp_path / "again").items():
        assert torch.equal(tensor, weights(run)[name]), name
    assert (tmp_path / "again" / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert (tmp_path / "again" / "run.json").read_bytes() == (run / "run.json").read_bytes()

    code, _, err = csae("eval", run, tmp_path / "again", "--device", "cpu", "--ce-windows", "1", capsys=capsys)
    assert code == 0, err

    code, _, err = csae(*command, "-o", tmp_path / "alone", "--k", "2", capsys=capsys)
    assert code == 2
    assert "holds one run; needed a folder for the runs of 4 SAEs" in err


def test_several_learning_rates_and_a_toml_file(from_model, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "many.toml"
    file.write_text('arch = "topk"\nlr = [0.001, 0.002]\nd-sae = 24\nk = 3\n')
    code, _, err = csae(
        "train", *from_model, "--config", file, "-o", tmp_path / "all", "--tokens", "320", "--batch-windows", "4",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    runs = sorted((tmp_path / "all").iterdir())
    assert [run.name for run in runs] == ["resid.out-1-topk-k3-lr0.001", "resid.out-1-topk-k3-lr0.002"]
    assert [json.loads((run / "run.json").read_text())["train"]["lr"] for run in runs] == [0.001, 0.002]
    assert yaml.safe_load((runs[1] / "config.yaml").read_text())["lr"] == 0.002
    assert load_sae(runs[0]).d_sae == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kk: 3\n", "kk: no option of csae train; needed some of"),
        ("- 1\n", "needed options and their values"),
        ("k: [\n", "not YAML"),
        ("k: many\n", "'many' is not a valid integer"),
        ("seed: [1, 2]\n", "seed: given [1, 2]; needed one value"),
        ("k: {a: 1}\n", "k: given {'a': 1}; needed one value or more"),
        ("k: [[4]]\n", "k: given [4]; needed one value or more"),
        ("k: []\n", "k: given []; needed one value or more"),
        ("k: [4, null]\n", "k: given [4, None]; needed one value or more"),
        ("from: [a]\n", "from: given ['a']; needed one value"),
        ("k: [4, 3.5]\n", "k: given 3.5; needed a whole number"),
        ("tokens: true\n", "tokens: given True; needed a whole number"),
        ("lr: true\n", "lr: given True; needed a number"),
        ("k: 4\nseed: 1\nk: 3\n", "not YAML (k is given twice)"),
        ("n_ctx: 4\nn-ctx: 3\n", "an option is given both with - and with _"),
        ("out: here\n", "out: no option of csae train"),
        ("prefixes: [4, 8.5]\n", "given [4, 8.5]; needed whole numbers with commas between them"),
    ],
)
def test_a_config_file_that_cannot_be_followed_is_one_line(content, message, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    code, _, err = csae("train", "--config", file, "-o", tmp_path / "run", capsys=capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_place_of_the_command_line_takes_the_place_of_that_in_a_file(from_model, tmp_path, capsys):  # noqa: F811
    assert csae("train", *from_model, *LITTLE, "-o", tmp_path / "first", capsys=capsys)[0] == 0
    file = tmp_path / "first" / "config.yaml"
    for number, place in enumerate([["--hook", "mlp.out:0"], ["--from", "mlp.in:0", "--to", "mlp.out:0"]]):
        run = tmp_path / str(number)
        code, _, err = csae("train", "--config", file, *place, "-o", run, capsys=capsys)
        assert code == 0, err
        assert [read_run(run)["origin"].get(name) for name in ("layer", "hook")] == [None, place[1]]


def test_a_run_on_one_of_several_saved_hook_points_is_repeated_alone(from_model, tmp_path, capsys):  # noqa: F811
    saved = ["cache", *from_model, "--hook", "mlp.out:1", "-o", tmp_path / "acts"]
    assert csae(*saved, capsys=capsys)[0] == 0
    settings = ["--activations", tmp_path / "acts", *PLAIN, "--arch", "topk", "--tokens", "640", "--device", "cpu"]
    code, _, err = csae("train", *settings, "-o", tmp_path / "both", capsys=capsys)
    assert code == 0, err
    (run,) = (tmp_path / "both").glob("mlp.out-1-*")
    code, _, err = csae("train", "--config", run / "config.yaml", "-o", tmp_path / "again", capsys=capsys)
    assert code == 0, err
    assert "training one SAE" in err
    for name, tensor in weights(tmp_path / "again").items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_prefixes_by_option_and_by_file(from_model, tmp_path, capsys):  # noqa: F811
    first = ["train", *from_model, *LITTLE_TOPK, "--prefixes", "2,8", "-o", tmp_path / "first"]
    assert csae(*first, capsys=capsys)[0] == 0
    assert load_sae(tmp_path / "first").prefixes == (2, 8)
    file = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(file.read_text())["prefixes"] == [2, 8]
    code, _, err = csae("train", "--config", file, "-o", tmp_path / "again", capsys=capsys)
    assert code == 0, err
    one, other = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert torch.equal(one["W_enc"], other["W_enc"])
    begun = ["train", *from_model, "--batch-windows", "4", "--tokens", "64", "--init", tmp_path / "first"]
    assert csae(*begun, "--prefixes", "2,8", "-o", tmp_path / "begun", capsys=capsys)[0] == 0
    code, _, err = csae(*begun, "--prefixes", "2", "-o", tmp_path / "no", capsys=capsys)
    assert "--prefixes: given 2; the SAE of --init has 2,8: leave" in err
    code, _, err = csae(*first[:-4], "--prefixes", "8,2", "-o", tmp_path / "no", capsys=capsys)
    assert (code, "prefixes: given 8, 2; needed ascending numbers" in err) == (2, True)


def test_a_run_begins_with_the_weights_of_another(from_model, tmp_path, capsys):  # noqa: F811
    first = ["train", *from_model, *LITTLE_TOPK, "-o", tmp_path / "first"]
    assert csae(*first, capsys=capsys)[0] == 0
    more = ["train", *from_model, "--batch-windows", "4", "--tokens", "64", "--init", tmp_path / "first"]
    code, _, err = csae(*more, "--lr", "1e-9", "-o", tmp_path / "second", capsys=capsys)
    assert code == 0, err
    one, other = weights(tmp_path / "first"), weights(tmp_path / "second")
    torch.testing.assert_close(one["W_enc"], other["W_enc"], rtol=1e-4, atol=1e-6)
    assert json.loads((tmp_path / "second" / "run.json").read_text())["init"]["name"] == "first"
    assert load_sae(tmp_path / "second").k == 4
    code, _, err = csae(*more, "--k", "8", "-o", tmp_path / "third", capsys=capsys)
    assert code == 2
    assert "--k: given 8; the SAE of --init has 4" in err
    code, _, err = csae(*more, "--arch", "contextual", "-o", tmp_path / "third", capsys=capsys)
    assert "--arch: given contextual; the SAE of --init has topk" in err
    assert not (tmp_path / "third").exists()


def test_what_differs_is_named_by_its_option_and_more_tokens_extend(from_model, tmp_path, capsys):  # noqa: F811
    command = ["train", *from_model, *LITTLE, "-o", tmp_path / "run"]
    assert csae(*command, capsys=capsys)[0] == 0
    for changed, message in (
        (["--k", "2"], "--k: given 2, the run has 4"),
        (["--heads", "1"], "--heads: given 1, the run has 2"),
        (["--layer", "1"], None),
        (["--tokens", "320"], "--tokens: given 5 steps (320 tokens), the run has 10 steps (640 tokens)"),
        (["--held-out", "0.3"], "--held-out: given 0.3, the run has 0.02"),
    ):
        if message:
            code, _, err = (
                csae(*command, *changed, capsys=capsys)
                if changed[0] != "--k"
                else csae(
                    *[arg if arg != "4" or command[at - 1] != "--k" else "2" for at, arg in enumerate(command)],
                    capsys=capsys,
                )
            )
            assert code == 2
            assert message in err
    code, _, err = csae(*command, "--tokens", "960", capsys=capsys)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["start"] == 10


def test_the_dtype_of_the_model_is_kept_and_evaluated_with(from_model, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: {"avx512_bf16"})
    command = ["train", *from_model, *PLAIN, "--tokens", "320", "--arch", "topk", "-o", tmp_path / "run"]
    assert csae(*command, capsys=capsys)[0] == 0
    job = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (job["origin"]["lm_dtype"], job["data"]["dtype"]) == ("bfloat16", "bfloat16")
    opened = {}
    evaluate_run(tmp_path / "run", load_sae(tmp_path / "run"), ce_windows=1, device="cpu", opened=opened)
    assert any(key.startswith("model ") and key.endswith("bfloat16") for key in opened)
    # On another machine the run goes on as it was.
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: set())
    assert csae(*command, capsys=capsys)[0] == 0
    code, _, err = csae(*command, "--lm-dtype", "float32", capsys=capsys)
    assert code == 2
    assert "--lm-dtype: given float32, the run has bfloat16" in err


def test_auto_is_bfloat16_where_the_hardware_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for flags, expected in (
        ({"avx512_bf16"}, True),
        ({"amx_bf16", "avx2"}, True),
        ({"avx512f"}, False),
        (set(), False),
    ):
        monkeypatch.setattr(dtypes, "cpu_flags", lambda flags=flags: flags)
        assert multiplies_bfloat16(cpu) == expected
        assert resolved_dtype("auto", cpu) == ("bfloat16" if expected else "float32")
    assert resolved_dtype("float16", cpu) == "float16"


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_a_transcoder_is_trained_and_repeated(arch, from_model, tmp_path, capsys):  # noqa: F811
    data = [
        *from_model[:2],
        *from_model[4:],
        *(LITTLE if arch == "contextual" else LITTLE_TOPK),
        "--arch",
        arch,
        "--skip",
    ]
    command = ["train", *data, "--from", "mlp.in:1", "--to", "mlp.out:1", "-o", tmp_path / "run"]
    code, _, err = csae(*command, capsys=capsys)
    assert code == 0, err
    job = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (job["origin"]["hook"], job["origin"]["hook_to"]) == ("mlp.in:1", "mlp.out:1")
    code, _, err = csae("train", "--config", tmp_path / "run" / "config.yaml", "-o", tmp_path / "again", capsys=capsys)
    assert code == 0, err
    assert all(torch.equal(one, weights(tmp_path / "again")[name]) for name, one in weights(tmp_path / "run").items())
    code, _, err = csae("eval", tmp_path / "run", "--device", "cpu", "--ce-windows", "1", capsys=capsys)
    assert code == 0, err


def test_selections_train_side_by_side_and_by_a_config_file(from_model, tmp_path, capsys):  # noqa: F811
    command = ["train", *from_model, *LITTLE_TOPK, "--selection", "topk", "--selection", "batch"]
    code, _, err = csae(*command, "--k-max", "6", "-o", tmp_path / "all", capsys=capsys)
    assert code == 0, err
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "resid.out-1-topk-k4-topk",
        "resid.out-1-topk-k4-batch",
    }
    run = tmp_path / "all" / "resid.out-1-topk-k4-batch"
    sae = load_sae(run)
    assert (sae.selection, sae.k_max) == ("batch", 6)
    assert sae.threshold > 0
    assert "| selection | batch |" in (run / "README.md").read_text()
    assert csae("train", "--config", run / "config.yaml", "-o", tmp_path / "again", capsys=capsys)[0] == 0
    for name, tensor in weights(tmp_path / "again").items():
        assert torch.equal(tensor, weights(run)[name]), name
    code, _, err = csae(*command[:-4], "--selection", "topk", "--k-max", "6", "-o", tmp_path / "b", capsys=capsys)
    assert code == 2
    assert "k_max: given 6; needed None" in err
    given = ["train", *from_model, *LITTLE_TOPK, "--init", run]
    code, _, err = csae(*given, "--selection", "topk", "-o", tmp_path / "c", capsys=capsys)
    assert code == 2
    assert "--selection: given topk; the SAE of --init has batch" in err


def test_the_default_is_a_budget_that_the_batch_shares(from_model, tmp_path, capsys):  # noqa: F811
    assert csae("train", *from_model, *LITTLE_TOPK, "-o", tmp_path / "run", capsys=capsys)[0] == 0
    sae = load_sae(tmp_path / "run")
    assert (sae.selection, sae.k, sae.k_max) == ("batch", 4, 16)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["selection"] == "batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "past"], "--query: given with --arch topk, which does not look back: it has no effect there"),
        (["--heads", "8"], "--heads: given with --arch topk"),
        (["--sweeps", "3"], "--sweeps: given with --arch topk"),
        (["--look-back-lr", "0.5"], "--look-back-lr: given with --arch topk"),
        (["--gap-every", "9"], "--gap-every: given with --arch topk"),
        (["--workers", "2"], "--workers: given without a data set that is streamed"),
        (["--shuffle-buffer", "2"], "--shuffle-buffer: given without a data set that is streamed"),
        (["--k", "5000"], "k: given 5000; needed 1 <= k <= d_sae = 40"),
        (["--prefixes", "8,99"], "prefixes: given"),
        (["--selection", "topk", "--k-max", "9"], "k_max: given 9; needed None"),
        (["--skip"], "skip: given for an SAE that rebuilds what it reads"),
        (["--lr", "-1"], "lr: given -1.0"),
        (["--text", "no/such.txt"], "no/such.txt': no such file or folder"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(
    options, message, from_model, tmp_path, capsys, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(LanguageModel, "load", None)
    code, _, err = csae("train", *from_model, *LITTLE_TOPK, *options, "-o", tmp_path / "run", capsys=capsys)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_file_with_what_has_no_effect_is_followed_and_told(from_model, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "old.yaml"  # as earlier versions wrote it of a run
    file.write_text("arch: topk\nheads: 8\nquery: [past]\nworkers: 1\nshuffle_buffer: 1024\n")
    command = ["train", *from_model, *PLAIN, *SHORT, "--config", file, "-o", tmp_path / "run"]
    code, _, err = csae(*command, capsys=capsys)
    assert code == 0, err
    assert err.count("no effect") == 1
    assert f"{file}: query: given with --arch topk, which does not look back: it has no effect there" in err
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert not {"heads", "query", "sweeps", "gap_every", "workers", "shuffle_buffer"} & set(kept)
    assert csae("train", "--config", tmp_path / "run" / "config.yaml", "-o", tmp_path / "b", capsys=capsys)[0] == 0


def test_a_data_set_that_is_not_there_is_said_before_a_model_is_loaded(
    from_model, tmp_path, capsys, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(LanguageModel, "load", None)
    dataset = tmp_path / "a.jsonl"
    dataset.write_text('{"body": "some text"}\n')
    for command in ("train", "cache"):
        for more in (["--stream", "--tokens", "64"][: 3 if command == "train" else 1], ["--no-stream"]):
            given = [*from_model[:4], "--dataset", dataset, *more, "-o", tmp_path / "out"]
            code, _, err = csae(command, *given, capsys=capsys)
            assert (code, len(err.splitlines())) == (2, 1), err
            assert "has no column text" in err


def test_what_changed_of_the_data_is_said_in_words(from_model, tmp_path, capsys):  # noqa: F811
    command = ["train", *from_model, *LITTLE, "-o", tmp_path / "run"]
    assert csae(*command, capsys=capsys)[0] == 0
    path = from_model[from_model.index("--text") + 1]
    content = path.read_text()
    path.write_text(content.replace("a", "e", 1))
    code, _, err = csae(*command, capsys=capsys)
    path.write_text(content)
    assert code == 2
    assert "data: the text has other tokens: it was changed since" in err
    assert "sha256" not in err
