"""Engines: the implementations that one contract can run on, and which of them this machine has.

``auto`` picks by device, and on a GPU by the shape of each call (`preferences`); the argument ``engine`` of an op and
the environment variable ``LONGLIVE_ENGINE`` (for calls that say ``auto``) override it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

ENVIRONMENT = "LONGLIVE_ENGINE"
INTERPRETER = "TRITON_INTERPRET"
TRITON_VERSIONS = ((3, 6), (3, 10))  # the first that works, the first that is not known to


@dataclass(frozen=True)
class Engine:
    """One implementation of the ops.

    Attributes:
        name: what ``engine=`` takes.
        module: module that holds the ops' functions, within this package.
        devices: device types it runs on.
        summary: what it is, for people.
        obstacle: takes a device type, returns why the engine cannot run there on this machine, or None.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    summary: str
    obstacle: Callable[[str], str | None]


def _triton_obstacle(device_type: str) -> str | None:
    return _why_not_triton(device_type, os.environ.get(INTERPRETER, "").lower() in ("1", "true", "yes", "on", "y"))


@lru_cache
def _why_not_triton(device_type: str, interpreter: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'longlive-rag-ops[gpu]')"
    version = _version("triton")
    first, beyond = TRITON_VERSIONS
    if version is not None and not first <= version < beyond:
        found, low, high = (".".join(map(str, v)) for v in (version, first, beyond))
        return f"it needs triton >= {low}, < {high}; found {found}"
    if torch.version.hip is not None:
        return "its kernels are written and compiled for CUDA, this torch is built for ROCm"
    if device_type == "cpu":
        interpreted = f"on a CPU it runs only in Triton's interpreter, for tests: set {INTERPRETER}=1"
        if not interpreter:
            return interpreted
        reason = interpreter_obstacle()
        if reason is not None:
            return reason
        language = sys.modules.get("triton.language")
        if language is not None and type(language.softmax).__name__ != "InterpretedFunction":
            return f"{interpreted} before anything imports triton"
    elif _has_cuda() and torch.cuda.get_device_capability() < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"it needs a device of compute capability 8.0 or newer, got {capability}"
    return None


def _has_cuda() -> bool:
    try:
        return torch.cuda.is_available()
    except Exception:  # a broken driver shows as one of many types; the doctor reports it
        return False


def interpreter_obstacle() -> str | None:
    """Why Triton's interpreter fails with the packages that are installed, or None."""
    # Loops up to a number that is known only when the kernel runs: NumPy no longer turns arrays into integers.
    if _version("triton") == (3, 6) and (_version("numpy") or (0, 0)) >= (2, 4):
        return "Triton 3.6's interpreter fails under NumPy 2.4 and newer"
    return None


def _version(distribution: str) -> tuple[int, int] | None:
    """Major and minor version of what is installed; None where no distribution has this name."""
    try:
        major, minor, *_ = importlib.metadata.version(distribution).split(".")
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("reference", "reference", ("cpu", "cuda"), "the oracle in float64, plain PyTorch", lambda _: None),
        Engine("dense", "dense", ("cpu", "cuda"), "dense attention, all else plain PyTorch", lambda _: None),
        Engine("triton", "triton_kernels.engine", ("cpu", "cuda"), "kernels over paged frames", _triton_obstacle),
    )
}
DEVICES = ("cpu", "cuda")


def check_engine(name: str) -> str:
    """Returns ``name`` when it is ``auto`` or an engine's name, else raises `ValueError`."""
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}; got {name!r}")
    return name


def resolve_engine(name: str, device_type: str) -> ModuleType:
    """Module of the engine that a call with ``engine=name`` on a device runs on; raises as `engine_name` does."""
    return _load(engine_name(name, device_type))


def engine_name(name: str, device_type: str) -> str:
    """Name of the engine that a call with ``engine=name`` on a device runs on.

    ``auto`` is ``dense`` on a CPU. On a GPU it stays ``auto``, Triton's steps with the attention that `preferences`
    names for each call; without Triton it is ``dense``.

    Raises:
        ValueError: no such engine, or no engine runs on this device type.
        RuntimeError: the engine is known but cannot run on this machine.
    """
    check_engine(name)
    if name == "auto" and os.environ.get(ENVIRONMENT):
        name = os.environ[ENVIRONMENT]
        if name not in ENGINES and name != "auto":
            raise ValueError(f"{ENVIRONMENT} must be one of auto, {', '.join(ENGINES)}; got {name!r}")
    if device_type not in DEVICES:
        raise ValueError(f"q must be on a device that an engine runs on ({', '.join(DEVICES)}), got {device_type}")
    if name == "auto":
        return "auto" if device_type == "cuda" and ENGINES["triton"].obstacle("cuda") is None else "dense"
    reason = ENGINES[name].obstacle(device_type)
    if reason is not None:
        works = ", ".join(other for other, engine in ENGINES.items() if engine.obstacle(device_type) is None)
        raise RuntimeError(f"engine {name!r} is not available: {reason}; engines that work here: {works}")
    return name


_loaded: dict[str, ModuleType] = {}


def _load(name: str) -> ModuleType:
    module = _loaded.get(name)
    if module is None:
        path = "auto" if name == "auto" else ENGINES[name].module
        module = _loaded[name] = importlib.import_module(f".{path}", __package__)
    return module


def report() -> list[dict[str, object]]:
    """Every engine with ``name``, ``available``, ``reason`` (why not, or None), ``devices`` and ``summary``.

    An engine is available when it runs on one of the devices that torch finds on this machine; ``devices`` are those.
    """
    present = [device for device in DEVICES if device == "cpu" or _has_cuda()]
    rows: list[dict[str, object]] = []
    for engine in ENGINES.values():
        reasons = {device: engine.obstacle(device) for device in engine.devices if device in present}
        runs = [device for device, reason in reasons.items() if reason is None]
        rows.append(
            {
                "name": engine.name,
                "available": bool(runs),
                "reason": None if runs else "; ".join(f"{reason}" for reason in dict.fromkeys(reasons.values())),
                "devices": runs or list(engine.devices),
                "summary": engine.summary,
            }
        )
    return rows
