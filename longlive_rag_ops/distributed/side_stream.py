"""A stream beside the caller's, for what must not wait for a forward that was enqueued before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Collectives and copies on a GPU that overlap the caller's stream; on a CPU there are no streams, and it is none.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def on_host(self) -> bool:
        """Whether what is done waits on the host, so that it is best put off until it is needed."""
        return self._stream is None

    @contextmanager
    def entered(self, after_caller: bool = True) -> Iterator[None]:
        """What is enqueued inside goes on this stream.

        Args:
            after_caller: after all that the caller's stream has been given so far; else only after what this stream
                has been given.
        """
        if self._stream is None:
            yield
            return
        if after_caller:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
