import torch
from safetensors.torch import save_file

from csae.bench import saved


def test_what_saved_activations_cost(tiny_model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(saved, "python_prose", lambda: ["some words, and some more of them. " * 100])
    given = ["--model", str(tiny_model_path), "--layer", "2", "--n-ctx", "16", "--windows", "20", "--read-gb", "0.0001"]
    saved.main(["--out", str(tmp_path / "acts"), *given, "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all("us a token" in line for line in lines[1:4])
    assert all(line.endswith(" GB/s") for line in lines[4:])
    assert not list(tmp_path.iterdir())


def test_reading_of_a_folder_that_is_there(tmp_path, capsys):
    acts = torch.randn(16, 4, 8)
    save_file({"activations": acts}, tmp_path / "acts.safetensors")
    saved.main(["--read", str(tmp_path), "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "from beginning to end, from the disk",
        "from beginning to end, from memory",
        "windows as in training, from the disk",
        "windows as in training, from memory",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["acts.safetensors"]
