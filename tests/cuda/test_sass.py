"""Instruction counts of loops in SASS: the usual path is found, with inner loops, and without rare or skipped code."""

from __future__ import annotations

import pytest

from tests.cuda import check_library, sass

NAME = "_ZN4neox9attention14forward_kernelI13__nv_bfloat16NS0_14ForwardShapeOfILi64ELb0EEELb0EEEvNS0_7ForwardIT_EE"

# A loop (.L_x_1) with two copies, one of which a branch may skip; a rare path (.L_x_3); and an inner loop (.L_x_4) with
# a product.
SASS = f"""
	.section	.text.{NAME},"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR8][R4.64] ;
        /*0020*/              @P0 BRA `(.L_x_2) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R2+0x80], desc[UR8][R4.64] ;
        /*0040*/                   IADD3 R2, R2, 0x100, RZ ;
.L_x_2:
        /*0050*/                   BRA !P1, `(.L_x_4) ;
.L_x_3:
        /*0060*/                   IMAD R9, R9, R9, R9 ;
        /*0070*/                   IMAD R9, R9, R9, R9 ;
.L_x_4:
        /*0080*/                   HMMA.16816.F32.BF16 R16, R112, R116.reuse, R16 ;
        /*0090*/                   ISETP.NE.AND P2, PT, R8, RZ, PT ;
        /*00a0*/               @P2 BRA `(.L_x_4) ;
        /*00b0*/                   MUFU.EX2 R7, R7 ;
        /*00c0*/              @!P3 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5) ;
	.section	.nv.constant0,"a",@progbits
"""


def counts(copies: int, turns: int = 1) -> dict[str, int]:
    return dict(sass.tile_counts(sass.functions(SASS)[NAME], copies, turns))


def test_the_usual_path_has_the_copies_and_skips_rare_code():
    assert counts(2) == {"LDGSTS": 2, "BRA": 4, "IADD3": 1, "HMMA": 1, "ISETP": 1, "MUFU": 1}
    assert counts(1) == {"LDGSTS": 1, "BRA": 4, "HMMA": 1, "ISETP": 1, "MUFU": 1}
    assert counts(3) == {}


def test_inner_loops_count_by_their_iterations():
    assert counts(2, turns=4) == {"LDGSTS": 2, "BRA": 7, "IADD3": 1, "HMMA": 4, "ISETP": 4, "MUFU": 1}


def test_instructions_are_summed_by_class():
    assert sass.by_class(sass.tile_counts(sass.functions(SASS)[NAME], 2)) == {
        "LDGSTS": 2,
        "branch": 4,
        "integer": 2,
        "HMMA": 1,
        "MUFU": 1,
    }


@pytest.mark.parametrize(("limit", "problems"), [(10, 0), (9, 1)])
def test_a_loop_above_its_limit_is_a_problem(limit, problems, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sass, "nvdisasm", lambda: "nvdisasm")
    monkeypatch.setattr(sass, "disassemble", lambda _: SASS)
    monkeypatch.setitem(check_library.LOOPS, ("forward", 64, False), check_library.Loop(limit, copies=2))
    found = check_library.report_loops([tmp_path / "attention_forward_bf16_cuda.compute_90.sm_90a.cubin"])
    assert len(found) == problems
    assert "forward 64 bf16" in capsys.readouterr().out


def test_a_loop_that_is_not_found_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(sass, "nvdisasm", lambda: "nvdisasm")
    monkeypatch.setattr(sass, "disassemble", lambda _: SASS.replace("HMMA", "FFMA"))
    assert check_library.report_loops([tmp_path / "attention_forward_bf16_cuda.compute_90.sm_90a.cubin"])


def test_without_a_disassembler_the_counts_are_skipped(monkeypatch, capsys):
    monkeypatch.setattr(sass, "nvdisasm", lambda: None)
    assert check_library.report_loops([]) == []
    assert "skipped, nvdisasm not found" in capsys.readouterr().out
