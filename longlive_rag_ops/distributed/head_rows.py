"""Pages of a frame as rows, one a head, so that any ranks can keep any of them.

A row has, for each layer and each sample, the head's keys ``(T, D)`` and values ``(T, D)`` as they are stored, and of
quantised pages the float16 scales of keys ``(T)`` and of values ``(T)``; little-endian, without padding. Its last four
bytes are the CRC-32C of frame, generation and head (int64 each) and of all bytes before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch

from ..bank.checked_json import crc32c
from ..bank.page_format import PageFormat

CHECKSUM = 4  # bytes


def row_bytes(form: PageFormat) -> int:
    """Bytes of a row; the same whichever heads a rank has."""
    return form.layers * form.samples * (form.used_bytes // form.kv_heads) + CHECKSUM


def head_rows(form: PageFormat, record: torch.Tensor, frame: int, generation: int, first_head: int) -> torch.Tensor:
    """The rows ``(kv_heads, row_bytes)`` uint8 of a frame.

    Args:
        form: of this rank's pages.
        record: the frame's, as `MemoryBank.record` returns it.
        frame, generation: which.
        first_head: of all ranks' heads, the first that is in the record.
    """
    rows = torch.empty(form.kv_heads, row_bytes(form), dtype=torch.uint8)
    for of_record, of_rows in _parts(form, record, rows):
        of_rows.copy_(of_record)
    for row, checksum in zip(rows, _checksums(rows, frame, generation, first_head), strict=True):
        row[-CHECKSUM:] = torch.frombuffer(bytearray(checksum), dtype=torch.uint8)
    return rows


def damaged_heads(rows: torch.Tensor, frame: int, generation: int, first_head: int) -> list[int]:
    """The heads, numbered over all ranks, whose rows are not as `head_rows` made them."""
    expected = _checksums(rows, frame, generation, first_head)
    return [
        first_head + at
        for at, (row, checksum) in enumerate(zip(rows, expected, strict=True))
        if row[-CHECKSUM:].numpy().tobytes() != checksum
    ]


def record_of(form: PageFormat, rows: torch.Tensor) -> torch.Tensor:
    """The record that rows were made of, ``(layers, samples, page_bytes)`` uint8, zeros as padding."""
    record = torch.zeros(form.layers, form.samples, form.page_bytes, dtype=torch.uint8)
    for of_record, of_rows in _parts(form, record, rows):
        of_record.copy_(of_rows)
    return record


def _parts(form: PageFormat, record: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views ``(heads, layers, samples, T, bytes)`` of a record and of rows that hold the same."""
    pages = rows[:, :-CHECKSUM].unflatten(-1, (form.layers, form.samples, -1))
    begin = 0
    for stored in form.views(record).values():  # (layers, samples, T, H, D), of scales without D
        if stored.dim() == 4:
            stored = stored[..., None]
        size = stored.shape[-1] * stored.element_size()
        of_record = stored.view(torch.uint8)  # as bytes: in a row nothing is aligned
        end = begin + form.tokens_per_frame * size
        of_rows = pages[..., begin:end].unflatten(-1, (form.tokens_per_frame, size))
        yield of_record.permute(3, 0, 1, 2, 4), of_rows
        begin = end


def _checksums(rows: torch.Tensor, frame: int, generation: int, first_head: int) -> Iterator[bytes]:
    for at, row in enumerate(rows):
        which = crc32c(struct.pack("<3q", frame, generation, first_head + at))
        yield struct.pack("<I", crc32c(row[:-CHECKSUM].numpy().data, which))
