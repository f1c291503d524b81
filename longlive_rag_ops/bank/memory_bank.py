"""The memory bank as an object: pages and embeddings of finished frames, bounded, in tiers."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ..build_info import extension
from ..config import check_int
from ..index import FrameIndex
from ..modes import normal_tensors
from ..ops.checks import FLOATS, LARGEST_FRAME, check
from ..ops.waiting import drop_handle, new_handle
from . import limits
from .catalogue import Catalogue, take_back
from .config import BankConfig
from .errors import BankFull, DamagedPage, core_errors
from .faults import FaultWatch
from .host_copy import HostCopy
from .page_format import PageFormat
from .retrieval_log import RetrievalLog
from .sources import Sources
from .statistics import bank_stats

Pages = torch.Tensor | Sequence[torch.Tensor]


class Lost(NamedTuple):
    """A prefetched frame that cannot be had."""

    frame: int
    reason: str  # "missing"; "replaced"; "damaged: " and what, with layer and sample


class MemoryBank:
    """A bounded store of frames' canonical pages: device slots, host memory, disk; with the index of their embeddings.

    A page is the bank's from `commit` on and never changes within its *generation*: any tier may hold a copy. Pages are
    what the window placed, keys before the temporal rotation. All samples of a frame are stored together.

    Order. Copies begin after what the current stream was given before the call, and are done in the background.
    `wait` makes the current stream wait for a layer: after it, fetched pages may be read and committed ones
    overwritten. On a CPU copies are done when the call returns. Commits and searches belong on one stream, or in an
    order of the caller's.

    Every method may be called from any thread. A bank that nobody refers to is closed.

    Args:
        format: of the pages.
        config: limits and settings.
        slots: tensor of device slots to use, shaped as ``format.slots`` makes them (plain: the window's pool); when not
            given the bank makes its own.
        device_slots: how many; with ``slots``, 0 means all from ``first_slot`` on.
        first_slot: with ``slots``: the first that is the bank's.
        device: of pages, slots and index; must be that of ``slots``.
        sink: frames below it are never forgotten for others.
        frames_per_commit: most frames of one `commit`.
        most_fetched: frames that can be fetched and held on the device at once, whatever else the bank holds.

    Attributes:
        format, config, sink, layers, samples: as given.
        slots: the device slots, in the format's shape.
        log: the `RetrievalLog`.
        handle: number by which ``torch.ops.longlive.wait_pages`` finds the bank.

    Raises:
        TypeError, ValueError: an argument is not allowed, or a tier cannot hold one commit and one fetch; the message
            names the limit, the bytes needed and given.
        ImportError: the compiled core is not built.
        RuntimeError: there is no CUDA driver for a CUDA device.
        OSError: the folder for the disk tier cannot be written to.
    """

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
        count = _slot_count(format, slots, check_int("first_slot", first_slot, 0), device_slots, self.device)
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
        self._slot_bytes = count * format.slots(1, "meta").nbytes
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
        self._lost: list[Lost] = []  # that settle() has not named yet
        self._unsettled = False
        self._counts: Counter[str] = Counter()
        self._stall_us = 0  # up to the last settle
        self._faults = FaultWatch(repr(self), config, locks=later)
        self.log = RetrievalLog(config.log)
        # Closes before the memory that copies still touch is given back, be it at the end of the process.
        self._finalizer = weakref.finalize(self, _close, self._core, self.log, self.handle, (self.slots, self._sources))

    # Pages

    @normal_tensors
    def commit(
        self,
        frames: Iterable[int],
        keys: Pages,
        values: Pages,
        embeddings: torch.Tensor | None = None,
        *,
        replace: bool = False,
    ) -> list[int]:
        """Stores frames; when the bank is full, forgets others by its policy, never sink or pinned ones.

        The pages are copied in the background: until `wait` they must not be overwritten (the bank keeps them alive).

        Args:
            frames: ``n`` frame numbers, at most ``frames_per_commit``, each once. A frame that is there must be
                replaced.
            keys, values: ``n`` views ``(layers, samples, T, H, D)`` each, or one tensor ``(layers, samples, n, T, H,
                D)`` each, in the compute dtype. Plain pages must be contiguous, ``(T, H, D)``.
            embeddings: ``(samples, n, E)`` floating point; a frame is not found in samples where it has NaN or
                infinity. None: the frames are found by no search or, with ``replace``, by their old embeddings.
            replace: the frames are there, and get a new generation: the old pages are in no tier any more when the call
                returns, fetches of them are dropped, and their slots must not be used.

        Returns:
            Frames that were forgotten.

        Raises:
            BankFull: there is no room, and the policy gives none up.
            TypeError, ValueError: an argument is not allowed.
            RuntimeError: the bank is closed, or the current stream is being captured into a CUDA graph. The bank is
                unchanged in all of these cases, but that frames may have been forgotten when the system has refused
                memory meanwhile.
        """
        numbers = _frames(frames)
        with self._changes, self._turn(), self._range("commit"):
            self._check_stream("commit")
            pages = self._pages_of(numbers, keys, values)
            if embeddings is not None:
                self._catalogue.make_index(numbers, embeddings)
            for frame in numbers:
                if (frame in self) != replace:
                    state = "not in the bank, and replace is True" if replace else "in the bank, and replace is False"
                    raise ValueError(f"frames must not name frame {frame}, which is {state}")
            stream = self._stream()
            sources = self._sources.take(pages, stream)
            forgotten = self._store(numbers, sources, stream, replace)
            self._sources.committed()
            for frame in numbers:
                self._catalogue.fetched.pop(frame, None)
            if embeddings is not None:
                self._catalogue.embed(numbers, embeddings)
            self._faults.check(self._core.stats())
        return forgotten

    def _store(self, frames: list[int], sources: list[Any], stream: int, replace: bool) -> list[int]:
        forgotten: list[int] = []
        while True:
            if not replace:
                forgotten += self._make_room(len(frames))
            try:
                with core_errors():
                    self._core.commit(frames, sources, stream=stream, replace=replace)
                return forgotten
            except BankFull:  # the system has refused memory that the bank counted on: there is less room now
                if replace or self._core.room() >= len(frames):
                    raise
            except BaseException:  # a device that fails in the middle may take a frame that was being replaced
                for frame in frames:
                    if frame not in self:
                        self._catalogue.drop(frame)
                raise

    def forget(self, frames: Iterable[int]) -> None:
        """Drops frames from every tier and from the index, sink frames too.

        ValueError when one is not there or is pinned, or fetched and not released; nothing is dropped then.
        """
        numbers = _frames(frames)
        with self._changes, self._turn():
            for frame in numbers:
                if frame in self._catalogue.pins:
                    raise ValueError(f"frames must not name pinned frames, got {frame}")
            self._core.forget(numbers)
            for frame in numbers:
                self._catalogue.drop(frame)
            self._counts["asked"] += len(numbers)

    def clear(self) -> None:
        """Drops every frame, embedding and pin, and what a prefetch has asked for; counters stay."""
        with self._changes, self._turn():
            self._core.clear()
            self._core.settle()
            self._catalogue.clear()
            self._lost, self._unsettled = [], False

    def pin(self, frames: int | Iterable[int]) -> None:
        """Keeps frames from being forgotten until they are unpinned as often. Those that are not there are passed over.

        A frame keeps its pins when it is replaced, and loses them when it is damaged.
        """
        with self._turn():
            self._catalogue.pins.update(frame for frame in _frames(frames) if frame in self)

    def unpin(self, frames: int | Iterable[int]) -> None:
        """Takes back one `pin` each. Frames that are not pinned are passed over."""
        with self._turn():
            take_back(self._catalogue.pins, _frames(frames))

    def pins(self, frame: int) -> int:
        """How often a frame is pinned, its fetches not counted."""
        return self._catalogue.pins.get(frame, 0)

    # Retrieval

    @normal_tensors
    def search(
        self,
        query: torch.Tensor,
        k: int,
        *,
        end_frame: int,
        first_frame: int | None = None,
        recent_exclude: int = 0,
        min_score: float | None = None,
        diversity: float = 0.0,
        engine: str = "auto",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames whose embeddings are most similar to the query's: ``topk_retrieve`` over the index.

        The host does not wait. What is found counts as retrieved (policy ``least_retrieved``) and goes to the log.

        Args:
            query: ``(samples, E)``.
            first_frame: oldest frame that may be found; ``sink`` when not given.
            k, end_frame, recent_exclude, min_score, diversity, engine: as ``topk_retrieve`` takes them.

        Returns:
            ids ``(samples, k)`` int64, most similar first, -1 past the last; scores ``(samples, k)``, -inf past the
            last. All -1 while the index is empty.
        """
        first = self.sink if first_frame is None else check_int("first_frame", first_frame, 0)
        with self._turn(), self._range("search"):
            index = self.index
            if index is None:  # so that arguments are checked all the same
                check("query", query, (self.samples, None), FLOATS, query)
                index = FrameIndex(self.samples, max(1, query.shape[1]), query.dtype, self.device)
            ids, scores = torch.ops.longlive.topk_retrieve(
                query.detach(),
                index.embeddings,
                index.ids,
                index.length,
                torch.full((1,), check_int("end_frame", end_frame, 0), dtype=torch.int64, device=self.device),
                k,
                first_frame=first,
                recent_exclude=recent_exclude,
                normalized=True,
                min_score=min_score,
                diversity=diversity,
                engine=engine,
            )
            found = HostCopy(ids)
            self._counts["searches"] += 1
            self._catalogue.found(found)
            options = {
                "k": k,
                "end_frame": end_frame,
                "first_frame": first,
                "recent_exclude": recent_exclude,
                "min_score": min_score,
                "diversity": diversity,
            }
            self.log.searched(found, HostCopy(scores), options)
        return ids, scores

    def prefetch(self, frames: Iterable[int]) -> None:
        """Begins to bring frames into device slots, and holds them there until `release`.

        Copies from host memory go layer by layer behind what the current stream was given, reads from disk begin.
        `slot` tells where a frame is after `settle`. A frame the bank does not have is no error: `settle` names it.

        Raises:
            BankFull: slots, or host memory for reads from disk, do not suffice beside what is held. Nothing is fetched.
            TypeError, ValueError: not frame numbers, each once.
            RuntimeError: as for `commit`.
        """
        numbers = _frames(frames)
        with self._turn(), self._range("prefetch"):
            self._check_stream("prefetch")
            tiers = {frame: self._tier(frame) for frame in numbers}
            if numbers:
                with core_errors():
                    self._core.prefetch(numbers, stream=self._stream())
                self._unsettled = True
            self._catalogue.fetched.update(frame for frame in numbers if tiers[frame] != "missing")
            self.log.prefetched(tiers)

    def settle(self) -> list[Lost]:
        """Waits for reads from disk and begins their copies to the device; names prefetched frames that cannot be had.

        Those are not held in slots and have left the index, replaced frames excepted, whose new pages are there. What a
        call names it does not name again. Without a prefetch it does nothing.
        """
        self._collect()
        with self._turn():
            lost, self._lost = self._lost, []
        return lost

    def wait(self, layer: int, pool_layer: torch.Tensor | None = None) -> None:
        """Makes the current stream wait for a layer's copies, from slots and into them, that were begun before.

        Settles first when a prefetch is not settled. The host waits only for reads from disk.

        Args:
            layer: ``0 .. layers-1``.
            pool_layer: what a compiled graph has for ``slots[layer]``, see ``torch.ops.longlive.wait_pages``.

        Raises:
            TypeError, ValueError: there is no such layer, or ``pool_layer`` is not what it must be.
            RuntimeError: the bank is closed, the current stream is being captured into a CUDA graph (wait before it is
                replayed), or ``pool_layer`` is a copy of slots on a GPU.
        """
        check_int("layer", layer, 0, self.layers - 1)
        self._check_open()
        self._check_stream("wait")
        copied = pool_layer is not None and self._is_copy(pool_layer, layer)
        if self._unsettled:
            self._collect()
        stream, commits = self._stream(), self._sources.commits
        with core_errors():
            self._core.wait(layer, stream)
        self._sources.waited(layer, stream, commits)
        if copied and pool_layer is not None:
            at = 1 if self.format.quantised else 2
            arrived = slice(self._first_slot, self._first_slot + self._slot_count)
            index = (slice(None),) * at + (arrived,)
            pool_layer[index] = self.slots[layer][index]

    def _is_copy(self, pool_layer: torch.Tensor, layer: int) -> bool:
        """Whether a tensor is a compiler's copy of a layer's slots, rather than these or another tensor."""
        slots = self.slots[layer]
        if pool_layer.untyped_storage().data_ptr() == slots.untyped_storage().data_ptr():
            return False
        if self.format.quantised and (pool_layer.dtype != slots.dtype or pool_layer.shape != slots.shape):
            return False
        check("pool_layer (slots of the layer)", pool_layer, slots.shape, (slots.dtype,), slots)
        if pool_layer.is_cuda:
            raise RuntimeError(
                "pool_layer must be the bank's own slots on a GPU, got a copy of them, as compilers make it when the "
                "pool is no input of the graph, or is also used by others than the ops that write it: wait before the "
                "compiled call"
            )
        return True

    def release(self, frames: Iterable[int]) -> None:
        """The current stream has been given the last read of these frames' slots: takes back one `prefetch` each.

        A frame that was lost, replaced or forgotten meanwhile is passed over.
        """
        numbers = _frames(frames)
        with self._turn():
            self._core.release(numbers, stream=self._stream())
            take_back(self._catalogue.fetched, numbers)

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
        return len(self.frames())

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

    @normal_tensors
    def restore(
        self,
        frame: int,
        record: torch.Tensor,
        *,
        generation: int = 0,
        embedding: torch.Tensor | None = None,
        retrievals: int = 0,
    ) -> None:
        """Stores a frame as `record`, `generation`, `embedding` and `retrievals` gave it.

        The record is copied before the call returns. BankFull when there is no room (nothing is forgotten for it),
        ValueError when the frame is there.
        """
        check_int("frame", frame, 0, LARGEST_FRAME)
        check_int("generation", generation, 0)
        self._check_record("record", record)
        record = record.contiguous()
        with self._changes, self._turn():
            if embedding is not None:
                self._catalogue.make_index([frame], embedding[:, None])
            with core_errors():
                self._core.insert(frame, record.data_ptr(), generation=generation)
            if embedding is not None:
                self._catalogue.embed([frame], embedding[:, None], normalized=True)
            self._catalogue.set_retrievals(frame, retrievals)
            self._faults.check(self._core.stats())

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

    def save(self, path: str | os.PathLike[str]) -> list[tuple[int, str]]:
        """Saves every frame with its generation and embedding, and how often it was retrieved, for `open`.

        What is saved is the bank at one moment: until it is, commits and whatever else adds, replaces or forgets frames
        wait, in other threads; searches and fetches do not. Frames go through one buffer, a frame's size. Whatever
        happens, the folder holds what it held or what it is to hold; see docs/bank.md.

        Args:
            path: folder, made when it is not there; a bank that was saved there is replaced, also the one that this one
                was opened from.

        Returns:
            Frames that were not saved because a page is damaged, with the reason; a warning names them too.

        Raises:
            OSError: it could not be written (no space, say). BlockingIOError: another save into the folder is under
                way. FileExistsError: the folder's ``manifest.json`` is no saved bank's. The folder is as it was, except
                that a failure of the very last step, making the new state durable, leaves that in place.
            RuntimeError: the bank is closed.
        """
        from .saved import save_bank

        return save_bank(self, path)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: BankConfig, *, format: PageFormat | None = None, **options: Any
    ) -> MemoryBank:
        """A bank with what `save` has put into a folder, which is not needed afterwards.

        A frame with a page that is damaged or cannot be read is left out, with its embedding: a warning names it, layer
        and sample, and `stats` counts it. When the saved bank has more frames than ``config`` has room for, its policy
        chooses among all of them which to forget, sink frames excepted.

        Args:
            path: the folder.
            config: limits and settings; its storage must be the saved bank's.
            format: what the pages must be; None: whatever they are.
            options: keyword arguments of the constructor; ``sink`` is the saved bank's when not given.

        Raises:
            SavedBankError: (a ValueError) there is no saved bank (`NoSavedBank`), a newer program saved it
                (`NewerVersion`), or its manifest or index is damaged.
            BankFull: there is no room, and the policy gives no frame up.
            TypeError, ValueError: format or config do not fit the saved bank, or as for the constructor.
            OSError: a file cannot be read.
        """
        from .saved import open_bank

        return open_bank(path, config, bank_type=cls, format=format, **options)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """While it lasts no other thread adds, replaces or forgets frames; only damaged ones may go."""
        with self._changes:
            self._check_open()
            yield

    def count_opened(self, forgotten: int, damaged_frames: int, damaged_pages: int) -> None:
        """Counts what was left out of a saved bank when it was opened."""
        with self._turn():
            self._counts[self.config.policy] += forgotten
            self._counts["damaged"] += damaged_frames
            self._counts["damaged_pages"] += damaged_pages

    # Closing

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Waits for what is under way and gives everything back. Any later use but of `close` is a RuntimeError."""
        self._finalizer()

    def __enter__(self) -> MemoryBank:
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
            raise RuntimeError(f"{self!r} is closed")

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

    def _pages_of(self, frames: list[int], keys: Pages, values: Pages) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not 1 <= len(frames) <= self.frames_per_commit:
            raise ValueError(f"frames must name 1 to {self.frames_per_commit} (frames_per_commit), got {len(frames)}")
        shape = (self.layers, self.samples, *self.format.page_shape)
        views = []
        for name, pages in (("keys", keys), ("values", values)):
            if isinstance(pages, torch.Tensor):
                whole = (*shape[:2], len(frames), *shape[2:])
                check(name, pages, whole, (self.format.dtype,), self.slots)
                pages = pages.unbind(2)
            if len(pages) != len(frames):
                raise ValueError(f"{name} must be {len(frames)} tensors, one a frame; got {len(pages)}")
            for page in pages:
                check(name, page, shape, (self.format.dtype,), self.slots)
            views.append([page.detach() for page in pages])
        return list(zip(*views, strict=True))

    def _make_room(self, frames: int) -> list[int]:
        missing = frames - self._core.room()
        if missing <= 0:
            return []
        held = len(self)
        names = "host_bytes" if self.config.spill is None else "host_bytes and disk_bytes"
        if self.config.policy == "error":
            raise BankFull(
                f"{names} are used up by {held} frames and {frames} more are committed: raise them, or choose a policy "
                "by which others are forgotten"
            )
        candidates = self._catalogue.candidates(self.frames())
        if len(candidates) < missing:
            raise BankFull(
                f"{names} are used up by {held} frames, {frames} more are committed, and only {len(candidates)} may be "
                f"forgotten: the others are sink frames (below {self.sink}), pinned, or fetched and not released"
            )
        forgotten = []
        for _ in range(missing):
            frame = self._catalogue.choose(candidates)
            candidates.remove(frame)
            self._core.forget([frame])
            self._catalogue.drop(frame)
            forgotten.append(frame)
        self._counts[self.config.policy] += len(forgotten)
        return forgotten

    def _lose(self, lost: Lost) -> None:
        """Follows the core, which may have dropped a frame."""
        if self._core.where(lost.frame)[3] < 0:
            self._catalogue.drop(lost.frame)
        if lost.reason.startswith("damaged"):
            self._counts["damaged"] += 1
            self._faults.damaged(lost.frame, lost.reason)

    def _collect(self) -> None:
        """Settles the core; without the lock while it waits, unless the caller holds it."""
        self._check_open()
        self._unsettled = False
        with self._range("settle"), core_errors():
            found = [Lost(*lost) for lost in self._core.settle()]
        with self._turn():
            for lost in found:
                self._lose(lost)
            self._lost += found
            stats = self._core.stats()
            self._faults.check(stats)
            self.log.settled(found, stats["stall_us"] - self._stall_us)
            self._stall_us = stats["stall_us"]


class _Turn:
    """The face's lock, for one call on an open bank."""

    def __init__(self, bank: MemoryBank) -> None:
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
    pages: PageFormat, slots: torch.Tensor | None, first_slot: int, device_slots: int, device: torch.device
) -> int:
    """Device slots that are the bank's."""
    check_int("device_slots", device_slots, 0)
    if slots is None:
        if first_slot:
            raise ValueError(f"first_slot must be 0 when slots is not given, got {first_slot}")
        return device_slots
    if slots.device != device:
        raise ValueError(f"slots must be on device ({device}), got {slots.device}")
    pages.slot_parts(slots)  # checks dtype, shape and strides
    count = slots.shape[2 if pages.quantised else 3] - first_slot
    if count < device_slots or count < 0:
        raise ValueError(
            f"slots must have first_slot + device_slots ({first_slot} + {device_slots}) or more, got "
            f"{count + first_slot}"
        )
    return device_slots or count


def _frames(frames: int | Iterable[int]) -> list[int]:
    """Frame numbers, each once."""
    numbers = [frames] if isinstance(frames, int) else list(frames)
    for frame in numbers:
        check_int("frames", frame, 0, LARGEST_FRAME)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"frames must name each frame once, got {numbers}")
    return numbers
