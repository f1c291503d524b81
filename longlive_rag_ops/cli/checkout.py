"""The repository's own programs, which are not installed: found beside the package in a clone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import longlive_rag_ops


def checkout_root(purpose: str) -> Path:
    """The folder of the clone that this package is imported from.

    Raises:
        RuntimeError: there is none; the message names ``purpose``.
    """
    root = Path(longlive_rag_ops.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "run_suites.py").is_file():
        raise RuntimeError(
            f"{purpose} needs a clone of the repository with its folder benchmarks, which an installed package "
            "does not have; run it from a clone, installed there with pip install -e '.[bench]'"
        )
    return root


def benchmark_module(name: str, purpose: str) -> ModuleType:
    """A module of ``benchmarks`` in the clone.

    Raises:
        RuntimeError: no clone, or another ``benchmarks`` has been imported before.
    """
    root = str(checkout_root(purpose))
    sys.path.insert(0, root)  # before the current folder, which may have a benchmarks of its own
    try:
        package = importlib.import_module("benchmarks")
        if not any(Path(folder).resolve() == Path(root, "benchmarks") for folder in package.__path__):
            raise RuntimeError(
                f"{purpose}: another package named benchmarks is imported first; run it in a new process"
            )
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(root)
