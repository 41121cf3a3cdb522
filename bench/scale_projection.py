"""What the counts of a step mean for many GPUs: a projection, not a measurement.

What each purpose sends is counted on a few processes, at two numbers of tokens and two of features. So it is known how
it grows with both; with the number of ranks it grows as `scale_count` says of its kind, and the counts on 2, 3 and 4
processes agree with that. Times are those bytes over a link's speed, and operations and bytes of memory over a GPU's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from .harness import Report
from .scale_steps import Sizes

N = 131_072
"""tokens of a step, of all GPUs together"""
GPUS = (8, 16, 32, 64)
D_SAE = (2**20, 2**22, 2**24)
NODE = 8
"""GPUs of a node, joined by NVLink; nodes are joined by InfiniBand"""

NVLINK = 360e9
"""bytes/s that a GPU sends: measured by others for an all-gather on 8 H100, and expected, says an author of NCCL
(github.com/NVIDIA/nccl-tests/issues/326)"""
INFINIBAND = 45e9
"""bytes/s that a GPU sends: 90% (assumed) of 400 Gbit/s, an adapter a GPU, as a DGX H100 has. Counted as if all that is
sent passed it. In fact a part stays in the node, and NCCL's rings enter and leave a node once for all of its GPUs"""
PRODUCT = 600e12
"""operations/s of an encoder's product in bfloat16: three quarters of what a large one reached on an H200"""
MEMORY = 3.0e12
"""bytes/s of a GPU's memory, as a copy reaches on an H100"""
ADAM_BYTES = 28
"""that a step of Adam reads and writes for each float32 parameter: its gradient is made and used in place"""
GPU_BYTES = {"80 GB": 75e9, "141 GB": 135e9}
"""what is left of an H100's and an H200's memory for tensors"""


class Law(NamedTuple):
    """What a rank sends in a step, for one purpose: how it grows."""

    kind: str
    purpose: str
    by_token: float
    """bytes for each token of the batch, times (ranks - 1) / ranks"""
    by_feature: float
    """bytes for each feature, times (ranks - 1) / ranks"""
    fixed: float
    """bytes, times ranks - 1 for an all-gather, (ranks - 1) / ranks for others"""

    def bytes(self, n: int, d_sae: int, R: int) -> float:
        share = (R - 1) / R
        return share * (n * self.by_token + d_sae * self.by_feature + self.fixed * self._of_fixed(R))

    def _of_fixed(self, R: int) -> float:
        return R if self.kind == "all-gather" else 1


class Kept(NamedTuple):
    """Memory of a rank."""

    weights: float
    """bytes between steps, for each feature that it owns"""
    moments: float
    gradients: float
    all_tokens: float
    """bytes at the peak of a step, for each token of the batch, at most; where ranks own rows"""
    own_tokens: float
    """the same for each token of its own windows, where ranks have those only"""


def formula(sizes: dict[str, Any], R: int) -> dict[str, float]:
    """Bytes that a rank sends in a step of a TopK SAE, by purpose: what the design says, for this dtype.

    Numbers have the width of the product's dtype; a candidate is a value and an index of 4 bytes each.
    """
    n, d, k = sizes["n"], sizes["d_in"], sizes["k"]
    width = 2 if sizes["precision"] == "bfloat16" else 4
    whole = {
        "x to all owners": n * d * width,
        "candidates home": n * k * (4 + 4),
        "codes to all owners": n * k * (4 + 4),
        "sums of rows home": n * d * 4,
        "gradients of sums to all owners": n * d * width,
    }
    return {purpose: size * (R - 1) / R for purpose, size in whole.items()}


def laws(report: Report, impl: str, R: int) -> list[Law]:
    """Those of an implementation, from its counts on R processes at the largest d_in that has them."""
    base, more_tokens, more_features = _three(report, impl, R)
    share = (R - 1) / R
    n, F = base["sizes"]["n"], base["sizes"]["d_sae"]
    found = []
    for (kind, purpose), sent in _sent(base).items():
        by_token = (_sent(more_tokens)[kind, purpose] - sent) / (more_tokens["sizes"]["n"] - n)
        by_feature = (_sent(more_features)[kind, purpose] - sent) / (more_features["sizes"]["d_sae"] - F)
        law = Law(kind, purpose, by_token / share, by_feature / share, 0.0)
        fixed = (sent - law.bytes(n, F, R)) / (share * law._of_fixed(R))
        found.append(law._replace(fixed=fixed))
    return found


