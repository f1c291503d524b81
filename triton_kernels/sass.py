"""What a compiled kernel takes and what it is made of, read with the tools that come with Triton.

The tools are found through ``triton.knobs.nvidia``. Without the disassembler there are no instruction counts; without
``cuobjdump`` the resources come from assembling the PTX again with ``ptxas -v``. No GPU and no driver is needed.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# "/*0030*/  @!P2 HGMMA.64x64x16.F32.BF16 ..." as nvdisasm and cuobjdump print it; group 1 is what precedes the first
# dot. Lines of encoding have nothing but a second comment.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
# mma.sync (half, integer, 8-bit float, ...), Hopper's wgmma, Blackwell's tcgen05.mma
_MATRIX = re.compile(r"[HIQBDO]MMA|[HIQB]GMMA|UTC[A-Z]*MMA")
# cp.async, the tensor memory accelerator, and its bulk copies without a descriptor
_COPIES = ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP")


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, and bytes of local memory a thread, which is where spills go."""

    registers: int
    stack: int


@dataclass(frozen=True)
class Instructions:
    """Of one kernel, as written, not as executed.

    Attributes:
        matrix: matrix instructions, count by name.
        copies: asynchronous copies, count by name.
        warpgroup: ``WARPGROUP.ARRIVE`` and ``WARPGROUP.DEPBAR``, the brackets around runs of wgmma. Many brackets mean
            that each wgmma waits for the one before, which ptxas reports nowhere else.
    """

    matrix: dict[str, int]
    copies: dict[str, int]
    warpgroup: int


def count_instructions(sass: str) -> Instructions:
    """Counts in a disassembly."""
    counts = Counter(_INSTRUCTION.findall(sass))
    return Instructions(
        matrix={name: counts[name] for name in sorted(counts) if _MATRIX.fullmatch(name)},
        copies={name: counts[name] for name in _COPIES if counts[name]},
        warpgroup=counts["WARPGROUP"],
    )


def parse_usage(text: str) -> Resources:
    """Of the output of ``cuobjdump -res-usage``; the most that a function of it takes."""
    return Resources(_most(r"\bREG:(\d+)", text), _most(r"\bSTACK:(\d+)", text) + _most(r"\bLOCAL:(\d+)", text))


def parse_assembler(text: str) -> Resources:
    """Of what ``ptxas -v`` prints; the most that a function of it takes."""
    return Resources(_most(r"Used (\d+) registers", text), _most(r"(\d+) bytes stack frame", text))


def _most(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"a tool of Triton did not say {pattern!r} of a kernel, but {text.strip()!r}")
    return max(map(int, found))


def resources(cubin: Path, ptx: Path) -> Resources:
    """Of the kernel in a file."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is not None:
        return parse_usage(_output(cuobjdump, "-res-usage", str(cubin)))
    target = re.search(r"^\s*\.target\s+(sm_(\d+)\w*)", ptx.read_text(), re.MULTILINE)
    if target is None:
        raise RuntimeError(f"no .target in {ptx.name}")
    ptxas = tool("ptxas_blackwell" if int(target[2]) >= 100 else "ptxas")
    if ptxas is None:
        raise RuntimeError("neither cuobjdump nor ptxas of Triton is there")
    result = ptx.with_suffix(".again")
    try:
        return parse_assembler(_output(ptxas, "-v", f"--gpu-name={target[1]}", str(ptx), "-o", str(result)))
    finally:
        result.unlink(missing_ok=True)


def disassemble(cubin: Path) -> str | None:
    """The kernel's instructions, or None without a disassembler."""
    nvdisasm = tool("nvdisasm")
    return None if nvdisasm is None else _output(nvdisasm, "--print-code", "--no-dataflow", str(cubin))


def tool(name: str) -> str | None:
    """Path of one of Triton's tools, None when it is missing."""
    import triton

    try:
        return str(getattr(triton.knobs.nvidia, name).path)
    except (RuntimeError, AttributeError):
        return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed with exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout + (done.stderr if Path(command[0]).name.startswith("ptxas") else "")  # which logs there
