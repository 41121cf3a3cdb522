"""Checks of arguments to native code, which gets raw pointers and strides and can't check them itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import TYPES
from .memory import fresh

# The dtypes that native code reads and writes.
STORED = tuple(TYPES)
# The dtypes that are float32 to native code, by a copy if need be.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous, as native code takes it; copied only if it is not so already."""
    if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps any strides where it is empty


def check_strided(
    name: str, tensor: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> None:
    """Check that `tensor` is a strided CPU tensor of this dtype (or one of these) and of this shape (None: any size).

    Raises TypeError if it is no tensor or has another dtype, ValueError otherwise.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: given {type(tensor).__name__}; needed a torch.Tensor")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: given {tensor.dtype}; needed {' or '.join(map(str, dtypes))}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name}: given a {tensor.layout} tensor on {tensor.device}; needed a strided one on the CPU")
    # A plain loop, because it is faster, and this runs a hundred times a step.
    fits = tensor.ndim == len(shape)
    for size, given in zip(shape, tensor.shape, strict=False):
        fits = fits and (size is None or size == given)
    if not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name}: given shape {list(tensor.shape)}; needed {wanted}")


def check_matrix(
    name: str, tensor: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | None, int | None]
) -> None:
    """Check that `tensor` is a CPU matrix of this dtype and shape with contiguous rows. As `check_strided`."""
    check_strided(name, tensor, dtype, shape)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: given strides {tensor.stride()}; needed a contiguous last dimension")


def check_output(
    name: str, tensor: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int, int]
) -> None:
    """Check that `tensor` is such a matrix and its rows don't overlap, so that it can be written to."""
    check_matrix(name, tensor, dtype, shape)
    if shape[0] > 1 and tensor.stride(0) < shape[1]:
        raise ValueError(f"{name}: given strides {tensor.stride()}; needed rows that don't overlap")


def output_matrix(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """`tensor` after `check_output`, or a new matrix if it is None."""
    if tensor is None:
        return fresh(shape, dtype)
    check_output(name, tensor, dtype, shape)
    return tensor


def check_count(name: str, count: int) -> None:
    """Check that `count` is an int of 0 or more."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: given {type(count).__name__}; needed int")
    if count < 0:
        raise ValueError(f"{name}: given {count}; needed 0 or more")
