"""Saving a bank."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ..safetensors_file import NAMES, header_bytes
from .checked_json import crc32c
from .errors import DamagedPage
from .page_format import ALIGNMENT, PageFormat
from .record_buffer import RecordBuffer
from .saved_contents import SavedContents, index_file
from .saved_folder import SavedFolder, SavingFile
from .saved_manifest import IndexFile, Manifest, PagesFile

Read = Callable[[int, torch.Tensor], object]  # (frame, record): writes the frame's pages there


def write_saved(path: str | os.PathLike[str], contents: SavedContents, read: Read) -> list[tuple[int, str]]:
    """Saves a bank into a folder, which is made when it is not there; a saved bank that is there is replaced.

    Whatever happens, the folder holds the old or the new state. Frames go through one buffer of a record's size.

    Args:
        path: the folder. Files that are no saved bank's stay as they are.
        contents: what the bank holds.
        read: writes a frame's pages to a tensor, ``(layers, samples, page_bytes)`` uint8. KeyError or `DamagedPage`
            for a frame that is left out.

    Returns:
        Frames that were left out, with the reason.

    Raises:
        OSError: the state could not be written; the old one is untouched, and what was written is removed.
            BlockingIOError while another save into the folder is under way. FileExistsError when its ``manifest.json``
            is no saved bank's, NotADirectoryError when it is no folder.
    """
    path = Path(path)
    _make_folder(path)
    with SavedFolder(path) as folder, folder.locked():
        folder.check_replaceable()
        folder.clean()  # first, for the space
        with folder.create("pages") as pages, folder.create("index") as index:
            pages_file, checksums, left_out = _write_pages(pages, contents, read)
            kept = contents.without([frame for frame, _ in left_out])
            index_entry = _write_index(index, kept, checksums)
            manifest = Manifest(kept.format, kept.sink, kept.frames, pages_file, index_entry)
            folder.publish(manifest.to_bytes(), pages, index)
        failed = folder.clean()
    if failed:
        warnings.warn(f"{path} was saved; old files could not be removed: {failed}", RuntimeWarning, stacklevel=4)
    return left_out


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a bank is saved into a folder, and this is none", str(path))
    made = []
    while not path.exists():
        made.append(path)
        path = path.parent
    for folder in reversed(made):
        folder.mkdir(exist_ok=True)
        # Its name must last as long as what will be in it.
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _write_pages(
    file: SavingFile, contents: SavedContents, read: Read
) -> tuple[PagesFile, torch.Tensor, list[tuple[int, str]]]:
    form = contents.format
    begins = len(_pages_header(form, list(contents.frames)))
    file.reserve(begins + len(contents.frames) * form.record_bytes)
    file.skip(begins)
    buffer = RecordBuffer(form)
    written, checksums, left_out = [], [], []
    for frame in contents.frames:
        try:
            read(frame, buffer.record)
        except (KeyError, DamagedPage) as error:
            left_out.append((frame, str(error.args[0] if error.args else error)))
            continue
        file.write(buffer.view)
        written.append(frame)
        checksums.append([crc32c(page) for page in buffer.pages()])
    header = _pages_header(form, written, begins)  # last, when it is known which frames there are
    file.write_at(0, header)
    file.sync()
    table = torch.tensor(checksums, dtype=torch.int64).to(torch.uint32).reshape(-1, form.layers, form.samples)
    return PagesFile(file.name, file.bytes, begins, crc32c(header)), table, left_out


def _pages_header(form: PageFormat, frames: list[int], least: int = 0) -> bytes:
    shape = form.layers, form.samples, form.page_bytes
    tensors = {f"frame.{frame}": (torch.uint8, shape) for frame in frames}
    return header_bytes(tensors, {"what": "pages of a longlive-rag-ops memory bank"}, ALIGNMENT, least)


def _write_index(file: SavingFile, contents: SavedContents, checksums: torch.Tensor) -> IndexFile:
    crc = 0
    for piece in index_file(contents, checksums):
        file.write(piece)
        crc = crc32c(piece, crc)
    file.sync()
    rows = contents.index
    if rows is None or not rows.frames:
        return IndexFile(file.name, file.bytes, crc, 0, 0, "F32")
    dim = rows.embeddings.shape[-1]
    return IndexFile(file.name, file.bytes, crc, len(rows.frames), dim, NAMES[rows.embeddings.dtype])
