"""The simulator against attention traces recorded from the published module."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from simulator import Rules, Simulator, choose, cosine, place_memory
from torch import Tensor

TRACES = sorted((Path(__file__).parent / "data" / "traces").glob("trace_*.safetensors"))


def read_trace(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Tensors, config and log of a trace; all tensors of a trace are float32."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        start, end = entry["data_offsets"]
        flat = torch.frombuffer(bytearray(data[8 + length + start : 8 + length + end]), dtype=torch.float32)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors, json.loads(meta["config"]), json.loads(meta["log"])


def test_the_traces_are_there() -> None:
    assert {p.stem for p in TRACES} >= {"trace_batch2_sink3", "trace_head_dim_128", "trace_paper_window"}


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_the_simulator_reproduces_the_trace(path: Path) -> None:
    tensors, config, log = read_trace(path)
    rules = Rules(config["window_frames"], config["sink_frames"], config["top_k"], config["recent_exclude"])
    sim = Simulator(rules, config["batch"])
    n, grid = config["frames_per_block"], tuple(config["grid"])
    worst = 0.0
    for block, entry in enumerate(log):
        assert sim.frames == entry["start_frame"]
        # The trace logs what the block was offered before it ran, and what had left when it was done.
        assert len(rules.candidates(sim.frames)) == entry["eligible"]
        assert rules.evicted(sim.frames + n) == entry["evicted"]
        for sample in range(config["batch"]):
            choices = sim.choices(sample)
            frames = entry["memory_frames"][sample] if entry["memory_frames"] else []
            scores = entry["scores"][sample] if entry["scores"] else []
            assert [f for f, _ in choices] == frames
            assert [s for _, s in choices] == pytest.approx(scores, abs=1e-6)
        for forward in range(config["forwards_per_block"]):
            q, k, v, expected = (tensors[f"block{block:02d}.forward{forward}.{x}"] for x in ("q", "k", "v", "out"))
            out, _ = sim.attend(0, q, k, v, grid)
            error = (out - expected).abs().max() / expected.double().square().mean().sqrt()
            worst = max(worst, float(error))
        sim.finish(n, tensors[f"block{block:02d}.embedding"])
    assert worst < 2e-5


@pytest.mark.parametrize("a_scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("b_scale", [1e-30, 1.0, 1e30])
def test_cosine_neither_overflows_nor_vanishes(a_scale: float, b_scale: float) -> None:
    a, b = torch.tensor([1.0, 2.0, -2.0]), torch.tensor([2.0, 1.0, 2.0])
    assert cosine(a * a_scale, a * b_scale) == pytest.approx(1.0, abs=1e-6)
    assert cosine(a * a_scale, b * b_scale) == pytest.approx(0.0, abs=1e-6)
    assert cosine(a * a_scale, -a * b_scale) == pytest.approx(-1.0, abs=1e-6)
    assert cosine(a * a_scale, torch.zeros(3)) == 0.0


def test_choices_follow_score_then_age() -> None:
    same, other, zero = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), torch.zeros(2)
    nan, inf = torch.tensor([float("nan"), 0.0]), torch.tensor([1.0, float("inf")])
    candidates = {3: other, 4: same, 5: zero, 6: same, 7: nan, 8: inf, 9: same}
    assert [f for f, _ in choose(same, candidates, 2)] == [4, 6]
    assert [f for f, _ in choose(same, candidates, 9)] == [4, 6, 9, 5, 3]
    assert [f for f, _ in choose(zero, candidates, 9)] == [3, 4, 5, 6, 9]
    assert choose(nan, candidates, 9) == choose(inf, candidates, 9) == []


@pytest.mark.parametrize(
    ("before", "chosen", "after"),
    [
        ([], [7, 3], [7, 3]),
        ([7, 3], [3, 7], [7, 3]),
        ([7, 3, 5], [9, 3, 4], [9, 3, 4]),
        ([7, 3, 5], [9, 5, 3, 8], [9, 3, 5, 8]),
        ([7, 3, 5], [5], [5]),
        ([7, 3, 5, 6], [6, 5], [6, 5]),
        ([7, 3, 5], [], []),
    ],
)
def test_pages_stay_where_they_are(before: list[int], chosen: list[int], after: list[int]) -> None:
    assert place_memory(before, chosen) == after
