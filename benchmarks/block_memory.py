"""Memory that a contender takes: of the process, and of the device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

STATUS, CLEAR, MEMORY = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
SLACK = 16 << 20  # between two looks at the same


def resident_bytes(peak: bool = False) -> int | None:
    """Resident set of this process, or its peak since `MemoryPeak` began; None where the system does not say."""
    return _kilobytes(STATUS, "VmHWM" if peak else "VmRSS")


def available_bytes() -> int | None:
    """Host memory that can be had; None where the system does not say."""
    return _kilobytes(MEMORY, "MemAvailable")


def _kilobytes(path: Path, name: str) -> int | None:
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None


def give_back(device: str) -> None:
    """Gives what the process has freed back to the system, page-locked memory too: torch keeps all of it otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        torch.cuda.synchronize()  # a block is free once the copies out of it are done
        torch.cuda.empty_cache()
        older = getattr(torch._C, "_host_emptyCache", None)  # before torch 2.13
        empty = getattr(torch.accelerator, "empty_host_cache", older)
        if empty is not None:
            empty()


class MemoryPeak:
    """From its making on: how much more memory there is in use, at most, than there was.

    What the process has freed is given back to the system first, else it would be taken again without being seen.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        give_back(device)
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")  # the peak is now the present
        self._before, highest = resident_bytes() or 0, resident_bytes(peak=True) or 0
        self._resets = highest < self._before + SLACK
        self._allocated = 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()

    def resident(self) -> int | None:
        """Bytes of the resident set now. Memory that CUDA has page-locked may not be in it."""
        now = resident_bytes()
        return None if now is None else max(0, now - self._before)

    def host(self) -> int | None:
        """Bytes of the resident set at its peak; None where the system does not begin a peak anew."""
        peak = resident_bytes(peak=True)
        return None if peak is None or not self._resets else max(0, peak - self._before)

    def device(self) -> int | None:
        """Bytes allocated on the GPU."""
        return torch.cuda.max_memory_allocated() - self._allocated if self._cuda else None
