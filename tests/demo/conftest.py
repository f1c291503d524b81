"""Fixtures of the demo's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import scene_frames, write_video


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices on many threads are slow where other processes want the cores as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Three scenes of 40 frames, the third another stretch of the first: A, B, A; 64 x 48."""
    parts = [scene_frames(1, 40), scene_frames(2, 40), scene_frames(1, 40, first=60)]
    return write_video(tmp_path / "aba.mp4", np.concatenate(parts))
