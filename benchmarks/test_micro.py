"""Every op beside what it is held against, on a CPU with 96 tokens a frame, by pytest-benchmark.

``pytest benchmarks/test_micro.py`` shows a table an op; outputs are checked first. The suite, ``longlive-rag bench
micro``, measures more, in turns, and writes records.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.cpu_timer import CpuTimer
from benchmarks.figures import Shape
from benchmarks.harness import Bench
from benchmarks.micro_cases import Point
from benchmarks.micro_ops import OPS

POINT = Point(Shape(grid=(8, 12)), torch.float32)


@pytest.mark.parametrize("which", ["ours", "peer"])
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, op: str, which: str) -> None:  # type: ignore[no-untyped-def]
    with torch.inference_mode():
        bench = Bench(POINT.shape, POINT.dtype, "cpu", CpuTimer())
        named = {entrant.name: entrant for entrant in OPS[op](bench, POINT, ("auto",), "", False)}
        assert len(named) == 2
        entrant = next(entrant for name, entrant in named.items() if (name == "auto") == (which == "ours"))
        assert entrant.check is not None and entrant.check() == ""
        benchmark.group = f"{op}, {POINT.text()}"
        benchmark.name = entrant.name
        calls = itertools.cycle(entrant.calls)
        benchmark(lambda: next(calls)())
