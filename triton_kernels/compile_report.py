"""Compiles every kernel as it is shipped, for architectures that need not be there, and reports what came out.

The launchers themselves run, on tensors without data (`launch.compile_only`), so that what is compiled is what would
be launched: the same block sizes, switches and types.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton

from . import configs, sass
from .compile_cases import CASES, Case
from .configs import Config
from .launch import MODELS, Device, compile_only

# `Config.warpgroup` was recorded with this version; another one may well schedule otherwise.
RECORDED_WITH = "3.7.1"
TENSOR_MEMORY = 512  # columns; PTX ISA, "Tensor Memory Addressing"


@dataclass
class Compiled:
    """One kernel as compiled for one architecture.

    Attributes:
        architecture: as in ``sm_90``.
        kernel: its name.
        cases: names of the cases that launch this very kernel.
        row: kernel and shape class of the row of `configs.CONFIGS` that it takes its sizes from; None without a row.
        constants: the kernel's compile-time numbers, block sizes and switches, by name.
        num_warps, num_stages: Triton's launch options.
        registers: a thread.
        spilled: bytes of local memory a thread.
        shared, shared_limit: bytes of shared memory a block, and what the device gives.
        tensor_memory: columns, on Blackwell.
        matrix, copies, warpgroup: see `sass.Instructions`; None without a disassembler.
        problems: what is wrong with it, for people; empty when nothing is.
    """

    architecture: int
    kernel: str
    cases: list[str] = field(default_factory=list)
    row: str | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    shared_limit: int = 0
    tensor_memory: int = 0
    matrix: dict[str, int] | None = None
    copies: dict[str, int] | None = None
    warpgroup: int | None = None
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that ``json.dumps`` takes."""
        return asdict(self)


def architectures(text: str) -> list[int]:
    """``"80,90"`` as numbers.

    Raises:
        ValueError: one is not an architecture that kernels are shipped for.
    """
    words = [word.strip().removeprefix("sm_") for word in text.split(",") if word.strip()]
    if not words or any(word not in map(str, MODELS) for word in words):
        wrong = next((word for word in words if word not in map(str, MODELS)), text)
        raise ValueError(f"--arch must name architectures among {', '.join(map(str, MODELS))}; got {wrong!r}")
    return list(dict.fromkeys(map(int, words)))


def compile_all(
    wanted: Sequence[int],
    dump: Path | None = None,
    cases: Sequence[Case] | None = None,
    quick: bool = False,
    progress: Callable[[Sequence[Any]], Iterator[Any]] = iter,
) -> list[Compiled]:
    """Compiles each case for each architecture: one report a kernel, cases that share a kernel together.

    A case that does not compile is reported as a kernel with that problem.

    Args:
        wanted: architectures.
        dump: folder for ``ttgir``, ``ptx``, ``cubin`` and ``sass`` of each kernel; made when missing.
        cases: what to compile; all cases when not given.
        quick: of each row of `configs.CONFIGS` only the first kernel.
        progress: wraps what is iterated over.
    """
    found: dict[tuple[Any, ...], Future[Compiled]] = {}
    met: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)  # cases, by the same keys
    taken: Counter[str] = Counter()
    seen: set[tuple[Any, ...]] = set()
    pairs = [(number, case) for number in wanted for case in (CASES if cases is None else cases)]
    # The tools that look into a kernel are processes of their own, and run while the next kernel is compiled.
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = dump or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for number, case in progress(pairs):
            device = MODELS[number]
            try:
                launches = _launches(device, case, seen if quick else None)
            except Exception as error:  # Triton's compiler fails with many types; the report is about which case did
                found[number, case.op, case.name] = pool.submit(_failure, device, case, error)
                met[number, case.op, case.name] = [case.name]
                continue
            for name, kernel, row in launches:
                key = (number, name, kernel.hash, row)
                if key not in found:
                    stem = re.sub(r"[^\w+-]+", "_", f"{name}-{case.name}-sm_{number}")
                    taken[stem] += 1  # a case may launch a kernel twice, compiled in two ways
                    stem += f"-{taken[stem]}" if taken[stem] > 1 else ""
                    found[key] = pool.submit(_report, device, name, kernel, row, folder / stem)
                if case.name not in met[key]:
                    met[key].append(case.name)
        return [replace(report.result(), cases=met[key]) for key, report in found.items()]


