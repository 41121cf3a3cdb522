"""The loops and branches of a kernel's source, each with a name that lasts while lines move.

A node is a `for`, a `while` or an `if` of a jit function, named by its function and its place among the function's
nodes: `_choose:2`. Machine code knows lines of source; a run in Triton's interpreter counts how often each node's body
is executed. Nodes join the two.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Node(NamedTuple):
    """A loop or a branch. Lines are those of the file; `header` is not part of the body."""

    name: str
    header: int
    first: int
    last: int
    loop: bool
    text: str
    """the header's source"""
    test: str
    """of an `if`: its condition"""


class Function(NamedTuple):
    """A jit function: its lines, its nodes from the outside in, and the lines at which it calls other ones."""

    name: str
    file: str
    first: int
    last: int
    nodes: tuple[Node, ...]
    calls: tuple[tuple[str, int], ...]
    text: str


def numbered(tree: ast.AST) -> Iterator[tuple[int, ast.For | ast.While | ast.If]]:
    """The nodes of a function's tree with their numbers, in the order of the source."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While | ast.If)]
    yield from enumerate(sorted(found, key=lambda node: (node.lineno, node.col_offset)), 1)


def of_triton(jit: Any) -> bool:
    """Whether a jit function is one of triton's own."""
    return jit.fn.__module__.partition(".")[0] == "triton"


@functools.cache
def functions(kernel: Any) -> dict[str, Function]:
    """The kernel and all jit functions that it calls but triton's own, directly or not, by name."""
    found: dict[str, Function] = {}
    waiting = [kernel]
    while waiting:
        jit = waiting.pop()
        if jit.fn.__name__ in found:
            continue
        lines, start = inspect.getsourcelines(jit.fn)
        text = textwrap.dedent("".join(lines))
        tree = ast.parse(text)
        ast.increment_lineno(tree, start - 1)
        calls = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called = jit.fn.__globals__.get(node.func.id)
                if hasattr(called, "fn") and not of_triton(called):
                    calls.append((called.fn.__name__, node.lineno))
                    waiting.append(called)
        nodes = tuple(
            Node(
                f"{jit.fn.__name__}:{number}",
                of.lineno,
                of.body[0].lineno,
                of.body[-1].end_lineno or of.body[-1].lineno,
                not isinstance(of, ast.If),
                lines[of.lineno - start].strip(),
                ast.unparse(of.test) if isinstance(of, ast.If) else "",
            )
            for number, of in numbered(tree)
        )
        file = Path(inspect.getsourcefile(jit.fn) or "").name
        last = start + len(lines) - 1
        found[jit.fn.__name__] = Function(jit.fn.__name__, file, start, last, nodes, tuple(calls), text)
    return found


def calls(kernel: Any, constants: dict[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """For each function of the kernel, the ways in which it is called: the lines of the calls, from the kernel inwards.

    In the order of the source, which is that of the machine code. Calls by the kernel itself in a branch that its
    constants rule out are left out.
    """
    known = functions(kernel)
    found: dict[str, list[tuple[int, ...]]] = {}

    def visit(name: str, way: tuple[int, ...]) -> None:
        found.setdefault(name, []).append(way)
        for called, line in sorted(known[name].calls, key=lambda call: call[1]):
            # Within other functions a constant's name may stand for another number.
            if way or not _ruled_out(known[name], line, constants):
                visit(called, (*way, line))

    visit(kernel.fn.__name__, ())
    return found


def _ruled_out(function: Function, line: int, constants: dict[str, Any]) -> bool:
    """Whether a line is in a branch that is never taken with these constants."""
    around = [node.test for node in function.nodes if node.test and node.first <= line <= node.last]
    return any(_is_false(test, constants) for test in around)


def _is_false(test: str, constants: dict[str, Any]) -> bool:
    """Whether a condition of constants alone doesn't hold."""
    try:
        return not eval(test, {"__builtins__": {}}, dict(constants))
    except Exception:
        return False  # of other things than constants


@functools.cache
def digest(kernel: Any) -> str:
    """Changes with what the kernel and the functions that it calls do; not with comments, docstrings or lines."""
    trees = []
    for name, function in sorted(functions(kernel).items()):
        tree = ast.parse(function.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        trees.append(f"{name}: {ast.dump(tree)}")
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()[:12]


class Around(NamedTuple):
    """The nodes around a line, from the outside in."""

    nodes: tuple[Node, ...]
    sure: bool
    """whether these are all: not where functions are called from several nodes, of which only the common ones count"""


def path(kernel: Any, constants: dict[str, Any], file: str, line: int) -> Around:
    """The nodes around a line, those of callers included as far as all calls are in the same nodes.

    Of the kernel's own calls, those that its constants rule out don't count. Nothing for a line that no function of the
    kernel holds.
    """
    known, own = functions(kernel), functions(kernel)[kernel.fn.__name__]
    callers = [
        (called, function, at)
        for function in known.values()
        for called, at in function.calls
        if function is not own or not _ruled_out(own, at, constants)
    ]

    def around(function: Function, line: int) -> Around:
        inside = tuple(node for node in function.nodes if node.first <= line <= node.last)
        paths = {around(caller, at) for called, caller, at in callers if called == function.name}
        outside = tuple(of[0] for of in zip(*(of.nodes for of in paths), strict=False) if len(set(of)) == 1)
        return Around((*outside, *inside), len(paths) <= 1 and all(of.sure for of in paths))

    holding = [of for of in known.values() if of.file == file and of.first <= line <= of.last]
    return around(holding[0], line) if holding else Around((), True)


def outside(kernel: Any, constants: dict[str, Any], node: Node) -> tuple[Node, ...]:
    """The nodes around a node, as far as they are known."""
    return path(kernel, constants, functions(kernel)[node.name.partition(":")[0]].file, node.header).nodes


def nodes(kernel: Any) -> dict[str, Node]:
    """All nodes of a kernel by name."""
    return {node.name: node for function in functions(kernel).values() for node in function.nodes}
