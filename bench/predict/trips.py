"""How often the loops and branches of kernels run on random data, and how many bytes they ask for.

    TRITON_INTERPRET=1 python -m csae.bench.predict.trips CALLS RESULT

reads calls of operators from a file, runs each in Triton's interpreter, and writes what was counted. Launchers run as
they are, at full size; of each launch a sample of the programs runs. Products run on a few rows and a depth of one
block: their loops don't depend on numbers, and are counted for all.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import source

Call = dict[str, Any]
"""operator: its name; given: its arguments by name: a number, None, a dtype, {"shape", "dtype"}, or lists of these"""

ROWS = 4  # of a product and the selection from it
LEAST_BLOCK = 16  # rows of a product's tile, at least
PROGRAMS = 48  # of any other kernel
ADAM_TABLES = ("params", "exp_avgs", "exp_avg_sqs", "copies")
DEPTH_WORDS = ("steps", "depth")  # in the header of a loop over the depth of a product
FLAGS_AT_ONCE = 4096
FLAGS = f"range(0, rows, {FLAGS_AT_ONCE})"  # in the header of a loop over the flags of all rows


class Counted(NamedTuple):
    """A launch, as a sample of its programs ran."""

    kernel: str
    digest: str
    """of the kernel's source: `source.digest`"""
    constants: dict[str, Any]
    trips: dict[str, list[float]]
    """of each node: how often its body is executed by a program, for each place that its function is called from"""
    loaded: dict[str, float]
    """bytes that all programs load, by the tensor's name"""
    stored: dict[str, float]


