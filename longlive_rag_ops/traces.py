"""Recorded attention traces: one self-attention layer of a backbone over a whole run, in the safetensors format.

The file's metadata has two JSON texts. ``config``: ``heads, head_dim, grid [h, w], tokens_per_frame, window_frames,
sink_frames, top_k, recent_exclude, frames_per_block, blocks, batch, forwards_per_block, embedding_dim, rope``. ``log``:
one entry a block with ``start_frame`` and ``memory_frames`` (for each sample, most similar first; null for none).

Tensors: ``blockBB.forwardF.q|k|v|out`` ``(batch, frames_per_block * tokens_per_frame, heads, head_dim)``, q, k, v
before rotation; ``blockBB.embedding`` ``(batch, frames_per_block, embedding_dim)``.

The format is read here, without the safetensors package, so that a trace can be replayed wherever torch is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
MAX_HEADER = 100_000_000  # bytes; the limit of the format
CONFIG_SIZES = (
    "heads",
    "head_dim",
    "tokens_per_frame",
    "window_frames",
    "sink_frames",
    "top_k",
    "recent_exclude",
    "frames_per_block",
    "blocks",
    "batch",
    "forwards_per_block",
    "embedding_dim",
)


MAY_BE_ZERO = ("sink_frames", "top_k", "recent_exclude")


@dataclass(frozen=True)
class Trace:
    """A recorded run: ``config`` and ``log`` as above, and the tensors by name."""

    path: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]

    def block(self, block: int, forward: int, name: str) -> torch.Tensor:
        """``q``, ``k``, ``v`` or ``out`` of one forward."""
        return self.tensors[f"block{block:02d}.forward{forward}.{name}"]

    def embedding(self, block: int) -> torch.Tensor:
        """``(batch, frames_per_block, embedding_dim)``, the finished block's embeddings."""
        return self.tensors[f"block{block:02d}.embedding"]


def load_trace(path: str | Path) -> Trace:
    """Reads and checks a trace.

    Raises:
        ValueError: the file cannot be read, is truncated, or is no attention trace; the message says what is wrong.
    """
    path = Path(path)
    metadata, tensors = read_safetensors(path)
    try:
        config, log = json.loads(metadata["config"]), json.loads(metadata["log"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"trace {path}: metadata must have JSON texts config and log, got {error!r}") from None
    if not isinstance(config, dict) or not isinstance(log, list):
        raise ValueError(f"trace {path}: config must be an object and log a list")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"trace {path}: metadata must be texts, got {metadata!r}")
    missing = [key for key in (*CONFIG_SIZES, "grid") if key not in config]
    if missing:
        raise ValueError(f"trace {path}: config lacks {', '.join(missing)}")
    for key in CONFIG_SIZES:
        least = 0 if key in MAY_BE_ZERO else 1
        if isinstance(config[key], bool) or not isinstance(config[key], int) or config[key] < least:
            raise ValueError(f"trace {path}: config {key} must be an int, at least {least}, got {config[key]!r}")
    grid, rope = config["grid"], config.setdefault("rope", {})
    if not isinstance(grid, list) or len(grid) != 2 or not all(isinstance(size, int) for size in grid):
        raise ValueError(f"trace {path}: config grid must be [h, w], got {grid!r}")
    if not isinstance(rope, dict):
        raise ValueError(f"trace {path}: config rope must be an object, got {rope!r}")
    _check_tensors(path, config, log, tensors)
    return Trace(path, config, log, tensors)


def _check_tensors(path: Path, config: dict[str, Any], log: list[Any], tensors: dict[str, torch.Tensor]) -> None:
    if len(log) != config["blocks"]:
        raise ValueError(f"trace {path}: log must have {config['blocks']} entries (config blocks), got {len(log)}")
    batch, frames = config["batch"], config["frames_per_block"]
    attention = (batch, frames * config["tokens_per_frame"], config["heads"], config["head_dim"])
    expected: dict[str, tuple[int, ...]] = {}
    for block in range(config["blocks"]):
        expected[f"block{block:02d}.embedding"] = (batch, frames, config["embedding_dim"])
        for forward in range(config["forwards_per_block"]):
            for name in ("q", "k", "v", "out"):
                expected[f"block{block:02d}.forward{forward}.{name}"] = attention
        if not isinstance(log[block], dict) or not {"start_frame", "memory_frames"} <= log[block].keys():
            raise ValueError(
                f"trace {path}: log entry {block} must have start_frame and memory_frames, got {log[block]}"
            )
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"trace {path}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"trace {path}: tensor {name} must have shape {shape}, got {tuple(tensors[name].shape)}")


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file: 8 bytes header size, a JSON header, the data.

    Raises:
        ValueError: the file cannot be read, is truncated, or its header does not describe its data.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"trace {path} cannot be read: {error.strerror or error}") from None
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(MAX_HEADER, len(raw) - 8):
        raise ValueError(f"trace {path} is truncated or no safetensors file: {len(raw)} bytes, header of {size}")
    try:
        header = json.loads(raw[8 : 8 + size])
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"trace {path} is no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"trace {path} is no safetensors file: its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"trace {path} is no safetensors file: __metadata__ must be an object, got {metadata!r}")
    data = memoryview(bytearray(raw[8 + size :]))  # writable, as torch wants buffers to be
    return metadata, {name: _tensor(path, name, entry, data) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Any, data: memoryview) -> torch.Tensor:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        fits = all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape))
        fits = fits and begin <= end and end - begin == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"trace {path}: tensor {name} has no usable header entry, got {entry!r}") from None
    if not fits:
        raise ValueError(f"trace {path}: tensor {name} must have offsets that match its shape, got {entry!r}")
    if end > len(data):
        raise ValueError(f"trace {path} is truncated: tensor {name} ends at byte {end} of {len(data)}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=dtype).reshape(shape)
