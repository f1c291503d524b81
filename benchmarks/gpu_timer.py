"""Timing on a GPU: contenders take turns in one process; each is one CUDA graph over tensors that take turns too."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.turns import Measured, take_turns

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        calls: the same call on different tensors. Together they touch several times the L2 cache, so each finds it
            cold, as a layer does that follows other layers.
        launched: timed as it is launched, one call after the other, each with an idle device before it: what the host
            costs is in it.
    """

    name: str
    calls: Sequence[Call]
    launched: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds a call in every round, and how it was launched: ``graph`` or ``eager``; or the error that it ended in."""

    seconds: list[float]
    mode: str
    error: Exception | None = None

    @classmethod
    def of(cls, measured: Measured, mode: str) -> Timing:
        """Of what `take_turns` found."""
        return cls([], mode, measured) if isinstance(measured, Exception) else cls(measured, mode)


class GpuTimer:
    """CUDA events around the replay of a graph of all of a contender's calls.

    A graph, because the ops are used in graphs and a short kernel would otherwise be timed with its launch. Calls that
    wait for the device cannot be captured; they are launched one by one, and marked so. Before each start a buffer is
    overwritten: it empties the cache, and while it runs the host gets ahead of the device.
    """

    def __init__(self, rounds: int = 20, device: str = "cuda") -> None:
        self.rounds = rounds
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._ahead = torch.empty(max(8 * self.cache_bytes, 512 << 20), dtype=torch.int8, device=device)

    def measure(self, contenders: Sequence[Contender]) -> dict[str, Timing]:
        """All contenders, one after another in every round, in an order that changes from round to round."""
        modes: dict[str, str] = {}
        measures = [self._measure(contender, modes) for contender in contenders]
        found = take_turns(measures, self.rounds)
        return {
            contender.name: Timing.of(own, modes.get(contender.name, "eager"))
            for contender, own in zip(contenders, found, strict=True)
        }

    def _measure(self, contender: Contender, modes: dict[str, str]) -> Callable[[], float]:
        """What times a contender once; the first time it captures it and runs it up before."""
        ready: list[tuple[Call, int]] = []

        def measure() -> float:
            if not ready:
                run, count, modes[contender.name] = self._prepared(contender)
                ready.append((run, count))
                self._once(run, contender.launched)
            run, count = ready[0]
            return self._once(run, contender.launched) / count

        return measure

    def _once(self, run: Call, launched: bool) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._ahead.zero_()
        if launched:  # finds an idle device; the wait is not part of the call
            torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _prepared(self, contender: Contender) -> tuple[Call, int, str]:
        """What to run, how many calls that is, and how it is launched."""
        first = contender.calls[0]
        for _ in range(2):
            first()  # compiles, chooses algorithms
        torch.cuda.synchronize()
        calls = itertools.cycle(contender.calls)
        if not contender.launched and not _waits_for_the_device(first):
            with contextlib.suppress(RuntimeError):  # what cannot be captured for another reason
                return _captured(contender.calls).replay, len(contender.calls), "graph"
        return lambda: next(calls)(), 1, "eager"


def _captured(calls: Sequence[Call]) -> Any:
    """A graph of all the calls."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):  # libraries make their handles and workspaces for the capturing stream
        calls[0]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    return graph


def _waits_for_the_device(call: Call) -> bool:
    """Whether a call synchronises, which a graph does not allow (and a failed capture leaves the allocator astray)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return False


class DryTimer:
    """Calls everything once on a CPU. Its seconds are not a measurement of anything."""

    rounds = 1
    cache_bytes = 1

    def measure(self, contenders: Sequence[Contender]) -> dict[str, Timing]:
        found = take_turns([functools.partial(self._once, contender) for contender in contenders], self.rounds)
        return {contender.name: Timing.of(own, "dry") for contender, own in zip(contenders, found, strict=True)}

    def _once(self, contender: Contender) -> float:
        began = time.perf_counter()
        contender.calls[0]()
        return time.perf_counter() - began
