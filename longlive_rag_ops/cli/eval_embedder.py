"""``longlive-rag eval-embedder``: judges embedders of latent frames without a generator."""

from __future__ import annotations

import argparse
from pathlib import Path

from .window_options import add_window_options


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "eval-embedder",
        help="judge embedders of latent frames: redundancy, spread, choice, recall of a scene that returns",
        description="Prints, for each embedder on each clip, how alike neighbouring frames are, how wide cosines are "
        "spread, and how far the chosen frames are those that full-history attention (of a toy, untrained) weighs "
        "most; and, on edits A, B, A of every ordered pair of clips, the recall of A. --out keeps all numbers, tables "
        "and pictures.",
    )
    parser.add_argument(
        "clips",
        nargs="+",
        metavar="CLIP",
        help="latent file (.safetensors, .pt, .pth, .npy: frames, C, H, W), video file, or sample:NAME; NAME=FILE "
        "names it. Best one shot each",
    )
    parser.add_argument(
        "--embedder",
        nargs="+",
        action="extend",
        metavar="NAME_OR_FILE",
        help="average_pool, grid_pool, trained (the package's own), or a checkpoint; NAME=FILE names it (default: "
        "average_pool grid_pool)",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for evaluation.json, evaluation.md and pictures")
    add_window_options(parser)
    parser.add_argument(
        "--edit-pairs",
        choices=("all", "none"),
        default="all",
        help="edits of every ordered pair of clips, or none (default %(default)s)",
    )
    parser.add_argument(
        "--size", default="320x176", metavar="WxH", help="frame size of videos, multiples of 16 (default %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads, 0: torch's choice (default 1)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print evaluation.json's object instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints."""
    from ..config import WindowConfig
    from ..demo.settings import FRAMES_PER_BLOCK, parse_size
    from ..evaluation.named_embedder import DEFAULT
    from ..evaluation.report import json_text
    from ..evaluation.run import run_evaluation
    from ..evaluation.table import summary_text

    report = run_evaluation(
        args.clips,
        args.embedder or DEFAULT,
        WindowConfig(args.window, args.sink, args.top_k, args.recent_exclude, FRAMES_PER_BLOCK),
        size=parse_size(args.size),
        edits=args.edit_pairs == "all",
        out=None if args.out is None else Path(args.out),
        threads=args.threads,
        progress=not args.quiet,
    )
    if args.json:
        print(json_text(report), end="")
        return 0
    print(summary_text(report))
    if args.out is not None:
        for name in ("evaluation.json", "evaluation.md", *report["pictures"]):
            print(f"written: {Path(args.out) / name}")
    return 0
