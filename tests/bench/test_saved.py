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
