"""What a bank knows of its frames beside their pages: embeddings, pins, how often they were retrieved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from ..config import check_int
from ..index import FrameIndex
from ..ops.checks import FLOATS, check
from ..transfer import HostCopy
from .policies import make_policy

MOST_UNCOUNTED = 8  # searches; older ones have long been done, so that counting them waits for nothing


class Catalogue:
    """The index, who is pinned and fetched, what searches found, and by that: whom to forget.

    Not thread-safe; the bank serialises the calls.

    Args:
        samples: samples of a frame.
        policy: name of the policy.
        sink: frames below it are never chosen to be forgotten.
        most: frames that the bank can hold.
        like: a tensor on the device of the index.

    Attributes:
        index: None before the first embedding.
        pins: by the bank's user, against being forgotten.
        fetched: by prefetches, until they are released.
        non_finite: embeddings with NaN or infinity so far, on the device.
    """

    def __init__(self, samples: int, policy: str, sink: int, most: int, like: torch.Tensor) -> None:
        self.index: FrameIndex | None = None
        self.pins: Counter[int] = Counter()
        self.fetched: Counter[int] = Counter()
        self.non_finite: torch.Tensor | int = 0
        self._samples = samples
        self._sink = sink
        self._most = most
        self._like = like
        self._retrievals: Counter[int] = Counter()
        self._known: set[int] = set()
        self._members: set[int] = set()  # those that are no sinks
        self._policy = make_policy(policy, self._members, self._retrievals)
        self._found: list[HostCopy] = []  # of searches that are not counted yet

    def clear(self) -> None:
        """Forgets every frame."""
        self.index = None
        for table in (self._known, self._members, self._retrievals, self.pins, self.fetched):
            table.clear()
        self._policy.cleared()
        self._found = []

    def make_room(self, frames: Sequence[int], embeddings: torch.Tensor) -> None:
        """Room in the index for these frames; TypeError, ValueError for embeddings that do not fit it."""
        size = None if self.index is None else self.index.embedding_dim
        check("embeddings", embeddings, (self._samples, len(frames), size), FLOATS, self._like)
        check_int("embeddings' last size", embeddings.shape[2], 1)
        if self.index is not None:
            self.index.reserve(frames)

    def join(self, frames: Iterable[int]) -> None:
        """The bank has these frames now."""
        for frame in frames:
            self._known.add(frame)
            if frame >= self._sink and frame not in self._members:
                self._members.add(frame)
                self._policy.joined(frame)

    def embed(self, frames: Sequence[int], embeddings: torch.Tensor, normalized: bool = False) -> None:
        """Puts embeddings ``(samples, n, E)`` of the bank's frames into the index; `make_room` has checked them."""
        if self.index is None:
            device = self._like.device
            self.index = FrameIndex(self._samples, embeddings.shape[2], embeddings.dtype, device, self._most)
        index = self.index
        for frame in frames:
            if frame in index:
                self._policy.removed(index, frame)
        self.non_finite = self.non_finite + index.put(frames, embeddings.detach(), normalized)
        self._policy.added(index, frames)

    def drop(self, frame: int) -> bool:
        """Takes out a frame that the bank does not have any more; False when that has been done before."""
        known = frame in self._known
        if self.index is not None and frame in self.index:
            self._policy.removed(self.index, frame)
            self.index.remove(frame)
        self._known.discard(frame)
        self._members.discard(frame)
        for table in (self._retrievals, self.pins, self.fetched):
            table.pop(frame, None)
        return known

    def pinned(self) -> set[int]:
        """Frames that are pinned or fetched."""
        return set(self.pins) | set(self.fetched)

    def forgettable(self) -> int:
        """How many frames may be forgotten."""
        return len(self._members) - len(self._members & self.pinned())

    def choose(self) -> int | None:
        """The frame to forget, None when there is none, by a policy other than ``error``."""
        self.count_found()
        return self._policy.choose(self.pinned())

    def found(self, ids: HostCopy) -> None:
        """A search has found these, ``(samples, k)``, -1 for none."""
        self._found.append(ids)
        self.count_found(keep=MOST_UNCOUNTED)

    def count_found(self, keep: int = 0) -> None:
        """Counts what searches have found, all but the newest ``keep`` of them; waits for those searches."""
        while len(self._found) > keep:
            for frame in self._found.pop(0).get().flatten().tolist():
                if self.index is not None and frame in self.index:
                    self._retrievals[frame] += 1

    def retrievals(self, frame: int) -> int:
        """How often searches have found a frame, over all samples."""
        self.count_found()
        return self._retrievals.get(frame, 0)

    def set_retrievals(self, frame: int, count: int) -> None:
        """Starts a frame's count."""
        if count:
            self._retrievals[frame] = count


def take_back(pins: Counter[int], frames: Iterable[int]) -> None:
    """Takes back one pin each; frames that have none are passed over."""
    for frame in frames:
        if pins[frame] <= 1:
            del pins[frame]
        else:
            pins[frame] -= 1
