"""Speed by count: classes, clocks and bounds of counted instructions; what passes a limit or is missing is reported."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace

import pytest

from tests.cuda import sass, speed
from tests.cuda.test_sass import PASS, SASS

H200 = speed.DEVICES["sm_90a"]
TILE = Counter({"HMMA.16816.F32.BF16": 100, "LDSM.16.M88.4": 40, "FFMA": 200, "MUFU.EX2": 20})
COPY = Counter({"LDG.E.128.CONSTANT": 2, "STG.E.128": 2, "IMAD": 10, "LOP3.LUT": 6})
LIMITS = {"sm_90a": 360, "sm_80": 360}


def row(counts: Counter[str], **changes: object) -> speed.Row:
    hot = speed.Hot("loop", "loop", re.compile("loop"), (PASS,), LIMITS)
    return speed.Row(replace(hot, **changes), H200, counts)


def test_instructions_are_summed_by_class():
    classes = speed.by_class(Counter({"HMMA.16816.F32": 3, "HMMAX": 1, "LDG.E.128": 2, "REDG.E.ADD": 1, "ISETP.NE": 4}))
    assert classes == {"HMMA": 3, "memory": 3, "integer": 5}


def test_every_unit_has_its_clocks():
    clocks = speed.clocks_of(TILE, H200)
    assert clocks == {"issue": 360, "tensor": 640, "shared": 640, "exp": 160, "float": 200, "int": 0}
    assert speed.clocks_of(TILE, speed.DEVICES["sm_80"])["float"] == 400


@pytest.mark.parametrize(
    ("opcode", "clocks"), [("LDSM.16.M88.4", 4), ("LDSM.16.MT88.2", 2), ("LDS.128", 4), ("STS.64", 2), ("LDS.U", 1)]
)
def test_shared_memory_moves_128_bytes_per_clock(opcode, clocks):
    assert speed.shared_clocks(opcode) == clocks


def test_the_busiest_unit_bounds_attention():
    assert row(TILE).clocks == 640
    assert row(TILE).teraflops == pytest.approx(4096 * 100 * 4 / 640 * 132 * 1.7e9 / 1e12)
    assert row(TILE).ldsm_ratio == pytest.approx(1)


def test_a_copy_of_few_instructions_is_faster_than_the_memory():
    copied = row(COPY, moved=64)
    assert copied.clocks == 64  # 16 accesses of 128 bytes by each of four schedulers
    assert copied.percent_of_copy == pytest.approx(100 * 64 * 32 * 4 / 64 / (4.3e12 / 132 / 1.7e9))


def test_within_the_limits_there_is_no_problem():
    assert row(TILE, ldsm=1.1).problems("sm_90a") == []
    assert row(COPY, moved=64).problems("sm_90a") == []


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        (TILE, {"limits": {"sm_90a": 359}}, "360 instructions per pass, the limit is 359"),
        (TILE, {"ldsm": 0.9}, "ldmatrix takes 1.00 of the tensor cores' clocks"),
        (COPY, {"moved": 8, "floor": 90}, "83 % of a copy by count, the limit is 90"),
        (Counter(), {}, "0 instructions per pass, the limit is 360"),
    ],
)
def test_beyond_a_limit_is_a_problem(counts, changes, message):
    assert [problem.split(": ", 1)[1] for problem in row(counts, **changes).problems("sm_90a")] == [message]


def test_kernels_are_found_in_the_cubins_of_nvcc(tmp_path, monkeypatch, capsys):
    (tmp_path / "loop_cuda.cu.keep").mkdir()
    for architecture in speed.DEVICES:
        (tmp_path / "loop_cuda.cu.keep" / f"loop_cuda.compute_90.{architecture}.cubin").touch()
    monkeypatch.setattr(sass, "nvdisasm", lambda: "nvdisasm")
    monkeypatch.setattr(sass, "disassemble", lambda *_: SASS)
    found = row(TILE).hot
    problems = speed.report(tmp_path, set(speed.DEVICES), [found, replace(found, title="missing", file="missing")])
    assert problems == [
        f"missing on {architecture}: 0 instructions per pass, the limit is 360" for architecture in ("sm_90a", "sm_80")
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["10", "360", "1"] in [line[:3] for line in lines]


def test_the_newest_cubin_is_read_under_both_names_that_nvcc_gives_it(tmp_path):
    kept = tmp_path / "loop_cuda.cu.keep"
    kept.mkdir()
    assert speed.cubin_of(tmp_path, "loop", "sm_90a") is None
    alone, several = kept / "loop_cuda.compute_90.cubin", kept / "loop_cuda.compute_90.sm_90a.cubin"
    for age, path in enumerate((alone, several)):
        path.touch()
        os.utime(path, (age, age))
    assert speed.cubin_of(tmp_path, "loop", "sm_90a") == several
    os.utime(alone, (9, 9))
    assert speed.cubin_of(tmp_path, "loop", "sm_90a") == alone
    assert speed.cubin_of(tmp_path, "loop", "sm_80") is None


def test_only_compiled_architectures_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sass, "nvdisasm", lambda: "nvdisasm")
    (problem,) = speed.report(tmp_path, {"sm_90a"}, [row(TILE).hot])
    assert "on sm_90a: 0 instructions" in problem
    assert "sm_80 was not compiled" in capsys.readouterr().out


def test_without_a_disassembler_the_counts_are_skipped(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sass, "nvdisasm", lambda: None)
    assert speed.report(tmp_path, {"sm_90a"}) == []
    assert "skipped, nvdisasm not found" in capsys.readouterr().out


def test_every_kernel_is_counted_on_sm_90a():
    assert all("sm_90a" in hot.limits and set(hot.limits) <= set(speed.DEVICES) for hot in speed.HOT)
    assert len({hot.title for hot in speed.HOT}) == len(speed.HOT)
