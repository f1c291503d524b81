"""Saving a memory bank to a folder, and opening what was saved."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .catalogue import Catalogue
from .config import BankConfig
from .errors import BankFull
from .page_format import PageFormat
from .record_buffer import RecordBuffer
from .saved_contents import SavedContents, index_rows
from .saved_reader import DamagedSavedPage, SavedBank
from .saved_writer import write_saved

if TYPE_CHECKING:
    from .memory_bank import MemoryBank

NAMED = 8  # frames that a warning names


def save_bank(bank: MemoryBank, path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """What `MemoryBank.save` does; see there."""
    with bank.unchanged():
        left_out = write_saved(path, bank_contents(bank), bank.record)
    if left_out:
        named = "; ".join(f"frame {frame}: {reason}" for frame, reason in left_out[:NAMED])
        warnings.warn(f"saved bank {path}: frames left out {len(left_out)}: {named}", RuntimeWarning, stacklevel=3)
    return left_out


def bank_contents(bank: MemoryBank) -> SavedContents:
    """What a bank holds beside its pages, in the context of `MemoryBank.unchanged`."""
    if bank.device.type == "cuda":
        torch.cuda.synchronize(bank.device)  # embeddings may have been put into the index on any stream
    frames = {frame: bank.generation(frame) for frame in bank.frames()}
    return SavedContents(
        format=bank.format,
        sink=bank.sink,
        frames=frames,
        retrievals={frame: bank.retrievals(frame) for frame in frames},
        index=index_rows(bank.index, frames),  # which still has frames that a fetch under way has found damaged
    )


def open_bank(
    path: str | os.PathLike[str],
    config: BankConfig,
    *,
    bank_type: type[MemoryBank],
    format: PageFormat | None = None,
    **options: Any,
) -> MemoryBank:
    """What `MemoryBank.open` does; see there."""
    with SavedBank(path) as saved:
        contents = saved.contents
        check_saved_format(saved.path, contents.format, config, format)
        bank = bank_type(contents.format, config, **{"sink": contents.sink, **options})
        try:
            forgotten = surplus_frames(contents, bank)
            damaged = _restore(saved, bank, [frame for frame in contents.frames if frame not in forgotten])
            bank.count_opened(len(forgotten), len({page.frame for page in damaged}), len(damaged))
        except BaseException:
            bank.close()
            raise
    for problem in saved.problems:
        warnings.warn(f"saved bank {path}: {problem}", RuntimeWarning, stacklevel=3)
    if damaged:
        pages = {page.frame: page for page in reversed(damaged)}  # the first of each frame
        named = "; ".join(f"frame {frame}, {page}" for frame, page in sorted(pages.items())[:NAMED])
        warnings.warn(
            f"saved bank {path}: damaged pages {len(damaged)}, frames lost {len(pages)}: {named}",
            RuntimeWarning,
            stacklevel=3,
        )
    return bank


def check_saved_format(path: Path, found: PageFormat, config: BankConfig, wanted: PageFormat | None) -> None:
    """Raises ValueError when a saved bank's format is not the one wanted, or not of the config's storage."""
    if wanted is not None and wanted != found:
        saved_as = found.to_dict()
        fields = wanted.to_dict().items()
        differ = ", ".join(f"{name} {got!r}, not {saved_as[name]!r}" for name, got in fields if got != saved_as[name])
        raise ValueError(f"format must be that of the saved bank {path}, got {differ}")
    if config.storage != found.storage:
        raise ValueError(
            f"config's storage must be that of the saved bank {path} ({found.storage!r}), got {config.storage!r}"
        )


def surplus_frames(contents: SavedContents, bank: MemoryBank) -> set[int]:
    """Frames that the bank has no room for: those that its policy would forget if it had all of them."""
    surplus = len(contents.frames) - bank.room()
    if surplus <= 0:
        return set()
    policy = bank.config.policy
    if policy == "error":
        raise BankFull(
            f"the saved bank has {len(contents.frames)} frames, and the limits hold {bank.room()}: raise host_bytes "
            "(or disk_bytes), or choose a policy by which frames are forgotten"
        )
    catalogue = Catalogue(bank.samples, policy, bank.sink, len(contents.frames), torch.empty(0))
    catalogue.join(contents.frames)
    if contents.index is not None:
        catalogue.embed(*contents.index, normalized=True)
    for frame, count in contents.retrievals.items():
        catalogue.set_retrievals(frame, count)
    forgotten = set()
    for _ in range(surplus):
        chosen = catalogue.choose()
        assert chosen is not None  # a bank has room for more than its sink frames
        catalogue.drop(chosen)
        forgotten.add(chosen)
    return forgotten


def _restore(saved: SavedBank, bank: MemoryBank, frames: list[int]) -> list[DamagedSavedPage]:
    """Puts frames into the bank but those with damaged pages, which it returns."""
    contents = saved.contents
    rows = {} if contents.index is None else {frame: row for row, frame in enumerate(contents.index.frames)}
    buffer = RecordBuffer(contents.format)
    damaged = []
    for frame in frames:
        found = saved.read(frame, buffer.view)
        if found:
            damaged += found
            continue
        embedding = None
        if contents.index is not None and frame in rows:
            embedding = contents.index.embeddings[:, rows[frame]].to(bank.device)
        bank.restore(
            frame,
            buffer.record,
            generation=contents.frames[frame],
            embedding=embedding,
            retrievals=contents.retrievals[frame],
        )
    return damaged
