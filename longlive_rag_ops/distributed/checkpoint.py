"""Checkpoints of a bank that ranks share, by `torch.distributed.checkpoint`: saved on some ranks, opened on others.

Every rank writes the pages that it holds and reads those that it is to keep, a frame at a time; no rank gathers what
others hold. A checkpoint that was saved by any mesh, or by one process alone, opens on any other.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.checkpoint as dcp

from ..bank.checked_json import crc32c
from ..bank.config import BankConfig
from ..bank.errors import SavedBankError
from ..bank.memory_bank import MemoryBank
from ..bank.page_format import PageFormat
from ..bank.saved import NAMED, bank_contents, check_saved_format, surplus_frames
from ..bank.saved_contents import SavedContents
from .agreeing_ranks import AgreeingRanks
from .checkpoint_folder import CheckpointFolder
from .checkpoint_manifest import MANIFEST, Manifest, Part, check_settings
from .checkpoint_part import joined, part_bytes, read_part
from .checkpoint_plans import (
    METADATA,
    BankSavePlanner,
    CheckpointReader,
    PageLoadPlanner,
    PartLoadPlanner,
    part_entry,
)
from .head_rows import record_of
from .mesh import MemoryMesh

if TYPE_CHECKING:
    from ..window import MemoryWindow

TIMEOUT = 1800.0  # seconds; disks are slow, and not equally


def save(
    bank: MemoryBank | MemoryWindow,
    path: str | os.PathLike[str],
    *,
    mesh: MemoryMesh | None = None,
    settings: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
) -> list[tuple[int, str]]:
    """Saves the bank that ranks share, for `load`. All ranks of the mesh call it.

    What is saved are the banks as they are when all ranks have come here: until it is done, commits and whatever else
    adds, replaces or forgets frames wait; searches and fetches do not. A rank needs host memory for three frames.
    Whatever happens, the folder holds what it held or what it is to hold.

    Args:
        bank: this rank's, or a window that has one.
        path: folder, the same for all ranks, which must all see it; made when it is not there. A checkpoint that is
            there is replaced.
        mesh: which says what this rank's bank holds of all; None: everything, and no other rank takes part. Of a window
            it is the window's.
        settings: to be kept with it, as JSON has them; `load` can ask for them.
        timeout: seconds that a rank waits for others.

    Returns:
        Frames that were not saved because a page is damaged, with the reason; a warning names them too. The same on all
        ranks, whose banks have given them up.

    Raises:
        ValueError: the window has no bank, or a mesh was given beside one; the banks do not fit together, and the
            message says which rank's differ in what.
        OSError: it could not be written. BlockingIOError: another save into the folder is under way. FileExistsError:
            there is something else in the folder.
        RankFailure: a rank has died or has not answered.
        RuntimeError: a bank is closed.
    """
    bank, mesh = _bank_of(bank, mesh)
    folder = CheckpointFolder(Path(path))
    ranks = AgreeingRanks(mesh, f"saving a bank into {path}", timeout)
    with ExitStack() as stack:
        ranks.do(lambda: stack.enter_context(bank.unchanged()))
        contents = ranks.do(lambda: bank_contents(bank))
        raw = part_bytes(contents)
        holdings = ranks.gather(lambda: _holding(bank, mesh, contents, raw))
        _check_holdings(holdings)
        heads = bank.format.kv_heads * _shape(mesh)["head_ranks"]
        head_rank, frame_rank = (0, 0) if mesh is None else (mesh.head_rank, mesh.frame_rank)
        locked = stack.enter_context(ExitStack())
        data = ranks.once(lambda: locked.enter_context(folder.saving()))
        ranks.do(lambda: _check_seen(data))
        planner = BankSavePlanner(
            bank,
            contents.frames,
            heads,
            bank.format.kv_heads * head_rank,
            (part_entry(frame_rank), raw) if head_rank == 0 else None,
        )
        # A file an entry: a writer keeps what is in a file until the file is complete.
        writer = dcp.FileSystemWriter(data, single_file_per_rank=False)
        ranks.checkpoint(partial(dcp.save, {}, storage_writer=writer, planner=planner))
        left_out: dict[int, str] = {}
        for found in ranks.gather(lambda: planner.left_out):
            left_out |= dict(found)
        ranks.do(lambda: _forget(bank, left_out))

        def publish() -> None:
            written = (data / METADATA).read_bytes()
            manifest = Manifest(
                format=replace(bank.format, kv_heads=heads),
                sink=bank.sink,
                data=data.name,
                metadata=Part(len(written), crc32c(written)),
                parts=[part for _, part in sorted({(h["frame_rank"], h["part"]) for h in holdings})],
                left_out=left_out,
                settings=dict(settings or {}),
                mesh=_shape(mesh),
            )
            folder.publish(manifest)

        ranks.once(publish)
        ranks.do(locked.close)  # when any rank returns, what was replaced is gone and the folder is free again
    if left_out:
        _warn(path, "frames left out", left_out)
    return sorted(left_out.items())


def load(
    path: str | os.PathLike[str],
    config: BankConfig,
    *,
    mesh: MemoryMesh | None = None,
    format: PageFormat | None = None,
    settings: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> MemoryBank:
    """A bank with what this rank is to keep of a checkpoint, which is not needed afterwards. All ranks call it.

    A frame with a page that is damaged or cannot be read is left out on every rank: a warning names it, and `stats`
    counts it. When there are more frames for a rank than its limits have room for, its policy chooses which to forget,
    sink frames excepted. A rank needs host memory for three frames, and for all embeddings that were saved.

    Pickled data, which `torch.distributed.checkpoint` writes, are read with only the classes allowed that they need.

    Args:
        path: the folder, as `save` has it.
        config: limits of this rank's bank; its storage must be the saved bank's.
        mesh: of the ranks that open it: this one keeps the frames that ``mesh.owner`` gives it and its share of their
            heads. None: everything, in this process alone.
        format: what the pages must be, with the heads of all ranks; None: whatever they are.
        settings: that it must have been saved with.
        timeout: seconds that a rank waits for others.
        options: keyword arguments of `MemoryBank`; ``sink`` is the saved bank's when not given.

    Raises:
        SavedBankError: (a ValueError) there is no checkpoint (`NoSavedBank`), a newer program saved it
            (`NewerVersion`), or it is damaged beyond single frames.
        BankFull: there is no room, and the policy gives no frame up.
        TypeError, ValueError: format, settings or config do not fit the checkpoint, its heads cannot be divided among
            the ranks, or as for `MemoryBank`.
        OSError: a file cannot be read.
        RankFailure: a rank has died or has not answered.
    """
    folder, name = CheckpointFolder(Path(path)), str(Path(path) / MANIFEST)
    ranks = AgreeingRanks(mesh, f"opening the checkpoint {path}", timeout)
    with ExitStack() as stack:
        ranks.do(lambda: stack.enter_context(folder.reading()))
        raw = ranks.once(folder.read_manifest)
        manifest = ranks.do(lambda: Manifest.from_bytes(raw, name))

        def check() -> PageFormat:
            check_saved_format(Path(path), manifest.format, config, format)
            check_settings(name, manifest.settings, settings or {})
            return _share(manifest.format, mesh)

        form = ranks.do(check)
        reader = ranks.do(lambda: CheckpointReader(folder.path / manifest.data, manifest.metadata))
        parts = PartLoadPlanner(manifest.parts)
        ranks.checkpoint(partial(dcp.load, {}, storage_reader=reader, planner=parts))
        contents = ranks.do(lambda: _contents(manifest, parts.found, form, mesh))
        on_failure = stack.enter_context(ExitStack())

        def make() -> MemoryBank:
            bank = MemoryBank(form, config, **{"sink": manifest.sink, **options})
            on_failure.callback(bank.close)  # in here: this rank's bank is made although another rank fails to
            return bank

        bank = ranks.do(make)
        forgotten = ranks.do(lambda: surplus_frames(contents, bank))
        frame_rank = 0 if mesh is None else mesh.frame_rank
        _check_rooms(ranks.gather(lambda: (frame_rank, len(contents.frames), bank.room())))
        kept = contents.without(sorted(forgotten))
        planner = PageLoadPlanner(
            form,
            kept.frames,
            manifest.format.kv_heads,
            0 if mesh is None else mesh.head_rank * form.kv_heads,
            partial(_restore, bank, kept, _embeddings(kept)),
        )
        ranks.checkpoint(partial(dcp.load, {}, storage_reader=reader, planner=planner))
        damaged: dict[int, str] = {}
        for found in ranks.gather(lambda: planner.damaged):
            damaged = found | damaged
        own = {frame: reason for frame, reason in sorted(damaged.items()) if frame in kept.frames}
        ranks.do(lambda: _leave_out(bank, list(own), len(forgotten)))
        if own:  # before the bank is let go: warnings may be made errors
            _warn(path, "damaged frames lost", own)
        on_failure.pop_all()
    return bank


def _bank_of(bank: MemoryBank | MemoryWindow, mesh: MemoryMesh | None) -> tuple[MemoryBank, MemoryMesh | None]:
    if isinstance(bank, MemoryBank):
        return bank, mesh
    if mesh is not None:
        raise ValueError("mesh must not be given with a window, which has its own")
    if bank.bank is None:
        raise ValueError("bank must be a MemoryBank or a window with one, got a window without")
    return bank.bank, getattr(bank, "mesh", None)


def _shape(mesh: MemoryMesh | None) -> dict[str, int]:
    return {"frame_ranks": 1, "head_ranks": 1} if mesh is None else mesh.shape()


def _share(form: PageFormat, mesh: MemoryMesh | None) -> PageFormat:
    """The format of a rank's pages, when ``form`` is that of all heads."""
    ranks = _shape(mesh)["head_ranks"]
    if form.kv_heads % ranks:
        raise ValueError(f"mesh must have heads ranks that divide the saved {form.kv_heads} kv_heads, got {ranks}")
    return replace(form, kv_heads=form.kv_heads // ranks)


def _holding(bank: MemoryBank, mesh: MemoryMesh | None, contents: SavedContents, raw: bytes) -> dict[str, Any]:
    """What a rank says of what it holds."""
    return {
        "rank": 0 if mesh is None else mesh.rank,
        "frame_rank": 0 if mesh is None else mesh.frame_rank,
        "part": Part(len(raw), crc32c(raw)),
        "hash": hashlib.sha256(raw).hexdigest(),
        "frames": list(contents.frames),
        "same": {"sink": bank.sink, **bank.format.to_dict()},
    }


def _check_holdings(holdings: list[dict[str, Any]]) -> None:
    """Raises the same ValueError on every rank when their banks do not fit together."""
    for key, value in holdings[0]["same"].items():
        if any(holding["same"][key] != value for holding in holdings):
            values = ", ".join(f"{holding['same'][key]!r} on rank {holding['rank']}" for holding in holdings)
            raise ValueError(f"banks must have the same {key} on all ranks, got {values}")
    firsts: dict[int, dict[str, Any]] = {}
    owners: dict[int, int] = {}
    for holding in holdings:
        first = firsts.setdefault(holding["frame_rank"], holding)
        if holding is first:
            for frame in holding["frames"]:
                other = owners.setdefault(frame, holding["rank"])
                if other != holding["rank"]:
                    raise ValueError(
                        f"banks of different frame ranks must hold different frames, got frame {frame} on ranks "
                        f"{other} and {holding['rank']}"
                    )
        elif holding["hash"] != first["hash"]:
            differ = sorted(set(holding["frames"]) ^ set(first["frames"]))
            what = f"frames {differ[:NAMED]}" if differ else "a generation, an embedding or how often one was retrieved"
            raise ValueError(
                f"banks that share the heads of frames must hold the same frames, got ranks {first['rank']} and "
                f"{holding['rank']}, which differ in {what}"
            )


def _check_seen(data: Path) -> None:
    if not data.is_dir():
        raise FileNotFoundError(2, "all ranks must see the folder that the first one has made, and this does not", data)


def _check_rooms(rooms: list[tuple[int, int, int]]) -> None:
    """Ranks that share the heads of frames must forget the same ones."""
    for frame_rank, frames, room in rooms:
        first = next(other for other in rooms if other[0] == frame_rank)
        if min(frames, room) != min(first[1], first[2]):
            raise ValueError(
                f"config must give ranks that share the heads of frames room for the same number, got {first[2]} and "
                f"{room} of {frames} frames"
            )


def _contents(
    manifest: Manifest, parts: Mapping[str, bytes], form: PageFormat, mesh: MemoryMesh | None
) -> SavedContents:
    """What this rank is to keep, without its pages."""
    if not parts:
        raise SavedBankError(f"{MANIFEST}: parts must name at least one, got none")
    read = [read_part(raw, entry, form, manifest.sink) for entry, raw in parts.items()]

    def wanted(frame: int) -> bool:
        own = mesh is None or mesh.owner(frame, manifest.sink) == mesh.frame_rank
        return own and frame not in manifest.left_out

    return joined(read, wanted, form)


def _embeddings(contents: SavedContents) -> dict[int, Any]:
    index = contents.index
    return {} if index is None else dict(zip(index.frames, index.embeddings.unbind(1), strict=True))


def _restore(bank: MemoryBank, contents: SavedContents, embeddings: Mapping[int, Any], frame: int, rows: Any) -> None:
    embedding = embeddings.get(frame)
    bank.restore(
        frame,
        record_of(bank.format, rows),
        generation=contents.frames[frame],
        embedding=None if embedding is None else embedding.to(bank.device),
        retrievals=contents.retrievals[frame],
    )


def _forget(bank: MemoryBank, damaged: Iterable[int]) -> None:
    """A frame that one rank found damaged is gone from its bank. Ranks that share its heads give it up too: so they go
    on making the same choice."""
    for frame in damaged:
        if frame in bank and bank.pins(frame) == 0:
            with suppress(ValueError):  # fetched for the next block, which will name it
                bank.forget([frame])


def _leave_out(bank: MemoryBank, damaged: list[int], forgotten: int) -> None:
    """Frames that any rank could not read are nobody's; counted by the ranks that would have kept them."""
    bank.forget([frame for frame in damaged if frame in bank])
    bank.count_opened(forgotten, len(damaged), len(damaged))


def _warn(path: str | os.PathLike[str], what: str, frames: Mapping[int, str]) -> None:
    named: Iterable[str] = (f"frame {frame}: {reason}" for frame, reason in list(frames.items())[:NAMED])
    warnings.warn(f"checkpoint {path}: {what} {len(frames)}: {'; '.join(named)}", RuntimeWarning, stacklevel=3)
