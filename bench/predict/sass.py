"""Instructions of a compiled kernel by class, for each loop and branch of its source.

`nvdisasm` gives blocks of instructions and the line of source of each. Back edges of the flow graph make loops; a loop
belongs to the `for` or `while` whose body most of its instructions come from. `work` multiplies the counts of each
block with how often its node was executed.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from csae.kernels.triton import offline
from csae.kernels.triton.variant import Variant

from . import machine, source
from .machine import Busy

# The classes of opcodes, first match first. What none matches is issued only: branches, uniform numbers, waits.
CLASSES = [
    ("wgmma", r"[HIQ]GMMA"),
    ("shuffle", r"SHFL|VOTE|MATCH|REDUX"),
    ("load/store", r"LDG|STG|LDS|STS|LDSM|STSM|LDL|STL|LD|ST|ATOM|ATOMG|ATOMS|RED|UTMALDG|UTMASTG|LDGSTS"),
    ("special", r"MUFU|F2F|I2F|F2I|FRND|POPC|FLO|BREV"),
    ("multiply", r"IMAD|IDP"),
    ("float", r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2"),
    ("integer", r"IADD3?|VIADD|LOP3?|PLOP3|SHF|SHL|SHR|LEA|[IF]SETP|[HI]SETP2|[IF]?SEL|[IF]MNMX|VI\w*MNMX|PRMT|SGXT"
                r"|F2FP|FSET|IABS|BMSK|MOV|P2R|R2P|ICMP|LEPC"),
]  # fmt: skip


class Instruction(NamedTuple):
    text: str  # without its predicate
    opcode: str
    predicate: str
    file: str
    line: int

    @property
    def kind(self) -> str:
        return _kind(self.opcode.partition(".")[0])


@functools.cache
def _kind(name: str) -> str:
    return next((kind for kind, pattern in CLASSES if re.fullmatch(pattern, name)), "other")


class Block(NamedTuple):
    """Instructions without a jump between them."""

    first: int
    instructions: list[Instruction]
    next: list[int]  # the first instructions of the blocks that may follow


class Code(NamedTuple):
    """A compiled kernel."""

    blocks: list[Block]
    loops: list[tuple[int, set[int]]]  # header and members, as numbers of blocks; in the order of headers
    registers: int
    shared: int


def compiled(variant: Variant) -> Code:
    """A variant compiled for sm_90."""
    made, options = offline.source_of(variant)
    kernel = triton.compile(made, target=offline.TARGETS["sm_90"][0], options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        text = _run("nvdisasm", "--print-code", "--print-line-info", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    blocks = blocks_of(text)
    return Code(blocks, loops_of(blocks), int(registers[1]) if registers else 255, kernel.metadata.shared)


def _run(tool: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def blocks_of(text: str) -> list[Block]:
    """The blocks of what nvdisasm printed, in order; code that can't be reached is left out."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    file, line = "", 0
    for row in text.splitlines():
        if at := re.match(r'\s*//## File "(.*)", line (\d+)', row):
            file, line = Path(at[1]).name, int(at[2])
        elif label := re.match(r"(\.L_x_\d+):", row):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", row):
            found.append(Instruction(code[2] + code[3], code[2], (code[1] or "").strip(), file, line))
    starts = {0, *labels.values()}
    after: dict[int, list[int]] = {}
    for place, of in enumerate(found):
        if of.opcode.partition(".")[0] in ("BRA", "EXIT", "RET", "JMP", "BRX"):
            target = re.search(r"\.L_x_\d+", of.text)
            goes = [labels[target[0]]] if target and of.opcode.startswith("BRA") else []
            # Not taken where a predicate says so, or a condition of several threads (`BRA.DIV`) doesn't hold.
            goes += (
                [place + 1] if of.predicate or ".DIV" in of.opcode or re.search(r"BRA(\.\w+)* !?U?P\d", of.text) else []
            )
            after[place] = goes
            starts |= {*goes, place + 1}
    ordered = sorted(start for start in starts if start < len(found))
    number = {start: block for block, start in enumerate(ordered)}
    blocks = []
    for start, end in zip(ordered, [*ordered[1:], len(found)], strict=True):
        goes = after.get(end - 1, [end])
        blocks.append(Block(start, found[start:end], [number[g] for g in goes if g in number]))
    return blocks


