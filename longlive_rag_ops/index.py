"""The index: the matrix of frame embeddings that retrieval searches."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch

from .config import check_int
from .modes import normal_tensors
from .reference import lse_dtype, unit_rows
from .transfer import device_numbers


class FrameIndex:
    """Unit-length embeddings of finished frames, one row a frame, the same rows in every sample.

    A frame whose embedding is not finite in a sample gets the id -1 there: it is never chosen in that sample. Rows of
    removed frames are used again. Row numbers carry no meaning; ids do.

    It grows by doubling: over its life every row is copied less than twice on average, whatever the size of the
    appends, and no more often once `reserve` has made room. The tensors are replaced when it grows.

    Args:
        samples: samples in the batch, ``B``.
        embedding_dim: size of an embedding, ``E``.
        dtype: of the stored rows; float32, or float64 when embeddings are float64.
        device: where the index is searched.
        most: rows that will ever be needed at once, if that is known: it does not double beyond them.

    Attributes:
        embeddings: ``(B, N, E)``, rows of unit length; zero rows for zero embeddings.
        ids: ``(B, N)`` int64, the row's frame, -1 for none.
        length: ``(1,)`` int64 on the device, rows ever used.
    """

    FIRST_ROWS = 64

    @normal_tensors
    def __init__(
        self,
        samples: int,
        embedding_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        most: int | None = None,
    ) -> None:
        self.samples = check_int("samples", samples, 1)
        self.embedding_dim = check_int("embedding_dim", embedding_dim, 1)
        self.most = None if most is None else check_int("most", most, 1)
        self.embeddings = torch.zeros(samples, 0, embedding_dim, dtype=lse_dtype(dtype), device=device)
        self.ids = torch.full((samples, 0), -1, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self._row: dict[int, int] = {}
        self._freed: list[int] = []
        self._used = 0

    def __len__(self) -> int:
        """Frames in the index."""
        return len(self._row)

    def __contains__(self, frame: int) -> bool:
        return frame in self._row

    def frames(self) -> list[int]:
        """The frames in the index, ascending."""
        return sorted(self._row)

    def row(self, frame: int) -> int:
        """The frame's row. KeyError when it has none."""
        return self._row[frame]

    @property
    def used(self) -> int:
        """Rows ever used, as `length` has it on the device."""
        return self._used

    @normal_tensors
    def reserve(self, frames: Sequence[int]) -> None:
        """Makes room for these frames, so that appending them takes no memory."""
        rows = self._used + max(0, sum(frame not in self._row for frame in frames) - len(self._freed))
        if rows > self.embeddings.shape[1]:
            doubled = max(self.FIRST_ROWS, 2 * self.embeddings.shape[1])
            self._grow(max(rows, doubled if self.most is None else min(doubled, self.most)))

    def append(self, frames: Sequence[int], embeddings: torch.Tensor) -> int:
        """Adds frames (or replaces their embeddings, ``(B, n, E)``); returns how many embeddings were not finite."""
        return int(self.put(frames, embeddings))

    @normal_tensors
    def put(self, frames: Sequence[int], embeddings: torch.Tensor, normalized: bool = False) -> torch.Tensor:
        """As `append`, without waiting for the device: the count is a tensor there.

        Args:
            frames: frames, each once.
            embeddings: ``(B, n, E)``.
            normalized: the embeddings came from `embedding`: rows of unit length, or NaN, are stored as they are.
        """
        self.reserve(frames)
        embeddings = embeddings.to(self.embeddings.dtype)  # what float32 cannot hold is infinite from here on
        finite = embeddings.isfinite().all(-1)  # (B, n)
        units = embeddings if normalized else unit_rows(embeddings)
        units = torch.where(finite[..., None], units, 0.0)
        ids = torch.where(finite, device_numbers(frames, self.ids.device), -1)
        rows = [self._row[frame] if frame in self._row else self._free_row() for frame in frames]
        for at, part in _runs(rows):
            self.embeddings[:, at] = units[:, part]
            self.ids[:, at] = ids[:, part]
        self.length.fill_(self._used)
        self._row.update(zip(frames, rows, strict=True))
        return (~finite).sum()

    def embedding(self, frame: int) -> torch.Tensor:
        """Unit embedding of a frame, ``(B, E)``; NaN in samples where it was not finite."""
        row = self._row[frame]
        return torch.where(self.ids[:, row, None] == frame, self.embeddings[:, row], torch.nan)

    def remove(self, frame: int) -> None:
        """Takes a frame out in every sample; its row is free again."""
        row = self._row.pop(frame)
        self.ids[:, row] = -1
        heapq.heappush(self._freed, row)

    @property
    def nbytes(self) -> int:
        """Bytes of embeddings and ids, spare rows included."""
        return self.embeddings.nbytes + self.ids.nbytes

    def _free_row(self) -> int:
        if self._freed:
            return heapq.heappop(self._freed)
        self._used += 1
        return self._used - 1

    @normal_tensors
    def _grow(self, rows: int) -> None:
        more = rows - self.embeddings.shape[1]
        self.embeddings = torch.cat(
            [self.embeddings, self.embeddings.new_zeros(self.samples, more, self.embedding_dim)], 1
        )
        self.ids = torch.cat([self.ids, self.ids.new_full((self.samples, more), -1)], 1)


def _runs(rows: list[int]) -> Iterator[tuple[slice, slice]]:
    """The runs of consecutive rows, and where they are in the list: a list as an index would be copied to the device,
    and the host would wait for that."""
    first = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield slice(rows[first], rows[first] + end - first), slice(first, end)
            first = end


def unit_query(embeddings: torch.Tensor) -> torch.Tensor:
    """What `FrameIndex.embedding` would give for ``(B, E)`` embeddings once stored: unit rows, NaN if not finite."""
    rows = embeddings.to(lse_dtype(embeddings.dtype))
    return torch.where(rows.isfinite().all(-1, keepdim=True), unit_rows(rows), torch.nan)
