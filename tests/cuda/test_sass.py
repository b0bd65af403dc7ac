"""Instruction counts of loops in SASS: the ordinary path is found, with inner loops, without rare or skipped code."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

from tests.cuda import sass

# A loop (.L_x_1) with two copies, one of which a branch may skip; a rare path (.L_x_3); and an inner loop (.L_x_4) with
# a product.
SASS = """
	.section	.text.loop,"ax",@progbits
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
PASS = sass.Pass(re.compile("LDGSTS"), 2, (re.compile("HMMA"),))


def counts(**changes: object) -> dict[str, int]:
    return dict(sass.pass_counts(sass.blocks_of(sass.bodies(SASS)["loop"]), replace(PASS, **changes)))


def test_the_ordinary_path_has_the_copies_and_skips_rare_code():
    rest = {"HMMA.16816.F32.BF16": 1, "ISETP.NE.AND": 1, "MUFU.EX2": 1, "BRA": 4}
    assert counts() == {"LDGSTS.E.BYPASS.128": 2, "IADD3": 1, **rest}
    assert counts(count=1) == {"LDGSTS.E.BYPASS.128": 1, **rest}
    assert counts(count=3) == {}


def test_inner_loops_count_by_their_iterations():
    rest = {"LDGSTS.E.BYPASS.128": 2, "IADD3": 1, "MUFU.EX2": 1}
    assert counts(turns=4) == {**rest, "HMMA.16816.F32.BF16": 4, "ISETP.NE.AND": 4, "BRA": 7}


def test_of_two_paths_the_one_with_more_work_counts():
    work = (re.compile("HMMA"), re.compile("IMAD"))
    assert counts(work=work)["IMAD"] == 2


def test_a_kernel_without_a_loop_is_counted_from_its_first_instruction_to_its_exit():
    straight = counts(straight=True, count=1)  # the loop once
    assert (straight["MOV"], straight["EXIT"], straight["LDGSTS.E.BYPASS.128"]) == (1, 1, 1)


def test_without_the_work_nothing_is_counted():
    assert counts(work=(re.compile("DMMA"),)) == {}


def test_symbols_of_an_object_have_the_indices_that_the_linker_sees(tmp_path):
    source, compiled = tmp_path / "two.c", tmp_path / "two.o"
    source.write_text("int first(void) { return 1; }\nint second(void) { return 2; }\n")
    subprocess.run(["cc", "-c", str(source), "-o", str(compiled)], check=True)
    listed = subprocess.run(["readelf", "-sW", str(compiled)], capture_output=True, text=True, check=True).stdout
    symbols = sass.symbols_of(compiled.read_bytes())
    for name in ("first", "second"):
        assert re.search(rf"^\s*{symbols[name]}: .* {name}$", listed, re.MULTILINE)
