"""Short names of clips and embedders: what tables, pictures and reports call them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

LONGEST = 24
ALLOWED = re.compile(rf"[A-Za-z0-9._-]{{1,{LONGEST}}}")


def split_name(text: str, argument: str) -> tuple[str | None, str]:
    """``NAME=REST`` to its parts; None for a text without "=", or one that is itself a file's path.

    Raises:
        ValueError: NAME has other characters than letters, digits and ``._-``, or is longer than 24; REST is empty.
    """
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        return None, text
    if not ALLOWED.fullmatch(name) or not rest:
        raise ValueError(
            f"{argument}: got {text!r}; NAME=FILE must have a name of 1 to {LONGEST} letters, digits, dots, dashes and "
            "underscores, and a file"
        )
    return name, rest


def name_of(path: str) -> str:
    """A name made of a file's: its stem, other characters as underscores, cut to 24."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).stem)[:LONGEST] or "unnamed"


def check_names(names: Iterable[str], argument: str, taken: Iterable[str] = ()) -> None:
    """Raises ValueError for a name that cannot be one, occurs twice, or is among those taken."""
    seen: set[str] = set()
    reserved = set(taken)
    for name in names:
        if not ALLOWED.fullmatch(name):
            raise ValueError(
                f"{argument}: a name must have 1 to {LONGEST} letters, digits, dots, dashes and underscores, got "
                f"{name!r}"
            )
        if name in reserved:
            raise ValueError(
                f"{argument}: {name!r} is the name of a rule that is always there; give another, NAME=FILE"
            )
        if name in seen:
            raise ValueError(f"{argument}: {name!r} occurs twice; give each a name of its own, NAME=FILE")
        seen.add(name)
