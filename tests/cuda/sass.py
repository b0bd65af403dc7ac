"""Instruction counts of hot loops, from the SASS that nvdisasm prints.

A loop has rare paths: masks at the diagonal, rows that 16-byte accesses cannot read, the last pack of a row. The
ordinary path decides the speed. It is found in the control-flow graph: of all paths once around the loop with the
memory accesses of one pass, it is the one that ranks first (Pass).
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SECTION = re.compile(r"\.section\s+(?:\.text\.(\w+))?")
LABEL = re.compile(r"(\.L_x_\d+):$")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
SYMBOL_TABLE, SYMBOL_BYTES = 2, 24  # of ELF


@dataclass
class Block:
    """A basic block: opcodes with their modifiers, and the blocks that may follow."""

    opcodes: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    @cached_property
    def counts(self) -> Counter[str]:
        """Number of instructions per opcode."""
        return Counter(self.opcodes)


def matching(counts: Counter[str], pattern: re.Pattern[str]) -> int:
    """Number of instructions whose opcode begins with a match of the pattern."""
    return sum(count for opcode, count in counts.items() if pattern.match(opcode))


@dataclass(frozen=True)
class Pass:
    """How to find the ordinary path once around a loop, or through a kernel without one.

    Attributes:
        accesses: pattern of the opcodes that move the data of a pass.
        count: number of these on the path.
        work: patterns of opcodes; of several paths, the one with the most of the first is taken, then of the second,
            and last the shortest.
        turns: iterations per pass of inner loops with opcodes of the first pattern of `work`. Other inner loops are
            rare paths and are passed once at most.
        straight: the path leads through the kernel, not around a loop.
    """

    accesses: re.Pattern[str]
    count: int
    work: tuple[re.Pattern[str], ...]
    turns: int = 1
    straight: bool = False

    def rank(self, counts: Counter[str]) -> tuple[int, ...]:
        """Order of preference among paths with the same number of accesses. Ranks of a path's blocks can be added."""
        return (*(matching(counts, pattern) for pattern in self.work), -sum(counts.values()))


def nvdisasm() -> str | None:
    """Path of the disassembler: on PATH, in the CUDA toolkit, or from the PyPI package nvidia-cuda-nvdisasm. None if
    not found.
    """
    found = shutil.which("nvdisasm")
    nvcc = shutil.which("nvcc")
    near = [Path(nvcc).resolve().parent / "nvdisasm"] if nvcc else []
    packaged = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/nvdisasm")]
    return found or next((str(path) for path in (*near, *packaged) if path.is_file()), None)


