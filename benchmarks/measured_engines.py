"""Which engines are measured on a device."""

from __future__ import annotations

from collections.abc import Sequence

from longlive_rag_ops.engines import ENGINES


def engine_obstacle(engine: str, device: str, dry: bool) -> str | None:
    """Why an engine is not measured here, or None.

    Args:
        dry: nothing is measured: Triton's interpreter will do, where it is set.
    """
    if engine == "auto":
        return None
    if engine == "triton" and device == "cpu" and not dry:
        return "on a CPU it runs only in Triton's interpreter, for tests"
    return ENGINES[engine].obstacle(device)


def split_engines(engines: Sequence[str], device: str, dry: bool) -> tuple[list[str], dict[str, str]]:
    """Engines that are measured here, and why the others are not."""
    obstacles = {engine: engine_obstacle(engine, device, dry) for engine in engines}
    missing = {engine: obstacle for engine, obstacle in obstacles.items() if obstacle is not None}
    return [engine for engine in engines if engine not in missing], missing
