"""A bank of tiny pages beside a dictionary of arrays that says what it must hold, for tests that attack ``_C.Bank``.

Work of the compute stream goes through a ``Compute``: at once on the host, later and in random order on a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from longlive_rag_ops import _C

Array = np.ndarray[Any, Any]

LAYERS, SAMPLES, PAGE = 2, 2, 4096
SEGMENTS = [(0, 512), (512, 200)]  # the second ends in the middle of nowhere: what follows is zero
RECORD = LAYERS * SAMPLES * PAGE
GUARD = 0xEE  # in slots that are not the bank's
SPOILED = 0xDD  # in memory that a commit no longer needs


class Compute(Protocol):
    """What a framework does on its streams, in the order it was enqueued on each."""

    streams: Sequence[int]

    def write(self, stream: int, to: Array, values: Array) -> None:
        """`to[...] = values` when the stream gets there."""

    def read(self, stream: int, values: Array, then: Callable[[Array], None]) -> None:
        """Calls `then` with what `values` held when the stream got there; at the latest in `finish`."""

    def run(self, operations: int) -> None:
        """Lets some of what is under way happen."""

    def finish(self) -> None:
        """Lets all of it happen, and makes every check that is still to be made."""


class AtOnce:
    """The host: everything has happened when the call returns."""

    streams: Sequence[int] = (0,)

    def write(self, stream: int, to: Array, values: Array) -> None:
        to[...] = values

    def read(self, stream: int, values: Array, then: Callable[[Array], None]) -> None:
        then(values.copy() if isinstance(values, np.ndarray) else values.clone())

    def run(self, operations: int) -> None:
        pass

    def finish(self) -> None:
        pass


class Late:
    """Streams of the stand-in for the CUDA driver: nothing has happened until somebody waits for it, or `run`.

    Args:
        fake: a `stand_in.StandIn`.
    """

    def __init__(self, fake: Any) -> None:
        self.fake = fake
        self.streams: Sequence[int] = (fake.stream(), fake.stream(), 0)
        self._kept: list[Array] = []  # memory that kernels still use
        self._reads: list[tuple[Array, Callable[[Array], None]]] = []

    def write(self, stream: int, to: Array, values: Array) -> None:
        mine = np.ascontiguousarray(values)
        self._kept += [mine, to]
        for to_row, row in zip(_rows(to), _rows(mine), strict=True):
            self.fake.copy(stream, to_row.ctypes.data, row.ctypes.data, row.nbytes)

    def read(self, stream: int, values: Array, then: Callable[[Array], None]) -> None:
        mine = np.zeros(values.shape, values.dtype)
        self._kept.append(values)
        for to_row, row in zip(_rows(mine), _rows(values), strict=True):
            self.fake.copy(stream, to_row.ctypes.data, row.ctypes.data, row.nbytes)
        self._reads.append((mine, then))

    def run(self, operations: int) -> None:
        self.fake.run(operations)

    def finish(self) -> None:
        self.fake.run()
        assert self.fake.pending() == 0, "work that waits for ever"
        for got, then in self._reads:
            then(got)
        self._kept.clear()
        self._reads.clear()
        assert not self.fake.violations(), self.fake.violations()


def _rows(array: Array) -> list[Array]:
    """The contiguous runs along the last axis."""
    assert array.strides[-1] == array.itemsize
    return [array[index] for index in np.ndindex(array.shape[:-1])]


@dataclass(frozen=True)
class Limits:
    """Sizes of a bank, in records and slots."""

    host: int = 6
    disk: int = 0
    slots: int = 3
    bounce: int = 3
    commit: int = 2
    slab: int = 2
    shard: int = 2

    @property
    def kept_back(self) -> int:
        """Host records for frames on their way from disk or being replaced: not more than disk can hold."""
        return min(max(self.bounce, self.commit), self.disk)

    @property
    def most_frames(self) -> int:
        return self.host + self.disk - self.kept_back


@dataclass
class Held:
    """A frame that the bank must have."""

    record: Array
    generation: int
    pins: int = 0
    settled: bool = False  # a settle has passed since it was pinned: its slot may be read after a wait


class World:
    """A bank, its slots, and what it must hold. Methods do one call each and check what can be seen of it at once.

    Attributes:
        held: frame -> what the bank must have of it.
        asked: frames prefetched since the last settle: True for one that can be had, False for one that cannot,
            None for one whose pins were gone before it went, which may be named or not.
    """

    def __init__(self, limits: Limits, folder: str, compute: Compute | None = None, **options: Any) -> None:
        self.limits, self.compute = limits, compute or AtOnce()
        self.held: dict[int, Held] = {}
        self.asked: dict[int, bool | None] = {}
        self.cleared = False  # since the last settle
        self.versions = 0
        first, count = 1, limits.slots
        self.first = first
        self.slots = [
            np.full((LAYERS, SAMPLES, first + count + 1, size), GUARD, np.uint8) for _, size in SEGMENTS
        ]  # one slot before and one behind belong to nobody
        self.kept: list[Array] = []  # sources, alive as long as something may read them
        arguments: dict[str, Any] = {
            "layers": LAYERS,
            "samples": SAMPLES,
            "page_bytes": PAGE,
            "segments": SEGMENTS,
            "slots": [(part.ctypes.data, *part.strides[:3]) for part in self.slots],
            "first_slot": first,
            "slot_count": count,
            "host_bytes": limits.host * RECORD,
            "slab_bytes": limits.slab * RECORD,
            "lock": True,
            "disk_bytes": limits.disk * RECORD,
            "shard_bytes": limits.shard * RECORD,
            "spill": folder if limits.disk else "",
            "direct_io": True,
            "io_threads": 2,
            "bounce_records": limits.bounce,
            "commit_records": limits.commit,
        }
        self.bank = _C.Bank(**(arguments | options))

    # -- contents

    def new_record(self, frame: int) -> Array:
        """A page of bytes that differ between frames, generations, layers, samples and places."""
        self.versions += 1
        record = np.zeros((LAYERS, SAMPLES, PAGE), np.uint8)
        noise = np.random.default_rng([frame, self.versions])
        for offset, size in SEGMENTS:
            record[:, :, offset : offset + size] = noise.integers(0, 256, (LAYERS, SAMPLES, size), np.uint8)
        return record

    def sources(self, records: Sequence[Array]) -> list[list[Array]]:
        """For each record, memory for its segments, strided: what `commit` is told to read."""
        made = []
        for _ in records:
            parts = [np.zeros((SAMPLES, LAYERS, size + 64), np.uint8) for _, size in SEGMENTS]
            self.kept += parts
            made.append([part.transpose(1, 0, 2)[:, :, :size] for part, (_, size) in zip(parts, SEGMENTS, strict=True)])
        return made

    def slot_parts(self, slot: int, layer: int) -> list[tuple[Array, int, int]]:
        """A layer of a slot: for each segment its bytes (samples, size), offset and size in the page."""
        return [(part[layer, :, slot], offset, size) for part, (offset, size) in zip(self.slots, SEGMENTS, strict=True)]

    # -- calls

    def commit(
        self, frames: Sequence[int], stream: int = 0, replace: bool = False, spoil_on: int | None = None
    ) -> bool:
        """Writes pages on the stream, commits them, and overwrites them as soon as it is allowed. False: BankFull."""
        records = [self.new_record(frame) for frame in frames]
        sources = self.sources(records)
        for record, parts in zip(records, sources, strict=True):
            for part, (offset, size) in zip(parts, SEGMENTS, strict=True):
                self.compute.write(stream, part, record[:, :, offset : offset + size])
        pages = [[(part.ctypes.data, *part.strides[:2]) for part in parts] for parts in sources]
        room = self.bank.room()
        wrong = len(set(frames)) < len(frames) or any((frame in self.held) != replace for frame in frames)
        try:
            self.bank.commit(frames=list(frames), pages=pages, stream=stream, replace=replace)
        except ValueError:
            assert wrong, (frames, replace)
            return False
        except _C.BankFull:
            assert not wrong, frames
            if replace:  # more than a commit may be: what is on disk alone needs a record before it leaves its place
                assert len(frames) > self.limits.commit and self.limits.disk, (frames, self.limits)
            assert room < len(frames) - (self.limits.kept_back if replace else 0), (frames, replace, room, self.limits)
            return False
        assert not wrong and (replace or room >= len(frames)), (frames, replace, room)
        for frame, record in zip(frames, records, strict=True):
            old = self.held.get(frame)
            generation = self.bank.where(frame)[3]
            assert generation > old.generation if old else generation >= 0
            self.held[frame] = Held(record, generation)
            if self.asked.get(frame):
                self.asked[frame] = None if old is None or not old.pins else False
        other = stream if spoil_on is None else spoil_on
        for layer in range(LAYERS):
            self.wait(layer, other)
            for parts in sources:
                for part in parts:
                    self.compute.write(other, part[layer], np.full_like(part[layer], SPOILED))
        return True

    def insert(self, frame: int, generation: int = 0) -> bool:
        record, room = self.new_record(frame), self.bank.room()
        mine = record.copy()
        mine[:, :, SEGMENTS[-1][0] + SEGMENTS[-1][1] :] = GUARD  # belongs to no segment: to be kept as zeros
        try:
            self.bank.insert(frame=frame, address=mine.ctypes.data, generation=generation)
        except ValueError:
            assert frame in self.held
            return False
        except _C.BankFull:
            assert frame not in self.held and room < 1
            return False
        mine[...] = SPOILED  # copied before the call returned
        assert frame not in self.held and room >= 1
        self.held[frame] = Held(record, generation)
        return True

    def read(self, frame: int) -> None:
        got = np.full((LAYERS, SAMPLES, PAGE), GUARD, np.uint8)
        try:
            self.bank.read(frame=frame, address=got.ctypes.data)
        except KeyError as error:
            assert frame not in self.held and str(frame) in str(error)
            return
        assert frame in self.held
        assert np.array_equal(got, self.held[frame].record), f"frame {frame}: another record"

    def prefetch(self, frames: Sequence[int], stream: int = 0) -> bool:
        there = [frame for frame in frames if frame in self.held]
        pinned = {frame for frame, held in self.held.items() if held.pins} | set(there)
        try:
            self.bank.prefetch(frames=list(frames), stream=stream)
        except _C.BankFull:
            # Records for reads from disk are enough for every slot where that many are kept.
            assert len(pinned) > self.limits.slots or self.limits.bounce < self.limits.slots, (frames, pinned)
            return False
        assert len(pinned) <= self.limits.slots, (frames, pinned)
        for frame in frames:
            self.asked[frame] = frame in self.held
        for frame in there:
            held = self.held[frame]
            held.pins += 1
            held.settled = False
        return True

    def settle(self) -> None:
        lost = dict(self.bank.settle())
        if not self.cleared:
            assert {frame for frame, there in self.asked.items() if there is False} <= set(lost), (lost, self.asked)
            assert {frame for frame in lost if self.asked[frame]} == set(), (lost, self.asked)
        for reason in lost.values():
            assert reason in ("missing", "replaced", "forgotten"), lost
        self.asked.clear()
        self.cleared = False
        self._settled()

    def _settled(self) -> None:
        for held in self.held.values():
            held.settled = held.pins > 0

    def wait(self, layer: int, stream: int = 0, fetched_only: bool = False) -> None:
        self.bank.wait(layer=layer, stream=stream, fetched_only=fetched_only)
        self._settled()  # it settles first

    def attend(self, stream: int = 0, release: bool = True, fetched_only: bool = False) -> int:
        """Reads every pinned page on a stream, layer by layer, as attention does; pins go as soon as they may."""
        for layer in range(LAYERS):
            self.wait(layer, stream, fetched_only)
            for frame, held in self.held.items():
                if held.pins:
                    self._read_slot(frame, held, layer, stream)
        frames = [frame for frame, held in self.held.items() if held.pins]
        if release and frames:
            self.release(frames, stream)
        return len(frames)

    def _read_slot(self, frame: int, held: Held, layer: int, stream: int) -> None:
        slot = self.bank.where(frame)[0]
        assert self.first <= slot < self.first + self.limits.slots, (frame, slot)
        for values, offset, size in self.slot_parts(slot, layer):
            want = held.record[layer, :, offset : offset + size]
            about = f"frame {frame}, slot {slot}, layer {layer}, stream {stream}"

            def check(got: Array, want: Array = want, about: str = about) -> None:
                assert np.array_equal(got, want), f"{about}: other bytes"

            self.compute.read(stream, values, check)

    def release(self, frames: Iterable[int], stream: int = 0) -> None:
        frames = list(frames)
        self.bank.release(frames=frames, stream=stream)
        for frame in frames:
            if frame in self.held and self.held[frame].pins:
                self.held[frame].pins -= 1

    def forget(self, frames: Sequence[int]) -> bool:
        wrong = any(frame not in self.held or self.held[frame].pins for frame in frames)
        try:
            self.bank.forget(frames=list(frames))
        except ValueError as error:
            assert wrong, error
            return False
        assert not wrong, frames
        for frame in frames:
            del self.held[frame]
            if frame in self.asked:
                self.asked[frame] = None
        return True

    def clear(self) -> None:
        self.bank.clear()
        self.held.clear()
        self.cleared = True

    # -- what holds at any time

    def check(self) -> None:
        """What can be asked for without changing anything."""
        bank, limits = self.bank, self.limits
        assert list(bank.frames()) == sorted(self.held)
        assert bank.room() == limits.most_frames - len(self.held)
        taken = set()
        for frame in sorted(self.held):
            slot, host, disk, generation = bank.where(frame)
            assert generation == self.held[frame].generation
            assert host or disk, f"frame {frame} is nowhere"
            if slot >= 0:
                assert self.first <= slot < self.first + limits.slots and slot not in taken
                taken.add(slot)
            assert slot >= 0 or not self.held[frame].pins
        stats = bank.stats()
        assert stats["frames"] == len(self.held) and stats["device_frames"] == len(taken)
        assert stats["damaged_pages"] == stats["failed_spills"] == 0
        for tier, most in (("host", limits.host), ("disk", limits.disk)):
            of = stats[tier]
            assert of["used"] <= of["capacity"] == most, (tier, of)
            assert of["used"] * RECORD <= of["reserved_bytes"] <= most * RECORD, (tier, of)

    def finish(self) -> None:
        """Everything happens and is checked; each frame is read back once more, and nothing is left behind."""
        self.compute.finish()
        self.bank.flush()
        self.compute.finish()
        self.check()
        for frame in list(self.held):
            self.read(frame)
        for part in self.slots:
            assert (part[:, :, 0] == GUARD).all() and (part[:, :, -1] == GUARD).all()
        self.clear()
        self.bank.flush()
        stats = self.bank.stats()
        assert stats["host"]["used"] == stats["disk"]["used"] == stats["frames"] == 0, stats
        self.close()

    def close(self) -> None:
        self.bank.close()
        assert self.bank.closed


@dataclass
class Count:
    """Operations done, by name."""

    by_name: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str) -> None:
        self.by_name[name] = self.by_name.get(name, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.by_name.values())
