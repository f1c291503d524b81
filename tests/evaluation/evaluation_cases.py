"""Clips whose right answers are known, and short windows for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longlive_rag_ops.config import WindowConfig
from longlive_rag_ops.embedder import Embedder
from longlive_rag_ops.evaluation.clip import Clip
from longlive_rag_ops.evaluation.named_embedder import NamedEmbedder

CONFIG = WindowConfig(window=7, sink=1, top_k=3, recent_exclude=1)
SHAPE = (16, 4, 6)
OPTIONS = ("--window", "7", "--top-k", "3", "--recent-exclude", "1", "--quiet")


def scene(number: int, frames: int, shape: tuple[int, int, int] = SHAPE, noise: float = 0.05) -> torch.Tensor:
    """Latents of scene ``number``: a mean that is orthogonal to other scenes' (one channel each), and some noise."""
    source = torch.Generator().manual_seed(number)
    latents = noise * torch.randn(frames, *shape, generator=source)
    latents[:, number] += 1.0
    return latents


def clip(number: int, frames: int, **options: Any) -> Clip:
    """A clip of one scene, named ``c`` and its number."""
    return Clip(f"c{number}", scene(number, frames, **options))


def named(name: str, embed: Embedder) -> NamedEmbedder:
    """An embedder that needs no description."""
    return NamedEmbedder(name, "made for a test", embed)


def write_video(path: Path, frames: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A video of a slowly moving wave, MPEG-4."""
    av = pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            wave = np.stack([128 + 90 * np.sin((x + y * c + number) / 9) for c in (1, 2, 3)], -1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(wave.astype(np.uint8), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
