"""`csae push`."""

from __future__ import annotations

from pathlib import Path

import click

from csae.cli.no_effect import check_effect
from csae.errors import shown


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Only you and your organisation see it.")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", type=click.Path(path_type=Path), help="A new folder to write to; nothing is uploaded.")
def push(run: Path, repository: str, private: bool, message: str | None, dry_run: Path | None) -> None:
    """Upload a trained SAE to the Hugging Face hub, with a model card: figures, data, a snippet.

    The figures are those of eval.json: run `csae eval` first. A README.md that you wrote is kept.
    """
    from csae.push import push as push_run
    from csae.push import write_folder

    if dry_run is not None:
        check_effect(click.get_current_context(), ["private", "message"], "with --dry-run, which uploads nothing")
        names = write_folder(run, repository, dry_run)
        print(f"written: {shown(dry_run)} ({', '.join(names)}); nothing was uploaded")
        return
    print(f"pushed: {shown(push_run(run, repository, private, message))}")
