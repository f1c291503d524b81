"""Banks that ranks share, made of one process's bank, and what they hold."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longlive_rag_ops.bank import BankConfig, MemoryBank, PageFormat
from longlive_rag_ops.distributed.mesh import MemoryMesh

sys.path.append(str(Path(__file__).parents[1] / "bank"))

from saved_cases import SINK, fill

FRAMES = 11


def page_format(storage: str = "plain", heads: int = 4) -> PageFormat:
    return PageFormat(storage, 2, 2, 3, heads, 8, torch.float16)


def limits(form: PageFormat, frames: int | None = None, **more: Any) -> BankConfig:
    """Room for so many frames."""
    size = "16MiB" if frames is None else frames * form.record_bytes
    return BankConfig(host_bytes=size, storage=form.storage, slab_bytes=4 * form.record_bytes, **more)


def one_bank(storage: str = "plain", seed: int = 0, frames: int = FRAMES) -> MemoryBank:
    """What one process has: sinks without embeddings, one NaN embedding, one zero, frames replaced, found."""
    form = page_format(storage)
    return fill(MemoryBank(form, limits(form), sink=SINK, frames_per_commit=1), frames, seed)


def head_record(form: PageFormat, record: torch.Tensor, heads: slice) -> tuple[PageFormat, torch.Tensor]:
    """The format and record that a rank with these heads has."""
    count = len(range(form.kv_heads)[heads])
    part = replace(form, kv_heads=count)
    out = torch.zeros(form.layers, form.samples, part.page_bytes, dtype=torch.uint8)
    for mine, whole in zip(part.views(out).values(), form.views(record).values(), strict=True):
        mine.copy_(whole[:, :, :, heads])
    return part, out


def share(mesh: MemoryMesh | None, whole: MemoryBank) -> tuple[PageFormat, dict[int, tuple[Any, ...]]]:
    """What a rank is to hold of a bank: by frame its record, generation, embedding and retrievals."""
    form = whole.format
    heads = slice(0, form.kv_heads)
    if mesh is not None:
        count = form.kv_heads // mesh.head_ranks
        heads = slice(mesh.head_rank * count, (mesh.head_rank + 1) * count)
    found = {}
    for frame in whole.frames():
        if mesh is not None and mesh.owner(frame, SINK) != mesh.frame_rank:
            continue
        indexed = whole.index is not None and frame in whole.index
        found[frame] = (
            head_record(form, whole.record(frame), heads)[1],
            whole.generation(frame),
            whole.embedding(frame) if indexed else None,
            whole.retrievals(frame),
        )
    return replace(form, kv_heads=form.kv_heads // (1 if mesh is None else mesh.head_ranks)), found


def shared_bank(mesh: MemoryMesh | None, whole: MemoryBank) -> MemoryBank:
    """A rank's bank with its share of what one process has."""
    form, frames = share(mesh, whole)
    bank = MemoryBank(form, limits(form), sink=SINK, frames_per_commit=1)
    for frame, (record, generation, embedding, retrievals) in frames.items():
        bank.restore(frame, record, generation=generation, embedding=embedding, retrievals=retrievals)
    return bank


def held(bank: MemoryBank) -> dict[int, tuple[Any, ...]]:
    """What a bank has, comparable."""
    return comparable(share(None, bank)[1])


def comparable(frames: dict[int, tuple[Any, ...]]) -> dict[int, tuple[Any, ...]]:
    return {
        frame: (
            record.numpy().tobytes(),
            generation,
            None if embedding is None else embedding.numpy().tobytes(),
            retrievals,
        )
        for frame, (record, generation, embedding, retrievals) in frames.items()
    }


def page_file(folder: Path, frame: int, rank: int = 0) -> Path:
    """The file with a frame's pages that a rank has written."""
    import pickle

    (data,) = folder.glob("data-*")
    storage = pickle.loads((data / ".metadata").read_bytes()).storage_data
    found = [info.relative_path for index, info in storage.items() if index.fqn == f"pages.{frame}"]
    return data / next(name for name in found if name.startswith(f"__{rank}_"))


def flip(path: Path, at: int) -> None:
    """Changes one byte."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def flip_pages(path: Path) -> None:
    """Changes one byte of the pages in a file of theirs, not of what is around them."""
    stored = torch.load(path)
    raw = path.read_bytes()
    at = raw.index(stored.numpy().tobytes())
    flip(path, at + 17)
