"""Which frame a full bank forgets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set

import torch

from ..index import FrameIndex
from ..modes import normal_tensors
from ..ops.checks import LARGEST_FRAME
from .frame_heap import FrameHeap

POLICIES = ("error", "oldest", "least_retrieved", "most_redundant")


class Policy:
    """The base of all, and the policy that forgets nothing.

    Args:
        members: the frames that may be forgotten, as they come and go.
        retrievals: how often searches have found a frame; one that is missing counts 0.
    """

    name = "error"

    def __init__(self, members: Set[int], retrievals: Mapping[int, int]) -> None:
        self._members = members
        self._retrievals = retrievals

    def choose(self, kept: Collection[int]) -> int | None:
        """The member to forget next, none in ``kept``; None when there is no other."""
        raise NotImplementedError

    def joined(self, frame: int) -> None:
        """This frame is a member now. Leaving needs no word."""

    def added(self, index: FrameIndex, frames: Sequence[int]) -> None:
        """These frames' embeddings are in the index now, new or changed."""

    def removed(self, index: FrameIndex, frame: int) -> None:
        """This frame's embedding is about to leave the index, or to change."""

    def cleared(self) -> None:
        """There are no members, and the index is empty."""


class Oldest(Policy):
    """The frame with the lowest number."""

    name = "oldest"

    def __init__(self, members: Set[int], retrievals: Mapping[int, int]) -> None:
        super().__init__(members, retrievals)
        self._order = FrameHeap(members.__contains__)

    def choose(self, kept: Collection[int]) -> int | None:
        return self._order.first(kept)

    def joined(self, frame: int) -> None:
        self._order.push(frame)

    def cleared(self) -> None:
        self._order.clear()


class LeastRetrieved(Oldest):
    """The frame that searches have found least often, over all samples; among equals the oldest."""

    name = "least_retrieved"

    def __init__(self, members: Set[int], retrievals: Mapping[int, int]) -> None:
        super().__init__(members, retrievals)
        self._order = FrameHeap(members.__contains__, lambda frame: retrievals.get(frame, 0))


