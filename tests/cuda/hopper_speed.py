"""Clocks per tile of the Hopper attention kernels, from their SASS, and the bound on their speed that follows.

A tile takes a multiprocessor at least as long as the busiest of four units: tensor cores, shared memory, issue slots
and the exponential unit. The rates are those of an H100 SXM: a wgmma of 64 x N x 16 takes N / 2 clocks, shared memory
moves 128 bytes per clock, each of four schedulers issues one instruction per clock, and each computes an exponential of
4 lanes per clock. Latencies and the prologue and epilogue of a block are ignored, so a measured speed is lower.

usage: python -m tests.cuda.hopper_speed CUBIN...
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.cuda import sass

KERNEL = re.compile(r"hopper_(forward|backward)_kernel.*?ShapeILi(\d+)E")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\S*(\s+R\d+, (R|gdesc))")
NAMED = re.compile(r"HGMMA(\d+)(R|gdesc)")
SCHEDULERS, MULTIPROCESSORS, HERTZ = 4, 132, 1.83e9
WARPS = 8  # of a block that compute, in two warpgroups
KEYS = 128  # of a tile


@dataclass(frozen=True)
class Work:
    """A tile of a kernel, and its goal.

    Attributes:
        rows: of a tile.
        operations: per visible (query, key) pair and channel.
        copied: bytes per tile, key or row and channel that copies write to shared memory, without what a block loads
            once.
        exchanged: bytes per pair that are written to shared memory in addition (ds).
        turns: iterations of the inner loop per tile.
        goal: TFLOP/s, causal at 2,048 tokens; None if there is none.
    """

    rows: int
    operations: int
    copied: int
    exchanged: int = 0
    turns: int = 1
    goal: float | None = None


WORK = {
    ("forward", 64): Work(128, 4, 2 * KEYS * 2),
    ("forward", 128): Work(128, 4, 2 * KEYS * 2, goal=550),
    ("backward", 64): Work(128, 10, 2 * 128 * 2, exchanged=2, turns=2),
    ("backward", 128): Work(64, 10, 2 * 64 * 2, exchanged=2, goal=420),
}


def named(text: str) -> str:
    """SASS whose products have names that contain N and where the left operand is, such as HGMMA128gdesc."""
    return PRODUCT.sub(r"HGMMA\1\3\2", text)


def products(counts: Counter[str]) -> tuple[int, int, int]:
    """(number, tensor clocks, bytes read from shared memory) of the products in these counts."""
    number = clocks = read = 0
    for opcode, count in counts.items():
        match = NAMED.fullmatch(opcode)
        if match:
            columns = int(match[1])
            number += count
            clocks += count * columns // 2
            read += count * 16 * 2 * (columns + (64 if match[2] == "gdesc" else 0))
    return number, clocks, read


def multiplies(block: sass.Block) -> bool:
    """Whether a block has a product."""
    return products(block.counts)[0] > 0


def tile_path(blocks: list[sass.Block], loop: sass.Loop, turns: int) -> Counter[str]:
    """Counts of the ordinary path once around a loop.

    It is the path with the most products, of these the one with the most multiplications (the rescaling of the sums),
    and of these the shortest. An inner loop with products counts `turns` times; the others are rare paths.
    """
    loops = [one for one in sass.loops_of(blocks) if one.body < loop.body]
    inner = {one.head: one for one in loops if any(multiplies(blocks[at]) for at in one.body)}
    known: dict[int, Counter[str] | None] = {}

    def weight(path: Counter[str]) -> tuple[int, int, int]:
        return products(path)[0], path["FMUL"], -sum(path.values())

    def best(at: int) -> Counter[str] | None:
        if at in known:
            return known[at]
        known[at] = None  # while its successors are searched, so that no path visits it twice
        mine, following = blocks[at].counts, blocks[at].following
        if at in inner:
            once = tile_path(blocks, inner[at], 1)
            mine = Counter({opcode: count * turns for opcode, count in once.items()})
            following = [to for one in inner[at].body for to in blocks[one].following if to not in inner[at].body]
        paths = [Counter()] if loop.head in following else []
        paths += [path for to in following if to in loop.body and to != loop.head and (path := best(to)) is not None]
        known[at] = max((mine + path for path in paths), key=weight, default=None)
        return known[at]

    return best(loop.head) or Counter()


def tile_counts(blocks: list[sass.Block], turns: int) -> Counter[str]:
    """Counts per warp and tile; empty if the kernel has no loop with products."""
    hot = [loop for loop in sass.loops_of(blocks) if any(multiplies(blocks[at]) for at in loop.body)]
    outermost = [loop for loop in hot if not any(loop.body < other.body for other in hot)]
    return max(
        (tile_path(blocks, loop, turns) for loop in outermost), key=lambda path: products(path)[0], default=Counter()
    )


def share(rows: int) -> float:
    """Share of visible pairs among those computed, causal at 2,048 tokens."""
    s = 2048
    tiles = sum(1 for row in range(0, s, rows) for key in range(0, s, KEYS) if key <= row + rows - 1)
    return s * (s + 1) / 2 / (tiles * rows * KEYS)


@dataclass(frozen=True)
class TileClocks:
    """Clocks that each unit of a multiprocessor takes for a tile."""

    tensor: float
    shared: float
    issue: float
    exponentials: float

    def bound(self, work: Work, head_dim: int) -> float:
        """TFLOP/s, causal at 2,048 tokens, if the busiest unit never waits."""
        return self.speed(work, head_dim, max(self.tensor, self.shared, self.issue, self.exponentials))

    def serial(self, work: Work, head_dim: int) -> float:
        """The same if products and instructions never overlap."""
        return self.speed(work, head_dim, max(self.tensor, self.shared) + max(self.issue, self.exponentials))

    @staticmethod
    def speed(work: Work, head_dim: int, clocks: float) -> float:
        """TFLOP/s at this many clocks per tile."""
        operations = work.operations * work.rows * KEYS * head_dim * share(work.rows)
        return operations / clocks * MULTIPROCESSORS * HERTZ / 1e12


def tile_clocks(counts: Counter[str], work: Work, head_dim: int) -> TileClocks:
    """The clocks that follow from a warp's instructions per tile."""
    groups = WARPS // 4
    _, clocks, read = products(counts)
    moved = groups * read + work.copied * head_dim + work.rows * KEYS * work.exchanged
    return TileClocks(
        tensor=groups * clocks,
        shared=moved / 128,
        issue=WARPS / SCHEDULERS * sum(counts.values()),
        exponentials=WARPS / SCHEDULERS * counts["MUFU"] * 32 / 4,
    )


