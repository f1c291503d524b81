"""Timing on a GPU: contenders take turns in one process; each is one CUDA graph over tensors that take turns too."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    """Seconds a call in every round, and how it was launched: ``graph`` or ``eager``."""

    seconds: list[float]
    mode: str


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
        runs = [self._prepared(contender) for contender in contenders]
        for run, _, _ in runs:
            self._once(run)
        seconds: list[list[float]] = [[] for _ in runs]
        for number in range(self.rounds):
            for turn in range(len(runs)):
                which = (turn + number) % len(runs)
                run, calls, _ = runs[which]
                seconds[which].append(self._once(run) / calls)
        return {
            contender.name: Timing(times, mode)
            for contender, times, (_, _, mode) in zip(contenders, seconds, runs, strict=True)
        }

    def _once(self, run: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._ahead.zero_()
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
        if contender.launched:
            return lambda: (torch.cuda.synchronize(), next(calls)()), 1, "eager"
        if not _waits_for_the_device(first):
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
        timings = {}
        for contender in contenders:
            began = time.perf_counter()
            contender.calls[0]()
            timings[contender.name] = Timing([time.perf_counter() - began], "dry")
        return timings