class MostRedundant(Policy):
    """The frame whose nearest neighbour in the index is most similar: the one whose loss is missed least.

    Similarity is the cosine of embeddings; with several samples, a frame is as redundant as in the sample where it is
    least so; among equals the oldest is chosen. A frame that cannot be found by a search is the first to go: in a
    sample where its embedding is not finite it is redundant without limit, and so is a frame without an embedding.

    Each frame's nearest neighbour is kept. A new frame is compared with every other once, ``O(N E)``. A frame that
    leaves takes nobody's place: the similarity of those it was nearest to is from then on an upper bound, which is
    computed anew, ``O(N E)`` each, only if it comes to the top in a choice. `choose` compares on the device, ``O(N)``,
    and waits for it.
    """

    name = "most_redundant"

    def __init__(self, members: Set[int], retrievals: Mapping[int, int]) -> None:
        super().__init__(members, retrievals)
        self._without = FrameHeap(lambda frame: frame in members and not self._indexed(frame))
        self.cleared()

    def cleared(self) -> None:
        self._index: FrameIndex | None = None
        self._without.clear()

    def joined(self, frame: int) -> None:
        self._without.push(frame)

    def _indexed(self, frame: int) -> bool:
        return self._index is not None and frame in self._index

    @normal_tensors
    def added(self, index: FrameIndex, frames: Sequence[int]) -> None:
        self._follow(index)
        rows = [index.row(frame) for frame in frames]
        for frame, row in zip(frames, rows, strict=True):  # before the first comparison, which meets all of them
            self._set(row, -torch.inf, -1)
            self._frame[row] = frame if frame in self._members else -1
        for frame, row in zip(frames, rows, strict=True):
            scores = self._scores(row)
            best = self._best[:, : index.used]
            better = scores > best
            best.copy_(torch.where(better, scores, best))
            self._nearest[:, : index.used].masked_fill_(better, frame)
            self._stale[:, : index.used].masked_fill_(better, False)
            self._take_nearest(row, scores)

    @normal_tensors
    def removed(self, index: FrameIndex, frame: int) -> None:
        self._follow(index)
        self._stale |= self._nearest == frame
        self._set(index.row(frame), -torch.inf, -1)
        self._frame[index.row(frame)] = -1

    @normal_tensors
    def choose(self, kept: Collection[int]) -> int | None:
        without, index = self._without.first(kept), self._index
        if index is None or not len(index):
            return without
        frames = self._frame[: index.used]
        allowed = frames >= 0
        allowed[[index.row(frame) for frame in kept if frame in index]] = False
        while True:
            bounds = self._redundancy(slice(0, index.used))
            most = torch.where(allowed, bounds, -torch.inf).amax()
            oldest, row = torch.where(allowed & (bounds == most), frames, LARGEST_FRAME + 1).min(0)
            there = index.ids.index_select(1, row[None]) >= 0
            stale = (self._stale.index_select(1, row[None]) & there).any()
            frame, at, unsure, endless = torch.stack([oldest, row, stale.long(), (most == torch.inf).long()]).tolist()
            if without is not None and not (endless and frame < without):
                return without
            if frame > LARGEST_FRAME:
                return None
            if not unsure:
                return int(frame)
            self._take_nearest(at, self._scores(at))

    def redundancy(self, frame: int) -> float:
        """How redundant a frame is, computed anew: a cosine, or infinity or minus infinity. Waits for the device."""
        if self._index is None or frame not in self._index:
            return float("inf")
        row = self._index.row(frame)
        self._take_nearest(row, self._scores(row))
        return float(self._redundancy(slice(row, row + 1)))

    def _redundancy(self, rows: slice) -> torch.Tensor:
        """``(n,)``: the least over samples, of what is known or its upper bound."""
        assert self._index is not None
        found = self._index.ids[:, rows] >= 0
        return torch.where(found, self._best[:, rows], torch.inf).amin(0)

    def _follow(self, index: FrameIndex) -> None:
        """Has a place for every row of the index, which may have grown."""
        if self._index is not index:
            self._index = index
            like = index.embeddings
            self._best = like.new_full((index.samples, 0), -torch.inf)
            self._nearest = index.ids.new_full((index.samples, 0), -1)
            self._frame = index.ids.new_full((0,), -1)  # of each row; -1 for none, and for one that is no member
            self._stale = torch.zeros(index.samples, 0, dtype=torch.bool, device=like.device)
        more = index.embeddings.shape[1] - self._best.shape[1]
        if more > 0:
            shape = (index.samples, more)
            self._best = torch.cat([self._best, self._best.new_full(shape, -torch.inf)], 1)
            self._nearest = torch.cat([self._nearest, self._nearest.new_full(shape, -1)], 1)
            self._frame = torch.cat([self._frame, self._frame.new_full((more,), -1)])
            self._stale = torch.cat([self._stale, self._stale.new_zeros(shape)], 1)

    def _set(self, row: int, best: float, nearest: int) -> None:
        self._best[:, row] = best
        self._nearest[:, row] = nearest
        self._stale[:, row] = False

    def _scores(self, row: int) -> torch.Tensor:
        """Cosines ``(B, used)`` of a row with the others; minus infinity where there is no other."""
        index = self._index
        assert index is not None
        rows, ids = index.embeddings[:, : index.used], index.ids[:, : index.used]
        # Each row summed on its own, as in reference.row_scores: equal rows score equal, and a pair the same both ways.
        scores = (rows * rows[:, row, None]).contiguous().sum(-1)
        others = (ids >= 0) & (ids[:, row, None] >= 0)
        others[:, row] = False
        return torch.where(others, scores, -torch.inf)

    def _take_nearest(self, row: int, scores: torch.Tensor) -> None:
        assert self._index is not None
        best, at = scores.max(-1)
        nearest = self._index.ids[:, : self._index.used].gather(1, at[:, None])[:, 0]
        self._best[:, row] = best
        self._nearest[:, row] = torch.where(best > -torch.inf, nearest, -1)
        self._stale[:, row] = False


def make_policy(name: str, members: Set[int], retrievals: Mapping[int, int]) -> Policy:
    """The policy of a name in `POLICIES`."""
    return {policy.name: policy for policy in (Policy, Oldest, LeastRetrieved, MostRedundant)}[name](
        members, retrievals
    )
