"""Banks in a process that was forked: its copy of a bank has none of the threads, and is not to be touched or ended."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol

_banks: weakref.WeakSet[Forked] = weakref.WeakSet()


class Forked(Protocol):
    """What is told in the child."""

    def forked(self) -> object:
        """Takes its leave in the child; returns what must never be destroyed there."""


def leave_in_children(bank: Forked) -> None:
    """From now on ``bank.forked()`` is called in every child that is forked from this process."""
    _banks.add(bank)


def _in_child() -> None:
    for bank in list(_banks):
        # Its end would join threads that are not there; so one reference is never given back, not even at exit.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(bank.forked()))
    _banks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
