"""Fixtures of the embedder's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_cases import write_clips
from window_pair import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of small clips to train on."""
    return write_clips(tmp_path / "clips")
