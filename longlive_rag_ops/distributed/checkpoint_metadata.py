"""The table of contents of a checkpoint's data, read so that whoever wrote it can run nothing.

`torch.distributed.checkpoint` pickles its `Metadata`, and a pickle may name whatever is to be called. Here the names
that such metadata need stand for records, which keep what they are given and do nothing; any other is an error. What
the records have is checked, and torch's objects are made of it. A pickle never gets at torch's own classes, whose
attributes it could set for the rest of the process.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..bank.checked_json import Fields, is_number, shortened
from ..bank.errors import SavedBankError


class _Record:
    """Stands for an object of torch's, ``what``, and keeps its state."""

    what: str
    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    # By this alone a pickle can set attributes, and not a class's, for which it lacks the argument ``self``.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Contents(_Record):
    what = "Metadata"


class _Index(_Record):
    what = "MetadataIndex"


class _Tensor(_Record):
    what = "TensorStorageMetadata"


class _Chunk(_Record):
    what = "ChunkStorageMetadata"


class _Bytes(_Record):
    what = "BytesStorageMetadata"


class _Stored(_Record):
    what = "_StorageInfo"


class _Unused(_Record):
    what = "something that is not read"  # pages are bytes, and checksums say whether they are the right ones


_METADATA = "torch.distributed.checkpoint.metadata"
_STANDS_FOR: dict[tuple[str, str], Callable[..., Any]] = {
    (_METADATA, "Metadata"): _Contents,
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Stored,
    ("torch", "Size"): tuple,
    (_METADATA, "TensorProperties"): _Unused,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Unused,
    ("torch", "uint8"): _Unused,
    ("torch.serialization", "_get_layout"): _Unused,
    (_METADATA, "StorageMeta"): _Unused,
    ("pathlib", "PosixPath"): _Unused,  # where the checkpoint was written
    ("pathlib._local", "PosixPath"): _Unused,  # as Python 3.13 names it
}


def read_metadata(raw: bytes, name: str) -> Metadata:
    """The metadata that a file's bytes are, as far as a bank's pages are read by them.

    Args:
        raw: the bytes.
        name: of the file, for errors.

    Raises:
        SavedBankError: they have another class than the metadata of pages have, name a file that is not in the folder,
            or are damaged.
    """
    try:
        found = _Unpickler(raw, name).load()
    except SavedBankError:
        raise
    except Exception as error:  # what damaged bytes do to their reader has no end
        raise SavedBankError(f"{name} is damaged: {type(error).__name__}: {error}") from None
    fields = _fields(found, _Contents, name)
    entries, stored = fields.fields("state_dict_metadata"), fields.fields("storage_data")
    return Metadata(
        {_entry(entry, entries.name): _storage(value, entries.name) for entry, value in entries.entries.items()},
        storage_data={_index(index, stored.name): _stored(info, stored.name) for index, info in stored.entries.items()},
    )


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_STANDS_FOR` and imports nothing.

    Args:
        raw: the pickle.
        name: of its file, for errors.
    """

    def __init__(self, raw: bytes, name: str) -> None:
        super().__init__(io.BytesIO(raw))
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STANDS_FOR[module, name]
        except KeyError:
            raise SavedBankError(
                f"{self._name} must have only the classes that torch.distributed.checkpoint's metadata of pages need, "
                f"got {shortened(f'{module}.{name}')}: it was made to run code, or by a version of torch not known "
                f"here (this is torch {torch.__version__})"
            ) from None


def _fields(value: Any, kind: type[_Record], name: str) -> Fields:
    """What a record of a kind has."""
    if not isinstance(value, kind) or not isinstance(value.state, dict):
        raise SavedBankError(f"{name} must have a {kind.what} in its place, got {shortened(value)}")
    return Fields(name, value.state)


def _entry(value: Any, name: str) -> str:
    return Fields(name, {"entry": value}).text("entry")


def _size(fields: Fields, key: str) -> torch.Size:
    value = fields.entries.get(key)
    if not isinstance(value, tuple) or not all(is_number(number, 0) for number in value):
        raise SavedBankError(f"{fields.name}: {key} must be a tuple of ints from 0, got {shortened(value)}")
    return torch.Size(value)


def _storage(value: Any, name: str) -> STORAGE_TYPES:
    if isinstance(value, _Bytes):
        return BytesStorageMetadata()
    fields = _fields(value, _Tensor, name)
    size, chunks = _size(fields, "size"), []
    for saved in fields.list("chunks"):
        chunk = _fields(saved, _Chunk, name)
        offsets, sizes = _size(chunk, "offsets"), _size(chunk, "sizes")
        if not len(offsets) == len(sizes) == len(size):
            raise SavedBankError(f"{name}: chunks must have the dimensions of size {size}, got {offsets} and {sizes}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=torch.uint8), size, chunks)


def _index(value: Any, name: str) -> MetadataIndex:
    fields = _fields(value, _Index, name)
    offset = None if fields.entries.get("offset") is None else _size(fields, "offset")
    hint = None if fields.entries.get("index") is None else fields.number("index")
    return MetadataIndex(fields.text("fqn"), offset, hint)


def _stored(value: Any, name: str) -> _StorageInfo:
    fields = _fields(value, _Stored, name)
    path = fields.text("relative_path")
    if path in ("", ".", "..") or any(character in path for character in "/\\\0"):
        raise SavedBankError(f"{name}: relative_path must be a plain file name, got {path!r}")
    return _StorageInfo(path, fields.number("offset"), fields.number("length"))
