"""What was searched for, what was found, and which tier it came from, as JSON lines."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ..transfer import HostCopy
from .faults import callers_level

MOST_ENTRIES = 10_000  # kept in memory: two hours of video, some tens of megabytes


class RetrievalLog:
    """One entry for each search and the prefetch that follows it.

    An entry is complete when the prefetch is settled, or when the next search begins. Fields, those of a search or a
    prefetch that did not take place left out:

    - ``number``: of the entry, from 0; ``time``: when it began, seconds since 1970.
    - ``frames``, ``scores``: lists of frames and of their cosines, one list a sample, most similar first; with the
      search's ``k``, ``end_frame``, ``first_frame``, ``recent_exclude``, ``min_score``, ``diversity``.
    - ``tiers``: frame (as text) to the tier that served it: ``device``, ``host``, ``disk``, ``missing``.
    - ``missing``: frame (as text) to the reason why it could not be had; ``stall_us``: microseconds for which the host
      waited for the disk since the last entry.

    The newest ten thousand are kept. Thread-safe; entries of threads that search at the same time run into each other.

    Args:
        path: file to which each entry is appended as it is complete; None: none. When it cannot be written to any more
            (no space, say) there is one warning, and it is left as it is.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._lock = threading.RLock()
        self._entries: deque[dict[str, Any]] = deque(maxlen=MOST_ENTRIES)
        self._open: dict[str, Any] | None = None
        self._found: tuple[HostCopy, HostCopy] | None = None
        self._number = 0
        self._file = None if path is None else Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def searched(self, ids: HostCopy, scores: HostCopy, options: Mapping[str, Any]) -> None:
        """A search has begun; ids and scores are ``(B, k)``."""
        with self._lock:
            self._complete()
            self._found = ids, scores
            self._begin().update(options)

    def prefetched(self, tiers: Mapping[int, str]) -> None:
        """A prefetch has begun; the best tier of each frame."""
        with self._lock:
            self._begin().setdefault("tiers", {}).update({str(frame): tier for frame, tier in tiers.items()})

    def settled(self, lost: Iterable[tuple[int, str]], stall_us: int) -> None:
        """Prefetches were settled."""
        with self._lock:
            if self._open is not None and "tiers" in self._open:
                self._open["missing"] = {str(frame): reason for frame, reason in lost}
                self._open["stall_us"] = stall_us
                self._complete()

    def entries(self) -> list[dict[str, Any]]:
        """The entries that are complete, oldest first, at most the newest ten thousand."""
        with self._lock:
            return list(self._entries)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the complete entries to a file, one JSON object a line; a file that is there is replaced."""
        lines = "".join(f"{json.dumps(entry)}\n" for entry in self.entries())
        Path(path).write_text(lines, encoding="utf-8")

    def close(self) -> None:
        """Completes the last entry and closes the file."""
        with self._lock:
            self._complete()
            if self._file is not None:
                file, self._file = self._file, None
                with suppress(OSError):
                    file.close()

    def _begin(self) -> dict[str, Any]:
        if self._open is None:
            self._open = {"number": self._number, "time": time.time()}
            self._number += 1
        return self._open

    def _complete(self) -> None:
        entry, found = self._open, self._found
        self._open = self._found = None
        if entry is None:
            return
        if found is not None:
            ids, scores = (copy.get().tolist() for copy in found)
            entry["frames"] = [[frame for frame in row if frame >= 0] for row in ids]
            entry["scores"] = [
                [score for frame, score in zip(*rows, strict=True) if frame >= 0]
                for rows in zip(ids, scores, strict=True)
            ]
        self._entries.append(entry)
        if self._file is not None:
            self._append(self._file, f"{json.dumps(entry)}\n")

    def _append(self, file: TextIO, line: str) -> None:
        try:
            file.write(line)
        except OSError as error:  # a full disk: nothing that the bank is for depends on the log
            self._file = None
            with suppress(OSError):  # what is left in the buffer fails again
                file.close()
            warnings.warn(
                f"the retrieval log {file.name} is not continued: {error}", RuntimeWarning, stacklevel=callers_level()
            )