def count(calls: list[Call]) -> list[list[Counted]]:
    """What each call launches, counted in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "calls.json"), Path(folder, "counted.json")
        given.write_text(json.dumps(calls))
        variables = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "csae.bench.predict.trips", str(given), str(result)]
        subprocess.run(command, env=variables, check=True)
        return [[Counted(**one) for one in of_call] for of_call in json.loads(result.read_text())]


# --- within the interpreter ------------------------------------------------------------------------------------------


class _Counter:
    """What the kernels that run now have executed."""

    def __init__(self) -> None:
        self.chain: tuple[Any, ...] = ()
        self.reached: dict[tuple[str, tuple[Any, ...]], int] = {}
        self.bytes: dict[str, Counter[str]] = {"loaded": Counter(), "stored": Counter()}
        self.places: list[tuple[int, int, str]] = []

    def header(self, name: str) -> None:
        self.reached.setdefault((name, self.chain), 0)

    def body(self, name: str) -> None:
        self.reached[name, self.chain] += 1

    def touched(self, kind: str, pointers: Any, mask: Any, size: int) -> None:
        some = pointers[mask] if pointers.shape == mask.shape else pointers.flatten()[mask.flatten()]
        if some.size:
            first = int(some.flat[0])
            name = next((name for start, end, name in self.places if start <= first < end), "elsewhere")
            self.bytes[kind][name] += int(some.size) * size


_counter = _Counter()


def _instrument() -> None:
    """Make the interpreter count nodes, and bytes by tensor."""
    import numpy as np
    from triton.runtime import interpreter

    class Counting(interpreter.ASTTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            node.decorator_list = []
            names = {id(of): f"{node.name}:{number}" for number, of in source.numbered(node)}
            self._names = names
            return self.generic_visit(node)

        def _counted(self, node: Any) -> list[ast.stmt]:
            name = self._names[id(node)]
            self.generic_visit(node)
            node.body.insert(0, _call("_csae_body", name))
            return [_call("_csae_header", name), node]

        visit_For = visit_While = visit_If = _counted

    def _call(function: str, name: str) -> ast.stmt:
        return ast.Expr(ast.Call(ast.Name(function, ast.Load()), [ast.Constant(name)], []))

    interpreter.FunctionRewriter.ast_transformer = Counting()
    interpreter._csae_header = lambda name: _counter.header(name)
    interpreter._csae_body = lambda name: _counter.body(name)
    called = interpreter.InterpretedFunction.__call__

    def with_chain(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _counter.chain
        if not source.of_triton(self):
            _counter.chain = (*before, sys._getframe(1).f_lineno)
        try:
            return called(self, *args, **kwargs)
        finally:
            _counter.chain = before

    interpreter.InterpretedFunction.__call__ = with_chain
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def loading(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        found = load(self, ptrs, mask, *rest, **named)
        _counter.touched("loaded", ptrs.data, np.broadcast_to(mask.data, ptrs.data.shape), found.data.itemsize)
        return found

    def storing(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        size = value.data.itemsize
        _counter.touched("stored", ptrs.data, np.broadcast_to(mask.data, ptrs.data.shape), size)
        return store(self, ptrs, value, mask, *rest, **named)

    builder.create_masked_load, builder.create_masked_store = loading, storing


def _encodes(operator: str) -> bool:
    """Whether an operator multiplies and selects: then the same rows are taken of all its launches."""
    return "encode" in operator and "backward" not in operator and "gradient" not in operator


def _run(variant: Any, grid: tuple[int, ...], given: tuple[Any, ...], encoder: bool, depth: float) -> Counted:
    """Run a sample of a launch's programs, and count. depth: how many times deeper products are than here."""
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    global _counter
    names = [name for name in variant.kernel.arg_names if name not in variant.constants]
    arguments: dict[str, Any] = dict(zip(names, given, strict=True))
    full, more, blocks, constants = (*grid, 1, 1)[:3], 1.0, 1.0, dict(variant.constants)
    if encoder and "rows" in arguments and "BLOCK_M" in variant.constants:
        block, rows = variant.constants["BLOCK_M"], arguments["rows"]
        arguments["rows"] = min(rows, ROWS)
        if "BLOCK_N" in constants:
            constants["BLOCK_M"] = LEAST_BLOCK  # the other rows of a tile would be empty
        for name, argument in arguments.items():
            if isinstance(argument, TensorDescriptor) and variant.descriptors[name][0] == "BLOCK_M":
                sizes = (
                    [min(rows, ROWS), *argument.shape[1:]],
                    argument.strides,
                    [LEAST_BLOCK, *argument.block_shape[1:]],
                )
                arguments[name] = TensorDescriptor(argument.base, *sizes)
        more = blocks = math.ceil(rows / block)
        scale_bytes = rows / arguments["rows"]
        if "programs" in arguments and constants.get("GATED", True):  # persistent
            # Of a gated one all programs read flags, and do no more.
            sample = [(x, 0, 0) for x in range(0, full[0], 1 if variant.descriptors else PROGRAMS)]
        else:
            sample = [(x, 0, 0) for x in range(math.ceil(full[0] / more))]
            more = 1.0
    else:
        generator = torch.Generator().manual_seed(0)
        if encoder:
            sample = [(x, y, 0) for x in range(min(ROWS, full[0])) for y in range(full[1])]
        else:
            some = torch.randperm(full[0] * full[1], generator=generator)[:PROGRAMS].tolist()
            sample = [(place // full[1], place % full[1], 0) for place in some]
        scale_bytes = full[0] * full[1] / len(sample)
    _counter = _Counter()
    for name, argument in arguments.items():
        tensor = getattr(argument, "base", argument)
        if isinstance(tensor, Tensor):
            _counter.places.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name))
    function = variant.kernel
    fn = function.rewrite()
    scope = interpreter._patch_lang(fn)
    try:
        called = inspect.getcallargs(fn, **arguments, **constants)
        called = {n: a if n in variant.constants else interpreter._implicit_cvt(a) for n, a in called.items()}
        interpreter.interpreter_builder.set_grid_dim(*full)
        for place in sample:
            interpreter.interpreter_builder.set_grid_idx(*place)
            fn(**called)
    finally:
        scope.restore()
    trips: dict[str, list[float]] = {}
    scaled: dict[str, dict[str, float]] = {}
    ways = source.calls(function, variant.constants)
    for name, node in source.nodes(function).items():
        deep = depth if any(word in node.text for word in DEPTH_WORDS) and node.loop else 1.0
        reached = [_counter.reached.get((name, way), 0) for way in ways.get(name.partition(":")[0], [])]
        trips[name] = [round(number * more * deep / len(sample), 3) for number in reached]
        if node.loop and FLAGS in node.text:
            trips[name] = [math.ceil(rows / FLAGS_AT_ONCE)]
    for kind, of in _counter.bytes.items():
        # A product's tile reads whole columns, and the rows that are there; both as often as it is deep.
        factors = {n: (blocks if n.startswith("W") and blocks > 1 else scale_bytes) for n in of}
        depths = {n: depth if n.startswith(("x_", "W_")) else 1.0 for n in of}
        scaled[kind] = {n: size * factors[n] * depths[n] for n, size in of.items()}
    digest = source.digest(function)
    return Counted(function.fn.__name__, digest, variant.constants, trips, scaled["loaded"], scaled["stored"])


