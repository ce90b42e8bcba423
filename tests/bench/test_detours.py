"""What the audit leaves out of machine code: loops that only some chunks take."""

from bench.detours import skip_detours
from bench.machine_code import instructions

CODE = """
        /*0000*/                   MOV R1, R2 ;
.L_tile:
        /*0010*/                   LDG.E.128 R4, desc[UR14][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_fast) ;
.L_gaussian:
        /*0030*/                   LDG.E R8, desc[UR14][R2.64] ;
        /*0040*/               @P1 BRA `(.L_gaussian) ;
        /*0050*/                   FMUL R4, R4, R8 ;
.L_fast:
        /*0060*/                   STG.E.128 desc[UR14][R2.64], R4 ;
        /*0070*/              @!P2 BRA `(.L_tile) ;
        /*0080*/                   EXIT ;
"""


def test_what_leads_through_a_loop_over_scalars_is_left_out():
    names = [step.name for step in skip_detours(instructions(CODE))]
    assert names == ["MOV", "LDG.E.128", "BRA", "STG.E.128", "BRA", "EXIT"]


def test_other_jumps():
    """Check loops that end in a call, as sm_80 has them, and lanes that part, which they do not, and go elsewhere."""
    called = CODE.replace("@!P2 BRA `(.L_tile)", "@!P2 CALL.REL.NOINC `(.L_tile)")
    names = [step.name for step in skip_detours(instructions(called))]
    assert names == ["MOV", "LDG.E.128", "BRA", "STG.E.128", "CALL.REL.NOINC", "EXIT"]
    parted = CODE.replace(".L_gaussian:", "        /*0028*/    BRA.DIV UR4, `(.L_parted) ;\n.L_gaussian:")
    parted += ".L_parted:\n        /*0090*/    WARPSYNC 0xf ;\n        /*00a0*/    BRA `(.L_fast) ;\n"
    names = [step.name for step in skip_detours(instructions(parted))]
    assert names[:6] == ["MOV", "LDG.E.128", "BRA", "STG.E.128", "BRA", "EXIT"]
    jumps = instructions("\ts_cbranch_scc1 .LBB0_2\n\ts_branch .LBB0_3\n")
    assert [(step.target, step.predicated) for step in jumps] == [(".LBB0_2", True), (".LBB0_3", False)]


def test_other_code_stays():
    """Check a loop inside that moves as much as the one around it, and code without one."""
    for text in (CODE.replace("LDG.E R8", "LDG.E.128 R8"), CODE.replace("@P1 BRA", "@P1 MOV")):
        assert skip_detours(instructions(text)) == instructions(text)
