"""The embedder's benchmark without a GPU: its section on tiny tensors, with times made up by the test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_bench import FakeCuda, bench

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_embedder, gpu_ops
from benchmarks.embedder_contenders import as_published, contiguous, exact, random_autoencoder
from benchmarks.gpu_contenders import difference
from benchmarks.gpu_timer import Contender, GpuTimer
from longlive_rag_ops.embedder import AutoencoderEmbedder

COMPILED = [f"one call, {name}, torch.compile" for name in ("float32", "bfloat16")]


def test_every_way_gives_the_same() -> None:
    model = random_autoencoder(gpu_embedder.SMALL)
    frames = torch.randn(3, *gpu_embedder.SMALL.frame_shape)
    want = exact(model, frames)
    assert want.dtype == torch.float64 and float((want @ want.T)[0, 1:].max()) < 0.999, "frames must differ"
    for embed in (as_published(model), contiguous(model), AutoencoderEmbedder(model)):
        assert difference(embed(frames), want)[1] < 1e-5


def test_section_and_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"one call, float32": 400e-6, "one call, float32, launched call by call": 600e-6}
    section = gpu_ops.SECTIONS["embedder"](bench(lambda name: seconds.get(name, 1e-3)))
    assert not [row.trouble for row in section.rows if row.trouble]
    names = [row.name for row in section.rows]
    assert {*COMPILED, "as published, 3 calls, bfloat16", "attention of a layer, auto"} <= set(names)
    # The median of a fake timer's three rounds is 1.5 of what it is told.
    assert [(round(target.got or 0), target.limit) for target in section.targets] == [(600, 500), (900, 500)]
    seconds |= {name: value / 2 for name, value in seconds.items()}

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(AutoencoderEmbedder, "forward", _unless_compiled(AutoencoderEmbedder.forward, broken))
    section = gpu_embedder.embedder(bench(lambda name: seconds.get(name, 1e-3)))
    rows = {row.name: row for row in section.rows}
    for name in COMPILED:
        assert "torch.compile does not work here: RuntimeError: no compiler" in rows[name].trouble
        assert not rows[name].wrong
    assert [target.met for target in section.targets] == [True, True]


def _unless_compiled(forward: Any, broken: Any) -> Any:
    return lambda self, frames: forward(self, frames) if self.encoder._compiled_call_impl is None else broken()


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_embedder, "as_published", lambda model: lambda frames: as_published(model)(frames.flip(0)))
    section = gpu_embedder.embedder(bench(lambda name: 1e-3))
    wrong = [row.name for row in section.rows if row.wrong]
    assert wrong == [row.name for row in section.rows if row.name.startswith("as published")] and len(wrong) == 2


def test_what_is_launched_is_no_graph_and_finds_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    order: list[str] = []
    monkeypatch.setattr(cuda, "synchronize", lambda: order.append("idle"))

    def work() -> None:
        order.append("call")
        cuda.now += 2.0

    timings = GpuTimer(rounds=2, device="cpu").measure([Contender("launched", [work], launched=True)])
    assert timings["launched"].mode == "eager" and timings["launched"].seconds == [2.0, 2.0]
    assert order[-4:] == ["idle", "call"] * 2
