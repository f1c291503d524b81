"""Small tensors on their way to the device, without the host waiting for what the device still has to do."""

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
