"""Tiny synthetic videos: smooth random pictures that drift, so that frames of a scene are alike but never equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray


def scene_frames(scene: int, count: int, size: tuple[int, int] = (64, 48), first: int = 0) -> NDArray[np.uint8]:
    """(count, height, width, 3) uint8: scene ``scene`` from its frame ``first`` on."""
    width, height = size
    random = np.random.default_rng(scene)
    weights = random.normal(size=(5, 3))
    phases = random.uniform(0, 2 * np.pi, size=5)
    waves = random.uniform(-6, 6, size=(5, 2))
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    frames = []
    for number in range(first, first + count):
        angle = waves[:, 0, None, None] * x + waves[:, 1, None, None] * y + phases[:, None, None] + 0.004 * number
        frames.append(128 + 40 * np.einsum("phw,pc->hwc", np.sin(angle), weights))
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def write_video(path: Path, frames: NDArray[np.uint8], **options: str) -> Path:
    """Encodes frames as MPEG-4; ``options`` go to the muxer."""
    av = pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
