"""A trained SAE to the Hugging Face hub: weights, config, figures and a model card, in a repository of its own.

What is uploaded names no folder of this machine: run.json and the metrics stay here.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from csae.checkpoint import load_sae
from csae.errors import UserError, first_line
from csae.evaluate import EVAL
from csae.files import filled, read_json, write_file, writing
from csae.model_card import model_card
from csae.parts import INDEX, WEIGHTS
from csae.run import read_run
from csae.saving import CARD, CONFIG, is_our_card


def write_folder(run: Path | str, repo_id: str, folder: Path | str) -> list[str]:
    """Writes what `push` uploads to a folder, which is new or empty; gives the names of its files.

    run: the folder of a run that is done, or of a saved SAE. A model card that a person wrote there is kept; else the
    card has the figures of eval.json, the data, how it was trained, and a snippet. Raises UserError where the run is
    not done or damaged, or the folder holds something.
    """
    run, folder = Path(run), Path(folder)
    _check_repo_id(repo_id)
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; needed that of a run or of a saved SAE")
    if not (run / CONFIG).is_file() or not any((run / weights).is_file() for weights in (WEIGHTS, INDEX)):
        raise UserError(f"{run}: no trained SAE here ({CONFIG} and {WEIGHTS} are needed): train it to the end first")
    with filled(folder) as working:
        sae, job = load_sae(run), read_run(run)
        figures = read_json(run / EVAL) if (run / EVAL).is_file() else {}
        sae.save_pretrained(working)
        if figures:
            with writing(working / EVAL):
                shutil.copyfile(run / EVAL, working / EVAL)
        by_hand = (run / CARD).is_file() and not is_our_card(run / CARD)
        text = (run / CARD).read_text(encoding="utf-8") if by_hand else model_card(sae, repo_id, job, figures)
        write_file(working / CARD, lambda path: path.write_text(text, encoding="utf-8"))
    return sorted(file.name for file in folder.iterdir())


def push(run: Path | str, repo_id: str, private: bool = False, message: str | None = None) -> str:
    """Uploads a trained SAE to the hub; gives the address of the commit. The repository is made where it is not there.

    Raises UserError as `write_folder`, where the hub does not take it, and where `private` is asked for and the
    repository is there and public.
    """
    _check_repo_id(repo_id)
    api = HfApi()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "sae"
        write_folder(run, repo_id, folder)
        try:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            is_public = private and not api.repo_info(repo_id).private
            if not is_public:
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=message or "An SAE of csae"
                )
        except Exception as error:  # of the hub, of the network, of whichever library makes the requests
            raise UserError(
                f"{repo_id}: the hub did not take it ({first_line(error)}): log in with `hf auth login`, with a token "
                "that may write there"
            ) from error
    if is_public:
        raise UserError(f"--private: {repo_id} is there and public: make it private on the hub, or give another name")
    return str(getattr(commit, "commit_url", commit))


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise UserError(f"{repo_id}: no name of a repository ({first_line(error)}): needed ORG/NAME") from error
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id}: no name of a repository: needed ORG/NAME")
