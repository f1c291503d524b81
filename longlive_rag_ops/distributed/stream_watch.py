"""A thread that looks after collectives which streams wait for, while the host waits for something else."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

LONGEST = 1.0  # seconds between two looks while something is under way


class StreamWatch:
    """Looks from time to time, as long as there is something to look at.

    The thread starts with the first `note`; it does not keep what it looks at alive, and ends with it.

    Args:
        look: a bound method that returns the seconds until it must be called again, None when nothing is under way.
    """

    def __init__(self, look: Callable[[], float | None]) -> None:
        self._look = weakref.WeakMethod(look)
        self._noted, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        weakref.finalize(look.__self__, self._end, self._noted, self._stopped)  # type: ignore[attr-defined]

    def note(self) -> None:
        """There is something to look at."""
        if self._thread is None and not self._stopped.is_set():
            arguments = self._look, self._noted, self._stopped
            self._thread = threading.Thread(target=_watch, args=arguments, name="longlive-watch", daemon=True)
            self._thread.start()
        self._noted.set()

    def close(self) -> None:
        """Ends the thread, and waits for that a moment."""
        self._end(self._noted, self._stopped)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LONGEST)

    @staticmethod
    def _end(noted: threading.Event, stopped: threading.Event) -> None:
        stopped.set()
        noted.set()


def _watch(
    look: weakref.WeakMethod[Callable[[], float | None]], noted: threading.Event, stopped: threading.Event
) -> None:
    delay: float | None = None
    while True:
        if delay is None:
            noted.wait()
            noted.clear()
        elif stopped.wait(min(delay, LONGEST)):
            return
        found = look()
        if found is None or stopped.is_set():
            return
        delay = found()
        del found  # else it would stay alive while this waits
