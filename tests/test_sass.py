"""Reading what Triton's tools print about a compiled kernel."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from longlive_rag_ops.triton_kernels import sass

HOPPER = """
.text.attend:
        /*0290*/                   @UP1 UTMALDG.2D [UR12], [UR6] ;
        /*0b70*/                   @!UP4 UTMALDG.2D [UR8], [UR20] ;
        /*0c00*/                   WARPGROUP.ARRIVE ;
.L_x_1:
        /*10d0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR48], RZ, !UPT ;
        /*10e0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], R88, gsb0 ;
        /*10f0*/                   IGMMA.64x64x32.S8.S8 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*1100*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1110*/                   FFMA R4, R5, R6, R7 ;
        /*1120*/                   HFMA2 R3, -RZ, RZ, 0, 1.5e-05 ;
        /*1130*/                   WARPGROUPSET.USE ;
        /*1140*/                   EXIT ;
"""
# With encodings, as cuobjdump prints it; the second line of each is an encoding only.
AMPERE = """
\t\tFunction : attend
        /*0550*/                   LDGSTS.E.BYPASS.128 [R185+0x4000], [R2.64], P0 ;  /* 0x0400000002b97fae */
                                                                                     /* 0x000fe2000b901d48 */
        /*0560*/               @P0 LDGSTS.E.BYPASS.128 [R185+0x4800], [R6.64] ;      /* 0x0480000006b97fae */
        /*1480*/              @!PT HMMA.16816.F32.BF16 R120, R28, R146, R120 ;       /* 0x000000921c78723c */
        /*12480*/                  IMMA.16832.S8.S8 R8, R4.ROW, R2.COL, R8 ;         /* 0x0000000204087237 */
        /*12490*/                  IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;           /* 0x00000a00ff017624 */
"""
BLACKWELL = """
        /*06b0*/                   STTM.x64 tmem[UR60], RZ ;
        /*0ca0*/                   UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR13], tmem[UR54], idesc[UR55], !UPT ;
        /*0cb0*/              @UP0 UTCHMMA.2CTA gdesc[UR52], gdesc[UR48], tmem[UR13], tmem[UR54], idesc[UR55], UPT ;
        /*0cc0*/                   UTCQMMA gdesc[UR16], gdesc[UR20], tmem[UR13], tmem[UR54], idesc[UR55], UPT ;
        /*0cd0*/                   UTCBAR [UR9], URZ ;
"""


@pytest.mark.parametrize(
    ("listing", "matrix", "copies", "warpgroup"),
    [
        (HOPPER, {"HGMMA": 2, "IGMMA": 1}, {"UTMALDG": 2}, 2),
        (AMPERE, {"HMMA": 1, "IMMA": 1}, {"LDGSTS": 2}, 0),
        (BLACKWELL, {"UTCHMMA": 2, "UTCQMMA": 1}, {}, 0),
        ("", {}, {}, 0),
    ],
)
def test_instructions_are_counted(listing: str, matrix: dict[str, int], copies: dict[str, int], warpgroup: int) -> None:
    assert sass.count_instructions(listing) == sass.Instructions(matrix, copies, warpgroup)


USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function attend:
  REG:255 STACK:48 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function trap:
  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ASSEMBLER = """
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    48 bytes stack frame, 60 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
ptxas info    : Compile time = 76.582 ms
"""


def test_resources_are_read() -> None:
    assert sass.parse_usage(USAGE) == sass.Resources(255, 48)
    assert sass.parse_assembler(ASSEMBLER) == sass.Resources(255, 48)


@pytest.mark.parametrize("parse", [sass.parse_usage, sass.parse_assembler])
def test_other_output_of_a_tool_is_an_error_and_not_zero(parse: object) -> None:
    with pytest.raises(RuntimeError, match=r"did not say .* but 'Something else'"):
        parse("Something else")  # type: ignore[operator]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of scripts, which stand for Triton's tools."""
    triton = pytest.importorskip("triton")

    class Knobs:
        def __getattr__(self, name: str) -> SimpleNamespace:
            path = tmp_path / name.replace("_", "-")
            if not path.exists():
                raise RuntimeError(f"Cannot find {name}")
            return SimpleNamespace(path=str(path))

    monkeypatch.setattr(triton.knobs, "nvidia", Knobs())
    return tmp_path


def script(folder: Path, name: str, *lines: str) -> None:
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh -e", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_resources_without_cuobjdump_come_from_the_assembler_of_the_target(tools: Path) -> None:
    script(tools, "ptxas", "echo 'ptxas info : Used 40 registers, 8 bytes stack frame' >&2")
    script(
        tools,
        "ptxas-blackwell",
        'echo "Used 50 registers, 0 bytes stack frame $*" >&2',
        'test "$2" = --gpu-name=sm_100a',
    )
    ptx = tools / "kernel.ptx"
    ptx.write_text(".version 8.7\n.target sm_90a\n")
    assert sass.resources(tools / "kernel.cubin", ptx) == sass.Resources(40, 8)
    ptx.write_text(".version 8.7\n.target sm_100a\n")
    assert sass.resources(tools / "kernel.cubin", ptx) == sass.Resources(50, 0)
    script(tools, "cuobjdump", "echo 'REG:60 STACK:0 LOCAL:4'")
    assert sass.resources(tools / "kernel.cubin", ptx) == sass.Resources(60, 4)


def test_a_missing_disassembler_gives_nothing_and_a_failing_one_is_named(tools: Path) -> None:
    assert sass.disassemble(tools / "kernel.cubin") is None
    script(tools, "nvdisasm", "echo 'broken file' >&2", "exit 3")
    with pytest.raises(RuntimeError, match="nvdisasm failed with exit status 3: broken file"):
        sass.disassemble(tools / "kernel.cubin")
