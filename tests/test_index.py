"""The index: what it holds, and what it costs to grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from longlive_rag_ops.index import FrameIndex


def test_growing_copies_each_row_less_than_twice_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    grow = FrameIndex._grow

    def counted(self: FrameIndex, rows: int) -> None:
        copied.append(self.embeddings.shape[1])
        grow(self, rows)

    monkeypatch.setattr(FrameIndex, "_grow", counted)
    index = FrameIndex(1, 2, torch.float32)
    frames = 10_000
    for start in range(0, frames, 3):
        index.append(range(start, start + 3), torch.ones(1, 3, 2))
    assert len(index) > frames and index.used == len(index)
    assert len(copied) < 10 and sum(copied) < 2 * frames
    assert index.ids[0, : index.used].tolist() == list(range(index.used))


def test_it_does_not_double_beyond_what_is_ever_needed() -> None:
    index = FrameIndex(1, 2, torch.float32, most=100)
    index.append(range(100), torch.ones(1, 100, 2))
    assert index.embeddings.shape[1] == 100
    index.append(range(100, 103), torch.ones(1, 3, 2))  # more, if it must
    assert index.embeddings.shape[1] == 103


def test_room_that_was_reserved_is_used() -> None:
    index = FrameIndex(2, 3, torch.float32)
    index.reserve(range(500))
    embeddings, ids = index.embeddings, index.ids
    for start in range(0, 500, 5):
        index.append(range(start, start + 5), torch.randn(2, 5, 3))
    assert index.embeddings is embeddings and index.ids is ids
    index.reserve(range(500))  # which are there
    assert index.embeddings is embeddings


def test_rows_of_removed_frames_come_first() -> None:
    index = FrameIndex(1, 2, torch.float32)
    index.append(range(10), torch.ones(1, 10, 2))
    index.remove(7)
    index.remove(3)
    index.append([20, 30, 40], torch.ones(1, 3, 2))
    assert [index.row(frame) for frame in (20, 30, 40)] == [3, 7, 10]
    assert index.ids[0, :11].tolist() == [0, 1, 2, 20, 4, 5, 6, 30, 8, 9, 40]
    assert index.used == int(index.length) == 11
    assert index.frames() == [0, 1, 2, 4, 5, 6, 8, 9, 20, 30, 40] and 20 in index and 3 not in index


class NoLists(TorchFunctionMode):
    """Fails where a tensor is indexed with a list, which on a GPU is copied to it while the host waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__setitem__, torch.Tensor.__getitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list | torch.Tensor) for part in parts), parts
        return func(*args, **(kwargs or {}))


def test_rows_are_written_without_waiting_for_the_device() -> None:
    index = FrameIndex(1, 2, torch.float32)
    index.append(range(10), torch.ones(1, 10, 2))
    for frame in (8, 2, 5, 4):
        index.remove(frame)
    with NoLists():
        index.put([20, 31, 22, 23, 24], torch.eye(2).repeat(1, 3, 1)[:, :5])
    assert index.ids[0, :11].tolist() == [0, 1, 20, 3, 31, 22, 6, 7, 23, 9, 24]
    assert index.embeddings[0, [2, 4, 5, 8, 10], 0].tolist() == [1, 0, 1, 0, 1]


def test_memory_that_is_refused_leaves_the_index_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    index = FrameIndex(1, 2, torch.float32)
    index.append(range(10), torch.ones(1, 10, 2))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "where", lambda *_: (_ for _ in ()).throw(MemoryError()))
        index.put([20, 21], torch.ones(1, 2, 2))
    assert index.used == 10 and 20 not in index
    index.put([20], torch.ones(1, 1, 2))
    assert index.row(20) == 10


def test_frames_need_not_be_a_run() -> None:
    index = FrameIndex(1, 2, torch.float32)
    index.append([9, 4], torch.tensor([[[3.0, 4], [0, 2]]]))
    torch.testing.assert_close(index.embedding(9), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(index.embedding(4), torch.tensor([[0.0, 1]]))


def test_embeddings_that_were_read_go_in_as_they_are() -> None:
    index, again = FrameIndex(2, 5, torch.float32), FrameIndex(2, 5, torch.float32)
    embeddings = torch.randn(2, 4, 5)
    embeddings[1, 2] = torch.nan
    assert index.append(range(4), embeddings) == 1
    read = torch.stack([index.embedding(frame) for frame in range(4)], 1)
    assert int(again.put(range(4), read, normalized=True)) == 1
    assert torch.equal(again.embeddings, index.embeddings) and torch.equal(again.ids, index.ids)
    assert again.ids[1, 2] == -1 and again.ids[0, 2] == 2
