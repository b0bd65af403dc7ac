"""cuda_check: parsing of ptxas's report, and detection of spills, missing kernels, branches around exponentials and
slow loops.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cuda import check_library

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_80'
ptxas info    : Function properties for _Z3addPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1056 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90a'
ptxas info    : Function properties for _Z3addPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""


def test_kernels_are_read():
    first, second = check_library.kernels_of(LOG)
    assert first == check_library.Kernel("_Z3addPf", "sm_80", registers=32, shared=1056, stack=0, spilled=0)
    assert second == check_library.Kernel("_Z3addPf", "sm_90a", registers=255, shared=0, stack=16, spilled=20)


def test_an_unknown_format_is_rejected():
    with pytest.raises(ValueError, match="another form"):
        list(check_library.kernels_of(LOG.replace("bytes spill stores", "spilled")))


def test_spills_and_empty_logs_are_problems(tmp_path, capsys):
    (tmp_path / "sum_cuda.cu.o.log").write_text(LOG)
    (tmp_path / "none_cuda.cu.o.log").write_text("ptxas info    : 0 bytes gmem\n")
    problems = check_library.report(sorted(tmp_path.glob("*.cu.o.log")))
    assert any("no kernel in it" in problem for problem in problems)
    assert any(problem.startswith("sum add") and "spills 20 bytes on sm_90a" in problem for problem in problems)
    assert len(problems) == 2
    assert "      255    1056     16      20  sum add" in capsys.readouterr().out


def test_what_ptxas_serialises_is_a_problem(tmp_path):
    log = tmp_path / "sum_cuda.cu.o.log"
    loss = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    log.write_text(LOG.replace("8 bytes spill stores, 12", "0 bytes spill stores, 0") + loss * 2)
    assert check_library.report([log]) == ["sum: wgmma.mma_async instructions are serialized"]


def test_registrations_of_an_operator_are_found():
    assert check_library.implementations("bias_gelu") == ["bias_gelu", "bias_gelu_backward"]


PTX = """.visible .entry _Z7guardedPf(
)
{
	@%p1 bra 	$L__BB0_2;
	ex2.approx.ftz.f32 %f1, %f2;
$L__BB0_2:
	@%p2 bra 	$L__BB0_3;
	ld.global.f32 %f3, [%rd1];
	ex2.approx.ftz.f32 %f4, %f3;
$L__BB0_3:
	@%p3 bra 	$L__BB0_2;
	ret;
}
.visible .entry _Z8selectedPf(
)
{
	ex2.approx.ftz.f32 %f1, %f2;
	selp.f32 %f3, %f1, %f2, %p1;
	ret;
}
"""


def test_branches_around_exponentials_are_counted():
    """Branches that skip memory accesses, and loops, do not count."""
    assert check_library.guarded_exponentials(PTX) == {"_Z7guardedPf": 1, "_Z8selectedPf": 0}


def test_the_newest_ptx_is_read_under_both_names_that_nvcc_gives_it(tmp_path):
    kept = tmp_path / "sum_cuda.cu.keep"
    kept.mkdir()
    names = ("sum_cuda.compute_80.ptx", "sum_cuda.compute_90.ptx", "sum_cuda.ptx")
    for age, name in enumerate(names):
        (kept / name).touch()
        os.utime(kept / name, (age, age))
    assert check_library.ptx_of(tmp_path) == [kept / "sum_cuda.ptx"]
    os.utime(kept / names[1], (9, 9))
    assert check_library.ptx_of(tmp_path) == [kept / "sum_cuda.compute_90.ptx"]


def test_the_architectures_are_those_of_the_logs(tmp_path):
    log = tmp_path / "sum_cuda.cu.o.log"
    log.write_text(LOG)
    assert check_library.architectures_of([log]) == {"sm_80", "sm_90a"}


def test_branches_around_exponentials_are_problems(tmp_path, capsys):
    for name in ("sum_cuda", "attention_backward_keys_bf16_cuda"):
        (tmp_path / f"{name}.compute_90.ptx").write_text(PTX)
    (problem,) = check_library.report_branches(sorted(tmp_path.iterdir()))
    assert problem.startswith("sum _Z7guardedPf branches around 1 exponentials")
    assert "in 2 files of PTX: 2" in capsys.readouterr().out


def test_divisions_in_attention_kernels_are_problems(tmp_path):
    division = "\t@%p1 div.s32 %r3, %r4, %r5;\n\trem.u32 %r6, %r4, %r5;\n\tdiv.rn.f32 %f1, %f2, %f3;\n"
    few, many = (PTX.replace("\tret;\n", division * count + "\tret;\n") for count in (6, 7))
    for name, ptx in (("norm", many), ("attention_few", few), ("attention_many", many)):
        (tmp_path / f"{name}_cuda.compute_90.ptx").write_text(ptx)
    problems = check_library.report_divisions(sorted(tmp_path.iterdir()))
    assert problems[0] == "attention_many _Z7guardedPf: 14 integer divisions, the limit is 13"
    assert all(problem.startswith("attention_many ") for problem in problems)


@pytest.mark.parametrize("ptx_only", [True, False])
def test_without_machine_code_only_the_ptx_is_checked(tmp_path, monkeypatch, capsys, ptx_only):
    (tmp_path / "sum_cuda.cu.keep").mkdir()
    (tmp_path / "sum_cuda.cu.keep" / "sum_cuda.ptx").write_text(PTX)
    (tmp_path / "sum_cuda.cu.o.log").touch()
    loaded = []
    monkeypatch.setattr(check_library, "load", lambda library, operators: loaded.append((library, operators)) or [])
    monkeypatch.setattr(sys, "argv", ["check", "--ptx-only" if ptx_only else "", "x.so", str(tmp_path), "sum"])
    assert check_library.main() == 1
    problems = capsys.readouterr().err
    assert "branches around 1 exponentials" in problems and ("no kernel in it" in problems) != ptx_only
    assert loaded == [(Path("x.so"), ["sum"])]
