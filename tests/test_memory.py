"""Whether training fits in memory, with faked numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_line import one_line
from test_cli import csae

import csae.memory as memory
from csae.config import SAEConfig, TrainConfig
from csae.errors import UserError
from csae.memory import Need, available, check_loads, check_memory
from csae.step import adam

CPU = torch.device("cpu")
SIZES = [SAEConfig("topk", 40, 4), SAEConfig("contextual", 40, 4, heads=2, d_head=4, d_value=4, d_memory=8)]


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=["topk", "contextual"])
def test_weights_and_moments_are_counted_to_the_byte(sizes: SAEConfig, moments: str) -> None:
    config = TrainConfig(10, moments=moments)
    need = Need.of(lambda: sizes.make(16), config, n_ctx=8)
    sae = sizes.make(16)
    assert need.weights == sum(tensor.nbytes for tensor in sae.state_dict().values())
    states = adam(sae, config).state.values()
    assert need.moments == sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert need.step < 100 * 8 * 8 * 16 * 4


class Ranks:
    size = 3

    def rows(self, d_sae: int) -> range:
        return range(d_sae // 4)


def test_a_rank_holds_its_rows_only() -> None:
    whole, share = (
        Need.of(lambda: SAEConfig("topk", 4000, 4).make(16), TrainConfig(10), 8, ranks) for ranks in (None, Ranks())
    )
    assert share.weights == pytest.approx(whole.weights / 4, rel=0.01)
    assert share.moments == pytest.approx(whole.moments / 4, rel=0.01)
    assert share.step == whole.step


def gb(weights: float, moments: float, step: float = 0) -> Need:
    return Need(*(int(1e9 * size) for size in (weights, moments, step)))


def test_too_large_is_one_line_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 22_000_000_000)
    check_memory([gb(7, 14.9)], "cpu", "float32")
    check_memory([gb(2, 4, 9)] * 2, "cpu", "float32")  # steps come one after another
    with pytest.raises(UserError) as error:
        check_memory([gb(7, 15, 0.1)], "cpu", "float32")
    assert one_line(error) == (
        "--d-sae: to train needs 22.1 GB of memory on cpu (7.0 GB of weights, 15.0 GB of moments, 0.1 GB for a step), "
        "and 22.0 GB are available: needed a smaller --d-sae, --moments bfloat16, or more ranks (torchrun)"
    )
    with pytest.raises(UserError, match=r"to train 3 SAEs needs 24.0 GB .* a smaller --d-sae, or more ranks"):
        check_memory([gb(2, 4, 6)] * 3, "cpu", "bfloat16")


def test_what_is_not_known_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: None)
    check_memory([gb(1e9, 1e9)], "cpu", "float32")


def test_the_ranks_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {("one", "cpu"): 2, ("two", "cpu"): 1}

    def gather(found: list, mine: dict) -> None:
        (numbers,) = mine.values()
        found[:] = [{host: numbers} for host, count in hosts.items() for _ in range(count)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(memory, "available", lambda device: 20_000_000_000)
    check_memory([gb(3, 7)], "cpu", "float32", Ranks())
    with pytest.raises(UserError, match=r"22.0 GB of memory on cpu of one, for 2 ranks .* or more machines"):
        check_memory([gb(3, 8)], "cpu", "float32", Ranks())


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, **files: str) -> None:
    """A machine with 8 GB available and 1 GB of swap, and files of control groups: path to content."""
    (folder / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nSwapFree: 1000000 kB\n")
    (folder / "cgroup").write_text(cgroup)
    monkeypatch.setattr(memory, "MEMINFO", folder / "meminfo")
    monkeypatch.setattr(memory, "OWN_CGROUPS", folder / "cgroup")
    monkeypatch.setattr(memory, "CGROUPS", folder / "sys")
    for name, content in files.items():
        file = folder / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


STAT = "anon 5\nactive_file 3000\ninactive_file 4000\ntotal_active_file 3000\ntotal_inactive_file 4000\n"
SWAP = 1000 * 1024 * 1000  # free


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 9_000_000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/b/memory.current": "5\n"}, 9_000_000 * 1024),
        (
            "0::/a/b\n",
            {"a/memory.max": "90000", "a/memory.current": "80000", "a/memory.stat": STAT, "a/memory.swap.max": "0",
             "a/memory.swap.current": "0", "a/b/memory.max": "max"},
            10000 + 7000,
        ),
        ("0::/host/x\n", {"memory.max": "90000", "memory.current": "80000", "memory.stat": STAT}, 17000 + SWAP),
        (
            "4:memory:/x\n0::/\n",
            {"memory/x/memory.limit_in_bytes": "90000", "memory/x/memory.usage_in_bytes": "80000",
             "memory/x/memory.stat": STAT, "memory/x/memory.memsw.limit_in_bytes": "90500",
             "memory/x/memory.memsw.usage_in_bytes": "80000"},
            10000 + 7000 + 500,
        ),
        (
            "4:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": str(2**63 - 4096), "memory/x/memory.usage_in_bytes": "80000"},
            9_000_000 * 1024,
        ),
    ],
    ids=["no cgroup", "v2 without a limit", "v2, of a parent", "v2, in a container", "v1", "v1 without a limit"],
)  # fmt: skip
def test_the_limits_of_a_machine(cgroup, files, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, cgroup, **files)
    assert available(CPU) == expected


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMINFO", "OWN_CGROUPS", "CGROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / "nothing")
    assert available(CPU) is None


def test_train_refuses_before_it_makes_anything(tmp_path: Path, capsys, tiny_model_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words of text, again and again. " * 200)
    command = ["train", "-o", tmp_path / "run", "--model", tiny_model_path, "--text", tmp_path / "a.txt"]
    command += ["--layer", "2", "--n-ctx", "16", "--d-sae", str(10**12), "--device", "cpu"]
    code, _, err = csae(*command, capsys=capsys)
    assert code == 2
    assert "--d-sae: to train needs " in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_saved_sae_that_can_not_be_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes(600_000_000 // 1000))
    monkeypatch.setattr(memory, "available", lambda device: 1_200_000)
    check_loads(tmp_path, "cpu")
    check_loads("no/folder", "cpu")
    monkeypatch.setattr(memory, "available", lambda device: 1_199_999)
    with pytest.raises(UserError) as error:
        check_loads(tmp_path, "cpu")
    assert one_line(error).startswith(f"{tmp_path}: to load it takes 0.0 GB of memory on cpu, and 0.0 GB are available")

    def gather(found: list, mine: dict) -> None:
        found[:] = [mine] * 3

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(memory, "available", lambda device: 3_000_000)
    with pytest.raises(UserError, match=r"by 3 ranks, .*: needed fewer ranks, or a device or a machine with more"):
        check_loads(tmp_path, "cpu", Ranks())