def _tensor(operator: str, name: str, of: dict[str, Any]) -> Tensor:
    """Data for an argument. Tables of which only a sample is read are zeros, which take no memory."""
    shape, dtype = of["shape"], getattr(torch, of["dtype"])
    generator = torch.Generator().manual_seed(len(name))
    if name == "indices":
        return torch.randint(int(of["below"]), shape, generator=generator)
    if name == "values":
        return torch.rand(shape, generator=generator).sort(-1, descending=True).values.to(dtype)
    if dtype in (torch.int64, torch.int32):
        return torch.zeros(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if name == "kept":
        kept = torch.empty(shape, dtype=dtype)
        kept[: 2 * ROWS] = torch.randn(min(2 * ROWS, shape[0]), *shape[1:], generator=generator)
        return kept
    if _encodes(operator) and name in ("x", "a", "W_enc", "W_a", "b_enc"):
        return torch.randn(shape, generator=generator).to(dtype) * (0.01 if name == "b_enc" else 1.0)
    return torch.zeros(shape, dtype=dtype)


def _arguments(call: Call) -> tuple[list[Any], float]:
    """The arguments of a call, and how many times shallower its products are made."""
    operator, given, depth = call["operator"], call["given"], 1.0
    half = "bfloat16" if operator == "adam_rows" else "float16"  # the interpreter's bfloat16 is bits, which it widens
    if _encodes(operator):
        block = 64
        for name in ("x", "a", "W_enc", "W_a"):
            if isinstance(given.get(name), dict):
                deep = given[name]["shape"][-1]
                if deep > block:
                    depth = math.ceil(deep / block)
                    given[name]["shape"][-1] = block

    tables: dict[tuple[Any, ...], Tensor] = {}

    def made(name: str, of: Any) -> Any:
        if name == "threshold":  # half of k_max exceed it: pre-activations are normal, as x and W_enc are
            d_in, d_sae = given["W_enc"]["shape"][-1], given["W_enc"]["shape"][0]
            return torch.special.ndtri(torch.tensor(1 - given["k_max"] / 2 / d_sae)) * d_in**0.5
        if isinstance(of, list):
            return [made(name, one) for one in of]
        if not isinstance(of, dict):
            return of
        of = of | {"dtype": of["dtype"].replace("bfloat16", half)}
        if "shape" not in of:
            return getattr(torch, of["dtype"])
        if name == "indices":
            named = ("W_dec", "W_enc", "table", "since")
            table = next((given[n] for n in named if isinstance(given.get(n), dict)), None)
            of["below"] = given["d_sae"] if table is None else table["shape"][0]
        if operator == "adam_rows" and name in ADAM_TABLES:
            # Its loops don't depend on these numbers. At C there is no room for all of them.
            kind = of["dtype"], *of["shape"]
            if kind not in tables:
                tables[kind] = _tensor(operator, name, of)
            return tables[kind]
        return _tensor(operator, name, of)

    arguments = {name: made(name, of) for name, of in given.items()}
    if "order" in arguments:
        pairs, d_sae = arguments["tokens"].numel(), arguments["ends"].numel() - 1
        rows = max(of.shape[0] for of in arguments["rows"])
        features = torch.randint(d_sae, (pairs,), generator=torch.Generator().manual_seed(0))
        keys, order = features.sort(stable=True)
        arguments |= {"order": order, "tokens": order // max(1, pairs // rows)}
        arguments["ends"] = torch.searchsorted(keys, torch.arange(d_sae + 1))
    return list(arguments.values()), depth


def main() -> None:
    from csae.kernels.triton import topk_product
    from csae.kernels.triton.variant import Variant
    from csae.ops import backend

    from . import machine
    from .launches import pretending

    _instrument()
    result = []
    for call in json.loads(Path(sys.argv[1]).read_text()):
        arguments, depth = _arguments(call)
        encoder = _encodes(call["operator"])
        found: list[Counted] = []

        def launch(self: Any, grid: tuple[int, ...], *given: Any, **how: Any) -> None:
            found.append(_run(self, grid, given, encoder, depth))  # noqa: B023  # called within this turn

        Variant.launch = launch  # type: ignore[method-assign,assignment]
        with torch.no_grad(), pretending():
            topk_product._programs = lambda device: machine.MULTIPROCESSORS
            backend.FUNCTIONS[call["operator"]](*arguments)
        result.append([one._asdict() for one in found])
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