def loops_of(blocks: Sequence[Block]) -> list[tuple[int, set[int]]]:
    """The natural loops: of each block that a block behind it jumps back to, and that dominates it."""
    before, dominators = _before(blocks), _dominators(blocks)
    members: dict[int, set[int]] = {}
    for block, of in enumerate(blocks):
        for header in of.next:
            if header in dominators[block] and block != header | (len(of.instructions) > 2):
                waiting, inside = [block], members.setdefault(header, {header})
                while waiting:
                    one = waiting.pop()
                    if one not in inside:
                        inside.add(one)
                        waiting += before[one]
            elif header == block and len(of.instructions) > 2:
                members.setdefault(header, {header})
    return sorted(members.items())


def _before(blocks: Sequence[Block]) -> dict[int, list[int]]:
    """The blocks that each block may follow."""
    before: dict[int, list[int]] = {block: [] for block in range(len(blocks))}
    for block, of in enumerate(blocks):
        for follows in of.next:
            before[follows].append(block)
    return before


def _dominators(blocks: Sequence[Block]) -> dict[int, set[int]]:
    """For each block: itself, and those that every way to it leads through."""
    everything, before = set(range(len(blocks))), _before(blocks)
    dominators = {block: {0} if block == 0 else everything for block in everything}
    changed = True
    while changed:
        changed = False
        for block in range(1, len(blocks)):
            new = {block} | set.intersection(*(dominators[b] for b in before[block])) if before[block] else {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


class Placed(NamedTuple):
    """Where a block belongs in the source, and how often a program executes it."""

    loop: str
    """the name of its innermost loop, numbered where the loop's function is called from several places; "" for none"""
    trips: float
    """of that loop"""
    executed: float
    """fewer than `trips` in a branch"""


def placed(code: Code, kernel: Any, constants: dict[str, Any], trips: dict[str, list[float]]) -> list[Placed]:
    """The place of each block.

    constants: of the kernel. trips: for each node of the kernel's source, how often its body is executed in a program,
    for each place that its function is called from. Raises ValueError where loops of code and source don't match.
    """
    votes = [_votes(kernel, constants, block) for block in code.blocks]
    nodes = _nodes_of_loops(code, votes)
    of_loop = _trips_of_loops(code, nodes, trips)
    with_code = {node.name for node in nodes.values()}
    outside = {header: source.outside(kernel, constants, node) for header, node in nodes.items()}
    found = []
    for block, of_block in enumerate(votes):
        around = [(len(members), header) for header, members in code.loops if block in members and header in nodes]
        own = of_block.most_common(1)[0][0] if of_block else ()
        loop, count = of_loop[min(around)[1]] if around else ("", 1.0)
        if around:
            node = nodes[min(around)[1]]
            own_loop = next((of for of in reversed(own) if of.loop), node)
            outer = own_loop != node and _within(node, own_loop)  # two loops made one: this is a part of the outer one
            fused = own_loop != node and _within(own_loop, node) and own_loop.name not in with_code  # or the inner one
            if outer or fused:
                loop, count = own_loop.name, _mean(trips.get(own_loop.name, []))
        executed = count
        # A branch counts that is within the loop, or in no loop.
        within = own and not own[-1].loop and not (around and own[-1] in outside[min(around)[1]])
        if within and len(trips.get(own[-1].name, [])) <= 1:  # of several it isn't known which
            executed = min(count, _mean(trips.get(own[-1].name, [])))
        found.append(Placed(loop, count, executed))
    return _after_others(code, found)


def _after_others(code: Code, places: list[Placed]) -> list[Placed]:
    """The same, with no block executed more often than one of its loop that every way to it leads through.

    Of a function that is called in several places, its lines don't tell where a block belongs.
    """
    dominators = _dominators(code.blocks)
    around = {
        block: min((len(members), header) for header, members in code.loops if block in members)
        for block in set[int]().union(*(members for _, members in code.loops))
    }
    return [
        of._replace(
            executed=min(
                places[other].executed for other in dominators[block] if around.get(other) == around.get(block)
            )
        )
        for block, of in enumerate(places)
    ]


def _nodes_of_loops(code: Code, votes: list[Counter[tuple[source.Node, ...]]]) -> dict[int, source.Node]:
    """The loop of the source that each loop of the code belongs to, by the loop's header."""
    found = {}
    for header, members in code.loops:
        nested = set[int]().union(*(m for h, m in code.loops if h != header and m < members))
        chosen = _innermost_loop(sum((votes[block] for block in members - nested), Counter[tuple[source.Node, ...]]()))
        if chosen is not None:
            found[header] = chosen
    return found


def _trips_of_loops(
    code: Code, nodes: dict[int, source.Node], trips: dict[str, list[float]]
) -> dict[int, tuple[str, float]]:
    """The name and the trips of each loop of the code, by its header.

    Calls of a function are in the code in the order of the source. Where a loop is there several times for each call,
    the compiler unrolled it; then all trips are taken to be those of the smallest copy. One that is there once and was
    unrolled is taken for longer than it is: only loops of a few instructions are.
    """
    members = dict(code.loops)
    found: dict[int, tuple[str, float]] = {}
    for name in dict.fromkeys(node.name for node in nodes.values()):
        headers = [header for header, node in nodes.items() if node.name == name]
        known = trips[name]
        if not known or len(headers) % len(known):
            raise ValueError(
                f"{name}: {len(headers)} loops in the code, {len(known)} in the run; needed one each: see bench/predict"
            )
        each = len(headers) // len(known)
        for place, count in enumerate(known):
            copies = headers[place * each : (place + 1) * each]
            least = min(copies, key=lambda header: sum(len(code.blocks[b].instructions) for b in members[header]))
            label = name if len(known) == 1 else f"{name}, {place + 1}"
            found |= {of: (label, count) if of == least else (f"{label}, unrolled", 0.0) for of in copies}
    return found


def _within(inner: source.Node, outer: source.Node) -> bool:
    function = inner.name.partition(":")[0] == outer.name.partition(":")[0]
    return function and outer.first <= inner.header <= outer.last


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _votes(kernel: Any, constants: dict[str, Any], block: Block) -> Counter[tuple[source.Node, ...]]:
    """The nodes around the lines of a block, and how many instructions have them.

    Lines outside of all don't vote; those of which not all nodes are known only where no others do.
    """
    lines = Counter((of.file, of.line) for of in block.instructions)
    votes: dict[bool, Counter[tuple[source.Node, ...]]] = {True: Counter(), False: Counter()}
    for (file, line), number in lines.items():
        around = source.path(kernel, constants, file, line)
        if around.nodes:
            votes[around.sure][around.nodes] += number
    return votes[True] or votes[False]


def _innermost_loop(votes: Counter[tuple[source.Node, ...]]) -> source.Node | None:
    """The loop that most votes are within; of nested ones the inner one, if it has a vote of its own."""
    found: Counter[source.Node] = Counter()
    for around, number in votes.items():
        loops = [node for node in around if node.loop]
        if loops:
            found[loops[-1]] += number
    return found.most_common(1)[0][0] if found else None


def busy(code: Code, warps: int, times: Sequence[float], operations: float) -> Busy:
    """What a program costs. operations: of its products of matrices, multiplications and additions."""
    tensor = operations / (machine.OPERATIONS / machine.MULTIPROCESSORS / machine.CLOCK)
    issue = 0.0
    units = dict.fromkeys(machine.RATES, 0.0)
    products = sum(
        t * sum(of.kind == "wgmma" for of in b.instructions) for t, b in zip(times, code.blocks, strict=True)
    )
    # What is done while a product is being made, by what it is waited for with: nothing, if there is no other product.
    waits: dict[object, list[float]] = {}
    for number, (block, count) in enumerate(zip(code.blocks, times, strict=True)):
        if count == 0:
            continue
        size = len(block.instructions)
        issue += count * size * warps / machine.SCHEDULERS
        for of in block.instructions:
            if of.kind in units:
                units[of.kind] += count * warps * _width(of.opcode) / machine.RATES[of.kind]
        here = size * max(machine.DEPENDENT, warps / machine.SCHEDULERS)
        here += machine.LOAD * _load_depth(block)
        here += machine.BARRIER * sum(of.opcode.startswith("BAR") for of in block.instructions)
        in_block = sum(of.kind == "wgmma" for of in block.instructions)
        share = tensor * count * in_block / products if products else 0.0
        together = waits.setdefault(_turn(code, times, number), [0.0, 0.0])
        together[0] += count * here
        together[1] += share
    alone = sum(max(together) for together in waits.values())
    return Busy(issue, units, tensor, alone)


def _turn(code: Code, times: Sequence[float], block: int) -> object:
    """Which blocks pass while the same product is made: those of a loop's turn, if it leaves a product under way."""
    around = [(len(members), header, members) for header, members in code.loops if block in members]
    if around:
        _, header, members = min(around, key=lambda of: of[0])
        turn = [of for of in members if times[of] == times[block]]
        instructions = [of for number in turn for of in code.blocks[number].instructions]
        under_way = any(re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]", of.text) for of in instructions)
        if under_way and any(of.kind == "wgmma" for of in instructions):
            return "turn", header, times[block]
    return block


def by_loop(code: Code, places: Sequence[Placed]) -> dict[str, tuple[float, dict[str, float]]]:
    """For each loop, and "" for what is in none: its trips in a program, and a warp's instructions a trip by class."""
    found: dict[str, tuple[float, dict[str, float]]] = {}
    for block, of in zip(code.blocks, places, strict=True):
        trips, classes = found.setdefault(of.loop, (of.trips, {}))
        share = of.executed / trips if trips else 1.0
        for one in block.instructions:
            classes[one.kind] = classes.get(one.kind, 0.0) + share
    return found


def by_class(code: Code, times: Sequence[float]) -> dict[str, float]:
    """Instructions that each warp of a program issues, by class."""
    found: Counter[str] = Counter()
    for block, count in zip(code.blocks, times, strict=True):
        for of in block.instructions:
            found[of.kind] += count  # type: ignore[assignment]
    return dict(found)


def _width(opcode: str) -> float:
    """How many times longer than for 4 bytes a thread an instruction takes the path to memory."""
    if opcode.startswith(("LDSM", "STSM")):
        return 4.0 if ".4" in opcode else 2.0 if ".2" in opcode else 1.0
    if not opcode.startswith(("LD", "ST")):
        return 1.0
    return 4.0 if ".128" in opcode else 2.0 if ".64" in opcode else 1.0


def _load_depth(block: Block) -> int:
    """How many loads from global memory wait for one another in a block, by the registers of their addresses."""
    depth: dict[str, int] = {}
    deepest = 0
    for of in block.instructions:
        name = of.opcode.partition(".")[0]
        given = re.findall(r"\b(U?R)(\d+)(\.64)?", of.text)
        if not given:
            continue
        stores = name in ("STG", "STS", "ST", "RED", "LDGSTS")
        needed = 0
        for kind, number, wide in given if stores else given[1:]:
            needed = max(needed, *(depth.get(f"{kind}{int(number) + i}", 0) for i in range(2 if wide else 1)))
        if name in ("LDG", "LD", "ATOMG", "ATOM"):
            needed += 1
            deepest = max(deepest, needed)
        if not stores:
            kind, number, _ = given[0]
            words = 4 if ".128" in of.opcode else 2 if ".64" in of.opcode or ".WIDE" in of.opcode else 1
            depth |= {f"{kind}{int(number) + i}": needed for i in range(words)}
    return deepest


def resident(code: Code, warps: int) -> int:
    """How many programs a multiprocessor holds at a time."""
    registers = -(-code.registers // 8) * 8 * 32 * warps
    return max(1, min(machine.REGISTERS // registers, machine.SHARED // (code.shared + 1024), machine.WARPS // warps,
                      machine.PROGRAMS))  # fmt: skip
