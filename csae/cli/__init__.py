"""The command line: the program `csae`, a file a command.

Each command opens its inputs, calls one function of the library, and prints the result. An error that the user can
mend ends in one line and exit code 2.
"""

from __future__ import annotations

import sys

from csae.__main__ import main
from csae.errors import UserError
from csae.versions import DISTRIBUTION, check_name, pip_install

try:
    check_name()
    import click
    import rich  # noqa: F401
except UserError as error:
    sys.exit(f"csae: {error}")
except ImportError as error:  # the ops and modules don't need them
    sys.exit(f"csae: the command line needs {error.name}: {pip_install('cli')}")

import csae
from csae.cli.bench import bench
from csae.cli.cache import cache
from csae.cli.demo import demo
from csae.cli.evaluate import evaluate
from csae.cli.evidence import evidence
from csae.cli.export import export
from csae.cli.features import features
from csae.cli.hooks import hooks
from csae.cli.info import info
from csae.cli.push import push
from csae.cli.train import train
from csae.cli.view import view
from csae.distributed.telling import n_processes

__all__ = ["cli", "main"]

IN_SEVERAL_PROCESSES = ("train", "eval", "cache", "evidence", "info")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(csae.__version__, message=f"%(prog)s %(version)s ({DISTRIBUTION})")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train sparse autoencoders fast; and the contextual one, which encodes only what is new."""
    command, n = context.invoked_subcommand, n_processes()
    if n > 1 and command not in IN_SEVERAL_PROCESSES:
        raise UserError(f"csae {command}: runs in one process, and this is one of {n}: start it without torchrun")


for command in (demo, train, evaluate, features, view, cache, hooks, export, push, info, bench, evidence):
    cli.add_command(command)
