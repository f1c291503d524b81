"""What a run of the suites is told: device, dtype, rounds, threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cpu_timer import CpuTimer
from benchmarks.figures import Shape
from benchmarks.gpu_timer import DryTimer, GpuTimer
from benchmarks.harness import Bench
from benchmarks.record import Record, environment

Done = Callable[[list[Record]], None]
"""What a suite calls with all its records so far, after each group."""


@dataclass(frozen=True)
class Preset:
    """How a suite runs. The sizes that belong to a preset's name are in a table in each suite's module.

    Attributes:
        name: cpu, gpu or tiny. tiny is for tests: all of a suite's code on a CPU, once, with sizes that take seconds.
        rounds: in which contenders take turns.
        threads: of a CPU, that torch uses.
        facts: of the environment, as `benchmarks.record.environment` gives them, and the preset's name.
    """

    name: str
    device: str
    dtype: torch.dtype
    rounds: int
    threads: int
    facts: Mapping[str, Any] = field(default_factory=dict)


# name: device, dtype, rounds, shape of a layer that a Bench has where a suite gives no other
PRESETS: dict[str, tuple[str, torch.dtype, int, Shape]] = {
    "cpu": ("cpu", torch.float32, 7, Shape(grid=(15, 26))),
    "gpu": ("cuda", torch.bfloat16, 20, Shape()),
    "tiny": (
        "cpu",
        torch.float32,
        1,
        Shape(grid=(2, 3), block=2, window=8, heads=2, head_dim=32, new_pages=3, embedding=64),
    ),
}


def make_preset(name: str, rounds: int | None = None, threads: int | None = None) -> Preset:
    """The preset of that name, on this machine.

    Args:
        name: one of ``PRESETS``.
        rounds: instead of the preset's own.
        threads: set for torch in this process; None leaves what is set.

    Raises:
        ValueError: an unknown name, or a number below 1.
        RuntimeError: gpu, and torch finds no CUDA device.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    for argument, value in (("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1; got {value}")
    device, dtype, own_rounds, _ = PRESETS[name]
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("preset gpu needs a CUDA device, and torch finds none here; preset cpu needs none")
    if threads is not None:
        torch.set_num_threads(threads)
    facts = environment(device) | {"preset": name}
    return Preset(name, device, dtype, rounds or own_rounds, torch.get_num_threads(), facts)


def make_bench(preset: Preset, shape: Shape | None = None) -> Bench:
    """What times a suite's groups: in CUDA graphs on a GPU, call by call on a CPU, once in a dry run (tiny).

    Args:
        shape: of a layer, instead of the preset's own.
    """
    dry = preset.name == "tiny"
    timer: DryTimer | GpuTimer | CpuTimer
    if dry:
        timer = DryTimer()
    elif preset.device == "cuda":
        timer = GpuTimer(preset.rounds)
    else:
        timer = CpuTimer(preset.rounds)
    return Bench(shape or PRESETS[preset.name][3], preset.dtype, preset.device, timer, dry=dry)
