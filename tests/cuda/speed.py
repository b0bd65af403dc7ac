"""Bounds on the speed of the hot kernels, by counts of instructions in the SASS, and the limits that hold them.

A pass of a hot loop keeps several units of a multiprocessor busy: the schedulers issue one instruction per clock, and
the tensor cores, the shared memory, the integer unit and the exponential unit have rates of their own. The busiest one
bounds the kernel, if all the others overlap with it. Latency, occupancy, bank conflicts, the L2 cache and the ends of
loops are ignored: a kernel may be slower than its bound, but not faster.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.cuda import sass
from tests.cuda.sass import Pass


@dataclass(frozen=True)
class Device:
    """Rates of a GPU.

    Attributes:
        multiprocessors: of 4 schedulers each.
        clock: Hz under load.
        copy: bytes per second that a copy reads and writes, together.
        mma: clocks per scheduler of an mma.sync of 16 x 8 x 16.
        float_clocks: per scheduler, of an fp32 instruction.
    """

    name: str
    multiprocessors: int
    clock: float
    copy: float
    mma: float
    float_clocks: float

    @property
    def copy_per_clock(self) -> float:
        """Bytes that a multiprocessor copies per clock."""
        return self.copy / (self.multiprocessors * self.clock)


# mma: 2,048 operations per clock and multiprocessor on an A100; an H200 has twice that rate, of which mma.sync reaches
# five eighths. Throughputs of other instructions: CUDA C++ Programming Guide, "Arithmetic Instructions".
DEVICES = {
    "sm_90a": Device("H200", 132, 1.7e9, 4.3e12, 6.4, 1),
    "sm_80": Device("A100", 108, 1.41e9, 1.75e12, 8, 2),
}
MMA_OPERATIONS = 2 * 16 * 8 * 16
SCHEDULERS, WARP = 4, 32

CLASSES = {
    "HMMA": r"HMMA",
    "LDSM": r"LDSM",
    "LDGSTS": r"LDGSTS",
    "memory": r"LDG|STG|LDS|STS|REDG?|ATOMG?|SHFL",
    "MUFU": r"MUFU",
    "FP": r"FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|F2FP|HFMA2|HADD2|HMUL2",
    "branch": r"BRA|BSSY|BSYNC|EXIT|WARPSYNC|CALL|RET|BAR|BREAK|NOP|VOTE",
}
COLUMNS = (*CLASSES, "integer")
CLASS_PATTERN = {name: re.compile(rf"(?:{pattern})\b") for name, pattern in CLASSES.items()}

UNITS = ("tensor", "shared", "exp", "float", "int")
FLOAT_UNIT = re.compile(r"(?:FADD|FMUL|FFMA|IMAD)\b")
INTEGER_UNIT = re.compile(
    r"(?:FMNMX|FSEL|FSETP|F2FP|I2FP|IADD3|IADD|VIADD|LEA|LOP3|SHF|ISETP|SEL|PLOP3|PRMT|VIMNMX|IABS|MOV|SGXT|P2R|R2P)\b"
)
EXPONENTIAL_UNIT = re.compile(r"(?:MUFU|F2I|I2F|F2F|POPC|FLO)\b")
SHARED = re.compile(r"(?:LDSM|LDGSTS|LDG|STG|LDS|STS|REDG?|ATOMG?|SHFL)\b")
WIDTH = re.compile(r"\.(128|64)\b")


def by_class(counts: Counter[str]) -> Counter[str]:
    """Sums opcodes by class. All others are 'integer': arithmetic, moves, special registers."""
    classes: Counter[str] = Counter()
    for opcode, count in counts.items():
        name = next((name for name, pattern in CLASS_PATTERN.items() if pattern.match(opcode)), "integer")
        classes[name] += count
    return classes


def shared_clocks(opcode: str) -> int:
    """Clocks of the shared memory and L1, which move 128 bytes per clock, for an access without conflicts."""
    if opcode.startswith("LDSM"):
        return 4 if opcode.endswith(".4") else 2
    width = WIDTH.search(opcode)
    return int(width[1]) // 32 if width else 1


def clocks_of(counts: Counter[str], device: Device) -> dict[str, float]:
    """Clocks of a scheduler that each unit takes for a pass of one warp. The shared memory serves four schedulers."""
    return {
        "issue": sum(counts.values()),
        "tensor": device.mma * sass.matching(counts, CLASS_PATTERN["HMMA"]),
        "shared": SCHEDULERS * sum(n * shared_clocks(opcode) for opcode, n in counts.items() if SHARED.match(opcode)),
        "exp": 8 * sass.matching(counts, EXPONENTIAL_UNIT),
        "float": device.float_clocks * sass.matching(counts, FLOAT_UNIT),
        "int": 2 * sass.matching(counts, INTEGER_UNIT),
    }


@dataclass(frozen=True)
class Hot:
    """A hot kernel, how to count a pass of it, and its limits.

    Attributes:
        title: in the report.
        file: name of the source without `_cuda.cu`.
        kernel: pattern in the mangled name.
        passes: its loops.
        limits: instructions per pass, on the architectures on which it is counted.
        moved: bytes to and from global memory that a thread needs to move in a pass; 0 for attention.
        floor: lowest bound, in percent of a copy; 0 for attention.
        ldsm: largest number of clocks of ldmatrix per clock of the tensor cores; 0 if it is not limited.
    """

    title: str
    file: str
    kernel: re.Pattern[str]
    passes: tuple[Pass, ...]
    limits: dict[str, int]
    moved: int = 0
    floor: float = 90
    ldsm: float = 0


@dataclass(frozen=True)
class Row:
    """The counts of a kernel on a device."""

    hot: Hot
    device: Device
    counts: Counter[str]

    @property
    def clocks(self) -> float:
        """Clocks of a scheduler per pass of a warp, of the busiest unit."""
        return max(clocks_of(self.counts, self.device).values())

    @property
    def percent_of_copy(self) -> float:
        """Bound of a memory-bound kernel; above 100 the memory is the limit."""
        if not self.clocks:
            return 0
        return 100 * self.hot.moved * WARP * SCHEDULERS / self.clocks / self.device.copy_per_clock

    @property
    def teraflops(self) -> float:
        """Bound of an attention kernel."""
        if not self.clocks:
            return 0
        operations = MMA_OPERATIONS * sass.matching(self.counts, CLASS_PATTERN["HMMA"]) * SCHEDULERS
        return operations / self.clocks * self.device.multiprocessors * self.device.clock / 1e12

    @property
    def ldsm_ratio(self) -> float:
        """Clocks of ldmatrix per clock of the tensor cores."""
        units = clocks_of(Counter({op: n for op, n in self.counts.items() if op.startswith("LDSM")}), self.device)
        tensor = clocks_of(self.counts, self.device)["tensor"]
        return units["shared"] / tensor if tensor else 0

    def problems(self, architecture: str) -> list[str]:
        """A line per limit that is exceeded."""
        total, limit = sum(self.counts.values()), self.hot.limits[architecture]
        name = f"{self.hot.title} on {architecture}"
        found = []
        if not 0 < total <= limit:
            found.append(f"{name}: {total} instructions per pass, the limit is {limit}")
        if self.hot.moved and self.percent_of_copy < self.hot.floor:
            found.append(f"{name}: {self.percent_of_copy:.0f} % of a copy by count, the limit is {self.hot.floor}")
        if self.hot.ldsm and self.ldsm_ratio > self.hot.ldsm:
            found.append(f"{name}: ldmatrix takes {self.ldsm_ratio:.2f} of the tensor cores' clocks")
        return found


def pattern(text: str) -> re.Pattern[str]:
    """A compiled pattern: matched at the beginning of an opcode, or searched in a kernel's name."""
    return re.compile(text)


