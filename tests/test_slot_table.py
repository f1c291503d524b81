"""The slot table through its Python face: examples, errors, and a model that searches everything and links nothing."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from longlive_rag_ops import build_info
from longlive_rag_ops.slot_table import Acquired, SlotTable


class Model:
    """The rules of :class:`SlotTable`, written down once more in the plainest way."""

    def __init__(self, capacity: int, first: int) -> None:
        self.capacity, self.first = capacity, first
        self.slots: dict[int, int] = {}  # the order of the keys is the order of use
        self.pinned: dict[int, int] = {}

    def use(self, frame: int) -> None:
        self.slots[frame] = self.slots.pop(frame)

    def acquire_many(self, frames: list[int]) -> list[Acquired]:
        slots, missing = dict(self.slots), [f for f in dict.fromkeys(frames) if f not in self.slots]
        free = [s for s in range(self.first, self.first + self.capacity) if s not in slots.values()]
        victims = [f for f in slots if f not in self.pinned and f not in frames]
        if len(missing) > len(free) + len(victims):
            raise RuntimeError
        result, seen = [], set()
        for frame in frames:
            evicted, is_new = None, frame in missing and frame not in seen
            if is_new:
                if free:
                    slots[frame] = free.pop(0)
                else:
                    evicted = victims.pop(0)
                    slots[frame] = slots.pop(evicted)
            seen.add(frame)
            result.append(Acquired(slots[frame], is_new, evicted))
        self.slots = slots
        for frame in frames:
            self.use(frame)
        return result

    def touch(self, frame: int) -> int:
        if frame not in self.slots:
            return -1
        self.use(frame)
        return self.slots[frame]

    def pin(self, frame: int) -> int:
        if frame not in self.slots:
            raise ValueError
        if frame not in self.pinned:
            self.use(frame)
        self.pinned[frame] = self.pinned.get(frame, 0) + 1
        return self.pinned[frame]

    def unpin(self, frame: int) -> int:
        if frame not in self.slots:
            raise ValueError
        if frame not in self.pinned:
            raise RuntimeError
        self.pinned[frame] -= 1
        if self.pinned[frame] == 0:
            del self.pinned[frame]
            self.use(frame)
        return self.pinned.get(frame, 0)

    def release(self, frame: int) -> int:
        if frame not in self.slots:
            raise ValueError
        if frame in self.pinned:
            raise RuntimeError
        return self.slots.pop(frame)

    def clear(self) -> None:
        self.slots, self.pinned = {}, {}

    def grow(self, capacity: int) -> None:
        if capacity < self.capacity:
            raise ValueError
        self.capacity = capacity

    def frames(self) -> list[int]:
        return [f for f in self.slots if f not in self.pinned] + [f for f in self.slots if f in self.pinned]


def outcome(call: Callable[..., object], *arguments: object) -> object:
    try:
        return call(*arguments)
    except (ValueError, RuntimeError) as error:
        return type(error)


def run_against_model(capacity: int, first: int, calls: list[tuple[str, tuple[object, ...]]]) -> None:
    table, model = SlotTable(capacity, first), Model(capacity, first)
    for name, arguments in calls:
        got, expected = outcome(getattr(table, name), *arguments), outcome(getattr(model, name), *arguments)
        assert got == expected, (name, arguments)
        assert table.frames() == model.frames()
        assert len(table) == len(model.slots)
        assert table.capacity == model.capacity
        for frame in range(9):
            assert table.lookup(frame) == model.slots.get(frame, -1)
            assert table.pins(frame) == model.pinned.get(frame, 0)
            assert (frame in table) == (frame in model.slots)


def random_call(choose: random.Random) -> tuple[str, tuple[object, ...]]:
    name = choose.choice(["acquire_many"] * 4 + ["touch", "pin", "unpin", "unpin", "release", "grow", "clear"])
    if name == "clear":
        return (name, ()) if choose.random() < 0.1 else ("touch", (0,))
    if name == "grow":
        return name, (choose.randrange(1, 9),)
    if name == "acquire_many":
        return name, ([choose.randrange(9) for _ in range(choose.randrange(5))],)
    return name, (choose.randrange(9),)


def test_random_calls_agree_with_the_model() -> None:
    choose = random.Random(5)
    for _ in range(100):
        run_against_model(choose.randrange(1, 6), choose.randrange(20), [random_call(choose) for _ in range(40)])


def test_any_calls_agree_with_the_model() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    frame = st.integers(0, 8)
    one = st.tuples(st.sampled_from(["touch", "pin", "unpin", "release"]), st.tuples(frame))
    many = st.tuples(st.just("acquire_many"), st.tuples(st.lists(frame, max_size=5)))
    grow = st.tuples(st.just("grow"), st.tuples(st.integers(1, 8)))
    clear = st.tuples(st.just("clear"), st.just(()))
    calls = st.lists(st.one_of(many, many, one, one, grow, clear), max_size=40)

    @hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.integers(1, 5), st.integers(0, 20), calls)
    def check(capacity: int, first: int, calls: list[tuple[str, tuple[object, ...]]]) -> None:
        run_against_model(capacity, first, calls)

    check()


def test_acquire_gives_evicts_and_reports() -> None:
    table = SlotTable(2, first=12)
    assert table.acquire(7) == Acquired(slot=12, is_new=True, evicted=None)
    assert table.acquire(9) == (13, True, None)
    assert table.acquire(7) == (12, False, None)
    assert table.acquire(8) == (13, True, 9)
    assert repr(table) == "SlotTable(capacity=2, first=12, size=2)"
    assert (table.capacity, table.first, table.size) == (2, 12, 2)


def test_a_failed_request_changes_nothing() -> None:
    table = SlotTable(3)
    table.acquire_many([1, 2, 3])
    table.pin(3)
    with pytest.raises(RuntimeError, match=r"no slot for 2 new frame.*of 3 slots 0 are free, 1 pinned"):
        table.acquire_many([2, 5, 6])

    def broken() -> object:
        yield 8
        raise KeyError("from the caller's iterator")

    with pytest.raises(KeyError, match="iterator"):
        table.acquire_many(broken())
    with pytest.raises(TypeError, match="frame must be an integer, got 'x'"):
        table.acquire_many([8, "x"])
    assert table.frames() == [1, 2, 3]
    assert 8 not in table


def test_whatever_is_an_integer_is_taken() -> None:
    table = SlotTable(np.int64(4), first=np.int32(1))
    assert table.acquire(np.int64(2**40)).slot == 1
    assert table.acquire(torch.tensor(5)).slot == 2
    assert [got.slot for got in table.acquire_many(torch.tensor([5, 6]))] == [2, 3]
    assert table.frames() == [2**40, 5, 6]
    assert all(type(frame) is int for frame in table.frames())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: SlotTable(0), ValueError, r"capacity must be in 1 \.\. 2147483647 .*got 0"),
        (lambda t: SlotTable(-1), ValueError, r"capacity must be .* got -1"),
        (lambda t: SlotTable(2**31), ValueError, r"capacity must be .* got 2147483648"),
        (lambda t: SlotTable(2**80), ValueError, r"capacity must fit into 64 bits, got 1208925819614629174706176"),
        (lambda t: SlotTable(1.5), TypeError, r"capacity must be an integer, got 1\.5 \(float\)"),
        (lambda t: SlotTable(2, first=-4), ValueError, r"first must be in 0 \.\. 2147483647, got -4"),
        (lambda t: SlotTable(2, first=2**31 - 1), ValueError, r"capacity must be in 1 \.\. 1 .*got 2"),
        (lambda t: t.acquire(-1), ValueError, r"frame must be >= 0, got -1"),
        (lambda t: t.acquire(2**63), ValueError, r"frame must fit into 64 bits"),
        (lambda t: t.acquire(None), TypeError, r"frame must be an integer, got None \(NoneType\)"),
        (lambda t: t.lookup(-2), ValueError, r"frame must be >= 0, got -2"),
        (lambda t: t.touch(-2), ValueError, r"frame must be >= 0, got -2"),
        (lambda t: t.pin(3), ValueError, r"cannot pin frame 3: it has no slot"),
        (lambda t: t.unpin(3), ValueError, r"cannot unpin frame 3: it has no slot"),
        (lambda t: t.unpin(1), RuntimeError, r"cannot unpin frame 1: it is not pinned"),
        (lambda t: t.release(3), ValueError, r"cannot release frame 3: it has no slot"),
        (lambda t: (t.pin(1), t.release(1)), RuntimeError, r"cannot release frame 1: it has 1 pin"),
        (lambda t: t.grow(1), ValueError, r"new_capacity must be >= the present capacity 2, got 1"),
        (lambda t: t.grow(2**31), ValueError, r"new_capacity must be in 1 \.\. 2147483647"),
    ],
)
def test_errors_name_the_argument(call: Callable[[SlotTable], object], error: type[Exception], message: str) -> None:
    table = SlotTable(2)
    table.acquire(1)
    with pytest.raises(error, match=message):
        call(table)


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "longlive_rag_ops._C", None)  # what Python itself does for "not importable"
    with pytest.raises(ImportError, match=r"longlive_rag_ops\._C cannot be loaded: .*make setup"):
        SlotTable(2)
    info = build_info.build_info()
    assert info["available"] is False
    assert "make setup" in info["reason"]
    assert "make setup" in build_info.summary()
