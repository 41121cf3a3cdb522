"""Which kernels an op runs on, by device and dtype: the one place that chooses. And how an operator is registered.

On CUDA: `kernels/triton`. On a CPU: `kernels/cpu`, for the dtypes that it knows. Otherwise `kernels/portable`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from csae import versions
from csae.kernels import cpu, triton
from csae.kernels.cpu import library

_FLOAT32 = (torch.float32,)
_STORED = (torch.float32, torch.bfloat16)
_HALF = (torch.float32, torch.bfloat16, torch.float16)

# The modules of `kernels/triton` and of `kernels/cpu`; and the dtypes that the latter know.
ON_TRITON = (
    "topk_encode",
    "threshold_encode",
    "sparse_decode",
    "feature_rows",
    "lookback_attention",
    "scaled_heads",
    "fvu",
    "activity",
    "scaling",
    "adam_numbers",
)
ON_CPU = {
    "topk_encode": _HALF,
    "threshold_encode": _HALF,
    "sparse_decode": _STORED,
    "feature_rows": _HALF,
    "lookback_attention": _HALF,
    "read_memory": _FLOAT32,
    "scaled_heads": _FLOAT32,
    "float_products": _FLOAT32,
}


def kernels(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that implements `op` for tensors of `dtype` on `device`."""
    return _module(place(op, device, dtype), op)


def place(op: str, device: torch.device, dtype: torch.dtype) -> Literal["triton", "cpu", "portable"]:
    """The folder of that module."""
    if device.type == "cuda" and op in ON_TRITON and triton.available():
        return "triton"
    if device.type == "cpu" and dtype in ON_CPU.get(op, ()):
        if cpu.available():
            return "cpu"
        cpu.warn_once()
    return "portable"


def has_matrix_units() -> bool:
    """Whether this CPU has units for products of bfloat16 matrices (AMX) that `kernels/cpu` uses."""
    return library.has_matrix_units()


@functools.cache
def _module(where: str, op: str) -> ModuleType:
    if where == "triton":
        versions.check("triton")
    return import_module(f"csae.kernels.{where}.{op}")


LIBRARY = torch.library.Library("csae", "FRAGMENT")
# The function of each operator: a tool that looks inside of operators, without running them, calls it itself.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as torch.ops.csae.<name>: what a tracer sees of a native or a Triton call.

    Kernels take pointers, so nothing but the function of an operator may call them: there tensors are real, whoever
    traces, transforms or compiles. Dtypes are settled before, so that it runs without autocast.

    It is `torch.library.custom_op` at half its overhead. Writes to `mutates_args` are not counted as versions of the
    tensors: use torch.autograd.graph.increment_version.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _in_eager_mode(function), "CompositeExplicitAutograd")
        FUNCTIONS[name] = function
        return getattr(torch.ops.csae, name).default

    return register


def _in_eager_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, seen neither by autocast nor by a compiler."""

    @torch._disable_dynamo  # type: ignore[untyped-decorator]  # as custom_op has it; torch.compiler.disable loads the compiler
    @functools.wraps(function)
    def run(*given: Any) -> Any:
        each = (one for of in given for one in (of if isinstance(of, list) else [of]))
        kind = next(tensor.device.type for tensor in each if isinstance(tensor, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*given)
        with torch.autocast(kind, enabled=False):
            return function(*given)

    return run


def fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register what an operator gives, without numbers: shapes, dtypes and strides."""
    return torch.library.register_fake(f"csae::{name}", lib=LIBRARY)


def gradient(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register an operator's backward pass."""
    torch.library.register_autograd(f"csae::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def no_gradient(name: str) -> None:
    """Make an operator refuse to be differentiated. Of one that is a backward pass that is a second derivative."""
    twice, never = "differentiate twice; needed a first derivative only", "differentiate what has no gradient"

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"csae::{name}: trying to {twice if name.endswith('_backward') else never}")

    torch.library.register_autograd(f"csae::{name}", refuse, lib=LIBRARY)