TENSOR = (pattern("HMMA"), pattern("STS|REDG|FMUL"))  # products first, then the rescaling of the sums
COPIES = pattern("LDGSTS")
WIDE = pattern(r"(?:LDG|STG)\S*\.128")


def attention(
    kernel: str, dim: int, general: bool, limits: dict[str, int], copies: int, turns: int = 1, ldsm: float = 0
) -> Hot:
    """An instance of an attention kernel for bf16. A pass is one tile.

    Args:
        kernel: forward, backward_keys or backward_queries.
        dim: head_dim.
        general: with softcap, ALiBi and dropout.
        limits: see Hot.
        copies: cp.async instructions per thread and tile.
        turns: iterations of the inner loop over rows per tile. The loop over channels of head_dim 256 counts once.
        ldsm: see Hot.
    """
    return Hot(
        f"attention {kernel} {dim}{' general' * general}",
        f"attention_{kernel}_bf16",
        pattern(rf"\d{kernel}_kernelI.*?ShapeOfILi{dim}ELb{int(general)}EE"),
        (Pass(COPIES, copies, TENSOR, turns),),
        limits,
        ldsm=ldsm,
    )


def memory(
    title: str,
    file: str,
    kernel: str,
    moved: int,
    limits: dict[str, int],
    passes: tuple[Pass, ...],
    floor: float = 90,
) -> Hot:
    """A memory-bound kernel for aligned bf16."""
    return Hot(title, file, pattern(kernel), passes, limits, moved, floor)


