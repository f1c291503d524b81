"""What went wrong without stopping the bank, said once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from .config import BankConfig


class FaultWatch:
    """Warns, once for each kind of fault (once for each frame where a page was damaged), with RuntimeWarning.

    Args:
        name: of the bank, for the text.
        config: what was asked for.
        locks: whether host memory is expected to be page-locked.
    """

    def __init__(self, name: str, config: BankConfig, locks: bool) -> None:
        self._name = name
        self._config = config
        self._locks = locks and config.lock_memory
        self._said: set[str] = set()

    def check(self, core: Mapping[str, Any]) -> None:
        """Looks at the core's statistics."""
        host, disk = core["host"], core["disk"]
        if self._locks and host["pageable_slabs"]:
            self._say(
                "memory",
                f"host memory could not be page-locked ({host['pageable_reason']}): copies are slower and hold up the "
                "host; raise the limit of locked memory (ulimit -l), or pass lock_memory=False to leave it at that",
            )
        if host["refusal"]:
            self._say("host", f"the system refused host memory below host_bytes: {host['refusal']}")
        if self._config.direct_io and disk["buffered_shards"]:
            self._say(
                "direct",
                f"{self._config.spill} takes no direct I/O ({disk['buffered_reason']}): pages on disk also fill the "
                "system's cache; pass direct_io=False to leave it at that",
            )
        if disk["refusal"]:
            self._say("full", f"no more room in {self._config.spill}: {disk['refusal']}; pages stay in host memory")
        elif core["failed_spills"]:
            self._say("spill", f"pages could not be written to {self._config.spill}; they stay in host memory")

    def damaged(self, frame: int, reason: str) -> None:
        """A frame was lost to a damaged page; ``reason`` names layer and sample."""
        self._warn(f"frame {frame} is lost, {reason}; it will not be retrieved again")

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._warn(text)

    def _warn(self, text: str) -> None:
        warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=callers_level())


def callers_level() -> int:
    """Where this package was called from, as `warnings.warn` counts from the caller of this."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__name__.partition('.')[0]}."):
        frame, level = frame.f_back, level + 1
    return level
