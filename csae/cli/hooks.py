"""`csae hooks`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from csae.cli.options import DEVICE, device_of

if TYPE_CHECKING:
    from csae.data.hook_points import HookPoint, HookPoints


@click.command()
@click.argument("model")
@click.argument("patterns", nargs=-1)
@DEVICE
def hooks(model: str, patterns: tuple[str, ...], device: str | None) -> None:
    """List the hook points of a language model, a line for those of all blocks; or each that the patterns stand for.

    Blocks are numbered from 0, as the model does: resid.out:11 is --layer 12.
    """
    from csae.data.sources import open_model
    from csae.progress import track

    lm = open_model(model, device_of(device), progress=track)
    found = [point for pattern in patterns for point in lm.hook_points.find(pattern)]
    points = list(dict.fromkeys(found)) or lm.hook_points.all()
    named = [point for point in points if point.name.partition(":")[2] or patterns]
    console = Console()
    console.print(_named(lm.hook_points, named, one_line=not patterns))
    console.print(f"resid.out:0 is --layer 1, resid.out:{lm.n_layers - 1} is --layer {lm.n_layers}.")
    if len(named) < len(points):
        console.print("\nOther modules, by path; with .in behind it, what a module is given:")
        console.print(_by_path([point for point in points if point not in named]))


def _named(hook_points: HookPoints, points: list[HookPoint], one_line: bool) -> Table:
    """The places that have a short form, all blocks in one line where that is wanted."""
    rows: dict[str, list[HookPoint]] = {}
    for point in points:
        rows.setdefault(_any_block(point.name, point) if one_line else point.name, []).append(point)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for header in ("hook point", "blocks", "width", "module", "in TransformerLens"):
        table.add_column(header, overflow="fold")
    for name, of_row in rows.items():
        blocks = [point.block for point in of_row if point.block is not None]
        # Where it has one in some blocks only, those are listed by a pattern.
        others = [hook_points.others_name(point) for point in of_row]
        path, other = of_row[0].path + ".in" * (of_row[0].side == "in"), others[0] if all(others) else None
        if one_line:
            path, other = _any_block(path, of_row[0]), other and _any_block(other, of_row[0])
        where = f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else "".join(map(str, blocks))
        table.add_row(name, where, _widths(of_row), path, other)
    return table


def _by_path(points: list[HookPoint]) -> Table:
    """Other modules, those of all blocks in one line: the widths of what they are given and give."""
    rows: dict[str, dict[str, list[HookPoint]]] = {}
    for point in points:
        sides = rows.setdefault(_any_block(point.path, point), {"in": [], "out": []})
        sides[point.side].append(point)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for header in ("module", "given", "gives"):
        table.add_column(header, overflow="fold")
    for path, of_side in rows.items():
        table.add_row(path, _widths(of_side["in"]), _widths(of_side["out"]))
    return table


def _widths(points: list[HookPoint]) -> str:
    return ", ".join(map(str, sorted({point.width for point in points})))


def _any_block(name: str, point: HookPoint) -> str:
    """A name with `*` in the place of the number of its block."""
    return name if point.block is None else re.sub(rf"(?<=[.:]){point.block}(?=$|\.)", "*", name, count=1)
