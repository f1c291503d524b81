"""Host memory through which frames go to and from a saved bank."""

from __future__ import annotations

import mmap

import torch

from .page_format import PageFormat


class RecordBuffer:
    """Memory for one frame's pages, aligned as direct I/O asks for.

    Attributes:
        view: its bytes.
        record: the same, ``(layers, samples, page_bytes)`` uint8.
    """

    def __init__(self, pages: PageFormat) -> None:
        self.view = memoryview(mmap.mmap(-1, pages.record_bytes))
        shape = pages.layers, pages.samples, pages.page_bytes
        self.record = torch.frombuffer(self.view, dtype=torch.uint8).reshape(shape)
        self._page_bytes = pages.page_bytes

    def pages(self) -> list[memoryview]:
        """Each page's bytes, ``[layer][sample]``."""
        size = self._page_bytes
        return [self.view[begin : begin + size] for begin in range(0, len(self.view), size)]
