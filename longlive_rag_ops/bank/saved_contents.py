"""What a saved bank holds beside its pages, and the file of it, ``index-*.safetensors``.

====================  =========  ==========================================================================
tensor                dtype      shape and meaning; frames in the manifest's order
====================  =========  ==========================================================================
checksums             U32        (frames, layers, samples): CRC-32C of each page, padding included
retrievals            I64        (frames): how often searches found the frame
index.frames          I64        (indexed): the frames that can be searched for, ascending
index.embeddings      F32, F64   (samples, indexed, embedding_dim): of unit length, or 0; NaN: never found
====================  =========  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..index import FrameIndex
from ..safetensors_file import DTYPES, header_bytes, parse_safetensors
from .checked_json import LARGEST
from .errors import SavedBankError
from .page_format import PageFormat
from .saved_manifest import Manifest


class SavedIndex(NamedTuple):
    """Embeddings ``(samples, n, E)`` of frames, as `FrameIndex.put` takes them normalised; on the host."""

    frames: list[int]
    embeddings: torch.Tensor

    def only(self, frames: set[int]) -> SavedIndex:
        """Without the others."""
        kept = [row for row, frame in enumerate(self.frames) if frame in frames]
        return SavedIndex([self.frames[row] for row in kept], self.embeddings[:, kept])


@dataclass(frozen=True)
class SavedContents:
    """A bank at one moment, without its pages.

    Attributes:
        format: of the pages.
        sink: frames below it are sinks.
        frames: generation by frame, ascending.
        retrievals: how often searches found a frame, by frame; a frame that is missing counts 0.
        index: of the frames that can be searched for; None without any.
    """

    format: PageFormat
    sink: int
    frames: dict[int, int]
    retrievals: dict[int, int]
    index: SavedIndex | None

    def without(self, frames: Sequence[int]) -> SavedContents:
        """The same without some frames."""
        if not frames:
            return self
        kept = {frame: generation for frame, generation in self.frames.items() if frame not in frames}
        return replace(self, frames=kept, index=None if self.index is None else self.index.only(set(kept)))


def index_rows(index: FrameIndex | None, held: Mapping[int, object]) -> SavedIndex | None:
    """The rows of an index that are of frames held, copied to the host; None when there is none."""
    frames = [] if index is None else [frame for frame in index.frames() if frame in held]
    if index is None or not frames:
        return None
    rows = torch.tensor([index.row(frame) for frame in frames], device=index.ids.device)
    found = index.ids[:, rows] == torch.tensor(frames, device=index.ids.device)
    embeddings = torch.where(found[..., None], index.embeddings[:, rows], torch.nan)
    return SavedIndex(frames, embeddings.to("cpu", copy=True))


def index_file(contents: SavedContents, checksums: torch.Tensor) -> list[bytes | memoryview]:
    """The file's bytes, in pieces; checksums as in the table above."""
    tensors = {
        "checksums": checksums,
        "retrievals": torch.tensor([contents.retrievals.get(frame, 0) for frame in contents.frames], dtype=torch.int64),
    }
    if contents.index is not None and contents.index.frames:
        tensors["index.frames"] = torch.tensor(contents.index.frames, dtype=torch.int64)
        tensors["index.embeddings"] = contents.index.embeddings.contiguous()
    header = header_bytes({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}, {})
    return [header, *(x.reshape(-1).view(torch.uint8).numpy().data for x in tensors.values())]


def read_index_file(raw: bytearray, manifest: Manifest, name: str) -> tuple[SavedContents, torch.Tensor]:
    """Contents and checksums of a file that `index_file` made, its own checksum verified.

    Raises:
        SavedBankError: the file does not agree with the manifest, or holds what cannot be.
    """
    form, index, frames = manifest.format, manifest.index, list(manifest.frames)
    expected = {
        "checksums": (torch.uint32, (len(frames), form.layers, form.samples)),
        "retrievals": (torch.int64, (len(frames),)),
    }
    if index.frames:
        expected["index.frames"] = (torch.int64, (index.frames,))
        expected["index.embeddings"] = (DTYPES[index.dtype], (form.samples, index.frames, index.embedding_dim))
    try:
        tensors = parse_safetensors(raw, name)[1]
    except ValueError as error:
        raise SavedBankError(str(error)) from None
    found = {tensor: (x.dtype, tuple(x.shape)) for tensor, x in tensors.items()}
    if found != expected:
        raise SavedBankError(f"{name} must hold {expected}, got {found}")
    retrievals = tensors["retrievals"].tolist()
    if any(not 0 <= count <= LARGEST for count in retrievals):
        raise SavedBankError(f"{name}: retrievals must be from 0 to 2^62")
    rows = None
    if index.frames:
        rows = SavedIndex(tensors["index.frames"].tolist(), tensors["index.embeddings"])
        _check_rows(rows, manifest, name)
    counts = dict(zip(frames, retrievals, strict=True))
    return SavedContents(form, manifest.sink, dict(manifest.frames), counts, rows), tensors["checksums"]


def _check_rows(rows: SavedIndex, manifest: Manifest, name: str) -> None:
    if rows.frames != sorted(set(rows.frames)):
        raise SavedBankError(f"{name}: index.frames must ascend")
    unknown = [frame for frame in rows.frames if frame not in manifest.frames]
    if unknown:
        raise SavedBankError(f"{name}: index.frames must be frames of the bank, got {unknown[:8]}")
    missing = rows.embeddings.isnan().all(-1)
    lengths = torch.where(missing, 1.0, rows.embeddings.norm(dim=-1))
    if not bool(((lengths == 0) | ((lengths - 1).abs() < 1e-3)).all()):
        raise SavedBankError(f"{name}: index.embeddings must be of unit length, or 0, or NaN")
