"""The index: the matrix of frame embeddings that retrieval searches."""

from __future__ import annotations

import heapq

import torch

from .config import check_int
from .modes import normal_tensors
from .reference import lse_dtype, unit_rows


class FrameIndex:
    """Unit-length embeddings of finished frames, one row a frame, the same rows in every sample.

    A frame whose embedding is not finite in a sample gets the id -1 there: it is never chosen in that sample. Rows of
    removed frames are used again. Row numbers carry no meaning; ids do.

    Args:
        samples: samples in the batch, ``B``.
        embedding_dim: size of an embedding, ``E``.
        dtype: of the stored rows; float32, or float64 when embeddings are float64.
        device: where the index is searched.

    Attributes:
        embeddings: ``(B, N, E)``, rows of unit length; zero rows for zero embeddings.
        ids: ``(B, N)`` int64, the row's frame, -1 for none.
        length: ``(1,)`` int64 on the device, rows ever used.
    """

    @normal_tensors
    def __init__(
        self, samples: int, embedding_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.samples = check_int("samples", samples, 1)
        self.embedding_dim = check_int("embedding_dim", embedding_dim, 1)
        self.embeddings = torch.zeros(samples, 0, embedding_dim, dtype=lse_dtype(dtype), device=device)
        self.ids = torch.full((samples, 0), -1, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self._row: dict[int, int] = {}
        self._freed: list[int] = []
        self._used = 0

    def __len__(self) -> int:
        """Frames in the index."""
        return len(self._row)

    @normal_tensors
    def append(self, frames: range, embeddings: torch.Tensor) -> int:
        """Adds frames (or replaces their embeddings, ``(B, n, E)``); returns how many embeddings were not finite."""
        rows = [self._row[frame] if frame in self._row else self._free_row() for frame in frames]
        if self._used > self.embeddings.shape[1]:
            self._grow(max(64, 2 * self._used))
        embeddings = embeddings.to(self.embeddings.dtype)  # what float32 cannot hold is infinite from here on
        finite = embeddings.isfinite().all(-1)  # (B, n)
        units = unit_rows(embeddings)
        self.embeddings[:, rows] = torch.where(finite[..., None], units, 0.0)
        numbers = torch.arange(frames.start, frames.stop, device=self.ids.device)
        self.ids[:, rows] = torch.where(finite, numbers, -1)
        self.length.fill_(self._used)
        self._row.update(zip(frames, rows, strict=True))
        return int((~finite).sum())

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
