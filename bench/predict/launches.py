"""What a training step launches on a GPU, found without one: the step runs on tensors that have no numbers.

The models, the optimizer and the launchers of the kernels run as they are, on fake tensors. A dispatch mode sees
PyTorch's own operations, and goes into the operators of csae; `Variant.launch` is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from csae import contextual_sae
from csae.kernels.triton import topk_encode as by_ranges
from csae.kernels.triton import topk_product
from csae.kernels.triton.variant import Variant
from csae.ops import backend, sparse_decode, topk_encode
from csae.ops.adam_rows import Table, adam_rows, feature_sums, sort_pairs
from csae.ops.lookback_attention import _lookback_attention, _lookback_attention_backward
from csae.ops.sparse_decode import decode_backward
from csae.ops.threshold_encode import threshold_encode
from csae.ops.topk_encode import encode_again, encode_and_keep

from ..cases import CASES, OURS
from ..data import Data, Shape
from . import machine

# Operations of PyTorch that launch nothing, beside views and allocations.
_NOTHING = {"lift_fresh", "alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
            "_unsafe_view", "device", "resize_", "set_", "promote_types", "unbind", "split", "sym_size", "is_pinned",
            "_local_scalar_dense", "squeeze_", "unsqueeze_"}  # fmt: skip
# Those that launch several kernels: cub's radix sort of 32-bit keys takes 4 passes, two kernels before them, and a copy
# of the keys and one of the numbers; nonzero counts, adds up and selects; masked_fill copies first.
_SEVERAL = {"sort": 8, "nonzero": 3, "topk": 4, "masked_fill": 2}


class Torch(NamedTuple):
    """An operation of PyTorch."""

    name: str
    kernels: int
    bytes: float
    """read and written"""
    operations: float
    """of a product of matrices"""
    dtype: torch.dtype | None


class Triton(NamedTuple):
    """A launch of a kernel of csae."""

    variant: Variant
    grid: tuple[int, ...]
    sizes: dict[str, int]
    """bytes of each tensor"""
    numbers: dict[str, float]
    call: int
    """which call of an operator it is part of"""
    place: int
    """its place among the launches of that call"""


class Recorded(NamedTuple):
    """Launches in order, and the calls of operators that they are part of, as `trips` takes them."""

    launches: list[tuple[str, Torch | Triton]]
    """each with the function of csae that it comes from; what autograd does comes from the function that called it"""
    calls: list[dict[str, Any]]


@contextmanager
def pretending() -> Iterator[None]:
    """Within it the Triton kernels are chosen for all tensors, as on an H200."""
    place = backend.place

    def on_triton(op: str, device: torch.device, dtype: torch.dtype) -> str:
        return "triton" if op in backend.ON_TRITON else "portable"

    ours = [module for name, module in list(sys.modules.items()) if name.startswith("csae.") and module is not None]
    found = [(module, name) for module in ours for name, value in vars(module).items() if value is place]
    before = topk_product._has_tma, topk_product._is_hopper, topk_product._programs
    kept_bytes, workspace_bytes = contextual_sae.kept_bytes, by_ranges.workspace_bytes
    for module, name in found:
        setattr(module, name, on_triton)
    topk_product._has_tma = topk_product._is_hopper = lambda device: True
    topk_product._programs = lambda device: machine.MULTIPROCESSORS
    contextual_sae.kept_bytes = lambda device: int(contextual_sae.KEPT_SHARE * machine.CAPACITY)
    by_ranges.workspace_bytes = lambda device: by_ranges.MOST_WORKSPACE_BYTES
    try:
        yield
    finally:
        for module, name in found:
            setattr(module, name, place)
        topk_product._has_tma, topk_product._is_hopper, topk_product._programs = before
        contextual_sae.kept_bytes = kept_bytes
        by_ranges.workspace_bytes = workspace_bytes


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Recorded([], [])
        self.call: tuple[int, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "csae":
            outer, self.call = self.call, (len(self.found.calls), 0)
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            self.found.calls.append({"operator": name, "given": {n: _described(of) for n, of in given.items()}})
            with self:
                result = backend.FUNCTIONS[name](*args, **kwargs)
            self.call = outer
            return result
        if func.namespace == "prim":
            return func(*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if name == "nonzero":
            result = args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        else:
            result = func(*args, **kwargs)
        if not (func.is_view or name in _NOTHING):
            self.found.launches.append((_where(), _torch(name, args, kwargs, result)))
        return result

    def launch(self, variant: Variant, grid: tuple[int, ...], *given: Any) -> None:
        assert self.call is not None
        call, place = self.call
        self.call = call, place + 1
        names = [name for name in variant.kernel.arg_names if name not in variant.constants]
        sizes, numbers = {}, {}
        for name, argument in zip(names, given, strict=True):
            tensor = getattr(argument, "base", argument)
            if isinstance(tensor, Tensor):
                sizes[name] = tensor.nbytes
            else:
                numbers[name] = argument
        self.found.launches.append((_where(), Triton(variant, grid, sizes, numbers, call, place)))


def _where() -> str:
    """The innermost function of csae that is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        function = frame.f_code.co_name
        ours = name.startswith("csae.") and not name.startswith(("csae.bench", "csae.ops.backend", "csae.ops.checks"))
        if ours and not function.startswith("<"):
            return f"{name.removeprefix('csae.')}.{function}"
        frame = frame.f_back
    return "elsewhere"