def wide(count: int, work: str = "FFMA|FMUL|FADD", **options: bool) -> Pass:
    """A pass with that many 16-byte accesses to global memory per thread."""
    return Pass(WIDE, count, (pattern(work),), **options)


def limits(sm_90a: int, sm_80: int) -> dict[str, int]:
    """Instructions per pass: the count with nvcc 13.0 plus 2 %, of attention plus 1 %."""
    return {"sm_90a": sm_90a, "sm_80": sm_80}


# The general kernels of the backward are counted on sm_90a only: on sm_80 their copies are in a loop of another form.
ATTENTION = [
    attention("forward", 64, False, limits(744, 743), copies=8),
    attention("forward", 96, False, limits(917, 916), copies=12),
    attention("forward", 128, False, limits(1092, 1080), copies=16, ldsm=1.1),
    attention("forward", 256, False, limits(814, 811), copies=16),
    attention("forward", 64, True, limits(901, 887), copies=4),
    attention("forward", 128, True, limits(1113, 1098), copies=8),
    attention("forward", 256, True, limits(813, 796), copies=8),
    attention("backward_keys", 64, False, limits(738, 723), copies=5),
    attention("backward_keys", 96, False, limits(851, 825), copies=7),
    attention("backward_keys", 128, False, limits(1032, 1043), copies=9, ldsm=1.1),
    attention("backward_keys", 256, False, limits(609, 573), copies=17),
    attention("backward_keys", 64, True, {"sm_90a": 1913}, copies=5, turns=2),
    attention("backward_keys", 128, True, {"sm_90a": 2345}, copies=9, turns=4),
    attention("backward_keys", 256, True, {"sm_90a": 786}, copies=17),
    attention("backward_queries", 64, False, limits(451, 434), copies=4),
    attention("backward_queries", 96, False, limits(523, 501), copies=6),
    attention("backward_queries", 128, False, limits(660, 643), copies=8),
    attention("backward_queries", 256, False, limits(510, 492), copies=16),
    attention("backward_queries", 64, True, limits(737, 714), copies=2),
    attention("backward_queries", 128, True, limits(826, 797), copies=4),
    attention("backward_queries", 256, True, limits(954, 937), copies=16),
]
VECTOR = "13__nv_bfloat16Lb1E"  # template arguments: bf16, rows that can be read in packs
STAGED = pattern(r"(?:LDS|STG)\S*\.128")  # of a row in shared memory
EXPONENTIALS = (pattern("MUFU"),)
MEMORY = [
    memory("norm forward", "norm", rf"7forwardI{VECTOR}Li8E", 256, limits(1670, 1607), (wide(32, straight=True),)),
    # the sums of dweight and dbias pass through shared memory; dsum is requested, or not, by a predicate
    memory(
        "norm backward", "norm_backward", rf"8backwardI{VECTOR}Li1ELi1E", 48, limits(278, 243), (wide(4, "LDS|STS"),)
    ),
    memory(
        "dual norm backward",
        "norm_backward",
        rf"8backwardI{VECTOR}Li1ELi2E",
        64,
        limits(359, 315),
        (wide(5, "LDS|STS"),),
    ),
    memory("rotary", "rotary", r"6rotateI13__nv_bfloat16Li8E", 256, limits(705, 650), (wide(24, straight=True),)),
    memory(
        "bias_gelu forward", "bias_gelu", r"7forwardI13__nv_bfloat16Lb0ELi8E", 64, limits(450, 446), (wide(6, "MUFU"),)
    ),
    memory(
        "bias_gelu backward",
        "bias_gelu",
        r"8backwardI13__nv_bfloat16Lb0ELi8E",
        96,
        limits(520, 521),
        (wide(6, "MUFU"),),
    ),
    memory(
        "gated forward, silu",
        "gated",
        r"7forwardI13__nv_bfloat16LNS_10ActivationE0ELi8E",
        96,
        limits(285, 267),
        (wide(6, "MUFU"),),
    ),
    memory(
        "gated backward, silu",
        "gated",
        r"8backwardI13__nv_bfloat16LNS_10ActivationE0ELi8E",
        160,
        limits(474, 456),
        (wide(10, "MUFU"),),
    ),
    memory(
        "bias_dropout_add forward, dropout",
        "bias_dropout_add",
        rf"7forwardI{VECTOR}",
        96,
        limits(461, 461),
        (wide(8, "IMAD|LOP3"),),
    ),
    memory(
        "bias_dropout_add backward, dropout",
        "bias_dropout_add",
        rf"8backwardI{VECTOR}",
        128,
        limits(734, 734),
        (wide(8, "IMAD|LOP3"),),
    ),
    memory(
        "softmax forward, 2,048 columns",
        "scaled_masked_softmax",
        r"7forwardI13__nv_bfloat16Li8ENS0_3CutILi32ELi2E",
        128,
        limits(546, 542),
        (wide(8, "MUFU|F2FP"),),
    ),
    memory(
        "softmax backward, 2,048 columns",
        "scaled_masked_softmax",
        r"8backwardI13__nv_bfloat16Li8ENS0_3CutILi32ELi2E",
        192,
        limits(643, 641),
        (wide(12),),
    ),
    memory(
        "cross_entropy statistics", "cross_entropy", rf"10statisticsI{VECTOR}", 64, limits(217, 217), (wide(4, "MUFU"),)
    ),
    memory(
        "cross_entropy backward", "cross_entropy", rf"8backwardI{VECTOR}", 128, limits(217, 217), (wide(8, "MUFU"),)
    ),
    # four packs: requested, then read for the statistics, then for the gradient
    memory(
        "cross_entropy fused",
        "cross_entropy",
        rf"5fusedI{VECTOR}Lb1E",
        128,
        limits(516, 504),
        (Pass(COPIES, 4, (COPIES,)), Pass(STAGED, 4, EXPONENTIALS), Pass(STAGED, 8, EXPONENTIALS)),
    ),
]
HOT = ATTENTION + MEMORY