def report(cubins: list[Path]) -> list[str]:
    """Prints the clocks and bounds of each kernel. Returns a problem per kernel whose bound is below its goal."""
    if sass.nvdisasm() is None:
        return []  # speed.report() prints that nvdisasm is missing
    problems = []
    print("   instructions tensor shared  issue  exponentials  bound, serial in TFLOP/s  kernel on sm_90a")
    for cubin in cubins:
        for name, blocks in sass.functions(named(sass.disassemble(cubin))).items():
            kernel = KERNEL.search(name)
            if not kernel:
                continue
            head_dim = int(kernel[2])
            work = WORK[kernel[1], head_dim]
            counts = tile_counts(blocks, work.turns)
            clocks = tile_clocks(counts, work, head_dim)
            title = f"hopper {kernel[1]} {head_dim} {cubin.name.split('_hopper', 1)[0].rsplit('_', 1)[1]}"
            if not clocks.tensor:
                problems.append(f"{title}: no loop with products found")
                continue
            bound, serial = clocks.bound(work, head_dim), clocks.serial(work, head_dim)
            print(
                f"{sum(counts.values()):16} {clocks.tensor:6.0f} {clocks.shared:6.0f} {clocks.issue:6.0f} "
                f"{clocks.exponentials:13.0f} {bound:9.0f} {serial:7.0f}{'':9}  {title}"
            )
            if work.goal and bound < work.goal:
                problems.append(f"{title}: bound {bound:.0f} TFLOP/s, the goal is {work.goal:.0f}")
    return problems


if __name__ == "__main__":
    for problem in report([Path(name) for name in sys.argv[1:]]):
        print(problem, file=sys.stderr)
