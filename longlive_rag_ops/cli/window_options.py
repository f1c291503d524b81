"""Options that several commands have: sizes of the attention window."""

from __future__ import annotations

import argparse


def add_window_options(parser: argparse.ArgumentParser, title: str = "window sizes in latent frames") -> None:
    """Adds ``--window``, ``--sink``, ``--top-k`` and ``--recent-exclude``; the defaults are the published method's."""
    frames = parser.add_argument_group(title)
    for option, default, metavar, meaning in (
        ("--window", 12, "W", "frames attended to"),
        ("--sink", 1, "S", "first frames kept"),
        ("--top-k", 6, "K", "frames retrieved"),
        ("--recent-exclude", 5, "R", "newest evicted frames left out"),
    ):
        frames.add_argument(option, type=int, default=default, metavar=metavar, help=f"{meaning} (default %(default)s)")
