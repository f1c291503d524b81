"""Timing on a CPU: contenders take turns in one process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from benchmarks.gpu_timer import Contender, Timing


class CpuTimer:
    """Wall seconds of single calls, or of as many in a row as last ``least`` seconds.

    Args:
        rounds: in each of which every contender is timed once, in another order each time: whoever runs first finds the
            caches of whoever ran last, and a machine that becomes slower does so for all.
        least: seconds of a measurement; short calls are repeated within one.
    """

    cache_bytes = (
        32 << 20
    )  # last-level caches are shared and of unknown use here; tensors larger than this find them cold

    def __init__(self, rounds: int = 9, least: float = 0.005) -> None:
        self.rounds, self.least = rounds, least

    def measure(self, contenders: Sequence[Contender]) -> dict[str, Timing]:
        """Seconds a call of each, in every round."""
        calls = [itertools.cycle(contender.calls) for contender in contenders]
        repeats = []
        for own in calls:
            next(own)()  # allocates, chooses algorithms
            began = time.perf_counter()
            next(own)()
            repeats.append(max(1, round(self.least / max(time.perf_counter() - began, 1e-7))))
        seconds: list[list[float]] = [[] for _ in contenders]
        for number in range(self.rounds):
            for turn in range(len(contenders)):
                which = (turn + number) % len(contenders)
                own, count = calls[which], repeats[which]
                began = time.perf_counter()
                for _ in range(count):
                    next(own)()
                seconds[which].append((time.perf_counter() - began) / count)
        return {contender.name: Timing(times, "eager") for contender, times in zip(contenders, seconds, strict=True)}
