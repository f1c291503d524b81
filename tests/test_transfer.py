"""What goes to the device for a block goes from page-locked memory: the host waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from longlive_rag_ops.assignment import FRAME, SOURCE, empty_window_state
from longlive_rag_ops.blocks import Block
from longlive_rag_ops.index import FrameIndex
from longlive_rag_ops.transfer import device_copy, device_numbers

DEVICE = torch.device("meta")  # stands for a GPU


class Transfers(TorchFunctionMode):
    """Page-locks nothing, and fails where a copy to the device would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.locked: set[int] = set()
        self.copies = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            self.locked.add(id(args[0]))
            return args[0]
        if func is torch.Tensor.to and args[0].device.type == "cpu" and DEVICE in args[1:]:
            assert id(args[0]) in self.locked and kwargs.get("non_blocking"), "the host would wait"
            self.copies += 1
        if func is torch.tensor:
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", "the host would wait"
        return func(*args, **kwargs)


@pytest.mark.parametrize("in_pool", [False, True])
def test_a_block_begins_without_waiting(in_pool: bool) -> None:
    plan = empty_window_state(2, 5)
    plan[:, FRAME, :3] = torch.tensor([4, 5, 1])
    plan[:, SOURCE, 2] = 7
    with Transfers() as transfers:
        block = Block.planned(4, 2, plan, DEVICE, in_pool=in_pool)
    assert transfers.copies == (1 if in_pool else 2)
    assert block.state.device == block.start_frame.device == DEVICE and (block.stored is None) == in_pool


@pytest.mark.parametrize("frames", [[3, 4, 5], [9, 2, 4]])
def test_embeddings_are_stored_without_waiting(frames: list[int]) -> None:
    index = FrameIndex(1, 2, torch.float32, DEVICE)
    with Transfers() as transfers:
        index.put(frames, torch.ones(1, 3, 2, device=DEVICE))
    assert transfers.copies == (frames == [9, 2, 4])


def test_on_a_cpu_nothing_is_copied() -> None:
    numbers = torch.tensor([4, 2])
    assert device_copy(numbers, numbers.device) is numbers
    for listed in ([], [5], [5, 6, 7], [3, 9, 1]):
        found = device_numbers(listed, numbers.device)
        assert found.tolist() == listed and found.dtype == torch.int64


@pytest.mark.gpu
def test_the_device_is_not_waited_for() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        copied = [device_copy(torch.arange(4), torch.device("cuda")), device_numbers([3, 9], torch.device("cuda"))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [copy.tolist() for copy in copied] == [[0, 1, 2, 3], [3, 9]]
