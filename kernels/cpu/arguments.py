"""Checks of what goes to native code, which sees a pointer and strides and would believe anything."""

from __future__ import annotations

import torch
from torch import Tensor


def check_strided(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """`tensor` is a strided CPU tensor of this dtype and shape (None: any).

    TypeError for what is no tensor and for a wrong dtype, ValueError for the rest.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: given {type(tensor).__name__}; needed a torch.Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: given {tensor.dtype}; needed {dtype}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name}: given a {tensor.layout} tensor on {tensor.device}; needed a strided one on the CPU")
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    fits = tensor.ndim == len(shape)
    if not fits or any(size not in (None, given) for size, given in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{name}: given shape {list(tensor.shape)}; needed {wanted}")


def check_matrix(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, int | None]) -> None:
    """`tensor` is a CPU matrix of this dtype and shape (None: any) whose rows are contiguous; errors likewise."""
    check_strided(name, tensor, dtype, shape)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: given strides {tensor.stride()}; needed a contiguous last dimension")


def output_matrix(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """`tensor` if it can be written to as a matrix of this dtype and shape, a new one if it is None."""
    if tensor is None:
        return torch.empty(shape, dtype=dtype)
    check_matrix(name, tensor, dtype, shape)
    if shape[0] > 1 and tensor.stride(0) < shape[1]:
        raise ValueError(f"{name}: given strides {tensor.stride()}; needed rows that don't overlap")
    return tensor