def _launches(device: Device, case: Case, seen: set[tuple[Any, ...]] | None) -> list[tuple[str, Any, Config | None]]:
    """Name, Triton's compiled kernel and row of each kernel that a case launches; not those ``seen`` before."""
    rows: list[Config] = []
    launches: list[tuple[str, Any, Config | None]] = []

    def wanted(name: str) -> bool:
        if seen is None:
            return True
        key = (device.architecture, _row(name, rows) or name)
        if key in seen:
            return False
        seen.add(key)
        return True

    def record(name: str, kernel: Any) -> None:
        launches.append((name, kernel, _row(name, rows)))

    # ptxas' errors are printed by Triton, to where the report goes.
    with (
        contextlib.redirect_stdout(sys.stderr),
        configs.watch(rows.append),
        compile_only(device, record, wanted),
    ):
        case.run()
    return launches


def _row(name: str, rows: Sequence[Config]) -> Config | None:
    """The row last looked up for a kernel, whose function may be named a little longer."""
    fitting = [row for row in rows if row.kernel == name] or [row for row in rows if name.startswith(row.kernel)]
    return fitting[-1] if fitting else None


def _write(kernel: Any, stem: Path) -> Path:
    """Writes the stages of a kernel beside each other; returns the cubin's path."""
    cubin, listing = stem.with_name(stem.name + ".cubin"), stem.with_name(stem.name + ".sass")
    cubin.write_bytes(kernel.asm["cubin"])
    for stage in ("ttgir", "ptx"):
        cubin.with_suffix(f".{stage}").write_text(kernel.asm[stage])
    listing.unlink(missing_ok=True)
    instructions = sass.disassemble(cubin)
    if instructions is not None:
        listing.write_text(instructions)
    return cubin


def _failure(device: Device, case: Case, error: Exception) -> Compiled:
    problems = [f"does not compile: {_said(error)}"]
    return Compiled(device.architecture, case.op, shared_limit=device.shared_memory, problems=problems)


def _report(device: Device, name: str, kernel: Any, row: Config | None, stem: Path) -> Compiled:
    cubin = _write(kernel, stem)
    used = sass.resources(cubin, cubin.with_suffix(".ptx"))
    listing = cubin.with_suffix(".sass")
    counted = sass.count_instructions(listing.read_text()) if listing.exists() else None
    report = Compiled(
        architecture=device.architecture,
        kernel=name,
        row=None if row is None else f"{row.kernel}/{row.shape}",
        constants=_constants(kernel),
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        registers=used.registers,
        spilled=used.stack,
        shared=kernel.metadata.shared,
        shared_limit=device.shared_memory,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        matrix=None if counted is None else counted.matrix,
        copies=None if counted is None else counted.copies,
        warpgroup=None if counted is None else counted.warpgroup,
    )
    report.problems = problems(report, None if row is None else row.warpgroup)
    return report


def _constants(kernel: Any) -> dict[str, Any]:
    names = kernel.src.fn.arg_names
    given = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    return {name: value for name, value in given.items() if isinstance(value, (bool, int, float, str))}


def problems(report: Compiled, expected_warpgroup: int | None) -> list[str]:
    """What is wrong with a compiled kernel."""
    wrong = []
    if report.spilled:
        wrong.append(f"spills {report.spilled} bytes a thread")
    if report.shared > report.shared_limit:
        wrong.append(f"takes {report.shared} bytes of shared memory, a block may take {report.shared_limit}")
    if report.tensor_memory > TENSOR_MEMORY:
        wrong.append(f"takes {report.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY}")
    if (
        report.architecture == 90
        and None not in (expected_warpgroup, report.warpgroup)
        and report.warpgroup != expected_warpgroup
        and triton.__version__ == RECORDED_WITH
    ):
        wrong.append(f"has {report.warpgroup} WARPGROUP instructions, recorded are {expected_warpgroup}")
    return wrong


def _said(error: BaseException) -> str:
    """What an error says, in a line: Triton's begin with the place and end with the reason, source between them."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys([*lines[:1], *lines[-1:]]))}"
