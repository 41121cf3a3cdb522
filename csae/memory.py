"""Whether what training holds fits in memory, asked before anything is made.

Linux grants memory that it does not have, and then kills the process without a word. So the need is compared with
what is available. Both are taken on the generous side: what passes may still not fit, what is refused can't.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from csae.adam import TABLES
from csae.config import TrainConfig
from csae.errors import UserError

if TYPE_CHECKING:
    from csae.distributed.ranks import Ranks
    from csae.sae import SAE

MEMINFO, CGROUPS, OWN_CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60  # cgroup v1 says a number near 2^63 where there is no limit
ACTIVATIONS = 3  # at least: a step's, their reconstruction, and its gradient

Asked = dict[tuple[str, str], tuple[int, int | None]]
"""what is needed and what is there, at each place"""


class Need(NamedTuple):
    """What training one SAE holds at the same time, in bytes."""

    weights: int
    moments: int
    step: int
    """activations and gradients of a step"""

    @classmethod
    def of(cls, make: Callable[[], SAE], config: TrainConfig, n_ctx: int, ranks: Ranks | None = None) -> Need:
        """make: gives the whole SAE; it is called without memory for it. ranks: each holds the rows of its features."""
        with torch.device("meta"):
            sae = make()
        share = 1.0 if ranks is None else len(ranks.rows(sae.d_sae)) / sae.d_sae
        weights = moments = gradients = 0
        moment = getattr(torch, config.moments).itemsize
        for name, tensor in sae.state_dict().items():
            size = tensor.nbytes
            weights += int(size * share) if name in (*TABLES, "tokens_since_fired") else size
        for name, parameter in sae.named_parameters():
            numbers = parameter.numel()
            moments += 2 * (int(numbers * share) * moment if name in TABLES else 4 * numbers)
            gradients += 0 if name in TABLES else 4 * numbers
        tokens = config.batch_windows * n_ctx
        # A table's gradient is two numbers for each pair of a token and an active feature, and its feature's number.
        step = tokens * (ACTIVATIONS * 4 * max(sae.d_in, sae.d_out) + sae.k_max * (2 * 4 + 8))
        return cls(weights, moments, gradients + step)


def check_memory(needs: Sequence[Need], device: str | torch.device, moments: str, ranks: Ranks | None = None) -> None:
    """Raises UserError where these SAEs can't be trained in the memory that is available.

    needs: of each SAE; under `ranks` of this rank's share, and all ranks have to call it. The ranks on one machine
    share its memory. device: where they train; they are made on the CPU, one at a time, and moved there.
    """
    device, cpu = torch.device(device), torch.device("cpu")
    step = max((need.step for need in needs), default=0)  # one after another
    weights, moment_bytes = (sum(getattr(need, name) for need in needs) for name in ("weights", "moments"))
    asked = {_place(device): (weights + moment_bytes + step, available(device))}
    if device.type != "cpu":
        asked[_place(cpu)] = max((need.weights for need in needs), default=0), available(cpu)
    for place, n_ranks, needed, there in _on_each_place(asked, ranks):
        if there is None or needed <= there:
            continue
        host, kind = place
        parts = f"{_gb(weights)} of weights, {_gb(moment_bytes)} of moments, {_gb(step)} for a step"
        parts = "the weights, before they are moved" if kind != _place(device)[1] else parts
        of = f" {len(needs)} SAEs" if len(needs) > 1 else ""
        where = kind if ranks is None else f"{kind} of {host}, for {n_ranks} ranks"
        less = "a smaller --d-sae, " + ("--moments bfloat16, " if moments == "float32" else "")
        raise UserError(
            f"--d-sae: to train{of} needs {_gb(needed)} of memory on {where} ({parts}{', a rank' if ranks else ''}), "
            f"and {_gb(there)} are available: needed {less}or more {'machines' if ranks else 'ranks (torchrun)'}"
        )


def check_loads(run: str | Path, device: str | torch.device, ranks: Ranks | None = None) -> None:
    """Raises UserError where a saved SAE can't be loaded whole in the memory that is available, by each of the ranks.

    Of a folder that holds no saved SAE, or is none, nothing is said. All ranks have to call it.
    """
    folder = Path(run)
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    device = torch.device(device)
    asked = {_place(device): (sum(file.stat().st_size for file in files), available(device))}
    for (host, kind), n_ranks, needed, there in _on_each_place(asked, ranks):
        if there is not None and needed > there:
            by, fewer = ("", "") if ranks is None else (f" of {host}, by {n_ranks} ranks", "fewer ranks, or ")
            raise UserError(
                f"{folder}: to load it takes {_gb(needed)} of memory on {kind}{by}, and {_gb(there)} are available: "
                f"needed {fewer}a device or a machine with more"
            )


def available(device: torch.device) -> int | None:
    """The bytes that can still be had on a device; None where that can't be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_of_machine(), *_of_cgroups()) if limit is not None]
    return min(limits, default=None)


