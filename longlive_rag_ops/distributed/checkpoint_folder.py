"""The folder of a bank's checkpoint, which all ranks see: names, locks, and what is durable when.

Data lie in a folder of their own, ``data-*``, and are complete and on disk before ``checkpoint.json`` names them, which
is renamed into place. So there is the old or the new state at every instant.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..bank.errors import NoSavedBank, SavedBankError
from ..bank.saved_folder import SavedFolder
from ..bank.saved_manifest import MANIFEST as MANIFEST_OF_ONE
from ..bank.saved_manifest import MAX_BYTES
from .checkpoint_manifest import DATA_NAME, MANIFEST, Manifest, is_manifest

READERS = ".readers"  # locked by those who read, shared, so that nothing is removed meanwhile


class CheckpointFolder:
    """A folder for or with a checkpoint.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = path / MANIFEST

    def read_manifest(self) -> bytes:
        """The manifest's bytes.

        Raises:
            NoSavedBank: there is none, or it is too large for one.
            OSError: it cannot be read.
        """
        try:
            with self._manifest.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise NoSavedBank(f"{self.path} is no checkpoint of a bank: {self._instead()}") from None
        if len(raw) > MAX_BYTES:
            raise NoSavedBank(f"{self._manifest} is no checkpoint's: it has more than {MAX_BYTES} bytes")
        return raw

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While it lasts, saves remove no data. Where there is no lock, because the folder is a copy, nobody saves."""
        try:
            fd = os.open(self.path / READERS, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def saving(self) -> Iterator[Path]:
        """Makes and locks the folder; gives a new folder for data, which is removed unless `publish` has named it.

        Raises:
            BlockingIOError: another save into the folder is under way.
            FileExistsError: it has a ``checkpoint.json`` of something else, or is a bank's that one process saved.
            OSError: it cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with SavedFolder(self.path) as folder, folder.locked():
            self._check_replaceable()
            (self.path / READERS).touch()
            self._clean()  # first, for the space
            data = self.path / f"data-{secrets.token_hex(16)}"
            data.mkdir()
            try:
                yield data
            except BaseException:
                with suppress(SavedBankError, OSError):
                    if self._named() != data.name:  # nobody can have read it
                        shutil.rmtree(data, ignore_errors=True)
                raise
            finally:
                self._clean()

    def publish(self, manifest: Manifest) -> None:
        """Puts a manifest into place, whose data are complete. OSError: the old one is in place, or only the last step
        failed, making the new one durable."""
        _sync(self.path / manifest.data)
        _sync(self.path)
        partial = self.path / f"{MANIFEST}-{secrets.token_hex(16)}.tmp"
        try:
            with partial.open("xb") as file:
                file.write(manifest.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self._manifest)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync(self.path)

    def _check_replaceable(self) -> None:
        for name, theirs in ((MANIFEST, not self._is_ours()), (MANIFEST_OF_ONE, True)):
            if theirs and (self.path / name).exists():
                raise FileExistsError(errno.EEXIST, "there is a file that is no checkpoint's", str(self.path / name))

    def _is_ours(self) -> bool:
        try:
            return is_manifest(self.read_manifest()[:1024])
        except NoSavedBank:
            return False

    def _clean(self) -> None:
        """Removes what no manifest names, unless somebody reads; the next save tries again what cannot be removed.

        Beside a manifest that cannot be read everything stays: its data may still be of use to someone.
        """
        try:
            named = self._named()
        except (SavedBankError, OSError):
            return
        with suppress(OSError), (self.path / READERS).open("rb") as readers:
            fcntl.flock(readers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.path.iterdir():
                if path.name != named and DATA_NAME.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name.startswith(f"{MANIFEST}-") and path.suffix == ".tmp":
                    path.unlink(missing_ok=True)

    def _named(self) -> str:
        """The folder of data that the manifest names; empty without a manifest."""
        try:
            return Manifest.from_bytes(self.read_manifest(), MANIFEST).data
        except NoSavedBank:
            return ""

    def _instead(self) -> str:
        if not self.path.is_dir():
            return "there is no such folder"
        if (self.path / MANIFEST_OF_ONE).exists():
            return f"it has no {MANIFEST}, but a {MANIFEST_OF_ONE}, as MemoryBank.save writes it for MemoryBank.open"
        return f"it has no {MANIFEST}"


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
