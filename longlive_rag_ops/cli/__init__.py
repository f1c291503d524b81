"""The command line: ``longlive-rag`` and ``python -m longlive_rag_ops`` are the same program.

Each command is a module here with ``add_parser(subparsers)`` and ``run(args) -> exit status``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from . import (
    bench,
    bench_report,
    compile,
    demo,
    doctor,
    eval_embedder,
    fit_codec,
    inspect,
    latents,
    replay,
    train_embedder,
)

COMMANDS = (
    demo,
    replay,
    doctor,
    compile,
    bench,
    bench_report,
    eval_embedder,
    fit_codec,
    inspect,
    latents,
    train_embedder,
)


def parser() -> argparse.ArgumentParser:
    """The program's argument parser, with every command."""
    root = argparse.ArgumentParser(
        prog="longlive-rag", description="Attention with a searchable memory for long autoregressive video generation."
    )
    root.add_argument("--version", action="version", version=f"longlive-rag {__version__}")
    subparsers = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 well, 1 a check failed, 2 wrong input."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
