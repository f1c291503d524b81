"""``longlive-rag bench-report``: tables and plots of benchmark results."""

from __future__ import annotations

import argparse
from pathlib import Path

from .checkout import benchmark_module, checkout_root


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "bench-report",
        help="turn benchmark results into Markdown tables and plots (needs a clone)",
        description="Reads the .jsonl files of result folders and writes report.md, with the targets set for the "
        "package beside what was measured, and plots (PNG).",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="DIR",
        help="folders of results, or of such folders, one a device (default: the clone's benchmarks/results)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write to (default: the first DIR, or benchmarks/results/report)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints what was written."""
    report = benchmark_module("bench_report", "bench-report")
    results = checkout_root("bench-report") / "benchmarks" / "results"
    if "" in args.folders or args.out == "":
        raise ValueError("DIR and --out must name folders; got an empty name")
    folders = [Path(name) for name in args.folders] or report.result_folders(results)
    out = Path(args.out) if args.out else folders[0] if args.folders else results / "report"
    for path in report.write_report(folders, out):
        print(f"written: {path}")
    return 0