def kept(report: Report, impl: str) -> Kept:
    """What an implementation holds for each feature that a rank owns (data parallel: all of them), and each token."""
    few, many = _processes(report, impl)
    base, _, more_features = _three(report, impl, many)
    features = more_features["sizes"]["d_sae"] - base["sizes"]["d_sae"]
    owned = features / (many if sharded(impl) else 1)
    weights, moments, gradients = (
        (more_features["held"][what] - base["held"][what]) / owned for what in ("weights", "moments", "gradients")
    )
    # The larger one, since peaks of resident memory are rough; and the share of own tokens falls with the ranks.
    slopes = {R: _peak_of_a_token(report, impl, R) for R in (few, many)}
    if sharded(impl):
        return Kept(weights, moments, gradients, max(slopes.values()), 0.0)
    return Kept(weights, moments, gradients, 0.0, max(R * slope for R, slope in slopes.items()))


def _peak_of_a_token(report: Report, impl: str, R: int) -> float:
    """By how many bytes the peak of a step grows with each token of the batch."""
    base, more_tokens, _ = _three(report, impl, R)
    if base["peak"] is None or more_tokens["peak"] is None:
        raise LookupError(f"{impl} on {R} processes: its peak of memory was not measured; it is on Linux")
    return (more_tokens["peak"] - base["peak"]) / (more_tokens["sizes"]["n"] - base["sizes"]["n"])


def sharded(impl: str) -> bool:
    """Whether its ranks own rows each, rather than all."""
    return impl.startswith("csae")


def encodes(impl: str) -> int:
    """Products of a step: a contextual SAE looks back once (`TrainConfig.early_sweeps`), and encodes again."""
    return 2 if "contextual" in impl else 1


def project(report: Report, impl: str) -> Iterator[dict[str, Any]]:
    """For each number of GPUs and d_sae: bytes of memory and bytes sent of a GPU, and seconds of a step's parts."""
    found, held = laws(report, impl, _processes(report, impl)[1]), kept(report, impl)
    d_in = _three(report, impl, _processes(report, impl)[1])[0]["sizes"]["d_in"]
    for gpus in GPUS:
        for F in D_SAE:
            own = F / gpus if sharded(impl) else F
            memory = {what: own * getattr(held, what) for what in ("weights", "moments", "gradients")}
            memory["activations"] = N * (held.all_tokens + held.own_tokens / gpus)
            sent = sum(law.bytes(N, F, gpus) for law in found)
            yield {
                "gpus": gpus,
                "d_sae": F,
                **memory,
                "all": sum(memory.values()),
                "sent": sent,
                "sent_s": sent / (NVLINK if gpus <= NODE else INFINIBAND),
                # Data parallel: each GPU multiplies its own tokens by all features. As many operations.
                "product_s": encodes(impl) * 2 * N * d_in * F / gpus / PRODUCT,
                "adam_s": memory["weights"] / 4 * ADAM_BYTES / MEMORY,
            }


def break_even(report: Report, impl: str, speed: float) -> float:
    """Features a GPU for which what grows with tokens takes as long to send as the product; of many GPUs."""
    R = _processes(report, impl)[1]
    d_in = _three(report, impl, R)[0]["sizes"]["d_in"]
    sending = sum(law.by_token for law in laws(report, impl, R)) / speed
    return sending / (encodes(impl) * 2 * d_in / PRODUCT)


def fits(n: float) -> str:
    """The smallest GPU that so many bytes fit."""
    return next((name for name, size in GPU_BYTES.items() if n <= size), "no")


def _processes(report: Report, impl: str) -> tuple[int, int]:
    """The fewest and the most processes on which an implementation was counted at several sizes."""
    counted = []
    for R in sorted({r["processes"] for r in report["results"] if r["processes"] > 1}):
        with contextlib.suppress(LookupError):
            _three(report, impl, R)
            counted.append(R)
    if len(counted) < 2:
        raise LookupError(
            f"{impl}: counted at several sizes on {counted or 'no'} processes; needed two numbers of them"
        )
    return counted[0], counted[-1]


def _three(report: Report, impl: str, R: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Results at some sizes, at more tokens, and at more features. Raises LookupError where there are none."""
    results = [r for r in report["results"] if (r["impl"], r["processes"]) == (impl, R) and "skipped" not in r]
    widest = max((r["sizes"]["d_in"] for r in results), default=0)
    results = sorted((r for r in results if r["sizes"]["d_in"] == widest), key=lambda r: Sizes(**r["sizes"]))
    for base in results:
        tokens, features = (next((r for r in results if _grown(base, r) == what), None) for what in ("n", "d_sae"))
        if tokens and features:
            return base, tokens, features
    raise LookupError(f"{impl} on {R} processes: not counted at two numbers of tokens and of features")


def _grown(base: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The one size in which `other` is larger; None where it is not just one."""
    changed = [name for name, size in base["sizes"].items() if other["sizes"][name] != size]
    return changed[0] if len(changed) == 1 and other["sizes"][changed[0]] > base["sizes"][changed[0]] else None


def _sent(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(one["kind"], one["purpose"]): one["bytes"] for one in result["sent"]}
