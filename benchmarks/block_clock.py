"""Time of a block and of its parts: marks on the host's clock, or events on the current CUDA stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.gpu_timer import Contender, Timing
from benchmarks.turns import take_turns

PARTS = ("projections", "rotation + write", "embedding", "retrieval", "fetch stall", "attention", "rest")


class Marks(Protocol):
    """Points in time. None of the calls but `settle` waits."""

    def mark(self) -> Any: ...

    def between(self, first: Any, last: Any) -> float:
        """Seconds; after `settle`."""
        ...

    def settle(self) -> None:
        """Waits until everything is done that was given to the device."""
        ...


class HostMarks:
    """On a CPU a call has done its work when it returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, first: float, last: float) -> float:
        return last - first

    def settle(self) -> None:
        pass


class StreamMarks:
    """Events on the current stream: a mark is passed when the device gets there. Where the device waits for the host,
    the wait is in what lies between."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return float(first.elapsed_time(last)) / 1e3

    def settle(self) -> None:
        torch.cuda.synchronize()


def marks_for(device: str) -> Marks:
    return StreamMarks() if device == "cuda" else HostMarks()


class NoClock:
    """What a block that is timed as a whole is given: laps cost nothing."""

    running = False

    def lap(self, part: str) -> None:
        pass


NO_CLOCK = NoClock()


class PartClock(NoClock):
    """Adds up what passes between laps; the parts' sum is the time from the first mark to the last lap."""

    running = True

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._laps: list[tuple[str, Any]] = [("", marks.mark())]

    def lap(self, part: str) -> None:
        """What has passed since the last lap belongs to ``part``, one of ``PARTS``."""
        self._laps.append((part, self._marks.mark()))

    def seconds(self) -> dict[str, float]:
        """Of every part; those that never occurred have 0."""
        self._marks.settle()
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self._laps, self._laps[1:], strict=False):
            found[part] += self._marks.between(before, after)
        return found


class SteadyTimer:
    """Times calls of contenders whose work runs on behind them, as a fetch for the next block does.

    Each turn makes two calls without a stop between them, and times the second, from the end of the first: it finds the
    device as it is in the middle of a video, its own copies under way, and nobody else's.

    Args:
        rounds: in which all take turns, in an order that changes.
        marks: of the device.
        mode: of the records.
    """

    cache_bytes = 1

    def __init__(self, rounds: int, marks: Marks, mode: str = "eager") -> None:
        self.rounds, self._marks, self._mode = rounds, marks, mode

    def measure(self, contenders: Sequence[Contender]) -> dict[str, Timing]:
        """Seconds of a call of each, in every round."""
        found = take_turns([self._measure(contender) for contender in contenders], self.rounds)
        return {contender.name: Timing.of(own, self._mode) for contender, own in zip(contenders, found, strict=True)}

    def _measure(self, contender: Contender) -> Callable[[], float]:
        """What takes a turn; the first one begins with a call more, which chooses algorithms."""
        call, begun = contender.calls[0], False

        def measure() -> float:
            nonlocal begun
            if not begun:
                begun = True
                call()
            self._marks.settle()
            call()
            begin = self._marks.mark()
            call()
            end = self._marks.mark()
            self._marks.settle()
            return self._marks.between(begin, end)

        return measure
