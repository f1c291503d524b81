"""The safetensors file format: 8 bytes with the header's size, a JSON header, the tensors' bytes.

Read and written here, without the safetensors package, so that what is recorded can be used wherever torch is.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the format
LARGEST = 2**48  # product of the sizes of a shape, zeros left out: what is beyond is no tensor's, and torch overflows


def header_bytes(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str],
    alignment: int = 8,
    least: int = 0,
) -> bytes:
    """The beginning of a file whose tensors follow in the order given, without gaps.

    Args:
        tensors: dtype and shape of each, by name.
        metadata: texts for ``__metadata__``.
        alignment: the data begins at a multiple of this; a multiple of 8.
        least: bytes that the result has at least, itself a multiple of ``alignment``.

    Raises:
        ValueError: the header exceeds what the format allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    size = max(least, -(-(8 + len(text)) // alignment) * alignment) - 8
    if size > MAX_HEADER:
        raise ValueError(f"a safetensors file may have a header of {MAX_HEADER} bytes, this one needs {size}")
    return size.to_bytes(8, "little") + text.ljust(size)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, which is there whole or not at all; one that is there is replaced.

    Args:
        path: the file.
        tensors: contiguous, on the CPU, in this order.
        metadata: texts.

    Raises:
        OSError: it cannot be written.
    """
    header = header_bytes({name: (value.dtype, value.shape) for name, value in tensors.items()}, metadata)
    with replacing(path) as file:
        file.write(header)
        for value in tensors.values():
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in a ``with`` block, which takes the place of ``path`` when the block ends well.

    Raises:
        OSError: it cannot be written; what was at ``path`` is as it was.
    """
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(_mode(path))
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int:
    """Who may read a file: as it is where there is one, else as what the user writes otherwise."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def read_safetensors(path: Path, what: str = "file") -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file.

    Args:
        path: the file.
        what: it is, for errors.

    Raises:
        ValueError: the file cannot be read, is truncated, or its header does not describe its data.
    """
    try:
        raw = bytearray(path.read_bytes())  # writable, as torch wants buffers to be
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    return parse_safetensors(raw, f"{what} {path}")


def map_safetensors(path: Path, what: str = "file") -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """As `read_safetensors`, but the tensors are the file's, mapped: what is not looked at is not read.

    To be copied from while the file stays as it is.
    """
    try:
        with path.open("rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0  # and cannot be mapped
            raw = bytearray() if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    return parse_safetensors(raw, f"{what} {path}")


def parse_safetensors(raw: bytearray | mmap.mmap, name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file's bytes; the tensors share their memory.

    Args:
        raw: the whole file.
        name: of the file, for errors.

    Raises:
        ValueError: the bytes are truncated, or the header does not describe the data.
    """
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(MAX_HEADER, len(raw) - 8):
        raise ValueError(f"{name} is truncated or no safetensors file: {len(raw)} bytes, header of {size}")
    try:
        header = json.loads(raw[8 : 8 + size])
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number or a nesting beyond all bounds
        raise ValueError(f"{name} is no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{name} is no safetensors file: its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{name} is no safetensors file: __metadata__ must be an object, got {metadata!r}")
    data = memoryview(raw)[8 + size :]
    return metadata, {tensor: _tensor(name, tensor, entry, data) for tensor, entry in header.items()}


def _tensor(name: str, tensor: str, entry: Any, data: memoryview) -> torch.Tensor:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        fits = all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape))
        fits = fits and math.prod(max(size, 1) for size in shape) <= LARGEST
        fits = fits and begin <= end and end - begin == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name}: tensor {tensor} has no usable header entry, got {entry!r}") from None
    if not fits:
        raise ValueError(f"{name}: tensor {tensor} must have offsets that match its shape, got {entry!r}")
    if end > len(data):
        raise ValueError(f"{name} is truncated: tensor {tensor} ends at byte {end} of {len(data)}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=dtype).reshape(shape)
