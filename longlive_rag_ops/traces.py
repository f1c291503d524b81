"""Recorded attention traces: one self-attention layer of a backbone over a whole run, in the safetensors format.

The file's metadata has two JSON texts. ``config``: ``heads, head_dim, grid [h, w], tokens_per_frame, window_frames,
sink_frames, top_k, recent_exclude, frames_per_block, blocks, batch, forwards_per_block, embedding_dim, rope``. ``log``:
one entry a block with ``start_frame`` and ``memory_frames`` (for each sample, most similar first; null for none).

Tensors: ``blockBB.forwardF.q|k|v|out`` ``(batch, frames_per_block * tokens_per_frame, heads, head_dim)``, q, k, v
before rotation; ``blockBB.embedding`` ``(batch, frames_per_block, embedding_dim)``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .safetensors_file import read_safetensors

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
    metadata, tensors = read_safetensors(path, "trace")
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
