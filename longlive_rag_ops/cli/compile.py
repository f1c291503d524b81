"""``longlive-rag compile``: compiles the Triton kernels ahead of time, without a GPU, and shows what they take."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..triton_kernels.compile_report import Compiled

HEADER = (
    *("kernel", "case", "blocks", "warps", "stages", "registers", "spilled", "shared"),
    *("matrix", "copies", "WARPGROUP"),
)
LEFT = ("kernel", "case", "blocks", "matrix", "copies")  # the other columns are numbers


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "compile",
        help="compile the Triton kernels for GPUs that need not be there, and show what they take",
        description="Compiles every Triton kernel in its shipped configuration, without a GPU, and prints registers "
        "and spilled bytes a thread, shared memory a block of the device's limit, and counts of matrix instructions, "
        "asynchronous copies and (sm_90) WARPGROUP instructions; a kernel that several cases share is shown once. "
        "Exits 1 when a kernel spills, does not fit, does not compile, or waits for each wgmma on its own.",
    )
    parser.add_argument(
        "--arch",
        default="80,90,100,120",
        metavar="LIST",
        help="architectures: 80, 89, 90, 100, 120 (default: %(default)s)",
    )
    parser.add_argument("--kernel", metavar="WORD", help="only cases whose op or name contains WORD")
    parser.add_argument("--quick", action="store_true", help="one kernel for each row of the table of configurations")
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="write ttgir, ptx, cubin and sass of each kernel there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compiles and prints; 1 when a kernel has a problem."""
    _leave_interpreter()
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            f'compile needs triton (pip install "longlive-rag-ops[gpu]"), which cannot be imported: {error}'
        ) from error
    from ..triton_kernels import compile_cases
    from ..triton_kernels.compile_report import architectures, compile_all

    wanted = architectures(args.arch)
    cases = [case for case in compile_cases.CASES if args.kernel is None or args.kernel in f"{case.op} {case.name}"]
    if not cases:
        names = dict.fromkeys(case.op for case in compile_cases.CASES)
        raise ValueError(f"--kernel must occur in a case, such as {', '.join(names)}; got {args.kernel!r}")
    reports = compile_all(wanted, args.dump, cases, args.quick, _progress)
    if args.json:
        found = [report.as_dict() for report in reports]
        print(json.dumps({"triton": triton.__version__, "architectures": wanted, "kernels": found}, indent=2))
    else:
        print(format_text(triton.__version__, wanted, reports))
    return int(any(report.problems for report in reports))


def _leave_interpreter() -> None:
    """Kernels that Triton's interpreter has taken over cannot be compiled, and it takes them when it is imported."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("", "0", "false", "off", "no"):
        return
    if "triton" in sys.modules:
        raise RuntimeError("compile needs a process without TRITON_INTERPRET: triton has been imported with it")
    del os.environ["TRITON_INTERPRET"]


def _progress(steps: Sequence[Any]) -> Iterator[Any]:
    """The steps, with a progress bar when someone may be looking and tqdm is there."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return iter(tqdm(steps, desc="compiling", unit="case", leave=False))
    return iter(steps)


def format_text(version: str, wanted: Sequence[int], reports: Sequence[Compiled]) -> str:
    """A table an architecture, then what is wrong."""
    lines = []
    for number in wanted:
        rows = [report for report in reports if report.architecture == number]
        lines += [f"sm_{number}, triton {version}, {len(rows)} kernels", *_table([_cells(row) for row in rows]), ""]
    wrong = [report for report in reports if report.problems]
    for report in wrong:
        row = "" if report.row is None else f", row {report.row}"
        name = f"sm_{report.architecture} {report.kernel} ({', '.join(report.cases)}{row})"
        lines += [f"PROBLEM: {name} {problem}" for problem in report.problems]
    return "\n".join([*lines, f"{len(wrong)} of {len(reports)} kernels have a problem" if wrong else "no problems"])


def _cells(report: Compiled) -> list[str]:
    if not report.num_warps:  # it does not compile
        return [report.kernel, report.cases[0], *["-"] * (len(HEADER) - 2)]
    return [
        report.kernel,
        report.cases[0] + (f" (+{len(report.cases) - 1})" if len(report.cases) > 1 else ""),
        " ".join(f"{name}={value}" for name, value in report.constants.items() if name.startswith("B")) or "-",
        str(report.num_warps),
        str(report.num_stages),
        str(report.registers),
        str(report.spilled),
        f"{report.shared}/{report.shared_limit}",
        _counts(report.matrix),
        _counts(report.copies),
        str(report.warpgroup) if report.warpgroup is not None and report.architecture == 90 else "-",
    ]


def _counts(counts: dict[str, int] | None) -> str:
    return " ".join(f"{name} {count}" for name, count in (counts or {}).items()) or "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if name in LEFT else cell.rjust(width)
            for name, cell, width in zip(HEADER, row, widths, strict=True)
        ).rstrip()
        for row in (HEADER, *rows)
    ]
