"""Engines: the implementations that one contract can run on, and which of them this machine has.

``auto`` picks by device; the argument ``engine`` of an op and the environment variable ``LONGLIVE_ENGINE`` (for calls
that say ``auto``) override it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

ENVIRONMENT = "LONGLIVE_ENGINE"


@dataclass(frozen=True)
class Engine:
    """One implementation of the ops.

    Attributes:
        name: what ``engine=`` takes.
        module: module that holds the ops' functions, within this package.
        devices: device types it runs on.
        summary: what it is, for people.
        obstacle: returns why it cannot run here, or None.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    summary: str
    obstacle: Callable[[], str | None]


def _triton_obstacle() -> str | None:
    return "the Triton kernels are not part of this version"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("reference", "reference", ("cpu", "cuda"), "the oracle in float64, plain PyTorch", lambda: None),
        Engine("dense", "dense", ("cpu",), "PyTorch's dense attention over the contiguous window run", lambda: None),
        Engine("triton", "triton_kernels", ("cuda",), "fused Triton kernels over paged frames", _triton_obstacle),
    )
}
# What "auto" means on each device type; the first engine without an obstacle.
PREFERENCE = {"cpu": ("dense", "reference"), "cuda": ("triton", "reference")}


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

    Raises:
        ValueError: no such engine, or it does not run on this device type.
        RuntimeError: the engine is known but cannot run on this machine.
    """
    check_engine(name)
    if name == "auto" and os.environ.get(ENVIRONMENT):
        name = os.environ[ENVIRONMENT]
        if name not in ENGINES and name != "auto":
            raise ValueError(f"{ENVIRONMENT} must be one of auto, {', '.join(ENGINES)}; got {name!r}")
    if name == "auto":
        for choice in PREFERENCE.get(device_type, ()):
            if ENGINES[choice].obstacle() is None:
                return choice
        raise ValueError(f"q must be on a device that an engine runs on ({', '.join(PREFERENCE)}), got {device_type}")
    engine = ENGINES[name]
    if device_type not in engine.devices:
        raise ValueError(f"engine {name!r} runs on {', '.join(engine.devices)}; the tensors are on {device_type}")
    reason = engine.obstacle()
    if reason is not None:
        raise RuntimeError(f"engine {name!r} is not available: {reason}")
    return name


_loaded: dict[str, ModuleType] = {}


def _load(name: str) -> ModuleType:
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = importlib.import_module(f".{ENGINES[name].module}", __package__)
    return module


def report() -> list[dict[str, object]]:
    """Every engine with ``name``, ``available``, ``reason`` (why not, or None), ``devices`` and ``summary``."""
    rows: list[dict[str, object]] = []
    for engine in ENGINES.values():
        reason = engine.obstacle()
        rows.append(
            {
                "name": engine.name,
                "available": reason is None,
                "reason": reason,
                "devices": list(engine.devices),
                "summary": engine.summary,
            }
        )
    return rows
