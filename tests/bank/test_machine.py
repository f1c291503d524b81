"""Random sequences of calls held against a dictionary of arrays, by hypothesis: the core over the host, the core over a
stand-in CUDA whose work happens late and in random order, and ``MemoryBank`` with every policy and storage.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from bank_model import LAYERS, Count, Late, Limits, World
from memory_model import MemoryWorld
from stand_in import StandIn, stand_in

from longlive_rag_ops.bank import BankConfig, PageFormat

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

FRAMES = st.integers(0, 15)
PICK = st.integers(0, 15)  # number of a frame among those that are there
PICKS = st.lists(PICK, min_size=1, max_size=3)
STREAM = st.integers(0, 2)  # number of one of the compute streams


@st.composite
def limits(draw: Any) -> Limits:
    """Small enough that every tier is full most of the time."""
    slots, commit, disk = draw(st.integers(0, 5)), draw(st.integers(1, 2)), draw(st.sampled_from([0, 2, 4, 6, 6]))
    bounce = slots if disk else 0
    least = max(3, commit + bounce)
    return Limits(
        host=least + draw(st.integers(0, max(1, 8 - least))),
        disk=disk,
        slots=slots,
        bounce=bounce,
        commit=commit,
        slab=draw(st.integers(1, 4)),
        shard=draw(st.integers(1, 4)),
    )


class CoreMachine(RuleBasedStateMachine):
    """Calls of ``_C.Bank``. Subclasses give the device, and count calls and what the banks counted."""

    count = Count()
    seen: ClassVar[dict[str, int]] = {}
    world: World | None = None

    def make_world(self, sizes: Limits, folder: str) -> World:
        return World(sizes, folder)

    @initialize(sizes=limits(), fill=st.integers(0, 14))
    def start(self, sizes: Limits, fill: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="longlive-machine-")
        self.world = self.make_world(sizes, self.folder)
        for frame in range(min(fill, sizes.most_frames)):
            self.world.commit([frame], self.stream(0))

    def stream(self, number: int) -> int:
        streams = self.world.compute.streams
        return streams[number % len(streams)]

    def among(self, picks: list[int], away: bool = False) -> list[int]:
        """Different frames that are there; with ``away`` of those in the worst tier, if there are any such."""
        frames = sorted(self.world.held)
        if away:
            where = {frame: self.world.bank.where(frame) for frame in frames}
            slotless = [frame for frame in frames if where[frame][0] < 0] or frames
            frames = [frame for frame in slotless if not where[frame][1]] or slotless
        return list(dict.fromkeys(frames[pick % len(frames)] for pick in picks)) if frames else []

    def _commit(self, first: int, number: int, on: int, spoil_on: int) -> None:
        absent = [frame for frame in range(first, first + 16) if frame not in self.world.held]
        new = absent[: min(number, self.world.limits.commit)]
        self.world.commit(new, self.stream(on), spoil_on=self.stream(spoil_on))

    @rule(first=FRAMES, number=st.integers(1, 2), on=STREAM, spoil_on=STREAM)
    def commit(self, first: int, number: int, on: int, spoil_on: int) -> None:
        self.count("commit")
        self._commit(first, number, on, spoil_on)

    @rule(picks=PICKS, on=STREAM, spoil_on=STREAM)
    def replace(self, picks: list[int], on: int, spoil_on: int) -> None:
        self.count("replace")
        old = self.among(picks)[: self.world.limits.commit]
        if old:
            self.world.commit(old, self.stream(on), replace=True, spoil_on=self.stream(spoil_on))

    @rule(frame=FRAMES, other=FRAMES, replace=st.booleans())
    def commit_wrongly(self, frame: int, other: int, replace: bool) -> None:
        """A frame that is there, or not there, or twice: refused, and nothing of the call has happened."""
        self.count("commit wrongly")
        other = other if (other in self.world.held) == replace else frame
        frames = [other, frame] if self.world.limits.commit > 1 else [frame]
        if len(set(frames)) < len(frames) or (frame in self.world.held) != replace:
            assert not self.world.commit(frames, replace=replace)

    @rule(picks=PICKS, missing=FRAMES, on=STREAM)
    def prefetch(self, picks: list[int], missing: int, on: int) -> None:
        self.count("prefetch")
        frames = self.among(picks, away=missing % 2 == 0)
        self.world.prefetch(frames + [missing] * (missing not in self.world.held), self.stream(on))

    @rule(picks=PICKS, on=STREAM)
    def retrieve(self, picks: list[int], on: int) -> None:
        """What the window does: frames that are there, attended to layer by layer, and let go."""
        self.count("retrieve")
        self.world.prefetch(self.among(picks, away=True), self.stream(on))
        self.world.attend(self.stream(on))

    @rule(picks=PICKS, on=STREAM, spoil_on=STREAM)
    def block(self, picks: list[int], on: int, spoil_on: int) -> None:
        """A block of a video: frames come in, old ones go where there is no room, some are retrieved."""
        self.count("block")
        free = [frame for frame, held in self.world.held.items() if not held.pins]
        if self.world.bank.room() < self.world.limits.commit and free:
            self.world.forget(free[: self.world.limits.commit])
        self._commit(max(self.world.held, default=0) + 1, 2, on, spoil_on)
        if self.world.prefetch(self.among(picks, away=True), self.stream(on)):
            self.world.attend(self.stream(on))

    @rule(layer=st.integers(-1, LAYERS - 1), on=STREAM)
    def settle_or_wait(self, layer: int, on: int) -> None:
        self.count("settle" if layer < 0 else "wait")
        if layer < 0:
            self.world.settle()
        else:
            self.world.wait(layer, self.stream(on))

    @rule(on=STREAM, release=st.booleans(), fetched_only=st.booleans())
    def attend(self, on: int, release: bool, fetched_only: bool) -> None:
        self.count("attend")
        self.world.attend(self.stream(on), release, fetched_only)

    @rule(picks=PICKS, other=FRAMES, on=STREAM)
    def release(self, picks: list[int], other: int, on: int) -> None:
        """Of any frames: those that are not pinned, or not there, are passed over."""
        self.count("release")
        self.world.release(dict.fromkeys([*self.among(picks), other]), self.stream(on))

    @rule(picks=PICKS, other=FRAMES)
    def forget(self, picks: list[int], other: int) -> None:
        self.count("forget")
        self.world.forget(list(dict.fromkeys(self.among(picks[:1]) + [other] * (other == 15))))

    @rule(frame=FRAMES, generation=st.integers(0, 5))
    def insert(self, frame: int, generation: int) -> None:
        self.count("insert")
        self.world.insert(frame, generation)

    @rule(frame=FRAMES, what=st.integers(0, 20))
    def look(self, frame: int, what: int) -> None:
        """Reads a frame; seldom makes a clean sweep, after which nothing is under way that could go wrong."""
        self.count({20: "clear", 19: "flush"}.get(what, "read"))
        if what == 20:
            self.world.clear()
        elif what == 19:
            self.world.bank.flush()
        else:
            self.world.read(frame)

    @invariant()
    def agrees(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            for name, value in self.world.bank.stats().items():
                if isinstance(value, int):
                    self.seen[name] = self.seen.get(name, 0) + value
            try:
                self.world.finish()
            finally:
                shutil.rmtree(self.folder)


# Shrinking takes minutes: ask for it when there is something to shrink.
PHASES = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * ("LONGLIVE_SHRINK" in os.environ)


def run(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        phases=PHASES,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(machine, settings=settings)


def busy(machine: type[CoreMachine], *names: str) -> None:
    """What matters happened often enough for a wrong byte to have had its chance."""
    for name in (*names, "evictions", "host_drops", "spilled", "replaced"):
        assert machine.seen[name] >= 20, machine.seen


class HostMachine(CoreMachine):
    """Over the host device. What lies in slots that nobody has pinned is looked at, too."""

    count = Count()
    seen: ClassVar[dict[str, int]] = {}

    @invariant()
    def resident_pages_are_right(self) -> None:
        if self.world is None or self.world.asked:
            return  # reads may still be on their way to a slot
        for frame, held in self.world.held.items():
            if self.world.bank.where(frame)[0] >= 0:
                for layer in range(LAYERS):
                    self.world._read_slot(frame, held, layer, 0)


class LateMachine(CoreMachine):
    """Over the stand-in CUDA: whatever lacks a wait comes out as wrong bytes when the work is done in another order."""

    count = Count()
    seen: ClassVar[dict[str, int]] = {}
    fake: StandIn | None = None

    def make_world(self, sizes: Limits, folder: str) -> World:
        self.fake.reset()
        self.compute = Late(self.fake)
        return World(sizes, folder, self.compute, device="cuda", driver=str(self.fake.path))

    @initialize(seed=st.integers(0, 2**16))
    def shuffle(self, seed: int) -> None:
        self.fake.run(0, seed)

    @rule(steps=st.integers(1, 100))
    def run_some(self, steps: int) -> None:
        self.count("run")
        if steps == 100:
            self.compute.finish()
        else:
            self.compute.run(steps)


def test_the_core_over_a_late_device(tmp_path_factory: pytest.TempPathFactory) -> None:
    LateMachine.fake = StandIn(stand_in(tmp_path_factory.getbasetemp() / "stand-in"))
    run(LateMachine, 100, 80)
    assert LateMachine.count.total >= 5000 and len(LateMachine.count.by_name) == 16, LateMachine.count
    busy(LateMachine, "hits_device", "hits_host", "hits_disk", "misses", "late_layers", "dropped_fetches")


def test_the_core_over_the_host() -> None:
    run(HostMachine, 70, 80)
    assert HostMachine.count.total >= 3500 and len(HostMachine.count.by_name) == 15, HostMachine.count
    busy(HostMachine, "hits_device", "hits_host", "hits_disk", "misses")


@st.composite
def settings_of_a_bank(draw: Any) -> dict[str, Any]:
    slots, disk, sink, per_commit = (draw(st.integers(0, most)) for most in (4, 6, 2, 2))
    per_commit += 1
    bounce = max(1, slots) if disk and slots else 0
    least = (bounce + per_commit) if disk else sink + per_commit + slots
    host = draw(st.integers(max(3, least), max(8, least)))
    needed = sink + per_commit + slots - (host - max(bounce, per_commit))
    return {
        "storage": draw(st.sampled_from(["plain", "int8", "fp8"])),
        "policy": draw(st.sampled_from(["error", "oldest", "least_retrieved", "most_redundant"])),
        "host": host,
        "disk": max(disk, needed) if disk else 0,
        "slots": slots,
        "sink": sink,
        "per_commit": per_commit,
    }


class MemoryMachine(RuleBasedStateMachine):
    """Calls of ``MemoryBank``: frames come in ascending order, as a video has them."""

    count = Count()
    world: MemoryWorld | None = None
    forgotten = 0

    @initialize(made=settings_of_a_bank(), fill=st.integers(0, 14))
    def start(self, made: dict[str, Any], fill: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="longlive-machine-"))
        form = PageFormat(made["storage"], 2, 2, 3, 2, 4, torch.float16)
        config = BankConfig(
            host_bytes=made["host"] * form.record_bytes,
            disk_bytes=made["disk"] * form.record_bytes,
            spill=self.folder if made["disk"] else None,
            storage=made["storage"],
            policy=made["policy"],
            slab_bytes=2 * form.record_bytes,
            shard_bytes=3 * form.record_bytes,
            io_threads=2,
        )
        self.world = MemoryWorld(form, config, slots=made["slots"], sink=made["sink"], per_commit=made["per_commit"])
        self.next = 0
        self.saves = 0
        for frame in range(min(fill, self.world.most_frames)):
            self._commit([frame])

    def among(self, pick: int) -> int:
        """A frame that is there, or if none is one that is not."""
        frames = sorted(self.world.held)
        return frames[pick % len(frames)] if frames else 99

    @rule(picks=st.lists(PICK, min_size=1, max_size=3), searched=st.booleans(), stacked=st.booleans())
    def commit(self, picks: list[int], searched: bool, stacked: bool) -> None:
        self.count("commit")
        self._commit(picks, searched, stacked)

    def _commit(self, picks: list[int], searched: bool = False, stacked: bool = False) -> None:
        picks = picks[: self.world.per_commit]
        frames = list(range(self.next, self.next + len(picks)))
        found = searched or self.next >= self.world.sink
        if self.world.commit(frames, picks if found else None, stacked=stacked):
            self.next += len(frames)

    @rule(picks=st.lists(PICK, min_size=1, max_size=3), pick=PICK, k=st.integers(1, 3))
    def block(self, picks: list[int], pick: int, k: int) -> None:
        """A block of a video: frames come in, others go by the policy, some are retrieved."""
        self.count("block")
        self._commit(picks)
        if self.world.prefetch(self.world.search(pick, k, self.next)):
            self.world.attend()

    @rule(picks=st.lists(PICK, min_size=1, max_size=3), new=st.booleans())
    def replace(self, picks: list[int], new: bool) -> None:
        self.count("replace")
        frames = sorted({self.among(pick) for pick in picks[: self.world.per_commit]} & set(self.world.held))
        # Frames without an embedding stay without one: what is re-cached keeps its place in the index.
        new = new and all(self.world.held[frame].embedding is not None for frame in frames)
        if frames:
            self.world.commit(frames, picks[: len(frames)] if new else None, replace=True)

    @rule(picks=st.lists(PICK, min_size=1, max_size=3), missing=st.integers(0, 6))
    def prefetch(self, picks: list[int], missing: int) -> None:
        self.count("prefetch")
        frames = {self.among(pick) for pick in picks} | ({self.next + missing} if missing < 2 else set())
        self.world.prefetch(sorted(frames))

    @rule(pick=PICK, k=st.integers(1, 3))
    def retrieve(self, pick: int, k: int) -> None:
        self.count("retrieve")
        if self.world.prefetch(self.world.search(pick, k, self.next)):
            self.world.attend()

    @rule()
    def settle(self) -> None:
        self.count("settle")
        self.world.settle()

    @rule(release=st.booleans())
    def attend(self, release: bool) -> None:
        self.count("attend")
        self.world.attend(release=release)

    @rule(picks=st.lists(PICK, min_size=1, max_size=2))
    def forget(self, picks: list[int]) -> None:
        self.count("forget")
        self.world.forget(sorted({self.among(pick) for pick in picks}))

    @rule(pick=PICK)
    def pin(self, pick: int) -> None:
        self.count("pin")
        self.world.pin(self.among(pick))

    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        self.count("unpin")
        self.world.unpin(self.among(pick))

    @precondition(lambda self: self.saves < 2 and len(self.world.held) > 2)
    @rule()
    def reopen(self) -> None:
        self.count("reopen")
        self.saves += 1
        self.world.reopen(self.folder / "saved")

    @invariant()
    def agrees(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            try:
                self.world.finish()
                type(self).forgotten += self.world.forgotten
            finally:
                shutil.rmtree(self.folder)


def test_the_memory_bank() -> None:
    run(MemoryMachine, 60, 60)
    assert MemoryMachine.count.total >= 2500 and len(MemoryMachine.count.by_name) == 11, MemoryMachine.count
    assert MemoryMachine.forgotten > 100


def test_enough_was_done() -> None:
    """Runs after the machines of this file."""
    machines = (HostMachine, LateMachine, MemoryMachine)
    if any(machine.count.total == 0 for machine in machines):
        pytest.skip("counts what the other tests of this file did")
    assert sum(machine.count.total for machine in machines) >= 10_000
