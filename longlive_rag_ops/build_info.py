"""The compiled part of the package, ``longlive_rag_ops._C``: loading it, and what it was built from."""

from __future__ import annotations

import importlib
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

HOW_TO_BUILD = (
    "build it with `make setup`, or `pip install .` in the checkout (needs a C++17 compiler; "
    "LONGLIVE_BUILD_CUDA=0 leaves CUDA out)"
)


def extension() -> ModuleType:
    """The module ``longlive_rag_ops._C``.

    Raises ImportError that says why it cannot be loaded and how to build it. Needs neither torch nor a CUDA driver.
    """
    try:
        return importlib.import_module("longlive_rag_ops._C")
    except ImportError as error:
        raise ImportError(f"longlive_rag_ops._C cannot be loaded: {_why_missing(error)}; {HOW_TO_BUILD}") from error


def _why_missing(error: ImportError) -> str:
    built = sorted(path.name for path in Path(__file__).parent.glob("_C.*"))
    if not built:
        return "it was not built"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if f"_C{suffix}" not in built:
        return f"it was built for another Python ({', '.join(built)}; this one wants _C{suffix})"
    return str(error)


def build_info() -> dict[str, Any]:
    """What the extension module was built from; never raises.

    ``available`` (bool) and ``reason`` (str or None, why it is not) are always there. When it is available, so are
    ``version``, ``compiler``, ``build_type``, ``cxx_standard``, ``python``, ``pybind11``, ``cuda`` (bool),
    ``cuda_reason`` (why CUDA sources were not compiled) and ``cuda_archs`` (CMake's list of architectures).
    """
    try:
        module = extension()
    except ImportError as error:
        return {"available": False, "reason": str(error)}
    return {"available": True, "reason": None, **module.build_info()}


def summary() -> str:
    """One line about the extension module, as ``make setup`` prints it."""
    info = build_info()
    if not info["available"]:
        return str(info["reason"])
    cuda = f"CUDA for {info['cuda_archs']}" if info["cuda"] else f"no CUDA: {info['cuda_reason']}"
    return f"longlive_rag_ops._C {info['version']} ({info['compiler']}, Python {info['python']}; {cuda})"
