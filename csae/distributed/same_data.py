"""Whether ranks read the same: on several machines a folder of one name may hold other files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csae.distributed.hosts import Hosts
from csae.errors import UserError, shown
from csae.files import reading

ENDS = 4096  # bytes of a file that are compared, from its start and from its end, or numbers of a parameter


def check_same_data(source: Any, hosts: Hosts) -> None:
    """Compare what ranks have of a source of activations. All ranks call it, and it takes little time.

    Of saved activations: the names and sizes of their files, and both ends of each. Of a language model: the shape of
    each parameter, and both ends. Raises UserError, the same one on all ranks, where a rank has others than rank 0.
    """
    if hosts.alone:
        return
    model = getattr(getattr(source, "lm", None), "model", None)
    folder = getattr(source, "folder", None)
    if isinstance(model, nn.Module):
        what, found = shown(source.lm.name), hosts.all(lambda: of_model(model))
    elif folder is not None:
        what, found = shown(folder), hosts.all(lambda: of_folder(Path(folder)))
    else:
        return
    for rank, own in enumerate(found):
        if own != found[0]:
            raise UserError(
                f"{what}: rank {rank} has other numbers there than rank 0; needed the same files on all machines: "
                "copy them again, or give a folder that all see"
            )


def of_folder(folder: Path) -> str:
    """A fingerprint of the safetensors files in a folder and below."""
    digest = hashlib.sha256()
    with reading(folder):
        for file in sorted(folder.rglob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode())
            with open(file, "rb") as opened:
                digest.update(opened.read(ENDS))
                opened.seek(max(0, size - ENDS))
                digest.update(opened.read(ENDS))
    return digest.hexdigest()


@torch.no_grad()
def of_model(model: nn.Module) -> str:
    """A fingerprint of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} ".encode())
        for end in (flat[:ENDS], flat[-ENDS:]):
            digest.update(_bytes(end))
    return digest.hexdigest()


def _bytes(numbers: Tensor) -> bytes:
    return numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes() if numbers.numel() else b""