def symbols_of(elf: bytes) -> dict[str, int]:
    """Name -> index of the symbols of a 64-bit ELF file."""
    (sections_at,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    # of a section: type, offset, size, index of the section with its names
    sections = [
        (*struct.unpack_from("<I", elf, at + 4), *struct.unpack_from("<QQI", elf, at + 24))
        for at in range(sections_at, sections_at + size * count, size)
    ]
    found = {}
    for kind, offset, length, names in sections:
        if kind != SYMBOL_TABLE:
            continue
        for index in range(length // SYMBOL_BYTES):
            (name_at,) = struct.unpack_from("<I", elf, offset + index * SYMBOL_BYTES)
            start = sections[names][1] + name_at
            found[elf[start : elf.index(b"\0", start)].decode()] = index
    return found


def disassemble(cubin: Path, kernels: list[re.Pattern[str]] | None = None) -> str:
    """The SASS of kernels of a cubin, with labels.

    Args:
        cubin: the file.
        kernels: patterns of their mangled names; None for all kernels, which takes up to three times as long.

    Raises:
        FileNotFoundError: nvdisasm is missing.
    """
    program = nvdisasm()
    if program is None:
        raise FileNotFoundError("nvdisasm is missing; do=pip install nvidia-cuda-nvdisasm")
    if kernels is None:
        return subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    symbols = symbols_of(cubin.read_bytes())
    wanted = [
        index
        for name, index in symbols.items()
        if name.startswith("_Z") and any(kernel.search(name) for kernel in kernels)
    ]
    if not wanted:
        return ""
    command = [program, "-c", "-fun", ",".join(map(str, wanted)), str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def bodies(sass: str) -> dict[str, list[str]]:
    """Mangled kernel name -> its lines, from `nvdisasm -c`."""
    lines: dict[str, list[str]] = {}
    kernel: list[str] | None = None
    for line in map(str.strip, sass.splitlines()):
        section = SECTION.match(line)
        if section:
            kernel = lines.setdefault(section[1], []) if section[1] else None
        elif kernel is not None:
            kernel.append(line)
    return lines


def blocks_of(lines: Iterable[str]) -> list[Block]:
    """Splits a kernel into basic blocks."""
    blocks, labels, jumps = [Block()], {}, []
    for line in lines:
        label, instruction = LABEL.match(line), INSTRUCTION.match(line)
        if label:
            if blocks[-1].opcodes:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif instruction:
            opcode, operands = instruction.groups()
            base = opcode.split(".", 1)[0]
            blocks[-1].opcodes.append(opcode)
            target = TARGET.search(operands) if base == "BRA" else None
            if target or base in ("EXIT", "RET"):
                jumps.append((len(blocks) - 1, target[1] if target else None, conditional(line)))
                blocks.append(Block())
    ends = {at for at, _, may_continue in jumps if not may_continue}
    for at, block in enumerate(blocks[:-1]):
        if at not in ends:
            block.following.append(at + 1)
    for at, target, _ in jumps:
        if target is not None:
            blocks[at].following.append(labels[target])
    return blocks


def functions(sass: str) -> dict[str, list[Block]]:
    """Mangled kernel name -> its basic blocks, with opcodes without modifiers."""
    kernels = {name: blocks_of(lines) for name, lines in bodies(sass).items()}
    for block in (block for blocks in kernels.values() for block in blocks):
        block.opcodes = [opcode.split(".", 1)[0] for opcode in block.opcodes]
    return kernels


def conditional(line: str) -> bool:
    """Whether a branch may fall through, because a guard or an operand predicates it."""
    return bool(re.search(r"\*/\s+@|\bBRA(?:\.\w+)*\s+!?U?P\d|\bBRA\.DIV|\bBRA\.\w*CONV", line))


@dataclass
class Loop:
    """A natural loop: its head and all of its blocks, by index."""

    head: int
    body: set[int]


def loops_of(blocks: list[Block]) -> list[Loop]:
    """The natural loops of the backward branches. Loops with the same head are merged."""
    before: dict[int, list[int]] = {at: [] for at in range(len(blocks))}
    for at, block in enumerate(blocks):
        for target in block.following:
            before[target].append(at)
    found: dict[int, Loop] = {}
    for at, block in enumerate(blocks):
        for head in block.following:
            if head > at:
                continue
            body, waiting = {head}, [at]
            while waiting:
                one = waiting.pop()
                if one not in body:
                    body.add(one)
                    waiting += before[one]
            if 0 in body and head != 0:
                continue  # not a loop: a jump back from out-of-line code
            loop = found.setdefault(head, Loop(head, set()))
            loop.body |= body
    return list(found.values())


Chain = tuple[Counter[str], "Chain | None"]  # the counts of a block, and the rest of the path


@dataclass(frozen=True)
class BestPath:
    """The best path known with some number of accesses."""

    rank: tuple[int, ...]
    chain: Chain | None

    def counts(self) -> Counter[str]:
        """Sum over the path's blocks."""
        total: Counter[str] = Counter()
        chain = self.chain
        while chain:
            total.update(chain[0])
            chain = chain[1]
        return total


BestPaths = dict[int, BestPath]  # number of accesses -> the best path with that many


class PathSearch:
    """The best paths once around a loop, or from a block to the end of the kernel, per number of accesses."""

    def __init__(self, blocks: list[Block], loop: Loop, loops: list[Loop], wanted: Pass):
        self.blocks, self.loop, self.wanted = blocks, loop, wanted
        self.end = {0: BestPath((0,) * (len(wanted.work) + 1), None)}
        inner = [
            one
            for one in loops
            if one.head != loop.head
            and one.body < loop.body
            and any(matching(blocks[at].counts, wanted.work[0]) for at in one.body)
        ]
        self.inner = {one.head: one for one in inner if not any(one.body < other.body for other in inner)}
        self.hidden = {at for one in self.inner.values() for at in one.body} - set(self.inner)  # all but their heads
        self.unrolled: dict[int, Counter[str]] = {}  # head -> counts of all iterations of an inner loop
        for head, one in self.inner.items():
            best = max(PathSearch(blocks, one, loops, wanted).paths().values(), key=lambda path: path.rank)
            self.unrolled[head] = Counter({opcode: count * wanted.turns for opcode, count in best.counts().items()})
        self.known: dict[int, BestPaths] = {}
        self.pending: set[int] = set()

    def paths(self) -> BestPaths:
        """Paths from the loop's head back to it."""
        return self.from_block(self.loop.head)

    def from_block(self, at: int) -> BestPaths:
        """Paths from a block to the loop's head, or to the kernel's end, that avoid the blocks on the path to it."""
        if at in self.known or at in self.pending:
            return self.known.get(at, {})
        self.pending.add(at)
        inner = self.inner.get(at)
        exits = (
            {target for one in inner.body for target in self.blocks[one].following if target not in inner.body}
            if inner
            else set(self.blocks[at].following)
        )
        mine = self.unrolled[at] if inner else self.blocks[at].counts
        rank, accesses = self.wanted.rank(mine), matching(mine, self.wanted.accesses)
        paths: BestPaths = {}
        if self.wanted.straight and not exits and mine["EXIT"]:
            exits = {self.loop.head}
        for target in exits:
            if target == self.loop.head:
                rest = self.end
            elif target in self.loop.body and target not in self.hidden:
                rest = self.from_block(target)
            else:
                continue
            for count, path in rest.items():
                total = tuple(map(sum, zip(path.rank, rank, strict=True)))
                known = paths.get(count + accesses)
                if count + accesses <= self.wanted.count * 2 and (known is None or total > known.rank):
                    paths[count + accesses] = BestPath(total, (mine, path.chain))
        self.pending.discard(at)
        self.known[at] = paths
        return paths


def pass_counts(blocks: list[Block], wanted: Pass) -> Counter[str]:
    """Opcode counts of one ordinary pass; empty if there is none.

    Candidates are the outermost loops with opcodes of the first pattern of `work`; the path that ranks first is taken.
    """
    loops = loops_of(blocks)
    if wanted.straight:
        candidates = [Loop(0, set(range(len(blocks))))]
    else:
        hot = [one for one in loops if any(matching(blocks[at].counts, wanted.work[0]) for at in one.body)]
        candidates = [one for one in hot if not any(one.body < other.body for other in hot)]
    found = [PathSearch(blocks, loop, loops, wanted).paths().get(wanted.count) for loop in candidates]
    best = max((path for path in found if path), key=lambda path: path.rank, default=None)
    return best.counts() if best else Counter()
