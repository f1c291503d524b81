"""The folder of a saved bank: names, the lock of those who write, and what is durable when.

A data file is complete and on disk before a manifest names it, and the manifest is renamed into place. So the folder
holds the old or the new state at every instant; what no manifest names is left over from a save that did not end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import NoSavedBank, SavedBankError
from .saved_manifest import DATA_NAME, MANIFEST, MAX_BYTES, Manifest, is_manifest

Buffer = bytes | bytearray | memoryview
LOCK = ".lock"
_TEMPORARY = re.compile(r"manifest-[0-9a-f]{32}\.tmp", re.ASCII)
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class SavedFolder:
    """A folder, held open: renaming it meanwhile changes nothing. A context manager.

    Raises:
        NoSavedBank: there is no such folder.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NoSavedBank(f"{path} is no saved bank: {error.strerror}") from None

    def __enter__(self) -> SavedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def open(self, name: str) -> int:
        """Opens a file of the folder for reading; only a regular file, never through a link.

        Raises:
            SavedBankError: it is something else.
            OSError: it cannot be opened; FileNotFoundError when it is not there.
        """
        try:
            fd = os.open(name, _READ, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket or a pipe
                raise SavedBankError(f"{self.path / name} must be a regular file") from None
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SavedBankError(f"{self.path / name} must be a regular file")
        return fd

    def read_manifest(self) -> bytes:
        """The manifest's bytes.

        Raises:
            NoSavedBank: there is none, or it is too large for one.
            SavedBankError: it is no regular file.
            OSError: it cannot be read.
        """
        try:
            fd = self.open(MANIFEST)
        except FileNotFoundError:
            raise NoSavedBank(f"{self.path} is no saved bank: it has no {MANIFEST}") from None
        with os.fdopen(fd, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise NoSavedBank(f"{self.path / MANIFEST} is no saved bank's: it has more than {MAX_BYTES} bytes")
        return raw

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder against other writers, in this process or another.

        Raises:
            BlockingIOError: another one has it.
            OSError: the lock cannot be had, on file systems without locks for example.
        """
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise BlockingIOError(
                errno.EWOULDBLOCK, "another save into this folder is under way", str(self.path)
            ) from None
        except BaseException:
            os.close(fd)
            raise
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone would leave it to a child forked meanwhile
            os.close(fd)

    def check_replaceable(self) -> None:
        """Raises FileExistsError when the folder has a manifest of something else, which a save would overwrite."""
        with suppress(NoSavedBank):
            if is_manifest(self.read_manifest()[:1024]):
                return
        if MANIFEST in self._names():
            raise FileExistsError(
                errno.EEXIST, "there is a file that is no saved bank's manifest", str(self.path / MANIFEST)
            )

    def clean(self) -> list[str]:
        """Removes what earlier saves left over; returns what could not be removed, with the reason.

        Nothing is removed beside a manifest that cannot be read: its data may still be of use to someone.
        """
        try:
            manifest = Manifest.from_bytes(self.read_manifest())
            named = {manifest.pages.file, manifest.index.file}
        except NoSavedBank:
            named = set()
        except SavedBankError:
            return []
        failed = []
        for name in self._names():
            if (DATA_NAME.fullmatch(name) or _TEMPORARY.fullmatch(name)) and name not in named:
                try:
                    os.unlink(name, dir_fd=self._fd)
                except OSError as error:
                    failed.append(f"{name}: {error.strerror}")
        return failed

    def create(self, kind: str) -> SavingFile:
        """A new file, ``pages`` or ``index``, with a name that no other has."""
        return SavingFile(self._fd, f"{kind}-{secrets.token_hex(16)}.safetensors")

    def publish(self, manifest: bytes, *files: SavingFile) -> None:
        """Puts a manifest into place, and with it the data files that it names, which are complete and on disk.

        Raises OSError. The old manifest is in place then, or, when only the last step failed, the new one; the data
        of both are there.
        """
        os.fsync(self._fd)  # the names of the data files
        with SavingFile(self._fd, f"manifest-{secrets.token_hex(16)}.tmp") as file:
            file.write(manifest)
            file.sync()
            # Before the rename: nothing that comes in between, an interrupt say, may remove what the manifest names.
            for kept in (file, *files):
                kept.keep()
            os.rename(file.name, MANIFEST, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        os.fsync(self._fd)

    def _names(self) -> list[str]:
        return os.listdir(self._fd)  # noqa: PTH208 (a Path is not held open)


class SavingFile:
    """A new file, written from its beginning to its end, and removed again when its context ends without `keep`."""

    def __init__(self, folder: int, name: str) -> None:
        self.name, self.bytes = name, 0
        self._folder, self._keep = folder, False
        self._fd = os.open(name, _CREATE, 0o666, dir_fd=folder)

    def __enter__(self) -> SavingFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if not self._keep:
            with suppress(OSError):  # what cannot be removed is removed by the next save
                os.unlink(self.name, dir_fd=self._folder)

    def reserve(self, size: int) -> None:
        """Has the file system set space aside, so that a full one shows before much is written.

        Raises OSError when it cannot; not when it does not know how.
        """
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def write(self, data: Buffer) -> None:
        """Appends bytes."""
        self.write_at(self.bytes, data)
        self.bytes += memoryview(data).nbytes

    def write_at(self, offset: int, data: Buffer) -> None:
        """Writes bytes at an offset, all of them or OSError."""
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def skip(self, size: int) -> None:
        """Leaves bytes for `write_at`."""
        self.bytes += size

    def sync(self) -> None:
        """Cuts off what was reserved and not written; returns when the bytes are on disk."""
        os.ftruncate(self._fd, self.bytes)
        os.fdatasync(self._fd)

    def keep(self) -> None:
        """The file stays."""
        self._keep = True
