"""``longlive-rag bench``: runs suites of benchmarks from a clone of the repository."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkout import benchmark_module


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure every op, the block and the memory beside what one would use instead (needs a clone)",
        description="Runs suites of benchmarks and prints a table a group: each contender's time with quartiles, its "
        "time over ours, and its share of the device's own rate, timed in the same rounds. What is wrong is not timed "
        "and makes the exit status 1. The folder benchmarks is not installed with the package: this needs a clone of "
        "the repository.",
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="micro, scaling, block, quality (default: all)")
    parser.add_argument(
        "--preset", default="cpu", metavar="NAME", help="cpu, gpu, or tiny: a dry run of everything (default cpu)"
    )
    parser.add_argument(
        "--out", default="bench_out", metavar="DIR", help="folder for DEVICE/SUITE.jsonl (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each group (default: the preset's)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the suites; 1 when something is wrong."""
    if args.preset == "tiny":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which is later
    runner = benchmark_module("run_suites", "bench")
    presets = benchmark_module("preset", "bench")
    preset = presets.make_preset(args.preset, args.rounds, args.threads)
    if not args.out:
        raise ValueError("--out must name a folder; got an empty name")
    bar, show = _progress(args.quiet, runner.count_groups(args.suites, preset))
    status = runner.run_suites(args.suites, preset, Path(args.out), bar, show)
    print(f"results: {args.out}; longlive-rag bench-report {args.out} makes tables and plots of them")
    return status


def _progress(quiet: bool, groups: int) -> tuple[Any, Callable[[str], object]]:
    """A bar of groups done where someone may be looking and tqdm is there, and what prints beside it."""
    flushed = functools.partial(print, flush=True)
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar(), flushed
    if quiet or not sys.stderr.isatty():
        return _NoBar(), flushed
    return tqdm(total=groups, unit=" groups", leave=False), tqdm.write


class _NoBar(contextlib.nullcontext[None]):
    """Shows nothing."""

    def set_description(self, text: str) -> None: ...

    def update(self, count: int) -> None: ...
