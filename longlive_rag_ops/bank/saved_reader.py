"""Reading a saved bank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .checked_json import crc32c
from .errors import SavedBankError
from .saved_contents import read_index_file
from .saved_folder import SavedFolder
from .saved_manifest import Manifest

PIECE = 4 * 2**20  # bytes read at once where nothing larger is there to be filled
ATTEMPTS = 100  # to open files that saves keep replacing


class DamagedSavedPage(NamedTuple):
    """A page whose bytes are not those that were saved, or cannot be read."""

    frame: int
    layer: int
    sample: int
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer}, sample {self.sample}: {self.reason}"


class SavedBank:
    """A saved bank whose manifest and index have been read and checked. A context manager.

    Its files are held open, so that a save into the folder takes nothing away from it.

    Args:
        path: the folder.

    Attributes:
        manifest, contents: what it says.
        problems: what is wrong with the file of pages, texts; the pages themselves are checked as they are read.

    Raises:
        NoSavedBank: there is none at that path.
        NewerVersion: it was saved by a newer program.
        SavedBankError: manifest or index are damaged or say what cannot be, or a file is missing.
        OSError: a file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with SavedFolder(self.path) as folder:
            self.manifest, self._pages, index = _open_files(folder)
        try:
            try:
                name = str(self.path / self.manifest.index.file)
                raw = _read_index(index, self.manifest, name)
            finally:
                os.close(index)
            self.contents, checksums = read_index_file(raw, self.manifest, name)
            self._checksums: list[list[list[int]]] = checksums.tolist()
            self._rows = {frame: row for row, frame in enumerate(self.manifest.frames)}
            self.problems = list(self._check_pages_file())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SavedBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file of pages."""
        if self._pages >= 0:
            os.close(self._pages)
            self._pages = -1

    def read(self, frame: int, record: memoryview) -> list[DamagedSavedPage]:
        """Reads a frame's record into memory of ``record_bytes``; returns its damaged pages.

        With a damaged page, the memory holds nothing of use.
        """
        size = self.manifest.format.page_bytes
        damaged = []
        for number, (layer, sample, checksum) in enumerate(self._pages_of(frame)):
            page = record[number * size : (number + 1) * size]
            reason = self._fill(page, self._offset(frame, number))
            if reason is None and crc32c(page) != checksum:
                reason = "its checksum does not match"
            if reason is not None:
                damaged.append(DamagedSavedPage(frame, layer, sample, reason))
        return damaged

    def verify(self, frame: int) -> list[DamagedSavedPage]:
        """The damaged pages of a frame, found with little memory however large pages are."""
        size = self.manifest.format.page_bytes
        piece = memoryview(bytearray(min(size, PIECE)))
        damaged = []
        for number, (layer, sample, checksum) in enumerate(self._pages_of(frame)):
            reason, crc = None, 0
            for done in range(0, size, PIECE):
                part = piece[: min(PIECE, size - done)]
                reason = self._fill(part, self._offset(frame, number) + done)
                if reason is not None:
                    break
                crc = crc32c(part, crc)
            if reason is None and crc != checksum:
                reason = "its checksum does not match"
            if reason is not None:
                damaged.append(DamagedSavedPage(frame, layer, sample, reason))
        return damaged

    def _pages_of(self, frame: int) -> Iterator[tuple[int, int, int]]:
        for layer, samples in enumerate(self._checksums[self._rows[frame]]):
            for sample, checksum in enumerate(samples):
                yield layer, sample, checksum

    def _offset(self, frame: int, page: int) -> int:
        form = self.manifest.format
        return self.manifest.pages.begins + self._rows[frame] * form.record_bytes + page * form.page_bytes

    def _fill(self, view: memoryview, offset: int) -> str | None:
        """Why the file's bytes from an offset on could not be read, None when they were."""
        try:
            return None if _read_all(self._pages, view, offset) else "the file ends before it does"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"

    def _check_pages_file(self) -> Iterator[str]:
        entry = self.manifest.pages
        size = os.fstat(self._pages).st_size
        if size != entry.bytes:
            yield f"{entry.file} must have {entry.bytes} bytes, got {size}"
        header = bytearray(min(entry.begins, size))
        reason = self._fill(memoryview(header), 0)
        if reason is not None or crc32c(header) != entry.header_crc32c:
            # Only other programs need it: where the records are, the manifest says.
            yield f"{entry.file} has a damaged header: {reason or 'its checksum does not match'}"


def _open_files(folder: SavedFolder) -> tuple[Manifest, int, int]:
    """The manifest, and its files of pages and index, opened: all of one save, whatever is saved meanwhile."""
    for _ in range(ATTEMPTS):
        raw = folder.read_manifest()
        manifest = Manifest.from_bytes(raw)
        opened: list[int] = []
        try:
            opened = [folder.open(manifest.pages.file)]
            opened.append(folder.open(manifest.index.file))
            return manifest, opened[0], opened[1]
        except (OSError, SavedBankError) as error:
            for fd in opened:
                os.close(fd)
            if not isinstance(error, FileNotFoundError):
                raise
            if folder.read_manifest() == raw:
                raise SavedBankError(f"{error.filename} is missing, which {folder.path} needs") from None
    raise SavedBankError(f"{folder.path} is being saved into all the time")


def _read_index(fd: int, manifest: Manifest, name: str) -> bytearray:
    entry = manifest.index
    size = os.fstat(fd).st_size
    if size != entry.bytes:
        raise SavedBankError(f"{name} must have {entry.bytes} bytes, got {size}")
    raw = bytearray(size)
    if not _read_all(fd, memoryview(raw), 0):
        raise SavedBankError(f"{name} ends before it should")
    if crc32c(raw) != entry.crc32c:
        raise SavedBankError(f"{name} is damaged: its checksum does not match")
    return raw


def _read_all(fd: int, view: memoryview, offset: int) -> bool:
    """Fills memory from a file; False when that ends before."""
    while view:
        got = os.preadv(fd, [view], offset)
        if got == 0:
            return False
        view, offset = view[got:], offset + got
    return True
