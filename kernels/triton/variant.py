"""One compiled form of a kernel: what the launchers launch, and what `offline` compiles and checks.

A Variant holds everything that selects the machine code: types, constants, warps and stages. Integer arguments are
annotated and never specialised on their value, and pointers are always 16-byte aligned (`aligned`). So the code that
was checked without a GPU is the code that runs on one.

Widths and strides are passed in units of UNIT elements, a constant of the variant. The compiler then knows that they
are multiples of UNIT, and loads 16 bytes at a time.
"""

import inspect
import math
from collections.abc import Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
_NUMBERS = {tl.int32: "i32", tl.int64: "i64", tl.float32: "fp32"}


if triton.knobs.runtime.interpret:
    # Triton 3.6's interpreter relies on numpy to turn an array of one element into an integer; numpy 2.4 no longer does
    # (triton-lang/triton issue 9171, fixed after 3.6).
    _patch_tensor = triton.runtime.interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    triton.runtime.interpreter._patch_lang_tensor = _patch_tensor_and_index

    # The interpreter applies a custom reduction, and the exclusive or that tl.sort is made of, one element at a time,
    # which takes seconds a tile.
    _reduce = triton.runtime.interpreter.ReduceOps.apply_impl

    def _reduce_at_once(self: Any, values: Any) -> Any:
        if self.combine_fn is max_or_nan:
            return self.min_max(values[0], val_reduce_op=np.max)
        if self.combine_fn is getattr(tl.standard, "_xor_combine", None):
            return self.min_max(values[0], val_reduce_op=np.bitwise_xor.reduce)
        return _reduce(self, values)

    triton.runtime.interpreter.ReduceOps.apply_impl = _reduce_at_once


@triton.jit
def max_or_nan(a, b):
    """The larger of two, or NaN if either is NaN. For tl.reduce, because tl.max drops a NaN. One instruction."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


class Variant(NamedTuple):
    """A kernel with everything that its machine code depends on."""

    kernel: Any  # a triton.jit function
    tensors: dict[str, torch.dtype]  # the dtype of each tensor argument, in the order of the arguments
    constants: dict[str, Any]  # the tl.constexpr arguments
    num_warps: int
    num_stages: int
    # For each tensor passed as a TMA (tensor memory accelerator) descriptor: the constants that give its block's shape.
    descriptors: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def block(self, name: str) -> list[int]:
        """The shape of the block that a descriptor loads."""
        return [self.constants[size] for size in self.descriptors[name]]

    def launch(self, grid: tuple[int, ...], *arguments: Tensor | TensorDescriptor | int | float) -> None:
        """Launch on the device of the first argument. `arguments`: in the kernel's order, without the constants."""
        for (name, dtype), argument in zip(self.tensors.items(), arguments, strict=False):
            tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
            if dtype not in _POINTERS:
                raise TypeError(f"{name}: given {dtype}; needed float32, bfloat16 or float16")
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor)
                raise TypeError(f"{name}: given {given}; needed {dtype}, as the tensors before it have it")
            if tensor.data_ptr() % 16:
                raise ValueError(f"{name}: given an address off a 16-byte boundary; needed one on it (see `aligned`)")
        first = arguments[0]
        with torch.cuda.device_of(first.base if isinstance(first, TensorDescriptor) else first):
            self.kernel[grid](*arguments, **self.constants, **self.options())

    def options(self) -> dict[str, int | bool]:
        """The compiler's options. a * b + c rounds once, said here because triton 3.10 changes what it does unasked."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def signature(self) -> dict[str, str]:
        """Triton's name for the type of each argument."""
        types = {name: _POINTERS[dtype] for name, dtype in self.tensors.items()}
        for name in self.descriptors:
            types[name] = f"tensordesc<{types[name][1:]}{self.block(name)}>"
        for name, parameter in inspect.signature(self.kernel.fn).parameters.items():
            if name in self.constants:
                types[name] = "constexpr"
            elif name not in types:
                types[name] = _NUMBERS[parameter.annotation]
        return {name: types[name] for name in self.kernel.arg_names}

    def __str__(self) -> str:
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype, _ in groupby(self.tensors.values()))
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}[{dtypes} {constants} warps={self.num_warps} stages={self.num_stages}]"


def jit(kernel: Any) -> Any:
    """triton.jit, with no integer argument specialised on its value."""
    parameters = inspect.signature(kernel).parameters.values()
    numbers = [p.name for p in parameters if p.annotation in list(_NUMBERS)]
    return triton.jit(kernel, do_not_specialize=numbers)


def vector_units(dtype: torch.dtype) -> tuple[int, int]:
    """The two possible units of widths and strides: the elements in 16 bytes, and one element."""
    return 16 // dtype.itemsize, 1


def unit_of(dtype: torch.dtype, *sizes: int) -> int:
    """The largest unit of `vector_units` that divides all sizes."""
    vector, one = vector_units(dtype)
    return vector if math.gcd(*sizes) % vector == 0 else one


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at a 16-byte boundary; copied only if it is not so already."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def dot_precision(dtype: torch.dtype) -> str:
    """The input_precision of tl.dot for `dtype`: for float32, whether torch's own switch allows TF32.

    The switch is torch.set_float32_matmul_precision, "highest" by default. It is read under its newer name, because
    torch.get_float32_matmul_precision raises if it was set under the newer one.
    """
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def dtypes_and_precisions() -> list[tuple[torch.dtype, str]]:
    """Every pair that `dot_precision` can give. The precision has no effect on 16-bit inputs."""
    return [(torch.float32, "ieee"), *((dtype, "tf32") for dtype in FLOATS)]