def _described(of: Any) -> Any:
    if isinstance(of, Tensor):
        return {"shape": list(of.shape), "dtype": str(of.dtype).removeprefix("torch.")}
    if isinstance(of, torch.dtype):
        return {"dtype": str(of).removeprefix("torch.")}
    return [_described(one) for one in of] if isinstance(of, list | tuple) else of


def _torch(name: str, args: Any, kwargs: Any, result: Any) -> Torch:
    tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
    size = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
    operations, dtype = 0.0, None
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left, right = [t for t in args if isinstance(t, Tensor) and t.dim() > 1][-2:]
        operations, dtype = 2.0 * left.numel() * right.shape[-1], left.dtype
    if name == "sort":  # 4 passes over keys of 4 bytes and numbers of 8, read and written
        size = 4 * 2 * 12 * args[0].numel()
    return Torch(name, _SEVERAL.get(name, 1), size, operations, dtype)


@contextmanager
def _recording() -> Iterator[_Recorder]:
    recorder = _Recorder()
    launch, pointer = Variant.launch, FakeTensor.data_ptr
    Variant.launch = lambda self, grid, *given: recorder.launch(self, grid, *given)  # type: ignore[method-assign,assignment]
    FakeTensor.data_ptr = lambda self: 0  # type: ignore[method-assign]  # aligned
    check = backend.versions.check
    backend.versions.check = lambda *_: None  # type: ignore[assignment]
    try:
        with pretending(), recorder:
            yield recorder
    finally:
        Variant.launch, FakeTensor.data_ptr = launch, pointer  # type: ignore[method-assign]
        backend.versions.check = check


def of_case(case: str, shape: Shape) -> Recorded:
    """What our implementation of a case of `bench.cases` launches in a run, in bfloat16; no feature is dead.

    Of a run that is not the first: it finds the copies of tables that the one before wrote.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        with _recording():  # before a step, dead features are looked for
            run = CASES[case].implementations[OURS](_data(shape)).run
            run()
        with _recording() as recorder:
            run()
    return recorder.found


def of_op(name: str, shape: Shape) -> Recorded:
    """What one of `ops` launches."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = ops(_data(shape))[name]
        with _recording() as recorder, torch.no_grad():
            run()
    return recorder.found


def op_names(shape: Shape) -> list[str]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return list(ops(_data(shape)))


def _data(shape: Shape) -> Data:
    return Data(shape, torch.bfloat16, torch.device("cpu"))


def ops(data: Data) -> dict[str, Callable[[], object]]:
    """The ops that `bench.kernel_times` measures, by its names, through the operators."""
    n, d_in, d_sae, k = data.shape.n, data.shape.d_in, data.shape.d_sae, data.shape.k
    values, indices = data.code
    pairs = sort_pairs(indices.flatten(), torch.arange(n).repeat_interleave(k), d_sae)
    weights = values.float().flatten()
    param, exp_avg, exp_avg_sq = (torch.empty(d_sae, d_in) for _ in range(3))
    rounded = torch.empty(d_sae, d_in, dtype=torch.bfloat16)  # as a step under autocast has it
    hyper, seed = torch.empty(6), torch.empty(1, dtype=torch.int64)

    def adam(unit_rows: bool) -> Callable[[], object]:
        table = Table(param, exp_avg, exp_avg_sq, weights, data.x, unit_rows, rounded)
        return lambda: adam_rows(pairs, [table], hyper, seed, False)

    def look_back() -> object:
        qkv = (*data.qkv, data.slope, data.null, None, None)
        return _lookback_attention_backward(data.grad_look_back, *qkv, *_lookback_attention(*qkv))

    some = data.x[: max(1, 2**26 // d_sae)]
    W_a, a = (torch.empty(size, data.qkv[2][0, 0].numel(), dtype=data.dtype) for size in (d_sae, len(some)))
    kept = torch.empty(len(some), d_sae)
    x, W_enc, b_enc = (of.float() for of in (data.x, data.W_enc, data.b_enc))
    return {
        "topk_encode": lambda: topk_encode(data.x, data.W_enc, data.b_enc, k),
        "topk_encode, float32": lambda: topk_encode(x, W_enc, b_enc, k),
        "threshold_encode": lambda: threshold_encode(data.x, data.W_enc, data.b_enc, torch.empty(()), 2 * k),
        "gather_sum": lambda: sparse_decode(values, indices, data.W_dec),
        "gather_dot": lambda: decode_backward(data.grad, values, indices, data.W_dec),
        "feature_sums": lambda: feature_sums(pairs, [weights, weights], [data.x, data.grad]),
        "adam_rows": adam(False),
        "adam_rows, unit rows": adam(True),
        "look-back": look_back,
        "encode_and_keep": lambda: encode_and_keep(some, data.W_enc, data.b_enc, k),
        "encode_again": lambda: encode_again(kept, a, W_a, k),
    }


def kernels(found: Recorded) -> int:
    """How many kernels are launched."""
    return sum(one.kernels if isinstance(one, Torch) else 1 for _, one in found.launches)
