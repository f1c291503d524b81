"""Which frame goes: each policy against a search through everything, on embeddings that come, go and change."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_rag_ops.bank.catalogue import Catalogue, take_back
from longlive_rag_ops.bank.frame_heap import FrameHeap
from longlive_rag_ops.bank.policies import POLICIES, MostRedundant, make_policy
from longlive_rag_ops.index import FrameIndex
from longlive_rag_ops.transfer import HostCopy


class Members:
    """A policy with its members."""

    def __init__(self, name: str, frames: Iterable[int], retrievals: dict[int, int] | None = None) -> None:
        self.frames: set[int] = set()
        self.policy: Any = make_policy(name, self.frames, {} if retrievals is None else retrievals)
        for frame in frames:
            self.join(frame)

    def join(self, frame: int) -> None:
        self.frames.add(frame)
        self.policy.joined(frame)

    def choose(self, candidates: Iterable[int]) -> int | None:
        """Among these, the other members being kept."""
        choice: int | None = self.policy.choose(self.frames - set(candidates))
        return choice


def most_redundant(frames: int, dim: int, samples: int = 1) -> tuple[Members, MostRedundant, FrameIndex]:
    members = Members("most_redundant", range(frames))
    return members, members.policy, FrameIndex(samples, dim, torch.float32)


def test_every_policy_but_error_chooses() -> None:
    assert POLICIES == ("error", "oldest", "least_retrieved", "most_redundant")
    for name in POLICIES[1:]:
        members = Members(name, [7, 4, 9])
        assert members.policy.name == name and members.choose([4, 7]) == 4
        assert members.choose([9]) == 9 and members.choose([]) is None and Members(name, []).choose([]) is None
    with pytest.raises(NotImplementedError):
        Members("error", [4]).choose([4])


def test_oldest_is_the_lowest_number() -> None:
    members = Members("oldest", [3, 5, 9], {3: 9})
    assert members.choose([3, 5, 9]) == 3
    members.frames.remove(3)
    assert members.choose([5, 9]) == 5
    members.join(3)
    assert members.choose([3, 5, 9]) == 3 and members.choose([9]) == 9 and members.choose([5, 9]) == 5


def test_least_retrieved_counts_and_prefers_the_older_among_equals() -> None:
    retrievals = {3: 2, 5: 1, 9: 1}
    members = Members("least_retrieved", [3, 5, 9], retrievals)
    assert members.choose([3, 5, 9]) == 5
    retrievals[5] += 1
    assert members.choose([3, 5, 9]) == 9
    members.join(11)
    assert members.choose([3, 5, 9, 11]) == 11  # never


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["join", "join", "leave", "find", "choose"]), st.sets(st.integers(0, 9), min_size=1)),
        max_size=60,
    )
)
def test_heaps_choose_as_a_search_through_everything(steps: list[tuple[str, set[int]]]) -> None:
    retrievals: dict[int, int] = {}
    oldest, least = Members("oldest", []), Members("least_retrieved", [], retrievals)
    for kind, frames in steps:
        for frame in frames:
            if kind == "join" and frame not in oldest.frames:
                oldest.join(frame)
                least.join(frame)
            elif kind == "leave":
                retrievals.pop(frame, None)
                oldest.frames.discard(frame)
                least.frames.discard(frame)
            elif kind == "find" and frame in oldest.frames:
                retrievals[frame] = retrievals.get(frame, 0) + 1
        free = frames & oldest.frames
        assert oldest.choose(frames) == min(free, default=None)
        assert least.choose(frames) == min(free, key=lambda f: (retrievals.get(f, 0), f), default=None)


@pytest.mark.parametrize("name", POLICIES[1:])
def test_frames_that_come_and_go_leave_nothing_behind(name: str) -> None:
    members = Members(name, [])
    for frame in range(5000):
        members.join(frame % 20)
        members.frames.discard(frame % 20)
        members.join(frame % 20)
        if frame >= 10:
            members.frames.discard((frame - 10) % 20)
    heaps = [each for each in vars(members.policy).values() if isinstance(each, FrameHeap)]
    assert heaps and all(len(heap) < 200 for heap in heaps)


# Few directions, so that cosines tie; -1 stands for an embedding that is not finite, 0 for the zero embedding.
DIRECTIONS = torch.tensor(
    [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1], [-1, 0, 2], [3, 2, 1], [1.0, 0, 0.01]]
)


def embedding(choice: int) -> torch.Tensor:
    return torch.full((3,), torch.nan) if choice < 0 else DIRECTIONS[choice]


class Model:
    """Embeddings in a dictionary; redundancy by comparing every pair."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.units: dict[int, list[torch.Tensor | None]] = {}

    def put(self, frame: int, choices: list[int]) -> None:
        index = FrameIndex(self.samples, 3, torch.float32)
        index.append([frame], torch.stack([embedding(c) for c in choices])[:, None])
        self.units[frame] = [None if c < 0 else unit for c, unit in zip(choices, index.embedding(frame), strict=True)]

    def redundancy(self, frame: int) -> float:
        if frame not in self.units:
            return float("inf")
        worst = float("inf")
        for sample, unit in enumerate(self.units[frame]):
            if unit is not None:
                others = [row[sample] for other, row in self.units.items() if other != frame]
                cosines = [float((unit * other).sum()) for other in others if other is not None]
                worst = min(worst, max(cosines, default=-float("inf")))
        return worst

    def choose(self, candidates: list[int]) -> int:
        return min(candidates, key=lambda frame: (-self.redundancy(frame), frame))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "remove", "choose", "forget"]),
        st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True),
        st.lists(st.integers(-1, len(DIRECTIONS) - 1), min_size=6, max_size=6),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(samples=st.integers(1, 2), steps=STEPS)
