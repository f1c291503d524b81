"""The attention step of one layer: as published, a plain sliding window, and this package, in one process.

``pytest benchmarks/test_attention_step.py -s`` prints the ratios; a block is 4 noisy forwards and 1 clean one. The
rounds of the contenders take turns, so that a change of the machine's speed meets all alike, and ratios are medians of
the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import AsPublished, Ours, Shape, SlidingWindow
from longlive_rag_ops import WindowConfig

FORWARDS = 5
WARM_BLOCKS = 9  # from block 8 on the window is full and six frames are retrieved
CONTENDERS = (AsPublished, SlidingWindow, Ours)


def check_agreement() -> None:
    """What is timed is right: the contenders' outputs equal ours on a small grid, each in its own setting."""
    shape = Shape(grid=(2, 3), heads=2, head_dim=32)
    plain = Shape(grid=(2, 3), heads=2, head_dim=32)
    plain.config = WindowConfig(window=12, sink=1, top_k=0, recent_exclude=0, position_rule="absolute")
    for theirs, ours in ((AsPublished(shape), Ours(shape)), (SlidingWindow(plain), Ours(plain))):
        for number in range(12):
            forwards, embeddings = shape.block(number, 2)
            want = theirs.run_block(3 * number, forwards, embeddings)
            got = ours.run_block(3 * number, forwards, embeddings)
            assert (got - want).abs().max() <= 2e-5 * want.square().mean().sqrt(), (theirs.name, number)


@pytest.mark.benchmark(group="attention step, 12 frames of 390 tokens, 12 heads x 128")
def test_attention_step(benchmark) -> None:  # type: ignore[no-untyped-def]
    check_agreement()
    shape = Shape()
    contenders = [make(shape) for make in CONTENDERS]
    forwards, embeddings = shape.block(0, FORWARDS)
    rounds = int(os.environ.get("LONGLIVE_BENCH_ROUNDS", "7"))
    start = 0
    with torch.inference_mode():
        for _ in range(WARM_BLOCKS):
            for contender in contenders:
                contender.run_block(start, forwards[:1], embeddings + start)
            start += 3
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}

        def take_turns() -> None:
            nonlocal start
            # Another order each round: whoever runs first finds the caches of whoever ran last.
            for turn in range(len(contenders)):
                contender = contenders[(turn + start // 3) % len(contenders)]
                began = time.perf_counter()
                contender.run_block(start, forwards, embeddings + start)
                seconds[contender.name].append(time.perf_counter() - began)
            start += 3

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


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
