"""Instruction counts of the attention kernels' inner loops, from the SASS that nvdisasm prints.

The loop over tiles has rare paths: masks at the diagonal, rows that 16-byte copies cannot read. What decides the speed
is the path of an ordinary tile. It is found in the control-flow graph: of all paths once around the loop with the
copies of one tile, the one with the most tensor-core instructions, then the most stores and multiplications (the
rescaling of the sums), then the fewest instructions.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SECTION = re.compile(r"\.section\s+(?:\.text\.(\w+))?")
LABEL = re.compile(r"(\.L_x_\d+):$")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*)")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
CLASSES = {
    "HMMA": ("HMMA",),
    "LDSM": ("LDSM",),
    "LDGSTS": ("LDGSTS",),
    "MUFU": ("MUFU",),
    "FP": ("FADD", "FMUL", "FFMA", "FMNMX", "FMNMX3", "FSEL", "FSETP", "F2FP", "HFMA2", "HADD2"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "CALL", "RET", "BAR"),
    "integer": (
        *(
            "IMAD",
            "IADD3",
            "IADD",
            "VIADD",
            "LEA",
            "LOP3",
            "SHF",
            "ISETP",
            "SEL",
            "PLOP3",
            "PRMT",
            "VIMNMX",
            "VIMNMX3",
            "VIADDMNMX",
            "IABS",
            "MOV",
            "SGXT",
        ),
        *(
            "S2R",
            "S2UR",
            "R2UR",
            "I2F",
            "I2FP",
            "F2I",
            "P2R",
            "R2P",
            "UIADD3",
            "UIMAD",
            "ULEA",
            "ULOP3",
            "USHF",
            "UISETP",
            "USEL",
            "UMOV",
            "UPLOP3",
            "LDC",
            "ULDC",
        ),
        *("CS2R", "IDP", "FLO", "POPC", "UVIADD", "LDCU"),
    ),
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}


@dataclass
class Block:
    """A basic block: opcodes, and the blocks that may follow."""

    opcodes: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    @cached_property
    def counts(self) -> Counter[str]:
        """Number of instructions per opcode."""
        return Counter(self.opcodes)


def nvdisasm() -> str | None:
    """Path of the disassembler: on PATH, in the CUDA toolkit, or from the PyPI package nvidia-cuda-nvdisasm. None if
    not found.
    """
    found = shutil.which("nvdisasm")
    nvcc = shutil.which("nvcc")
    near = [Path(nvcc).resolve().parent / "nvdisasm"] if nvcc else []
    packaged = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/nvdisasm")]
    return found or next((str(path) for path in (*near, *packaged) if path.is_file()), None)


def disassemble(cubin: Path) -> str:
    """The SASS of a cubin, with labels.

    Raises:
        FileNotFoundError: nvdisasm is missing.
    """
    program = nvdisasm()
    if program is None:
        raise FileNotFoundError("nvdisasm is missing; do=pip install nvidia-cuda-nvdisasm")
    return subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def functions(sass: str) -> dict[str, list[Block]]:
    """Mangled kernel name -> its basic blocks, in order, from `nvdisasm -c`."""
    lines: dict[str, list[str]] = {}
    kernel: list[str] | None = None
    for line in map(str.strip, sass.splitlines()):
        section = SECTION.match(line)
        if section:
            kernel = lines.setdefault(section[1], []) if section[1] else None
        elif kernel is not None:
            kernel.append(line)
    return {name: blocks_of(body) for name, body in lines.items()}


def blocks_of(lines: list[str]) -> list[Block]:
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
            blocks[-1].opcodes.append(opcode)
            target = TARGET.search(operands) if opcode == "BRA" else None
            if target or opcode in ("EXIT", "RET"):
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


def weight(counts: Counter[str]) -> tuple[int, int, int]:
    """Order of preference among paths with the same number of copies."""
    return counts["HMMA"], counts["STS"] + counts["REDG"] + counts["FMUL"], -sum(counts.values())


Paths = dict[int, Counter[str]]  # number of copies -> the best path with that many


def better_of(paths: Paths, more: Paths, extra: Counter[str]) -> None:
    """Extends the paths of `more` by `extra` and merges them into `paths`, which keeps the best per number of
    copies.
    """
    for rest in more.values():
        path = rest + extra
        known = paths.get(path["LDGSTS"])
        if known is None or weight(path) > weight(known):
            paths[path["LDGSTS"]] = path


class Around:
    """The best paths once around a loop, per number of copies.

    Inner loops with tensor-core instructions turn `turns` times; other inner loops, which serve rare paths, are passed
    once at most.
    """

    def __init__(self, blocks: list[Block], loop: Loop, loops: list[Loop], turns: int):
        self.blocks, self.loop = blocks, loop
        inner = [
            one
            for one in loops
            if one.head != loop.head and one.body < loop.body and any(blocks[at].counts["HMMA"] for at in one.body)
        ]
        self.inner = {one.head: one for one in inner if not any(one.body < other.body for other in inner)}
        self.hidden = {at for one in self.inner.values() for at in one.body} - set(self.inner)
        self.turned = {
            head: Counter(
                {
                    opcode: count * turns
                    for opcode, count in max(Around(blocks, one, loops, turns).paths().values(), key=weight).items()
                }
            )
            for head, one in self.inner.items()
        }
        self.known: dict[int, Paths] = {}
        self.pending: set[int] = set()

    def paths(self) -> Paths:
        """Paths from the loop's head back to it."""
        return self.from_block(self.loop.head)

    def from_block(self, at: int) -> Paths:
        """Paths from a block to the loop's head that avoid the blocks on the way to it."""
        if at in self.known or at in self.pending:
            return self.known.get(at, {})
        self.pending.add(at)
        inner = self.inner.get(at)
        exits = (
            {target for one in inner.body for target in self.blocks[one].following if target not in inner.body}
            if inner
            else self.blocks[at].following
        )
        mine = self.turned[at] if inner else self.blocks[at].counts
        paths: Paths = {}
        for target in set(exits):
            if target == self.loop.head:
                better_of(paths, {0: Counter()}, mine)
            elif target in self.loop.body and target not in self.hidden:
                better_of(paths, self.from_block(target), mine)
        self.pending.discard(at)
        self.known[at] = paths
        return paths


def tile_counts(blocks: list[Block], copies: int, turns: int = 1) -> Counter[str]:
    """Counts of one ordinary tile: of the outermost loop with tensor-core instructions, along its best path with
    `copies` asynchronous copies.

    Empty if there is no such loop or path.
    """
    loops = loops_of(blocks)
    hot = [loop for loop in loops if any(blocks[at].counts["HMMA"] for at in loop.body)]
    outermost = [loop for loop in hot if not any(loop.body < other.body for other in hot)]
    paths = [Around(blocks, loop, loops, turns).paths().get(copies, Counter()) for loop in outermost]
    return max(paths, key=weight, default=Counter())


def by_class(counts: Counter[str]) -> Counter[str]:
    """Sums opcodes by class; unknown opcodes are 'other'."""
    classes: Counter[str] = Counter()
    for opcode, count in counts.items():
        classes[CLASS_OF.get(opcode, "other")] += count
    return classes