def _place(device: torch.device) -> tuple[str, str]:
    """What ranks may share: a machine, and its memory or a device in it."""
    if device.type != "cuda":
        return socket.gethostname(), device.type
    return socket.gethostname(), f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def _on_each_place(asked: Asked, ranks: Ranks | None) -> list[tuple[tuple[str, str], int, int, int | None]]:
    """Each place, how many ranks use it, what all of them need, and what is there."""
    found: list[Asked] = [asked]
    if ranks is not None:
        # It also waits: no rank may take memory before all have seen what is there.
        found = [{}] * ranks.size
        torch.distributed.all_gather_object(found, asked)
    together = []
    for place in dict.fromkeys(place for of_rank in found for place in of_rank):
        at = [of_rank[place] for of_rank in found if place in of_rank]
        known = [there for _, there in at if there is not None]
        least = min(known) if len(known) == len(at) else None
        together.append((place, len(at), sum(needed for needed, _ in at), least))
    return together


def _of_machine() -> int | None:
    """Memory that the system can give without taking it from other programs, and free swap."""
    found = _meminfo()
    return found["MemAvailable"] + found.get("SwapFree", 0) if "MemAvailable" in found else None


def _meminfo() -> dict[str, int]:
    """What Linux says of the machine's memory, in bytes; empty elsewhere."""
    try:
        lines = (line.partition(":") for line in MEMINFO.read_text().splitlines())
        return {name: 1024 * int(rest.split()[0]) for name, _, rest in lines}
    except (OSError, ValueError, IndexError):
        return {}


def _of_cgroups() -> list[int]:
    """What is left of each limit on the control groups that this process is in, of version 1 and 2."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        folder = root / path.lstrip("/")
        # In a container the path is the host's, and what holds here is at the root.
        for each in (folder, *folder.parents):
            left = _left_of(each)
            if left is not None:
                found.append(left)
            if each == root:
                break
    return found


def _left_of(cgroup: Path) -> int | None:
    """What is left of one group's limit: pages of files that it can drop count as free, and so does swap."""
    try:
        if (cgroup / "memory.max").is_file():
            left, swap = _difference(cgroup, "memory.max", "memory.current"), None
            if (cgroup / "memory.swap.max").is_file():
                swap = _difference(cgroup, "memory.swap.max", "memory.swap.current")
            names = ("active_file", "inactive_file")
        else:
            left, swap = _difference(cgroup, "memory.limit_in_bytes", "memory.usage_in_bytes"), None
            if (cgroup / "memory.memsw.limit_in_bytes").is_file():  # of memory and swap together
                both = _difference(cgroup, "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")
                swap = None if both is None or left is None else max(0, both - left)
            names = ("total_active_file", "total_inactive_file")
        if left is None:
            return None
        pairs = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        stat: dict[str, Any] = dict(pair for pair in pairs if len(pair) == 2)
        free_swap = _meminfo().get("SwapFree", 0)
        return (
            left + sum(int(stat.get(name, 0)) for name in names) + min(free_swap, free_swap if swap is None else swap)
        )
    except (OSError, ValueError):
        return None


def _difference(cgroup: Path, limit: str, used: str) -> int | None:
    """What is left of a limit; None where there is none."""
    most = (cgroup / limit).read_text().strip()
    if most == "max" or int(most) > UNLIMITED:
        return None
    return max(0, int(most) - int((cgroup / used).read_text()))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