def test_most_redundant_is_kept_as_if_it_were_computed_anew(
    samples: int, steps: list[tuple[str, list[int], list[int]]]
) -> None:
    members, policy, index = most_redundant(12, 3, samples)
    model = Model(samples)

    def remove(frame: int) -> None:
        policy.removed(index, frame)
        index.remove(frame)
        members.join(frame)  # comes back without an embedding
        del model.units[frame]

    for kind, frames, choices in steps:
        if kind == "put":
            rows = [choices[i * samples : (i + 1) * samples] for i in range(len(frames))]
            for frame in frames:
                if frame in index:
                    policy.removed(index, frame)
            index.append(frames, torch.stack([torch.stack([embedding(c) for c in row]) for row in rows], 1))
            policy.added(index, frames)
            for frame, row in zip(frames, rows, strict=True):
                model.put(frame, row)
        elif kind == "remove" and frames[0] in index:
            remove(frames[0])
        elif kind == "choose":
            assert members.choose(frames) == model.choose(sorted(frames))
        elif kind == "forget" and len(index):
            chosen = members.choose(index.frames())
            assert chosen == model.choose(index.frames())
            remove(chosen)
        assert index.frames() == sorted(model.units)
    everything = list(range(12))
    while everything:
        chosen = members.choose(everything)
        assert chosen == model.choose(everything)
        assert policy.redundancy(chosen) == model.redundancy(chosen)
        everything.remove(chosen)
        if chosen in index:
            remove(chosen)


def test_one_of_two_twins_goes_and_the_other_is_unique_then() -> None:
    members, policy, index = most_redundant(4, 4)
    index.append(range(4), torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0.001], [0.6, 0.8, 0, 0]]]))
    policy.added(index, range(4))
    assert members.choose([0, 1, 2, 3]) == 1
    policy.removed(index, 1)
    index.remove(1)
    assert members.choose([0, 2, 3]) == 2  # 0.8 to frame 3, which is as near to it: the older
    assert members.choose([0, 3]) == 3


