"""What a bank holds and how it ends: the compiled core with its settings, looked into by frame, counted, closed."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

from ..build_info import extension
from ..config import check_int
from ..index import FrameIndex
from ..modes import normal_tensors
from ..ops.checks import check
from ..ops.waiting import drop_handle, new_handle
from . import limits
from .catalogue import Catalogue
from .config import BankConfig
from .errors import DamagedPage, core_errors
from .faults import FaultWatch
from .forking import leave_in_children
from .page_format import PageFormat
from .retrieval_log import RetrievalLog
from .sources import Sources
from .statistics import bank_stats

Self = TypeVar("Self", bound="BankContents")


class Lost(NamedTuple):
    """A prefetched frame that cannot be had."""

    frame: int
    reason: str  # "missing"; "replaced"; "damaged: " and what, with layer and sample


class BankContents:
    """The part of `MemoryBank` that changes nothing but by closing; arguments and errors are described there."""

    @normal_tensors
    def __init__(
        self,
        format: PageFormat,
        config: BankConfig,
        *,
        slots: torch.Tensor | None = None,
        device_slots: int = 0,
        first_slot: int = 0,
        device: torch.device | str = "cpu",
        sink: int = 0,
        frames_per_commit: int = 3,
        most_fetched: int = 0,
        _driver: str | None = None,
        _stream: Callable[[], int] | None = None,
    ) -> None:
        for name, value, kind in (("format", format, PageFormat), ("config", config, BankConfig)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        if format.storage != config.storage:
            raise ValueError(f"config's storage must be that of format ({format.storage!r}), got {config.storage!r}")
        self.format, self.config = format, config
        self.layers, self.samples = format.layers, format.samples
        self.sink = check_int("sink", sink, 0)
        self.frames_per_commit = check_int("frames_per_commit", frames_per_commit, 1)
        check_int("most_fetched", most_fetched, 0)
        self.device = _device(device)
        check_int("first_slot", first_slot, 0)
        count = _slot_count(format, config, slots, first_slot, device_slots, self.device)
        limits.check_limits(
            format, config, slots=count, most_fetched=most_fetched, sink=sink, frames_per_commit=frames_per_commit
        )
        if config.spill is not None and not config.spill.is_dir():
            raise ValueError(f"spill must be an existing folder, got {str(config.spill)!r}")
        core = extension()
        self.slots = format.slots(count, self.device) if slots is None else slots
        later = self.device.type == "cuda" or _driver is not None
        self._given_stream = _stream
        self._core = core.Bank(
            layers=format.layers,
            samples=format.samples,
            page_bytes=format.page_bytes,
            segments=format.segments,
            slots=format.slot_parts(self.slots),
            first_slot=first_slot,
            slot_count=count,
            host_bytes=config.host_bytes,
            slab_bytes=config.slab_bytes,
            lock=config.lock_memory and later,
            disk_bytes=config.disk_bytes,
            shard_bytes=config.shard_bytes,
            spill="" if config.spill is None else str(config.spill),
            direct_io=config.direct_io,
            io_threads=config.io_threads,
            bounce_records=limits.bounce_records(config, most_fetched, count),
            commit_records=frames_per_commit,
            device="cuda" if later else "cpu",
            ordinal=self.device.index or 0,
            driver=_driver or "",
        )
        self._slot_bytes = count * limits.slot_bytes(format)
        self._first_slot, self._slot_count = first_slot, count
        self._sources = Sources(
            format, frames_per_commit, self.device, self._core, later=later, on_host=self.device.type == "cpu"
        )
        self._lock = threading.RLock()
        # Held by what adds, replaces or forgets frames, taken before the lock: a save holds it for long, and searches
        # and fetches go on.
        self._changes = threading.RLock()
        self.handle = new_handle(self)
        self._catalogue = Catalogue(self.samples, config.policy, sink, self._core.room(), self.slots)
        self._lost: dict[int, Lost] = {}  # by frame, what settle() has not named yet
        self._unsettled = False
        self._counts: Counter[str] = Counter()
        self._stall_us = 0  # up to the last settle
        self._faults = FaultWatch(repr(self), config, locks=later)
        self.log = RetrievalLog(config.log)
        # Closes before the memory that copies still touch is given back, be it at the end of the process.
        self._finalizer = weakref.finalize(self, _close, self._core, self.log, self.handle, (self.slots, self._sources))
        self._process = os.getpid()
        leave_in_children(self)

    def wait(self, layer: int, pool_layer: torch.Tensor | None = None) -> None:
        """See `MemoryBank`; here because it is what a handle is for."""
        raise NotImplementedError

    # What is there

    @property
    def index(self) -> FrameIndex | None:
        """The embeddings; None before the first. Its tensors are replaced when it grows."""
        return self._catalogue.index

    def slot(self, frame: int) -> int:
        """Device slot that holds, or is being filled with, a frame's pages; -1 for none. Valid while it is fetched."""
        return int(self._where(frame)[0])

    def generation(self, frame: int) -> int:
        """How often a frame was replaced; -1 when it is not there."""
        return int(self._where(frame)[3])

    def __contains__(self, frame: int) -> bool:
        return self.generation(frame) >= 0

    def __len__(self) -> int:
        self._check_open()
        return int(self._core.stats()["frames"])

    def frames(self) -> list[int]:
        """The frames in the bank, ascending."""
        self._check_open()
        return list(self._core.frames())

    def room(self) -> int:
        """Frames that can be committed before others must be forgotten."""
        self._check_open()
        return int(self._core.room())

    def retrievals(self, frame: int) -> int:
        """How often searches have found a frame, over all samples."""
        with self._turn():
            return self._catalogue.retrievals(frame)

    def embedding(self, frame: int) -> torch.Tensor:
        """Unit embedding of a frame, ``(samples, E)``, NaN where it was not finite. KeyError when it has none."""
        with self._turn():
            if self.index is None or frame not in self.index:
                raise KeyError(f"frame {frame} has no embedding in the bank")
            return self.index.embedding(frame)

    def read(self, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A frame's keys and values ``(layers, samples, T, H, D)`` in the compute dtype, on the CPU; see `record`."""
        return self.format.decode(self.record(frame))

    def record(self, frame: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """A frame's stored pages ``(layers, samples, page_bytes)`` uint8 on the CPU, from host memory or disk.

        Args:
            frame: the frame.
            out: where to write them, contiguous; by default a new tensor.

        Raises:
            KeyError: the frame is not there.
            DamagedPage: a page is damaged. The frame is gone then, from the index too.
        """
        self._check_open()
        if out is None:
            out = torch.empty(self.layers, self.samples, self.format.page_bytes, dtype=torch.uint8)
        self._check_record("out", out)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {out.stride()}")
        try:
            with core_errors():
                self._core.read(frame, out.data_ptr())
        except DamagedPage as error:
            with self._turn():
                self._lose(Lost(frame, str(error).partition(" is ")[2]))
            raise
        return out

    def flush(self) -> None:
        """Waits on the host until all copies and writes to disk under way are done."""
        self._check_open()
        self._core.flush()

    def stats(self) -> dict[str, Any]:
        """Counters since the bank was made and what the tiers hold; the fields are those of `statistics.bank_stats`."""
        with self._turn():
            return bank_stats(
                self._core.stats(),
                self.format,
                self.config,
                slot_bytes=self._slot_bytes,
                staging_bytes=self._sources.nbytes,
                catalogue=self._catalogue,
                counts=self._counts,
            )

    # Closing

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Waits for what is under way and gives everything back. Any later use but of `close` is a RuntimeError."""
        self._finalizer()

    def forked(self) -> object:
        """For `forking`: in a child the bank counts as closed, whoever held its locks."""
        self._finalizer.detach()
        self._lock, self._changes = threading.RLock(), threading.RLock()
        return self._core

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"{self!r} cannot be copied or pickled: save() it, and open() what was saved")

    def __enter__(self: Self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if hasattr(self, "_finalizer") and self.closed else ""
        return (
            f"<MemoryBank {self.handle}: {self.layers} layers, {self.samples} samples, {self.format.storage}{closed}>"
        )

    # Private

    def _check_open(self) -> None:
        if self.closed:
            here = (
                "" if os.getpid() == self._process else f" here: it is process {self._process}'s, this one is its fork"
            )
            raise RuntimeError(f"{self!r} is closed{here}")

    def _turn(self) -> _Turn:
        return _Turn(self)

    def _range(self, name: str) -> AbstractContextManager[Any]:
        return torch.cuda.nvtx.range(f"longlive bank {name}") if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int:
        if self._given_stream is not None:
            return self._given_stream()
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self.device.type == "cuda" else 0

    def _check_stream(self, call: str) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{call} cannot be captured into a CUDA graph: call it before the graph is replayed")

    def _where(self, frame: int) -> tuple[int, bool, bool, int]:
        self._check_open()
        slot, host, disk, generation = self._core.where(frame)
        return slot, host, disk, generation

    def _tier(self, frame: int) -> str:
        slot, host, _, generation = self._where(frame)
        if generation < 0:
            return "missing"
        return "device" if slot >= 0 else "host" if host else "disk"

    def _check_record(self, name: str, record: torch.Tensor) -> None:
        shape = (self.layers, self.samples, self.format.page_bytes)
        check(name, record, shape, (torch.uint8,), torch.empty(0))

    def _lose(self, lost: Lost) -> None:
        """Follows the core, which may have dropped a frame. A read and a fetch may both have met the damage."""
        first = self._core.where(lost.frame)[3] >= 0 or self._catalogue.drop(lost.frame)
        if first and lost.reason.startswith("damaged"):
            self._counts["damaged"] += 1
            self._faults.damaged(lost.frame, lost.reason)


class _Turn:
    """The face's lock, for one call on an open bank."""

    def __init__(self, bank: BankContents) -> None:
        self._bank = bank

    def __enter__(self) -> None:
        self._bank._lock.acquire()
        try:
            self._bank._check_open()
        except BaseException:
            self._bank._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._bank._lock.release()


def _close(core: Any, log: RetrievalLog, handle: int, _kept: object) -> None:
    """Closes a bank; must not refer to it."""
    drop_handle(handle)
    core.close()
    log.close()


def _device(device: torch.device | str) -> torch.device:
    """With its number, which "cuda" alone does not say."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA device, got {device}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _slot_count(
    pages: PageFormat,
    config: BankConfig,
    slots: torch.Tensor | None,
    first_slot: int,
    device_slots: int,
    device: torch.device,
) -> int:
    """Device slots that are the bank's."""
    check_int("device_slots", device_slots, 0)
    if slots is None:
        if first_slot:
            raise ValueError(f"first_slot must be 0 when slots is not given, got {first_slot}")
        return limits.slots_within(pages, config, device_slots)
    if slots.device != device:
        raise ValueError(f"slots must be on device ({device}), got {slots.device}")
    pages.slot_parts(slots)  # checks dtype, shape and strides
    count = slots.shape[2 if pages.quantised else 3] - first_slot
    if count < device_slots or count < 0:
        raise ValueError(
            f"slots must have first_slot + device_slots ({first_slot} + {device_slots}) or more, got "
            f"{count + first_slot}"
        )
    return limits.slots_within(pages, config, device_slots or count)
