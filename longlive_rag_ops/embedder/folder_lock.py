"""A folder that one process at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path
from types import TracebackType

NAME = ".lock"
# File systems that know no locks: a cluster's may be mounted so.
WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_open: set[int] = set()  # descriptors of the locks that this process holds


class FolderLock:
    """Holds a lock on a folder's file ``.lock`` in its ``with`` block. The system drops it when the process ends.

    The file stays: one that is removed while another process waits with it open would be locked twice.

    Args:
        folder: which is there.

    Raises:
        ValueError: another holds it; the message names the folder. OSError: the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor = -1

    def __enter__(self) -> FolderLock:
        self._descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        _open.add(self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT:
                warnings.warn(
                    f"{self.folder} is not locked, its file system cannot ({error.strerror}); let no other training "
                    "write there",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self
            self._close()
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(f"out {self.folder} is in use by another training, which must end first") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor in _open:  # a forked child has closed it already
            _open.remove(self._descriptor)
            os.close(self._descriptor)


def _close_all() -> None:
    while _open:
        os.close(_open.pop())


# A child that is forked, such as a loader's, has the lock too, and would hold it when this process is long gone.
os.register_at_fork(after_in_child=_close_all)
