"""What copies to the host read from: kept alive, and not written again, until they are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .page_format import PageFormat

Part = tuple[int, int, int]


class Sources:
    """The pages of the last commit, where the core reads them.

    Plain pages are read where the caller has them. Quantised ones are encoded into a buffer of the bank's,
    ``(frames, layers, samples, page_bytes)``, so that a frame's record is one run of bytes. Before either is given up
    the compute stream waits for the copies of every layer, unless it has already.

    Args:
        pages: format of the pages.
        frames: most frames of a commit.
        device: where pages come from.
        core: the compiled bank.
        later: copies are done some time after the call that asks for them.
        on_host: the pages are written by the host, which waits for no stream.

    Attributes:
        commits: so far.
    """

    def __init__(
        self, pages: PageFormat, frames: int, device: torch.device, core: Any, *, later: bool, on_host: bool
    ) -> None:
        self._pages = pages
        self._core = core
        self._later = later
        self._on_host = on_host
        self._buffer: torch.Tensor | None = None
        if pages.quantised:
            shape = (frames, pages.layers, pages.samples, pages.page_bytes)
            self._buffer = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.commits = 0
        self._held: list[torch.Tensor] = []
        self._waited: dict[int, set[int]] = {}  # by stream, the layers whose copies it waits for

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def take(self, pages: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: int) -> list[list[Part]]:
        """Where each frame's pages lie, one part a segment.

        ``pages`` are keys and values ``(layers, samples, T, H, D)``. TypeError, ValueError for what the format does not
        allow.
        """
        if self._buffer is None:
            parts = [self._pages.source_parts(keys, values) for keys, values in pages]
            self._give_up(stream)
            self._hold([tensor for pair in pages for tensor in pair])
            return parts
        self._give_up(stream)
        records = self._buffer[: len(pages)].unbind(0)
        for record, (keys, values) in zip(records, pages, strict=True):
            self._pages.encode(keys, values, out=record)
        return [self._pages.source_parts(record) for record in records]

    def committed(self) -> None:
        """The core has been given what `take` returned."""
        self.commits += 1
        self._waited = {}

    def waited(self, layer: int, stream: int, commits: int) -> None:
        """A stream has been made to wait for the copies of a layer, of so many `commits` at least."""
        if commits == self.commits:  # no other thread has committed in between
            self._waited.setdefault(stream, set()).add(layer)

    def _give_up(self, stream: int) -> None:
        if not self._later or self.commits == 0:
            return
        for layer in set(range(self._pages.layers)) - self._waited.get(stream, set()):
            self._core.wait(layer, stream)
            self.waited(layer, stream, self.commits)
        if self._on_host:
            self._core.flush()
        self._held = []

    def _hold(self, tensors: list[torch.Tensor]) -> None:
        if self._later:
            self._held = tensors
