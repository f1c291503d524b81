"""``longlive-rag doctor``: what is installed, what this machine can run, and why not more."""

from __future__ import annotations

import argparse
import json

from longlive_rag_ops import doctor


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command ``doctor``."""
    parser = subparsers.add_parser("doctor", help="print versions, engines, the compiled core, GPU and driver")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 whatever it says."""
    report = doctor.collect()
    print(json.dumps(report, indent=2) if args.json else doctor.format_text(report))
    return 0
