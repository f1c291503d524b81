"""Banks to be saved, what they hold, and saved banks with something wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longlive_rag_ops.bank import BankConfig, MemoryBank, PageFormat
from longlive_rag_ops.bank.checked_json import crc32c
from longlive_rag_ops.bank.saved_manifest import MANIFEST

SINK, EMBEDDING = 2, 6
MANY = "64MiB"


def page_format(storage: str = "plain") -> PageFormat:
    return PageFormat(storage, 2, 2, 3, 2, 8, torch.float16)


def config(
    form: PageFormat, host: int | None = None, disk: int = 0, spill: Path | None = None, **more: Any
) -> BankConfig:
    """Limits of so many frames on the host and on disk."""
    size = MANY if host is None else host * form.record_bytes
    if disk:
        more |= {"disk_bytes": disk * form.record_bytes, "spill": spill}
    return BankConfig(host_bytes=size, storage=form.storage, slab_bytes=4 * form.record_bytes, **more)


def fill(bank: MemoryBank, frames: int, seed: int = 0) -> MemoryBank:
    """Random pages; sinks without embeddings, one embedding that is not finite, frames replaced, and found."""
    random = torch.Generator().manual_seed(seed)
    form = bank.format
    shape = form.layers, form.samples, 1, *form.page_shape

    def pages() -> torch.Tensor:
        return torch.randn(shape, generator=random).to(form.dtype)

    for frame in range(frames):
        embedding = torch.randn(form.samples, 1, EMBEDDING, generator=random)
        if frame == 4:
            embedding[1] = torch.nan
        if frame == 5:
            embedding[0] = 0.0
        bank.commit([frame], pages(), pages(), None if frame < SINK else embedding)
    for frame in (1, 3, 3):
        if frame < frames:
            bank.commit([frame], pages(), pages(), replace=True)
    for _ in range(3):
        bank.search(torch.randn(form.samples, EMBEDDING, generator=random), 3, end_frame=frames)
    return bank


def filled(form: PageFormat, frames: int = 8, seed: int = 0) -> MemoryBank:
    """A bank in host memory."""
    return fill(MemoryBank(form, config(form), sink=SINK, frames_per_commit=1), frames, seed)


@dataclass(frozen=True)
class Frame:
    """What a bank has of one frame; comparable."""

    record: bytes
    generation: int
    embedding: bytes | None
    retrievals: int


def held(bank: MemoryBank) -> dict[int, Frame]:
    """Everything a bank has."""
    index = bank.index
    return {
        frame: Frame(
            bank.record(frame).numpy().tobytes(),
            bank.generation(frame),
            None if index is None or frame not in index else bank.embedding(frame).numpy().tobytes(),
            bank.retrievals(frame),
        )
        for frame in bank.frames()
    }


def opened(folder: Path, **options: Any) -> tuple[dict[int, Frame], list[str]]:
    """What a saved bank gives when it is opened, and the warnings. The index must agree with the frames."""
    form = page_format(options.pop("storage", "plain"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with MemoryBank.open(folder, config(form, io_threads=1), format=form, **options) as bank:
            found = held(bank)
            indexed = [] if bank.index is None else bank.index.frames()
            assert indexed == [frame for frame in found if found[frame].embedding is not None]
            assert bank.sink == SINK
    return found, [str(warning.message) for warning in caught]


def names(folder: Path) -> list[str]:
    """The files of a folder by kind: ``index lock manifest pages`` when there is one saved bank and nothing else."""
    return sorted(path.name.split("-")[0].strip(".").removesuffix(".json") for path in folder.iterdir())


def data_file(folder: Path, kind: str) -> Path:
    (path,) = folder.glob(f"{kind}-*.safetensors")
    return path


def write_manifest(folder: Path, rest: str | bytes) -> None:
    """Writes a manifest, what follows the checksum given, with the checksum that it ought to have."""
    rest = rest.encode() if isinstance(rest, str) else rest
    (folder / MANIFEST).write_bytes(b'{"crc32c": "%08x",\n' % crc32c(rest) + rest)


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest's entries."""
    entries = json.loads((folder / MANIFEST).read_bytes())
    del entries["crc32c"]
    edit(entries)
    write_manifest(folder, json.dumps(entries)[1:])


def edit_index(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes a saved bank's file of index and checksums, and has the manifest say that it is right."""
    from safetensors.torch import load_file, save

    path = data_file(folder, "index")
    tensors = load_file(path)
    edit(tensors)
    raw = save(tensors)
    path.write_bytes(raw)
    edit_manifest(folder, lambda entries: entries["index"].update(bytes=len(raw), crc32c=crc32c(raw)))
