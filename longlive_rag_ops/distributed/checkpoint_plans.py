"""How a bank's pages pass through `torch.distributed.checkpoint`: a frame at a time, each rank what it has or keeps.

An entry ``pages.F`` a frame, ``(heads of all ranks, row_bytes)`` uint8, in chunks of the heads that a rank has (see
`head_rows`): what a ``DTensor`` sharded over its first dimension would be, but read from the bank when it is written.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from ..bank.checked_json import crc32c
from ..bank.errors import DamagedPage, SavedBankError
from ..bank.memory_bank import MemoryBank
from ..bank.page_format import PageFormat
from .checkpoint_manifest import Part
from .checkpoint_metadata import read_metadata
from .head_rows import damaged_heads, head_rows, row_bytes

METADATA = ".metadata"


def pages_entry(frame: int) -> str:
    """Name of a frame's pages in a checkpoint."""
    return f"pages.{frame}"


def part_entry(frame_rank: int) -> str:
    """Name of what the ranks of a share of the frames hold beside pages."""
    return f"frames.{frame_rank}"


class BankSavePlanner(DefaultSavePlanner):
    """Writes one rank's frames.

    Args:
        bank: the rank's.
        generations: by frame, of all that are written.
        heads: of all ranks.
        first_head: of this one.
        part: name and bytes of the entry beside pages; None where another rank writes it.

    Attributes:
        left_out: frames that the bank could not give, with the reason. What is written for them is no page.
    """

    def __init__(
        self,
        bank: MemoryBank,
        generations: Mapping[int, int],
        heads: int,
        first_head: int,
        part: tuple[str, bytes] | None,
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.left_out: list[tuple[int, str]] = []
        self._bank, self._generations, self._heads, self._first_head = bank, generations, heads, first_head
        self._part = part
        self._frames = {pages_entry(frame): frame for frame in generations}
        self._record = torch.empty(bank.layers, bank.samples, bank.format.page_bytes, dtype=torch.uint8)

    def create_local_plan(self) -> SavePlan:
        items = []
        if self._part is not None:
            index, data = MetadataIndex(self._part[0]), BytesIOWriteData(len(self._part[1]))
            items.append(WriteItem(index, WriteItemType.BYTE_IO, bytes_io_data=data))
        form = self._bank.format
        offsets, size = torch.Size((self._first_head, 0)), row_bytes(form)
        chunk = ChunkStorageMetadata(offsets, torch.Size((form.kv_heads, size)))
        properties = TensorProperties(dtype=torch.uint8)
        for entry in self._frames:
            write = TensorWriteData(chunk, properties, torch.Size((self._heads, size)))
            items.append(WriteItem(MetadataIndex(entry, offsets), WriteItemType.SHARD, tensor_data=write))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            assert self._part is not None
            return io.BytesIO(self._part[1])
        frame, form = self._frames[write_item.index.fqn], self._bank.format
        try:
            self._bank.record(frame, self._record)
        except (KeyError, DamagedPage) as error:
            self.left_out.append((frame, str(error.args[0] if error.args else error)))
            return torch.zeros(form.kv_heads, row_bytes(form), dtype=torch.uint8)
        return head_rows(form, self._record, frame, self._generations[frame], self._first_head)


class PartLoadPlanner(DefaultLoadPlanner):
    """Reads the entries ``frames.0``, ``frames.1`` ... into ``found``.

    Args:
        parts: their sizes and checksums.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.found: dict[str, bytes] = {}
        self._parts = {part_entry(frame_rank): part for frame_rank, part in enumerate(parts)}

    def create_local_plan(self) -> LoadPlan:
        none = torch.Size((0,))
        return LoadPlan(
            [
                ReadItem(LoadItemType.BYTE_IO, MetadataIndex(entry), none, MetadataIndex(entry), none, none)
                for entry in self._parts
            ]
        )

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        entry, raw = read_item.dest_index.fqn, value.getvalue()
        if Part(len(raw), crc32c(raw)) != self._parts[entry]:
            raise SavedBankError(f"{entry} is damaged: its checksum does not match")
        self.found[entry] = raw


class PageLoadPlanner(DefaultLoadPlanner):
    """Reads frames, as far as one rank keeps their heads, and hands over each as soon as it is whole.

    Args:
        form: of this rank's pages.
        generations: by frame, of all that are read.
        heads: of all ranks.
        first_head: of this one.
        take: is called with a frame and its rows ``(kv_heads, row_bytes)``.

    Attributes:
        damaged: frames that are not as they were saved, with the reason.
    """

    def __init__(
        self,
        form: PageFormat,
        generations: Mapping[int, int],
        heads: int,
        first_head: int,
        take: Callable[[int, torch.Tensor], None],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.damaged: dict[int, str] = {}
        self._form, self._generations, self._heads, self._first_head = form, generations, heads, first_head
        self._take = take
        self._frames = {pages_entry(frame): frame for frame in generations}
        self._rows: dict[str, torch.Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        size = row_bytes(self._form)
        chunk = ChunkStorageMetadata(torch.Size((self._first_head, 0)), torch.Size((self._form.kv_heads, size)))
        items = []
        for entry, frame in self._frames.items():
            saved = self.metadata.state_dict_metadata.get(entry)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != (self._heads, size):
                self.damaged[frame] = "it is not among the data"
                continue
            items += create_read_items_for_chunk_list(entry, saved, [chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        entry = read_item.dest_index.fqn
        if entry not in self._rows:
            self._rows[entry] = torch.zeros(self._form.kv_heads, row_bytes(self._form), dtype=torch.uint8)
        first = read_item.dest_offsets[0]
        return self._rows[entry][first : first + read_item.lengths[0]]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: the tensor is where it belongs."""

    def whole(self, entry: str) -> None:
        """All of an entry has been read."""
        frame, rows = self._frames[entry], self._rows.pop(entry)
        heads = damaged_heads(rows, frame, self._generations[frame], self._first_head)
        if heads:
            self.damaged[frame] = f"heads {', '.join(map(str, heads))}: their checksums do not match"
        else:
            self._take(frame, rows)

    def unreadable(self, entry: str, error: Exception) -> None:
        """An entry cannot be read."""
        self._rows.pop(entry, None)
        reason = str(error).strip().partition("\n")[0]
        self.damaged[self._frames[entry]] = f"it cannot be read: {type(error).__name__}: {reason}"


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint's data, whose metadata is verified and can run nothing, entry after entry.

    Args:
        path: of the data.
        metadata: size and checksum of its ``.metadata``.

    Raises:
        SavedBankError: that is damaged or missing, has a class that is not allowed, or names a file that is not in the
            folder.
    """

    def __init__(self, path: Path, metadata: Part) -> None:
        super().__init__(path)
        try:
            raw = (path / METADATA).read_bytes()
        except FileNotFoundError as error:
            raise SavedBankError(f"{error.filename} is missing") from None
        if Part(len(raw), crc32c(raw)) != metadata:
            raise SavedBankError(f"{path / METADATA} is damaged: its checksum does not match")
        self._metadata = read_metadata(raw, str(path / METADATA))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        entries: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            entries.setdefault(item.dest_index.fqn, []).append(item)
        for entry, items in entries.items():
            if not isinstance(planner, PageLoadPlanner):
                self._check_files(items)
                super().read_data(replace(plan, items=items), planner)
                continue
            try:
                self._check_files(items)
                super().read_data(replace(plan, items=items), planner)
            except Exception as error:  # whatever unpickling makes of damaged bytes
                planner.unreadable(entry, error)
            else:
                planner.whole(entry)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check_files(self, items: Sequence[ReadItem]) -> None:
        """SavedBankError when an item is in no file, or in something that is none: a link may lead anywhere."""
        stored = self._metadata.storage_data
        for item in items:
            if item.storage_index not in stored:
                raise SavedBankError(f"{item.storage_index.fqn} is not among the data")
            file = Path(self.path) / stored[item.storage_index].relative_path
            if file.is_symlink() or (file.exists() and not file.is_file()):
                raise SavedBankError(f"{file.name} must be a regular file, got a link or something else")
