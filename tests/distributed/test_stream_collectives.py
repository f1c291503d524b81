"""Collectives that a stream of a GPU waits for, with stand-ins for the work and its group."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longlive_rag_ops.distributed import RankFailure, failure
from longlive_rag_ops.distributed.failure import Collectives, waits_on_stream
from longlive_rag_ops.distributed.stream_watch import StreamWatch

TIMEOUT = 0.3


class Work:
    """Work on a GPU, which ends when it is told to."""

    def __init__(self) -> None:
        self.ended, self.asked = False, 0

    def wait(self, *limit: Any) -> None:
        assert not limit, "a stream waits, the host does not"

    def is_completed(self) -> bool:
        self.asked += 1
        return self.ended


class Group:
    """A process group that notes that it was aborted."""

    def __init__(self, fails: type[Exception] | None = None) -> None:
        self.aborts, self.fails = 0, fails

    def size(self) -> int:
        return 2

    def abort(self) -> None:
        self.aborts += 1
        if self.fails is not None:
            raise self.fails("no abort")


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collectives]:
    monkeypatch.setattr(failure.dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(failure.dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    made = Collectives([0, 1], 0, TIMEOUT, "cuda")
    yield made
    made.close()


def test_the_device_says_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for config, device, expected in (
        ("cpu:gloo,cuda:nccl", "cuda", True),
        ("cpu:gloo,cuda:nccl", "cpu", False),
        ("cpu:gloo,cuda:gloo", "cuda", False),
        ("cuda:nccl", "cuda", True),
    ):
        monkeypatch.setattr(failure.dist, "get_backend_config", lambda group, config=config: config)
        assert waits_on_stream(None, device) is expected  # type: ignore[arg-type]


def test_work_that_never_ends(collectives: Collectives) -> None:
    group: Any = Group()
    pending = collectives.begin("search for the block at 12", Work, group)  # type: ignore[arg-type]
    pending.wait()
    collectives.check()  # not yet
    began = time.monotonic()
    with pytest.raises(RankFailure, match=r"search for the block at 12 failed on rank 0 .*no answer"):
        pending.wait_on_host()
    assert TIMEOUT / 2 < time.monotonic() - began < 2 and group.aborts == 1
    with pytest.raises(RankFailure, match="cannot be used any more: search for the block at 12"):
        collectives.begin("more", Work, group)  # type: ignore[arg-type]


def test_a_host_that_asks_nothing(collectives: Collectives) -> None:
    """Because it waits for the stream itself: a thread ends what is overdue."""
    groups: list[Any] = [Group(), Group(RuntimeError)]
    works = [Work(), Work()]
    for at, group in enumerate(groups):
        collectives.begin(f"part {at}", lambda at=at: works[at], group).wait()  # type: ignore[misc]
    asked = works[0].asked  # by the host
    deadline = time.monotonic() + 10
    while collectives.failure is None or not all(group.aborts for group in groups):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "part 0 failed on rank 0" in str(collectives.failure)
    assert [group.aborts for group in groups] == [1, 1]
    assert works[0].asked == asked + 1  # not before its time was over
    with pytest.raises(RankFailure, match="any more: part 0 failed"):
        collectives.check()


def test_work_that_ends_in_time(collectives: Collectives) -> None:
    group: Any = Group()
    for at in range(3):
        work = Work()
        pending = collectives.begin(f"part {at}", lambda work=work: work, group)  # type: ignore[misc]
        pending.wait()
        work.ended = True
        time.sleep(TIMEOUT / 2)
    time.sleep(2 * TIMEOUT)
    pending.wait_on_host()
    assert collectives.failure is None and group.aborts == 0


def test_the_host_waits_for_what_it_needs_alone(collectives: Collectives) -> None:
    """A forward that was enqueued before, and is under way still, holds up nobody."""
    group: Any = Group()
    forward, choice = Work(), Work()
    collectives.begin("part", lambda: forward, group).wait()  # type: ignore[arg-type, return-value]
    pending = collectives.begin("comparing windows", lambda: choice, group)  # type: ignore[arg-type, return-value]
    choice.ended = True
    began = time.monotonic()
    pending.wait_on_host()
    pending.wait_on_host()  # again: nothing
    assert time.monotonic() - began < TIMEOUT / 2 and not forward.ended


def test_work_that_has_failed_counts_as_completed(collectives: Collectives) -> None:
    """As NCCL has it: what it would have brought must not be read."""

    class Broken(Group):
        def _get_backend(self, device: torch.device) -> Any:
            return SimpleNamespace(get_error=lambda: SimpleNamespace(name="REMOTE_ERROR"))

    for ask in ("wait_on_host", "check"):
        group, work = Broken(), Work()
        collectives.failure = None
        pending = collectives.begin("lost pages", lambda work=work: work, group)  # type: ignore[misc, arg-type]
        pending.wait()
        work.ended = True
        with pytest.raises(RankFailure, match=r"lost pages failed on rank 0 .*; NCCL reports REMOTE_ERROR"):
            getattr(pending if ask == "wait_on_host" else collectives, ask)()
        assert group.aborts == 1


def test_a_rank_that_failed_alone_ends_what_it_had_begun(collectives: Collectives) -> None:
    group: Any = Group()
    collectives.begin("pages", Work, group).wait()  # type: ignore[arg-type]
    collectives.fail_alone(OSError("disk"))
    assert "this rank has failed alone: OSError: disk" in str(collectives.failure)
    deadline = time.monotonic() + 10
    while not group.aborts:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "failed alone" in str(collectives.failure)


def test_errors_of_waiting_are_failures(collectives: Collectives) -> None:
    class Broken(Work):
        def wait(self, *limit: Any) -> None:
            raise RuntimeError("NCCL communicator was aborted\nand more")

    with pytest.raises(RankFailure, match=r"pages failed on rank 0 .*; NCCL communicator was aborted$"):
        collectives.begin("pages", Broken, Group()).wait()  # type: ignore[arg-type]
    assert collectives.failure is not None


def test_tensors_are_kept_until_the_host_knows_the_end(
    collectives: Collectives, monkeypatch: pytest.MonkeyPatch
) -> None:
    collectives.timeout = 30.0  # collecting garbage of a whole test run takes its time
    work, group = Work(), Group()
    monkeypatch.setattr(failure, "_all_gather", lambda *tensors, **options: work)
    row = torch.zeros(4)
    rows, pending = collectives.all_gather("search", row, group)  # type: ignore[arg-type]
    kept = [weakref.ref(row), weakref.ref(rows)]
    del row, rows
    gc.collect()
    assert all(ref() is not None for ref in kept)
    pending.wait()
    del pending
    collectives.check()
    gc.collect()
    assert all(ref() is not None for ref in kept)
    work.ended = True
    collectives.check()
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_a_watch_ends_with_what_it_looks_at() -> None:
    class Looked:
        def __init__(self, delay: float | None) -> None:
            self.delay, self.looks = delay, 0
            self.watch = StreamWatch(self.look)

        def look(self) -> float | None:
            self.looks += 1
            return self.delay

    for delay in (None, 0.01):
        for how in ("close", "forgotten"):
            looked = Looked(delay)
            assert looked.watch._thread is None
            looked.watch.note()
            thread = looked.watch._thread
            assert thread is not None
            deadline = time.monotonic() + 10
            while looked.looks < (1 if delay is None else 3):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if how == "close":
                looked.watch.close()
            del looked
            gc.collect()
            thread.join(10)
            assert not thread.is_alive()
