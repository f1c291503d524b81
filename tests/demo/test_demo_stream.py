"""The block loop and the attention probe, on latents made by hand."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from longlive_rag_ops import MemoryWindow, reference
from longlive_rag_ops.demo.footage import Footage, Scene
from longlive_rag_ops.demo.measures import WindowRule, coverage
from longlive_rag_ops.demo.model import ToyTransformer, WeightKind
from longlive_rag_ops.demo.probe import Probe
from longlive_rag_ops.demo.settings import DemoSettings
from longlive_rag_ops.demo.stream import Streamed, stream
from longlive_rag_ops.rotary import default_split, rotary_table

SETTINGS = DemoSettings(window=8, sink=1, top_k=3, recent_exclude=1, size=(64, 48))
RULE = WindowRule(8, 1, 3)


def scenes(lengths: tuple[int, ...], pictures: tuple[int, ...]) -> torch.Tensor:
    """(frames, 16, 6, 8): each scene one random picture plus a little noise of its own in every frame."""
    random = torch.Generator().manual_seed(7)
    stills = torch.randn(max(pictures) + 1, 16, 6, 8, generator=random)
    pairs = zip(lengths, pictures, strict=True)
    parts = [stills[p] + 0.1 * torch.randn(n, 16, 6, 8, generator=random) for n, p in pairs]
    return torch.cat(parts)


def footage() -> Footage:
    latents = scenes((12, 12, 12), (0, 1, 0))
    parts = (Scene("A1", "A", 0, 12), Scene("B", "B", 12, 24), Scene("A2", "A", 24, 36))
    thumbnails = np.zeros((36, 48, 64, 3), np.uint8)
    return Footage("made", "A, B, A", latents, thumbnails, tuple(("made", i) for i in range(36)), parts, {})


@lru_cache
def streamed(kind: WeightKind) -> Streamed:
    return stream(footage(), kind, SETTINGS)


def test_a_returning_scene_is_found() -> None:
    run = streamed("content")
    assert [record.choice.start for record in run.records] == list(range(0, 36, 3))
    by_start = {record.choice.start: record for record in run.records}
    assert by_start[9].choice.retrieved == () and by_start[9].choice.eligible == range(1, 1)
    assert all(f in range(12, 24) for f in by_start[24].choice.retrieved)  # the query is still the last frame of B
    assert len(by_start[27].choice.retrieved) == 3
    assert all(f in range(1, 12) for f in by_start[27].choice.retrieved)
    for record in run.records:
        assert all(f in record.choice.eligible for f in record.choice.retrieved)
        assert list(record.cosines) == sorted(record.cosines, reverse=True)
    assert footage().returning() == (Scene("A1", "A", 0, 12), Scene("A2", "A", 24, 36))


def test_choices_are_the_most_similar_frames() -> None:
    run = streamed("random")
    unit = torch.nn.functional.normalize(run.embeddings.double(), dim=1)
    for record in run.records:
        choice = record.choice
        if choice.retrieved:
            similarity = unit[choice.eligible.start : choice.eligible.stop] @ unit[choice.start - 1]
            best = similarity.topk(len(choice.retrieved))
            assert choice.retrieved == tuple((best.indices + choice.eligible.start).tolist())
            assert record.cosines == pytest.approx(best.values.tolist(), abs=1e-5)


def test_streams_repeat_and_choices_do_not_depend_on_weights() -> None:
    first, second = streamed("content"), stream(footage(), "content", SETTINGS)
    other = streamed("random")
    for a, b, c in zip(first.records, second.records, other.records, strict=True):
        assert a.choice == b.choice == c.choice
        np.testing.assert_array_equal(a.masses.by_layer, b.masses.by_layer)


def test_times_add_up_and_bytes_are_counted() -> None:
    run = streamed("content")
    for record in run.records:
        t = record.seconds
        assert t["total"] == pytest.approx(t["retrieval"] + t["attention"] + t["rest"])
        assert min(t.values()) >= 0 and t["embedding"] <= t["retrieval"]
    page = 2 * 4 * 12 * 4 * 64 * 4  # keys and values, layers, tokens, heads, head_dim, float32
    held = run.records[-1].bytes_held
    assert held["window"] == 8 * page and held["history"] == 35 * page  # the sink frame is never retrieved
    assert held["total"] == sum(size for name, size in held.items() if name not in ("history", "total"))


def test_content_attention_prefers_the_scene_seen_before() -> None:
    content, random = streamed("content"), streamed("random")
    record = content.records[9]  # second block of A2: 27..29, query in A2
    row = coverage(record.masses.placed, record.choice, RULE)
    assert row["retrieved"] > row["random"] + 0.03
    assert row["fixed"] < row["random"] < row["retrieved"] <= row["best"]
    assert record.masses.placed[1:12].mean() > 5 * record.masses.placed[12:22].mean()
    plain = random.records[9].masses.placed
    assert plain[1:12].mean() < 2 * plain[12:22].mean()


def shares_by_hand(
    queries: list[torch.Tensor], keys: dict[int, list[torch.Tensor]], start: int, positions: dict[int, int]
) -> np.ndarray:
    """(layers, frames): one softmax over the keys of all frames, each rotated from scratch to its position."""
    split, rope, rows = default_split(64), rotary_table(64), []
    for layer, q in enumerate(queries):
        at = torch.tensor([positions[start + i] for i in range(3)])
        query = reference.rotate(q.double(), rope, split, (3, 4), at)
        turned = [
            reference.rotate(keys[frame][layer].double(), rope, split, (3, 4), torch.tensor([positions[frame]]))
            for frame in range(start + 3)
        ]
        scores = torch.einsum("shd,thd->hst", query[0], torch.cat(turned, 1)[0]) / 8
        mass = scores.softmax(-1).unflatten(-1, (start + 3, 12)).sum(-1).mean((0, 1))
        rows.append(mass.numpy())
    return np.stack(rows)


OTHER = DemoSettings(window=10, sink=2, top_k=2, recent_exclude=0, size=(64, 48))


@pytest.mark.parametrize("kind, settings", [("content", SETTINGS), ("random", SETTINGS), ("content", OTHER)])
def test_probe_agrees_with_one_softmax_over_everything(kind: WeightKind, settings: DemoSettings) -> None:
    latents, config = footage().latents, settings.window_config()
    sink = config.sink
    model = ToyTransformer(kind, (6, 8))
    window = MemoryWindow(config, layers=4, batch=1, tokens_per_frame=12, kv_heads=4, head_dim=64)
    probe = Probe(window, config, 64, (3, 4))
    keys: dict[int, list[torch.Tensor]] = {}
    for start in range(0, 36, 3):
        queries: list[torch.Tensor] = []

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            queries.append(q)  # noqa: B023
            for i in range(3):
                keys.setdefault(start + i, []).append(k[:, 12 * i : 12 * (i + 1)])  # noqa: B023
            return window.attend(layer, q, k, v, start, (3, 4))  # noqa: B023

        model.forward(latents[start : start + 3], 0.0, attend)
        masses = probe.measure(queries, start)
        end = start + 3
        local = range(max(sink, end - config.local), end)
        recent = range(max(sink, end - (config.window - sink)), end)
        # While the window fills, a frame sits at its own number; later, the newest sits at W - 1.
        place = {f: f if end <= config.window else config.window - end + f for f in range(sink, end)}
        first = {f: f for f in range(sink)}
        placed = {f: place[f] if f in local else 0 for f in range(sink, end)} | first
        sliding = {f: place[f] if f in recent else 0 for f in range(sink, end)} | first
        np.testing.assert_allclose(masses.by_layer, shares_by_hand(queries, keys, start, placed), atol=2e-6)
        np.testing.assert_allclose(masses.placed, masses.by_layer.mean(0))
        expected = shares_by_hand(queries, keys, start, sliding).mean(0)
        np.testing.assert_allclose(masses.sliding, expected, atol=2e-6)
        assert masses.placed.sum() == pytest.approx(1)
        window.finish(start, torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(start)))
