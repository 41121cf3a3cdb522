"""Argument checks: each error names the argument, what was given, what is needed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: given a {type(value).__name__}; needed a torch.Tensor")


def check_floats(**tensors: Tensor) -> None:
    """Check that all are floating tensors with the dtype and device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name}: given dtype {tensor.dtype}; needed float32, bfloat16, float16 (or float64 on a CPU)"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name}: given dtype {tensor.dtype}; needed {first.dtype} as {first_name} has: "
                f"cast one of them, or run under torch.autocast"
            )
        check_device(name, tensor, first_name, first)
        if tensor.dtype == torch.float64 and tensor.device.type == "cuda":
            raise TypeError(f"{name}: given dtype torch.float64 on {tensor.device}; needed float32 or lower on CUDA")


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{name}: given on {tensor.device}; needed on {first.device} as {first_name} is: move one of them"
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """`expected` has a size per dimension, None where any will do; `meaning` spells it out: "[d_sae, d_in]"."""
    given = tuple(tensor.shape)
    fits = len(given) == len(expected)
    fits = fits and all(want is None or have == want for have, want in zip(given, expected, strict=True))
    if not fits:
        sizes = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name}: given shape {list(given)}; needed {meaning} = [{sizes}]")


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation: operators have no such derivative, and torch would take it for zero."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for tensor in tensors:
        # A compiler doesn't know of tangents where it traces.
        if torch.compiler.is_compiling() or (tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None):
            raise NotImplementedError(
                "csae: given a tensor with a tangent (forward-mode differentiation, as torch.func.jvp and jacfwd do); "
                "needed reverse mode: backward() or torch.autograd.grad"
            )


def check_k(k: object, d_sae: int, name: str = "k", most: str = "d_sae") -> None:
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"{name}: given a {type(k).__name__}; needed an int")
    if not 1 <= k <= d_sae:
        raise ValueError(f"{name}: given {k}; needed 1 <= {name} <= {most} = {d_sae}")


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, where it is on for the first one's device; float64 stays."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that `autocast_to` gives the tensor."""
    kind = tensor.device.type
    cast = torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else tensor.dtype
