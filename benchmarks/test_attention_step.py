"""The attention step of one layer: as published, native (a sliding window, as it is run and at its best), and
this package, in one process.

``pytest benchmarks/test_attention_step.py -s`` prints the ratios; a block is 4 noisy forwards and 1 clean one. The
rounds of the contenders take turns, so that a change of the machine's speed meets all alike, and ratios are medians of
the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks.attention_step import FORWARDS, WARM_BLOCKS, Stream, disagreement
from benchmarks.contenders import AsPublished, Ours, RollingWindow, Shape, SlidingWindow
from benchmarks.record import cpu_name

CONTENDERS = (AsPublished, RollingWindow, SlidingWindow, Ours)


def check_agreement() -> None:
    """What is timed is right: the contenders' outputs equal the oracle's on a small grid, each in its own setting."""
    for contender in CONTENDERS:
        assert disagreement(contender, "cpu", torch.float32) == "", contender.name


@pytest.mark.benchmark(group="attention step, 12 frames of 390 tokens, 12 heads x 128")
def test_attention_step(benchmark) -> None:  # type: ignore[no-untyped-def]
    check_agreement()
    shape = Shape()
    streams = [Stream(make(shape), shape, FORWARDS) for make in CONTENDERS]
    rounds = int(os.environ.get("LONGLIVE_BENCH_ROUNDS", "7"))
    number = 0
    with torch.inference_mode():
        for stream in streams:
            stream.warm(WARM_BLOCKS)
        seconds: dict[str, list[float]] = {stream.contender.name: [] for stream in streams}

        def take_turns() -> None:
            nonlocal number
            # Another order each round: whoever runs first finds the caches of whoever ran last.
            for turn in range(len(streams)):
                stream = streams[(turn + number) % len(streams)]
                began = time.perf_counter()
                stream()
                seconds[stream.contender.name].append(time.perf_counter() - began)
            number += 1

        benchmark.pedantic(take_turns, rounds=rounds, iterations=1)
    report = summary(
        f"one layer, one block of {FORWARDS} forwards: 12 frames of {shape.tokens} tokens, "
        f"{shape.heads} heads x {shape.head_dim}, float32",
        seconds,
        Ours.name,
    )
    benchmark.extra_info.update(report)
    publish(report, "attention_step")


def summary(what: str, seconds: dict[str, list[float]], ours: str) -> dict[str, object]:
    """Medians, and each contender's time over ours, as the median of the rounds' ratios."""
    own = seconds[ours]
    return {
        "what": what,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": len(own),
        "median_seconds_per_block": {name: statistics.median(times) for name, times in seconds.items()},
        "spread_seconds_per_block": {name: [min(times), max(times)] for name, times in seconds.items()},
        "time_over_ours": {
            name: statistics.median(one / other for one, other in zip(times, own, strict=True))
            for name, times in seconds.items()
        },
        "round_seconds": seconds,
    }


def publish(report: dict[str, object], name: str) -> None:
    """Prints a summary, and writes it where ``LONGLIVE_BENCH_OUT`` says."""
    medians, ratios = report["median_seconds_per_block"], report["time_over_ours"]
    assert isinstance(medians, dict) and isinstance(ratios, dict)
    print(f"\n{report['what']}\n{report['device']}, {report['threads']} threads, torch {report['torch']}")
    for contender in medians:
        print(f"  {contender:<22} {1000 * medians[contender]:9.1f} ms a block   {ratios[contender]:5.2f} x ours")
    out = os.environ.get("LONGLIVE_BENCH_OUT")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
