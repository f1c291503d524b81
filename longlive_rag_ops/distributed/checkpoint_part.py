"""What the ranks of one share of the frames hold beside pages: the entry ``frames.N`` of a checkpoint, safetensors.

====================  =========  ==================================================================================
tensor                dtype      shape and meaning
====================  =========  ==================================================================================
frames                I64        (n): the frames, ascending
generations           I64        (n): how often each was replaced
retrievals            I64        (n): how often searches found it
index.frames          I64        (indexed): the frames that can be searched for, ascending
index.embeddings      F32, F64   (samples, indexed, embedding_dim): of unit length, or 0; NaN: never found
====================  =========  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..bank.errors import SavedBankError
from ..bank.page_format import PageFormat
from ..bank.saved_contents import SavedContents, SavedIndex
from ..safetensors_file import header_bytes, parse_safetensors

NUMBERS = ("frames", "generations", "retrievals")


def part_bytes(contents: SavedContents) -> bytes:
    """The entry's bytes."""
    tensors = {
        "frames": torch.tensor(list(contents.frames), dtype=torch.int64),
        "generations": torch.tensor(list(contents.frames.values()), dtype=torch.int64),
        "retrievals": torch.tensor([contents.retrievals.get(frame, 0) for frame in contents.frames], dtype=torch.int64),
    }
    if contents.index is not None:
        tensors["index.frames"] = torch.tensor(contents.index.frames, dtype=torch.int64)
        tensors["index.embeddings"] = contents.index.embeddings.contiguous()
    header = header_bytes({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}, {})
    return b"".join([header, *(x.reshape(-1).view(torch.uint8).numpy().tobytes() for x in tensors.values())])


def read_part(raw: bytes, name: str, form: PageFormat, sink: int) -> SavedContents:
    """What `part_bytes` made the bytes of, its checksum verified.

    Args:
        raw: the bytes.
        name: of the entry, for errors.
        form, sink: of the bank.

    Raises:
        SavedBankError: the bytes hold something else.
    """
    try:
        tensors = parse_safetensors(bytearray(raw), name)[1]
        numbers = {key: tensors.pop(key).tolist() for key in NUMBERS}
        frames = dict(zip(numbers["frames"], numbers["generations"], strict=True))
        retrievals = dict(zip(numbers["frames"], numbers["retrievals"], strict=True))
        index = None
        if tensors:
            rows, embeddings = tensors["index.frames"], tensors["index.embeddings"]
            index = SavedIndex(rows.tolist(), embeddings)
            if embeddings.shape[:2] != (form.samples, len(rows)) or not set(index.frames) <= frames.keys():
                raise ValueError(f"index.embeddings of {len(rows)} frames have the shape {tuple(embeddings.shape)}")
    except (KeyError, ValueError) as error:
        raise SavedBankError(f"{name} is damaged: {error}") from None
    return SavedContents(form, sink, frames, retrievals, index)


def joined(parts: Iterable[SavedContents], wanted: Callable[[int], bool], form: PageFormat) -> SavedContents:
    """The frames that are wanted, of all parts together.

    Args:
        parts: one or more.
        wanted: whether a frame is.
        form: of the result.
    """
    parts = list(parts)
    frames: dict[int, int] = {}
    retrievals: dict[int, int] = {}
    rows: dict[int, torch.Tensor] = {}
    for part in parts:
        frames |= {frame: generation for frame, generation in part.frames.items() if wanted(frame)}
        retrievals |= part.retrievals
        if part.index is not None:
            found = zip(part.index.frames, part.index.embeddings.unbind(1), strict=True)
            rows |= {frame: row for frame, row in found if wanted(frame)}
    order = sorted(rows)
    index = SavedIndex(order, torch.stack([rows[frame] for frame in order], 1)) if rows else None
    ascending = {frame: frames[frame] for frame in sorted(frames)}
    return SavedContents(form, parts[0].sink, ascending, {frame: retrievals[frame] for frame in ascending}, index)