def cubin_of(folder: Path, file: str, architecture: str) -> Path | None:
    """The newest cubin for an architecture that nvcc stored. If it is the only one from its virtual architecture, nvcc
    names it by that: compute_90 for sm_90a.
    """
    kept, virtual = folder / f"{file}_cuda.cu.keep", "compute_" + architecture[3:5]
    cubins = [*kept.glob(f"{file}_cuda.*{architecture}.cubin"), *kept.glob(f"{file}_cuda.{virtual}.cubin")]
    return max(cubins, key=lambda path: path.stat().st_mtime, default=None)


def rows_of(folder: Path, architecture: str, hot: list[Hot]) -> list[Row]:
    """Counts of the hot kernels in the cubins that nvcc left in the folder. Empty counts: not found."""
    rows, kernels = [], {}
    for one in hot:
        if architecture not in one.limits:
            continue
        if one.file not in kernels:
            cubin = cubin_of(folder, one.file, architecture)
            patterns = [other.kernel for other in hot if other.file == one.file]
            kernels[one.file] = sass.bodies(sass.disassemble(cubin, patterns)) if cubin else {}
        bodies = [lines for name, lines in kernels[one.file].items() if one.kernel.search(name)]
        counts: Counter[str] = Counter()
        blocks = sass.blocks_of(bodies[0]) if bodies else []
        passes = [sass.pass_counts(blocks, wanted) for wanted in one.passes]
        if all(passes):
            for found in passes:
                counts.update(found)
        rows.append(Row(one, DEVICES[architecture], counts))
    return rows


def line_of(row: Row, architecture: str) -> str:
    """One line of the report."""
    classes, clocks = by_class(row.counts), clocks_of(row.counts, row.device)
    bound = f"{row.percent_of_copy:5.0f} %" if row.hot.moved else f"{row.teraflops:4.0f} TF"
    return " ".join(
        [
            f"{sum(row.counts.values()):6} {row.hot.limits[architecture]:6}",
            *(f"{classes[column]:{len(column)}}" for column in COLUMNS),
            *(f"{clocks[unit]:{max(len(unit), 5)}.0f}" for unit in UNITS),
            bound,
            row.hot.title,
        ]
    )


def report(folder: Path, compiled: set[str], hot: list[Hot] = HOT) -> list[str]:
    """Prints counts and bounds of the hot kernels on the compiled architectures. Returns a problem per kernel that is
    beyond a limit or was not found.
    """
    if sass.nvdisasm() is None:
        print("speed by count: skipped, nvdisasm not found; do=pip install nvidia-cuda-nvdisasm")
        return []
    problems = []
    for architecture, device in DEVICES.items():
        if architecture not in compiled:
            print(f"speed by count: {architecture} was not compiled")
            continue
        print(
            f"speed by count, {architecture} ({device.name}): instructions and clocks of a scheduler per warp and pass"
        )
        print(" ".join([" total  limit", *COLUMNS, *(f"{unit:>5}" for unit in UNITS), "  bound kernel"]))
        for row in rows_of(folder, architecture, hot):
            print(line_of(row, architecture))
            problems += row.problems(architecture)
    return problems
