"""`csae cache`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from csae.cli.no_effect import check_effect
from csae.cli.options import (
    BOS,
    DATASET,
    DEVICE,
    KEEP_FIRST,
    LONG,
    MODEL,
    N_CTX,
    TEXT,
    device_of,
    origin_of,
    place_options,
)
from csae.errors import UserError, shown

if TYPE_CHECKING:
    from csae.distributed import Ranks

UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for kind, base in (("", 1000), ("i", 1024))
}


@click.command()
@click.option("--out", "-o", type=click.Path(path_type=Path), help="A new folder, or one where this was cut short.")
@MODEL
@place_options(several=True)
@TEXT
@DATASET
@N_CTX
@BOS
@KEEP_FIRST
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Read --dataset bit by bit, whatever its length; text is if not given, token ids are not.",
)
@click.option("--max-tokens", type=int, help="Use at most so many tokens of the text.")
@click.option("--max-bytes", help="Store as many windows as fit in so much, such as 20GB or 500MiB.")
@click.option(
    "--shuffle", type=click.IntRange(min=0), metavar="SEED", help="Store the windows in an order drawn by this seed."
)
@click.option("--append", is_flag=True, help="Add the windows that are not there yet to a folder that is.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True)
@DEVICE
@click.option("--check", type=click.Path(path_type=Path), help="Read a folder and compare its checksums; nothing else.")
def cache(**options: Any) -> None:
    """Write a language model's activations to a folder of shards, for --activations.

    Under torchrun, each process runs the model on windows of its own, and writes some of the files.
    """
    from csae.data.shards import check_shards
    from csae.distributed.telling import started
    from csae.progress import track

    out, check = options["out"], options["check"]
    if (out is None) == (check is None):
        raise UserError("--out, --check: needed one of them: a folder to write, or one to check")
    if check is not None:
        context = click.get_current_context()
        check_effect(context, set(options) - {"check"}, "with --check, which only reads a folder")
        found = check_shards(check, track)
        print(f"checked: {found.n_windows} windows in {found.n_files} files, {found.n_bytes / 1e9:.2f} GB, as written")
        if found.unknown:
            print(f"{len(found.unknown)} of them have no checksum, such as {shown(found.unknown[0])}: they can be read")
        return
    if options["hook_from"] and options["hook_to"] and not (options["hook"] or options["layer"]):
        options |= {"hook": (options.pop("hook_from"), options.pop("hook_to"))}  # both are stored
    with started(options, options["device"], LONG) as ranks:
        _write(out, options, ranks)


def _write(out: Path, options: dict[str, Any], ranks: Ranks | None) -> None:
    from csae.data.cache import write_cache
    from csae.data.kept_text import remove_kept
    from csae.data.raw_text import is_streamed
    from csae.data.sources import open_source
    from csae.data.streamed import open_streamed
    from csae.distributed.hosts import Hosts
    from csae.distributed.same_data import check_same_data
    from csae.progress import quiet, say, track

    hosts = Hosts(ranks)
    first = hosts.is_first
    device = device_of(options["device"]) if ranks is None else str(ranks.device)
    max_bytes = None if options["max_bytes"] is None else bytes_of(options["max_bytes"])
    progress = track if first else quiet
    origin, dtype = origin_of(options), getattr(torch, options["dtype"])
    streamed = is_streamed(origin, options["stream"])
    if streamed:
        source = open_streamed(origin, out, dtype, max_bytes, device, progress, ranks)
    else:
        source, _ = open_source(origin, device, progress)
    check_same_data(source, hosts)
    try:
        did = write_cache(
            source,
            out,
            dtype,
            progress,
            max_bytes=max_bytes,
            shuffle=options["shuffle"],
            append=options["append"],
            ranks=ranks,
            say=say,
        )
    except UserError:
        if streamed and first:
            remove_kept(out)
        raise
    if not first:
        return
    if streamed:
        remove_kept(out)
    if did.n_left:
        print(f"--max-bytes {options['max_bytes']}: no room for {did.n_left} of {did.n_left + did.n_added} windows")
    if options["append"]:
        print(f"added: {did.n_added} windows")
    tokens = did.n_windows * source.n_ctx
    print(f"cached: {did.n_windows} windows of {source.n_ctx} positions, {tokens:,} tokens, in {shown(out)}")


def bytes_of(size: str) -> int:
    """The number of bytes that a text such as "20GB", "1.5 GiB" or "4096" names."""
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-z]*)", size.strip().lower())
    n_bytes = int(float(found[1]) * units.get(found[2], 0)) if found else 0
    if not n_bytes:
        raise UserError(f"--max-bytes: given {shown(size)}; needed a number of bytes, such as 20GB or 500MiB")
    return n_bytes
