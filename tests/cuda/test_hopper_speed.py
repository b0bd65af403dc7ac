"""Products, paths and bounds of hopper_speed.py, on SASS whose counts are known."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.cuda import hopper_speed, sass

NAME = "_ZN4neox9attention21hopper_forward_kernelI13__nv_bfloat16NS0_11HopperShapeILi128ELi6EEEEEvT_"


def kernel(body: list[str], name: str = NAME) -> str:
    """Text as of nvdisasm -c."""
    lines = [line if line.startswith(".L") else f"/*{16 * at:04x}*/ {line} ;" for at, line in enumerate(body)]
    return "\n".join([f'\t.section\t.text.{name},"ax",@progbits', *lines])


# scores before the loop; a loop with scores and output, a rare path with an inner loop, and a skipped rescaling
FORWARD = [
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT",
    ".L_x_1:",
    *["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0"] * 8,
    *["HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88"] * 8,
    "@P0 BRA `(.L_x_3)",
    ".L_x_2:",
    "IADD3 R1, R1, 0x1, RZ",
    "@P1 BRA `(.L_x_2)",
    ".L_x_3:",
    *["MUFU.EX2 R1, R2"] * 64,
    "@P2 BRA `(.L_x_4)",
    *["FMUL R1, R2, R3"] * 64,
    ".L_x_4:",
    "@P3 BRA `(.L_x_1)",
    "EXIT",
]


def blocks_of(body: list[str]) -> list[sass.Block]:
    return sass.functions(hopper_speed.named(kernel(body)))[NAME]


def test_products_have_the_clocks_of_their_columns_and_read_their_operands():
    counts = Counter({"HGMMA128R": 2, "HGMMA64gdesc": 3, "FMUL": 7})
    assert hopper_speed.products(counts) == (5, 2 * 64 + 3 * 32, 2 * 4096 + 3 * (2048 + 2048))


def test_the_path_of_a_tile_rescales_and_avoids_rare_loops():
    counts = hopper_speed.tile_counts(blocks_of(FORWARD), 1)
    assert (counts["HGMMA128gdesc"], counts["HGMMA128R"], counts["MUFU"], counts["FMUL"]) == (8, 8, 64, 64)
    assert counts["IADD3"] == 0
    assert counts["BRA"] == 3


def test_an_inner_loop_with_products_turns():
    body = [
        ".L_x_1:",
        "FADD R1, R1, R2",
        ".L_x_2:",
        "HGMMA.64x64x16.F32.F16 R24, gdesc[UR20], R24",
        "@P0 BRA `(.L_x_2)",
        "HGMMA.64x64x16.F32.F16 R24, gdesc[UR20], R24",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    ]
    counts = hopper_speed.tile_counts(blocks_of(body), 2)
    assert counts == {"FADD": 1, "HGMMA64gdesc": 3, "BRA": 3}


def test_bound_of_a_tile():
    """16 products of 64 clocks for two warpgroups, of which 94 % are visible: that share of the peak."""
    work = hopper_speed.WORK["forward", 128]
    clocks = hopper_speed.tile_clocks(hopper_speed.tile_counts(blocks_of(FORWARD), 1), work, 128)
    assert clocks.tensor == 2 * 16 * 64
    assert clocks.issue == 2 * (16 + 64 + 64 + 3)
    assert clocks.exponentials == 2 * 64 * 8
    assert clocks.shared == (2 * (8 * 6144 + 8 * 4096) + 2 * 128 * 2 * 128) / 128
    assert clocks.bound(work, 128) == pytest.approx(989 * 0.9416, rel=1e-3)
    assert clocks.serial(work, 128) == pytest.approx(clocks.bound(work, 128) * 2048 / (2048 + 1024))


@pytest.mark.parametrize(
    ("scale", "problem"), [(1, None), (8, "hopper forward 128 bf16: bound 2"), (0, "no loop with products")]
)
def test_a_bound_below_its_goal_is_a_problem(monkeypatch, capsys, scale, problem):
    text = kernel([line for line in FORWARD for _ in range(scale if "R152" in line else 1)] if scale else ["EXIT"])
    monkeypatch.setattr(sass, "nvdisasm", lambda: "nvdisasm")
    monkeypatch.setattr(sass, "disassemble", lambda _: text)
    problems = hopper_speed.report([Path("attention_forward_bf16_hopper_cuda.sm_90a.cubin")])
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]
    assert ("hopper forward 128 bf16" in capsys.readouterr().out) == (scale > 0)


def test_without_nvdisasm_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(sass, "nvdisasm", lambda: None)
    assert hopper_speed.report([Path("a.cubin")]) == []
