"""What is pushed to the hub: the files, the model card and its snippet; and what the hub is asked, by a fake."""

from __future__ import annotations

import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from runs_of_a_model import ARCHS
from runs_of_a_model import csae as command

from csae import TopKSAE
from csae import push as push_module
from csae.checkpoint import load_sae
from csae.errors import UserError
from csae.model_card import snippet
from csae.push import push, write_folder


class Hub:
    """In place of HfApi; its calls are checked with the real signatures."""

    def __init__(self, private=None, error=None):
        self.private, self.error, self.asked, self.files = private, error, [], {}

    def _ask(self, call, *args, **given):
        inspect.signature(getattr(HfApi, call)).bind(self, *args, **given)
        if self.error is not None:
            raise self.error
        self.asked.append((call, given))

    def create_repo(self, repo_id, **given):
        self._ask("create_repo", repo_id, **given)
        self.private = bool(given["private"]) if self.private is None else self.private

    def repo_info(self, repo_id, **given):
        self._ask("repo_info", repo_id, **given)
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **given):
        self._ask("upload_folder", **given)
        self.files = {file.name: file.read_text(errors="replace") for file in given["folder_path"].iterdir()}
        return SimpleNamespace(commit_url="https://huggingface.co/org/name/commit/1")


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(push_module, "HfApi", lambda: found)
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_files_and_card(runs, arch, tmp_path):
    names = write_folder(runs[arch], "org/name", tmp_path / "out")
    assert names == ["README.md", "config.json", "eval.json", "model.safetensors"]
    one, other = load_sae(runs[arch]), load_sae(tmp_path / "out")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    text = (tmp_path / "out" / "README.md").read_text()
    figures = json.loads((runs[arch] / "eval.json").read_text())
    job = json.loads((runs[arch] / "run.json").read_text())
    assert f"{figures['fvu']:.4f}" in text
    assert f"{figures['loss_recovered']:.1%}" in text
    assert "held-out windows of text.txt" in text
    assert f"| tokens trained on | {job['train']['steps'] * 4 * 32:,} |" in text
    assert f"| lr | {job['train']['lr']} |" in text
    assert "load_sae('org/name'" in text
    for file in names:  # nothing says where on this machine it was
        assert str(runs[arch].parent) not in (tmp_path / "out" / file).read_text(errors="replace")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_snippet_of_the_card_runs(runs, arch, tmp_path, tiny_model_path, capsys):
    write_folder(runs[arch], "org/name", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert tiny_model_path.name in code
    code = code.replace("'org/name'", repr(str(tmp_path / "out")))
    code = code.replace(repr(tiny_model_path.name), repr(str(tiny_model_path)))  # on the hub it is the model's id
    capsys.readouterr()
    exec(compile(code, "snippet", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert not lines[0].startswith("'The'")  # position 0 takes no part
    assert all(1 <= line.split("[")[1].count(",") + 1 <= 4 for line in lines)


def test_a_snippet_without_a_model_runs(tmp_path):
    sae = TopKSAE(6, 12, 2)
    sae.save_pretrained(tmp_path)
    exec(compile(snippet(sae, str(tmp_path)), "snippet", "exec"), {})


def test_a_saved_sae_without_a_run(tmp_path):
    TopKSAE(6, 12, 2).save_pretrained(tmp_path / "sae")
    assert write_folder(tmp_path / "sae", "org/name", tmp_path / "out") == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "It is not known what it was trained on." in text
    assert "## Figures" not in text


def test_a_card_that_a_person_wrote_is_kept(runs, tmp_path):
    shutil.copytree(runs["topk"], tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("# Mine\n")
    write_folder(tmp_path / "run", "org/name", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


def test_push(runs, hub):
    assert push(runs["topk"], "org/name", message="first") == "https://huggingface.co/org/name/commit/1"
    assert [call for call, _ in hub.asked] == ["create_repo", "upload_folder"]
    assert hub.asked[0][1] == {"private": None, "exist_ok": True}
    assert hub.asked[1][1]["commit_message"] == "first"
    assert sorted(hub.files) == ["README.md", "config.json", "eval.json", "model.safetensors"]
    assert "load_sae('org/name'" in hub.files["README.md"]


def test_private(runs, hub):
    push(runs["topk"], "org/name", private=True)
    assert hub.asked[0][1]["private"] is True
    assert hub.files


def test_private_is_refused_where_the_repository_is_public(runs, hub):
    hub.private = False
    with pytest.raises(UserError, match="--private: org/name is there and public"):
        push(runs["topk"], "org/name", private=True)
    assert not hub.files


def test_what_the_hub_says_is_one_line(runs, hub):
    hub.error = RuntimeError("401 Client Error\nmore")
    with pytest.raises(UserError, match=r"org/name: the hub did not take it \(401 Client Error\): log in"):
        push(runs["topk"], "org/name")


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", "org/--x", ""])
def test_other_names(runs, name, tmp_path):
    with pytest.raises(UserError, match="no name of a repository"):
        write_folder(runs["topk"], name, tmp_path / "out")


def test_what_is_no_trained_sae(runs, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_folder(tmp_path / "nowhere", "org/name", tmp_path / "out")
    (tmp_path / "begun").mkdir()
    shutil.copy(runs["topk"] / "run.json", tmp_path / "begun")
    with pytest.raises(UserError, match="train it to the end first"):
        write_folder(tmp_path / "begun", "org/name", tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        write_folder(runs["topk"], "org/name", runs["topk"])


def test_command(runs, hub, tmp_path, capsys):
    command("push", runs["topk"], "org/name", "--dry-run", tmp_path / "out")
    assert "nothing was uploaded" in capsys.readouterr().out
    assert not hub.asked
    assert (tmp_path / "out" / "model.safetensors").is_file()
    command("push", runs["topk"], "org/name", "--private")
    assert "commit/1" in capsys.readouterr().out
