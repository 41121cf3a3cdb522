"""`csae info`."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text


@click.command()
def info() -> None:
    """Show versions, devices, and which kernels each op runs on, or why not."""
    from csae.info import facts

    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for fact in facts():
        table.add_row(*map(Text, (fact.name, fact.value, fact.note)))  # plain text, not markup
    Console().print(table)
