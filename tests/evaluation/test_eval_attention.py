"""Attention over the whole history, against the demo's probe and a plain softmax in float64."""

from __future__ import annotations

import cmath

import numpy as np
import pytest
import torch
from evaluation_cases import CONFIG, SHAPE, scene

from longlive_rag_ops.config import WindowConfig
from longlive_rag_ops.demo.footage import Footage
from longlive_rag_ops.demo.model import ToyTransformer
from longlive_rag_ops.demo.settings import DemoSettings
from longlive_rag_ops.demo.stream import stream
from longlive_rag_ops.embedder import grid_pool
from longlive_rag_ops.evaluation import full_attention
from longlive_rag_ops.evaluation.choice import blocks, most_similar
from longlive_rag_ops.evaluation.full_attention import FullAttention


def turned(x: list[float], time: int, row: int, column: int) -> np.ndarray:
    """A head's 64 numbers, rotated pair by pair: 24 channels of time, 20 of height, 20 of width."""
    out = []
    for axis, channels, first in ((time, 24, 0), (row, 20, 24), (column, 20, 44)):
        for pair in range(channels // 2):
            z = complex(x[first + 2 * pair], x[first + 2 * pair + 1])
            z *= cmath.exp(1j * axis * 10000 ** (-2 * pair / channels))
            out += [z.real, z.imag]
    return np.array(out)


def brute_force(latents: torch.Tensor, start: int, config: WindowConfig) -> np.ndarray:
    """Shares by one softmax over all tokens of all frames in float64, with the design's positions spelt out."""
    model = ToyTransformer("content", (SHAPE[1], SHAPE[2]))  # all layers: the first must not depend on the others
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((q[0].double(), k[0].double()))
        return v

    model.forward(latents, 0.0, attend)
    q, k = seen[0]  # (frames * tokens, heads, 64)
    tokens, columns, stop = model.tokens_per_frame, model.grid[1], start + 3
    local = config.window - config.sink - config.top_k

    def position(frame: int) -> int:
        if frame < config.sink:
            return frame
        return config.window - 1 - (stop - 1 - frame) if frame >= stop - local else 0

    def rotated(x: torch.Tensor, frame: int, token: int, head: int) -> np.ndarray:
        values = x[frame * tokens + token, head].tolist()
        return turned(values, position(frame), token // columns, token % columns)

    shares = np.zeros(stop)
    for head in range(model.heads):
        keys = np.array([rotated(k, frame, token, head) for frame in range(stop) for token in range(tokens)])
        for frame in range(start, stop):
            for token in range(tokens):
                scores = keys @ rotated(q, frame, token, head) / 8
                weights = np.exp(scores - scores.max())
                shares += (weights / weights.sum()).reshape(stop, tokens).sum(1)
    return shares / (model.heads * 3 * tokens)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.cat([scene(number, 9, noise=1.0) for number in range(3)])


@pytest.mark.parametrize("start", [12, 24])
@pytest.mark.parametrize("config", [CONFIG, WindowConfig(window=10, sink=2, top_k=3, recent_exclude=0)])
def test_masses_against_a_plain_softmax(latents: torch.Tensor, config: WindowConfig, start: int) -> None:
    attention = FullAttention(SHAPE, config)
    masses = attention.masses(attention.project(latents), start)
    assert masses.shape == (start + 3,) and masses.sum() == pytest.approx(1, abs=1e-6)
    assert masses == pytest.approx(brute_force(latents, start, config), rel=1e-4)


def test_masses_and_choices_are_the_demos(latents: torch.Tensor) -> None:
    settings = DemoSettings(window=7, sink=1, top_k=3, recent_exclude=1, size=(48, 32))
    footage = Footage("made", "three scenes", latents, np.zeros((27, 32, 48, 3), np.uint8), (), (), {})
    records = stream(footage, "content", settings).records
    attention = FullAttention(SHAPE, CONFIG)
    projected = attention.project(latents)
    able = [block for block in blocks(27, CONFIG) if block.eligible]
    assert len(able) == 6
    for block, chosen in zip(able, most_similar(grid_pool(latents), able, CONFIG), strict=True):
        record = records[block.start // 3]
        assert attention.masses(projected, block.start) == pytest.approx(record.masses.by_layer[0], rel=1e-4)
        assert (block.eligible, chosen) == (record.choice.eligible, record.choice.retrieved)


def test_frames_are_projected_alone(latents: torch.Tensor) -> None:
    attention = FullAttention(SHAPE, CONFIG)
    whole, part = attention.project(latents), attention.project(latents[5:10])
    for all_frames, some in zip(whole, part, strict=True):
        assert torch.allclose(all_frames[5:10], some, atol=1e-5)


def test_scores_held_at_a_time_change_nothing(latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = FullAttention(SHAPE, CONFIG)
    projected = attention.project(latents)
    whole = attention.masses(projected, 24)
    monkeypatch.setattr(full_attention, "SCORES", 1)
    assert attention.masses(projected, 24) == pytest.approx(whole, rel=1e-5)


def test_the_scene_that_is_on_gets_the_attention() -> None:
    latents = torch.cat([scene(0, 9), scene(1, 9), scene(0, 6)])
    attention = FullAttention(SHAPE, CONFIG)
    masses = attention.masses(attention.project(latents), 21)
    assert masses[1:9].min() > 1.5 * masses[9:18].max()


def test_frames_that_the_toy_does_not_take() -> None:
    with pytest.raises(ValueError, match="latent_size: got \\(5, 6\\)"):
        FullAttention((16, 5, 6), CONFIG)
    with pytest.raises(ValueError, match="channels: got 65"):
        FullAttention((65, 4, 6), CONFIG)
