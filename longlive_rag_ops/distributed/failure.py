"""Ranks that die or stall: every collective of the history begins and is awaited here, under a time-out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from .progress import GRACE, Progress
from .stream_watch import StreamWatch

T = TypeVar("T")

POLL = 5e-5  # seconds between two looks of a host that waits for a GPU

# Called all_gather_into_tensor before PyTorch 2.13, which deprecates that name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RankFailure(RuntimeError):
    """A rank of the mesh has died, or has not answered within the time-out.

    The window that was used cannot go on; closing it, and what was saved before, still works.

    Attributes:
        suspects: ranks that have not been heard of since, as far as can be told; may be empty.
    """

    def __init__(self, message: str, suspects: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.suspects = list(suspects)


class Pending:
    """A collective that has begun; without ``work`` one that is done.

    It keeps its tensors, until the host knows that it has ended: their memory must not become that of others before,
    and the allocator knows the stream they were made on alone.
    """

    def __init__(
        self,
        collectives: Collectives,
        what: str,
        work: dist.Work | None,
        group: dist.ProcessGroup,
        buffers: Sequence[torch.Tensor] = (),
    ) -> None:
        self._collectives = collectives
        self._what = what
        self._work = work
        self._group = group
        self._buffers = tuple(buffers)
        self._on_stream: OnStream | None = None

    def wait(self) -> None:
        """Until the result may be read: by the host on a CPU, by the current stream on a GPU. Again: does nothing.

        Raises:
            RankFailure: a rank has not answered within the time-out of the mesh.
        """
        work, self._work = self._work, None
        buffers, self._buffers = self._buffers, ()
        if work is not None:
            self._on_stream = self._collectives.wait(self._what, work, self._group, buffers)

    def wait_on_host(self) -> None:
        """As `wait`, and the host waits on a GPU as well: for this one, whatever else is under way.

        A copy of the result to the host ends thereafter, without which it might never.

        Raises:
            RankFailure: a rank has not answered within the time-out of the mesh.
        """
        self.wait()
        if self._on_stream is not None:
            self._collectives.wait_on_host(self._on_stream)
            self._on_stream = None


class OnStream(NamedTuple):
    """A collective that a stream waits for, and the host has not seen the end of."""

    what: str
    work: dist.Work
    group: dist.ProcessGroup
    deadline: float
    buffers: Sequence[torch.Tensor] = ()


class Bad(NamedTuple):
    """A collective that is overdue or has failed."""

    begun: OnStream
    reason: str


class Collectives:
    """Begins and awaits the collectives of a mesh; after the first failure it refuses everything.

    Args:
        ranks: of the mesh.
        rank: this one.
        timeout: seconds.
        device_type: of the mesh: "cpu", or "cuda", where streams wait rather than the host.

    Attributes:
        failure: the first one, None before.
        timeout: as given.
        begun: collectives that this rank has begun.
    """

    def __init__(self, ranks: list[int], rank: int, timeout: float, device_type: str = "cpu") -> None:
        self.timeout = timeout
        self.failure: RankFailure | None = None
        self.begun = 0
        self._ranks, self._rank, self._device_type = ranks, rank, device_type
        self._closed = False
        self._lock = threading.RLock()  # of failure and _on_stream, which the watch looks at too
        self._watch = StreamWatch(self._look)
        self._progress: Progress | None = None
        self._group: dist.ProcessGroup | None = None
        self._on_stream: list[OnStream] = []

    def note_in(self, group: dist.ProcessGroup) -> None:
        """The group of all ranks of the mesh, in whose store progress is noted from now on."""
        self._group = group
        if len(self._ranks) > 1:
            self._progress = Progress(group, self._rank)

    def close(self) -> None:
        """Ends the threads; nothing can be begun after it."""
        self._closed = True
        self._watch.close()
        if self._progress is not None:
            self._progress.close()

    def check(self) -> None:
        """Raises `RankFailure` when a collective has failed before, or one that a stream waits for is overdue.

        RuntimeError after `close`.
        """
        with self._lock:
            if self.failure is not None:
                raise self._again()
            if self._closed:
                raise RuntimeError("the mesh cannot be used any more: it was closed")
            bad = self._bad()
            if bad is not None:
                raise self._fail(bad)

    def fail_alone(self, error: BaseException) -> None:
        """This rank fails by itself while the others go on: from now on it refuses everything."""
        with self._lock:
            if self.failure is None:
                reason = f"{type(error).__name__}: {_first_line(error)}"
                self.failure = RankFailure(f"this rank has failed alone: {reason} (rank {self._rank})", [self._rank])

    def begin(
        self,
        what: str,
        call: Callable[[], dist.Work | None],
        group: dist.ProcessGroup | None = None,
        buffers: Sequence[torch.Tensor] = (),
    ) -> Pending:
        """Begins a collective.

        Args:
            what: is being done, for errors: "search for the block at 12".
            call: begins it with ``async_op=True``.
            group: whose ranks take part; all of the mesh when not given.
            buffers: its tensors, kept until it has ended.

        Raises:
            RankFailure: a collective has failed, now or before.
        """
        self.check()
        self.begun += 1
        if self._progress is not None:
            self._progress.note(self.begun)
        group = self._group if group is None else group
        assert group is not None
        work = self.run(what, call, dist.get_process_group_ranks(group))
        return Pending(self, what, work, group, buffers)

    def all_gather(self, what: str, row: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, Pending]:
        """Begins to collect a contiguous tensor of the same shape from each rank of a group.

        Returns:
            ``(ranks, *row.shape)``, in rank order, once what comes with it has been awaited.
        """
        rows = row.new_empty(group.size(), *row.shape)
        whole = rows.view(-1)
        begun = partial(_all_gather, whole, row.view(-1), group=group, async_op=True)
        return rows, self.begin(what, begun, group, (row, rows))

    def run(self, what: str, call: Callable[[], T], ranks: list[int] | None = None) -> T:
        """A call that itself gives up after a time-out; ``ranks`` take part, all of the mesh when not given.

        Raises:
            RankFailure: it has raised a RuntimeError, but for one of memory.
        """
        try:
            return call()
        except (RankFailure, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # all that torch.distributed raises for ranks that are gone
            raise self._failed(what, error, self._ranks if ranks is None else ranks) from error

    def wait(
        self, what: str, work: dist.Work, group: dist.ProcessGroup, buffers: Sequence[torch.Tensor] = ()
    ) -> OnStream | None:
        """See `Pending.wait`; ``buffers`` as in `begin`. Returns what a stream waits for, if the host did not."""
        self.check()
        ranks = dist.get_process_group_ranks(group)
        if waits_on_stream(group, self._device_type):
            self.run(what, work.wait, ranks)  # whether it came to an end is looked at later
            begun = OnStream(what, work, group, time.monotonic() + self.timeout, buffers)
            with self._lock:
                self._on_stream.append(begun)
            self._watch.note()
            return begun
        limit = timedelta(seconds=self.timeout)
        self.run(what, lambda: work.wait(limit), ranks)
        return None

    def wait_on_host(self, begun: OnStream) -> None:
        """See `Pending.wait_on_host`."""
        self.check()
        while not begun.work.is_completed():
            time.sleep(POLL)
            self.check()  # those before it are overdue before it is
        self.check()  # an abort completes it as well
        state = error_state(begun.group, self._device_type)
        if state is not None:
            raise self._fail(Bad(begun, state))

    def _failed(self, what: str, error: Exception, ranks: list[int]) -> RankFailure:
        """The failure of a collective, from now on that of all; of an earlier one, what it was."""
        with self._lock:
            if self.failure is not None:  # the watch has aborted what this waited for
                return self._again()
            suspects = [] if self._progress is None else self._progress.silent(self.begun, ranks, self.timeout)
            named = f"; not heard of since: rank {', '.join(map(str, suspects))}" if suspects else ""
            self.failure = RankFailure(
                f"{what} failed on rank {self._rank} (ranks {ranks}, time-out {self.timeout:g} s){named}; "
                f"{_first_line(error)}",
                suspects,
            )
            self._abort()
            return self.failure

    def _again(self) -> RankFailure:
        assert self.failure is not None
        return RankFailure(f"the mesh cannot be used any more: {self.failure}", self.failure.suspects)

    def _bad(self) -> Bad | None:
        """The first collective that has failed, or that a stream waits for longer than it may. Those that have ended
        well are let go."""
        while self._on_stream:
            first = self._on_stream[0]
            if not first.work.is_completed():
                return Bad(first, "no answer") if time.monotonic() > first.deadline else None
            state = error_state(first.group, self._device_type)  # what has failed is completed, too
            if state is not None:
                return Bad(first, state)
            self._on_stream.pop(0)
        return None

    def _fail(self, bad: Bad) -> RankFailure:
        ranks = dist.get_process_group_ranks(bad.begun.group)
        return self._failed(bad.begun.what, RuntimeError(bad.reason), ranks)

    def _look(self) -> float | None:
        """What the watch does: fails what is overdue though the host asks nothing, because it waits for the stream.

        The work is asked when its time is over, not before: the host itself lets go what has ended.
        """
        with self._lock:
            if not self._on_stream:
                return None
            left = self._on_stream[0].deadline - time.monotonic()
            if left >= 0:
                return left + 1e-3
            bad = self._bad()
            if bad is None:
                return 0.0 if self._on_stream else None
            if self.failure is None:
                self._fail(bad)
            else:  # this rank's own: what it had begun with others may hang all the same
                self._abort()
            return None

    def _abort(self) -> None:
        """Ends what streams wait for, whose kernels would spin on the GPU for ever. One that hangs is left."""
        groups = {pending.group for pending in self._on_stream}
        aborting = [threading.Thread(target=_abort_group, args=(group,), daemon=True) for group in groups]
        for thread in aborting:
            thread.start()
        deadline = time.monotonic() + GRACE
        for thread in aborting:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._on_stream = []


def waits_on_stream(group: dist.ProcessGroup, device_type: str) -> bool:
    """Whether a stream, rather than the host, waits for a group's collectives of tensors on a type of device.

    A group may have a backend for each: "cpu:gloo,cuda:nccl".
    """
    backends = dict(part.split(":", 1) for part in dist.get_backend_config(group).split(",") if ":" in part)
    return device_type != "cpu" and backends.get(device_type) != "gloo"


def error_state(group: dist.ProcessGroup, device_type: str) -> str | None:
    """What a group's backend for a type of device says has gone wrong; None when nothing has, or it cannot tell."""
    try:
        state = group._get_backend(torch.device(device_type)).get_error()  # torch 2.7
    except (AttributeError, RuntimeError):
        return None
    return None if state.name == "SUCCESS" else f"NCCL reports {state.name}"


def _abort_group(group: dist.ProcessGroup) -> None:
    with contextlib.suppress(RuntimeError):
        group.abort()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
