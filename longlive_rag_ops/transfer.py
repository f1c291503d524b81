"""Small tensors on their way to the device and back, without the host waiting for what the device still has to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def device_copy(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device; on a CPU it is the same tensor.

    From ordinary memory a copy waits until the device has done all that it was given; from page-locked memory it takes
    its turn.
    """
    if device.type == "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def device_numbers(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """``(n,)`` int64 on a device."""
    first = numbers[0] if numbers else 0
    if list(numbers) == list(range(first, first + len(numbers))):
        return torch.arange(first, first + len(numbers), device=device)
    return device_copy(torch.tensor(numbers, dtype=torch.int64), device)


class HostCopy:
    """A copy of a tensor, begun on the current stream and waited for when it is read.

    Args:
        source: any tensor. Changing it afterwards, in the stream's order, does not change the copy.
    """

    def __init__(self, source: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        source = source.detach()
        if not source.is_cuda:
            self._host = source.clone()
        else:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(source.device))

    def get(self) -> torch.Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
