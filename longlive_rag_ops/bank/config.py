"""Limits and settings of a memory bank."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import check_int
from .page_format import STORAGES
from .policies import POLICIES

UNITS = {
    "B": 1,
    **{f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", 1)},
}
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in UNITS.items()}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
LARGEST = 2**63 - 1


def parse_bytes(size: int | str, name: str = "size", low: int = 0) -> int:
    """Bytes of a size: an int, or text such as ``"64MiB"``, ``"1.5 GB"``, ``"4096"`` (bytes when no unit is named).

    Units are B, KiB, MiB, GiB, TiB (powers of 1024) and KB, MB, GB, TB (of 1000), in upper or lower case. A fraction of
    a byte is dropped.

    Args:
        size: the size.
        name: of the argument, for errors.
        low: the smallest that is allowed.

    Raises:
        TypeError: neither an int nor text.
        ValueError: not a size, below ``low``, or beyond 64 bits.
    """
    if not isinstance(size, str):
        return check_int(name, size, low, LARGEST)
    match = _SIZE.fullmatch(size)
    factor = None if match is None else _BY_LOWER_CASE.get(match[2].lower() or "b")
    if match is None or factor is None:
        raise ValueError(f"{name} must be a number of bytes, with or without one of {', '.join(UNITS)}; got {size!r}")
    return check_int(name, int(Fraction(match[1]) * factor), low, LARGEST)


def format_bytes(size: int) -> str:
    """A number of bytes for people: ``"1.5 GiB (1610612736 bytes)"``; exact."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:.4g} {unit} ({size} bytes)"
    return f"{size} bytes"


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Limits and settings of a `MemoryBank`. Sizes are ints of bytes, or text such as ``"64MiB"`` (`parse_bytes`).

    Args:
        host_bytes: most host memory for pages.
        device_bytes: most device memory for slots; None: for as many as the bank, or the window, is asked for. When no
            number of slots is given, it says how many there are.
        disk_bytes: most space on disk for pages; 0: no disk. With disk, host memory is where pages pass through, and
            frames that do not fit there stay on disk alone.
        spill: existing folder for the disk tier's files, which have no names there and vanish with the process;
            required with ``disk_bytes``.
        storage: of pages: ``plain`` (the compute dtype), ``int8``, ``fp8`` (see `PageFormat`).
        policy: which frame is forgotten when the bank is full: ``error`` (none: commit raises), ``oldest``,
            ``least_retrieved``, ``most_redundant``.
        lock_memory: page-lock host memory, without which copies to a GPU are slower and hold up the host. When the
            system refuses, the bank goes on with one warning.
        slab_bytes: host memory is taken in pieces of this size, rounded down to whole frames, at least one.
        shard_bytes: likewise of files on disk.
        direct_io: read and write disk past the system's cache, where the file system allows it.
        io_threads: threads that read and write, and so requests under way on disk; 1 to 64.
        log: file to which the retrieval log is appended as it goes (see `RetrievalLog`); None: only kept in memory.

    Raises:
        TypeError, ValueError: a setting is not allowed.
    """

    host_bytes: int
    device_bytes: int | None = None
    disk_bytes: int = 0
    spill: Path | None = None
    storage: str = "plain"
    policy: str = "error"
    lock_memory: bool = True
    slab_bytes: int = 256 * 2**20
    shard_bytes: int = 2**30
    direct_io: bool = True
    io_threads: int = 8
    log: Path | None = None

    if TYPE_CHECKING:  # what is taken is wider than what is kept

        def __init__(
            self,
            *,
            host_bytes: int | str,
            device_bytes: int | str | None = None,
            disk_bytes: int | str = 0,
            spill: str | os.PathLike[str] | None = None,
            storage: str = "plain",
            policy: str = "error",
            lock_memory: bool = True,
            slab_bytes: int | str = 256 * 2**20,
            shard_bytes: int | str = 2**30,
            direct_io: bool = True,
            io_threads: int = 8,
            log: str | os.PathLike[str] | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        for name, low in (("host_bytes", 1), ("disk_bytes", 0), ("slab_bytes", 1), ("shard_bytes", 1)):
            object.__setattr__(self, name, parse_bytes(getattr(self, name), name, low))
        if self.device_bytes is not None:
            object.__setattr__(self, "device_bytes", parse_bytes(self.device_bytes, "device_bytes"))
        for name in ("spill", "log"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, str | os.PathLike):
                    raise TypeError(f"{name} must be a path or None, got {type(value).__name__} ({value!r})")
                object.__setattr__(self, name, Path(value))
        for name, allowed in (("storage", STORAGES), ("policy", POLICIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("lock_memory", "direct_io"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_int("io_threads", self.io_threads, 1, 64)
        if (self.spill is None) != (self.disk_bytes == 0):
            raise ValueError(
                "spill (a folder) and disk_bytes (above 0) must be given together, got "
                f"spill={self.spill if self.spill is None else str(self.spill)!r} and disk_bytes={self.disk_bytes}"
            )

    def to_dict(self) -> dict[str, object]:
        """The settings as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