def test_a_frame_is_as_redundant_as_where_it_is_least_so() -> None:
    members, policy, index = most_redundant(3, 2, samples=2)
    first = [[1.0, 0], [1, 0], [0, 1]]  # frames 0 and 1 are the same here,
    second = [[1.0, 0], [0, 1], [0.6, 0.8]]  # and nothing to each other here
    index.append(range(3), torch.tensor([first, second]))
    policy.added(index, range(3))
    redundancies = [policy.redundancy(frame) for frame in range(3)]
    torch.testing.assert_close(redundancies, [0.6, 0.8, 0.0])
    assert members.choose([0, 1, 2]) == 1


def test_what_no_search_can_find_goes_first() -> None:
    members, policy, index = most_redundant(8, 2)
    index.append(range(4), torch.tensor([[[1.0, 0], [1, 0], [torch.nan, 0], [0, 1]]]))
    policy.added(index, range(4))
    assert members.choose([0, 1, 2, 3]) == 2
    assert members.choose([0, 1, 7]) == 7  # has no embedding
    assert members.choose([0, 1, 3]) == 0


def test_a_commit_compares_once_and_a_removal_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """O(N E) a commit: a pass for each new frame, and at a choice for those whose neighbour went."""
    passes = 0
    scores = MostRedundant._scores

    def counted(self: MostRedundant, row: int) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return scores(self, row)

    monkeypatch.setattr(MostRedundant, "_scores", counted)
    members, policy, index = most_redundant(600, 16)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 600, 3):
        frames = range(start, start + 3)
        index.append(frames, torch.randn(1, 3, 16, generator=generator))
        policy.added(index, frames)
    assert passes == 600
    for _ in range(300):
        chosen = members.choose(index.frames())
        policy.removed(index, chosen)
        index.remove(chosen)
    assert passes - 600 < 2 * 300


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(2, "least_retrieved", sink=2, most=20, like=torch.zeros(0))


def test_sink_pinned_and_fetched_frames_are_no_candidates(catalogue: Catalogue) -> None:
    def candidates() -> list[int]:
        found = []
        while (frame := catalogue.choose()) is not None:
            found.append(frame)
            catalogue.drop(frame)
        catalogue.join(found)
        assert catalogue.forgettable() == len(found)
        return found

    catalogue.join(range(9))
    catalogue.pins.update([4, 4, 6])
    catalogue.fetched.update([5])
    assert candidates() == [2, 3, 7, 8]
    take_back(catalogue.pins, [4, 6, 8])
    take_back(catalogue.fetched, [5])
    assert candidates() == [2, 3, 5, 6, 7, 8]
    assert catalogue.pinned() == {4}
    take_back(catalogue.pins, [4, 4, 4])
    assert catalogue.pinned() == set()


def test_what_searches_find_is_counted_for_frames_in_the_index(catalogue: Catalogue) -> None:
    catalogue.join(range(2, 6))
    catalogue.embed(range(2, 6), torch.zeros(2, 4, 3))
    for _ in range(20):
        catalogue.found(HostCopy(torch.tensor([[2, 3, -1], [3, 9, -1]])))
    assert catalogue.choose() == 4
    assert [catalogue.retrievals(frame) for frame in (2, 3, 4, 9)] == [20, 40, 0, 0]
    catalogue.drop(3)
    assert catalogue.retrievals(3) == 0 and 3 not in catalogue.index
    catalogue.clear()
    assert catalogue.retrievals(2) == 0 and catalogue.index is None


def test_redundancy_survives_the_growth_of_the_index() -> None:
    members, policy, index = most_redundant(3 * FrameIndex.FIRST_ROWS, 3)
    model = Model(1)
    rng = random.Random(3)
    for frame in range(3 * FrameIndex.FIRST_ROWS):
        choice = rng.randrange(1, len(DIRECTIONS))
        index.append([frame], DIRECTIONS[choice][None, None])
        policy.added(index, [frame])
        model.put(frame, [choice])
    candidates = index.frames()[::7]
    assert members.choose(candidates) == model.choose(candidates)
