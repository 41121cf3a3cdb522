"""A dense tensor that is made when it is first read: what a patched library hands out where it had a dense one.

`Lazy` is a node of autograd's graph. It knows its shape, dtype and device, and its `source`, such as a `Code`, from
which it can be made. Code that knows the source works with that. A few operations stay lazy (`_stays_lazy`), and a few
functions are answered from the source (`ANSWERS`). Any other operation makes the dense tensor first, once; from then on
reads and writes go to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

aten = torch.ops.aten

ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Function of torch -> one of ours that takes its arguments and gives its result without making the tensor; or
NotImplemented where it can't."""


class Source(Protocol):
    """What a tensor can be made from."""

    def dense(self) -> Tensor: ...


class Code(NamedTuple):
    """The active features of each token: a [..., d_sae] that is zero elsewhere."""

    values: Tensor
    """[..., k]"""
    indices: Tensor
    """[..., k] int64, no two of a token the same"""
    d_sae: int

    def dense(self) -> Tensor:
        shape = (*self.values.shape[:-1], self.d_sae)
        return self.values.new_zeros(shape).scatter_(-1, self.indices, self.values)


class Columns(NamedTuple):
    """Some features of all tokens: a [..., d_sae] that is zero elsewhere."""

    values: Tensor
    """[..., m]"""
    features: Tensor
    """[m] int64, no two the same"""
    d_sae: int

    def dense(self) -> Tensor:
        shape = (*self.values.shape[:-1], self.d_sae)
        return self.values.new_zeros(shape).index_copy_(-1, self.features, self.values)


class Sum(NamedTuple):
    """Two tensors of one shape and dtype, added."""

    first: Source
    second: Source

    def dense(self) -> Tensor:
        return self.first.dense() + self.second.dense()


class Content:
    """The source of a tensor and, once it is made, the tensor. Views share one."""

    def __init__(self, source: Source, device_type: str) -> None:
        self.source: Source | None = source
        self.device_type = device_type
        self.made: Tensor | None = None

    def dense(self) -> Tensor:
        if self.made is None:
            assert self.source is not None
            with torch.no_grad(), torch.autocast(self.device_type, enabled=False):
                self.made, self.source = self.source.dense(), None
        return self.made


class Lazy(Tensor):
    """A tensor of this shape, dtype and device that `source` makes when it is first read."""

    content: Content
    note: Any = None
    """free for use by the code that made it"""

    @staticmethod
    def __new__(
        cls, source: Source | Content, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Lazy:
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        lazy.content = source if isinstance(source, Content) else Content(source, device.type)
        return lazy

    def __init__(self, *args: object) -> None:
        super().__init__()

    @classmethod
    def of(cls, code: Code | Columns) -> Lazy:
        return cls(code, (*code.values.shape[:-1], code.d_sae), code.values.dtype, code.values.device)

    @property
    def source(self) -> Source | None:
        """What it is yet to be made from, or None."""
        return self.content.source

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ANSWERS:
            answer = ANSWERS[func](*args, **(kwargs or {}))
            if answer is not NotImplemented:
                return answer
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READ_MEMORY:
                args = tree_map(_plain, args)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kept = _stays_lazy(func, args, kwargs)
        if kept is not None:
            return kept
        owners: dict[int, Lazy] = {}

        def make(arg: Any) -> Any:
            if not isinstance(arg, Lazy):
                return arg
            made = arg.content.dense()
            owners[id(made)] = arg
            return made

        out = func(*tree_map(make, args), **tree_map(make, kwargs))
        if func._schema.is_mutable:  # an in-place operation returns its argument
            return tree_map(lambda result: owners.get(id(result), result), out)
        return out


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or what a lazy one is, outside of autograd."""
    return tensor.content.dense() if isinstance(tensor, Lazy) else tensor


class _Plain(Function):
    """What a lazy tensor is, as an ordinary one, in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, lazy: Lazy) -> Tensor:
        return lazy.content.dense().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def plain(tensor: Tensor) -> Tensor:
    """The tensor, or an ordinary one in place of a lazy one."""
    return _Plain.apply(tensor) if isinstance(tensor, Lazy) else tensor


def _plain(arg: Any) -> Any:
    return plain(arg) if isinstance(arg, Tensor) else arg


def _stays_lazy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of an operation that needs no dense tensor; None for other operations."""
    lazy = args[0] if args else None
    if not isinstance(lazy, Lazy):
        return None
    if func in (aten.detach.default, aten.alias.default):
        return Lazy(lazy.content, tuple(lazy.shape), lazy.dtype, lazy.device)
    if func is aten.add.Tensor and not kwargs:
        return _add(lazy, args[1])
    code = lazy.source
    if not isinstance(code, Code):
        return None
    if func is aten._to_copy.default and kwargs.keys() == {"dtype"}:
        return Lazy.of(code._replace(values=code.values.to(kwargs["dtype"])))
    # Autocast on CUDA asks for a sum in float32.
    if func is aten.sum.dim_IntList and len(args) == 2 and lazy.ndim == 2 and kwargs in ({}, {"dtype": lazy.dtype}):
        return _sum(code, tuple(dim % 2 for dim in args[1] or ()))
    return None


def _add(first: Lazy, second: Any) -> Lazy | None:
    """The sum of two that are not made yet, as autograd forms it of gradients; None for another."""
    if not isinstance(second, Lazy) or first.source is None or second.source is None:
        return None
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return None
    return Lazy(Sum(first.source, second.source), tuple(first.shape), first.dtype, first.device)


def _sum(code: Code, dims: tuple[int, ...]) -> Tensor | None:
    """The sum of a code [n, d_sae] over its tokens or its features; None for another sum."""
    if dims == (1,):
        return code.values.sum(1)
    if dims == (0,):
        counted = code.values.long() if code.values.dtype == torch.bool else code.values
        return counted.new_zeros(code.d_sae).index_add_(0, code.indices.flatten(), counted.flatten())
    return None


def versions_of(*tensors: Tensor) -> tuple[int, ...]:
    """How often each was changed in place (`_version`); 0 for inference tensors, which have no count."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


# What reads the memory of a tensor past `__torch_dispatch__`.
_READ_MEMORY = {
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.share_memory_,
    Tensor.storage,
    Tensor.tolist,
    Tensor.untyped_storage,
    Tensor._typed_storage,
    Tensor.__cuda_array_interface__.__get__,  # type: ignore[attr-defined]
}
