"""A small tensor on its way to the host, without holding up what is enqueued behind it."""

from __future__ import annotations

import torch


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
