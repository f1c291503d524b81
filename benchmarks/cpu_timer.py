"""Timing on a CPU: contenders take turns in one process."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu_timer import Contender, Timing
from benchmarks.turns import take_turns

CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # on Linux: such as 32768K
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache(path: Path = CACHE, otherwise: int = 32 << 20) -> int:
    """Bytes of the last-level cache, as far as the system says."""
    try:
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
    except (OSError, UnicodeError):
        return otherwise
    return int(found[1]) * UNITS[found[2]] if found else otherwise


class CpuTimer:
    """Wall seconds of single calls, or of as many in a row as last ``least`` seconds.

    Args:
        rounds: in each of which every contender is timed once.
        least: seconds of a measurement; short calls are repeated within one.
    """

    def __init__(self, rounds: int = 9, least: float = 0.005) -> None:
        self.rounds, self.least = rounds, least
        self.cache_bytes = last_level_cache()

    def measure(self, contenders: Sequence[Contender]) -> dict[str, Timing]:
        """Seconds a call of each, in every round."""
        measures = [self._measure(contender) for contender in contenders]
        found = take_turns(measures, self.rounds)
        return {contender.name: Timing.of(own, "eager") for contender, own in zip(contenders, found, strict=True)}

    def _measure(self, contender: Contender) -> Callable[[], float]:
        """What times a contender once; the first time it runs it up before."""
        calls, repeats = itertools.cycle(contender.calls), 0

        def measure() -> float:
            nonlocal repeats
            if not repeats:
                next(calls)()  # allocates, chooses algorithms
                began = time.perf_counter()
                next(calls)()
                repeats = max(1, round(self.least / max(time.perf_counter() - began, 1e-7)))
            began = time.perf_counter()
            for _ in range(repeats):
                next(calls)()
            return (time.perf_counter() - began) / repeats

        return measure
