"""How contenders take turns, on a CPU and in general; what one that fails costs."""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cpu_timer import CpuTimer, last_level_cache
from benchmarks.figures import Section, Shape
from benchmarks.gpu_timer import Contender, DryTimer
from benchmarks.harness import Bench, Entrant
from benchmarks.turns import order, take_turns


@pytest.mark.parametrize("contenders", [2, 3, 5])
def test_everybody_has_a_turn_a_round_behind_different_ones(contenders: int) -> None:
    rounds = [order(contenders, number) for number in range(2 * contenders)]
    assert all(sorted(one) == list(range(contenders)) for one in rounds)
    assert {one[0] for one in rounds} == set(range(contenders))
    before = {(second, first) for one in rounds for first, second in pairwise(one)}
    for contender in range(contenders):
        assert len({first for second, first in before if second == contender}) == min(2, contenders - 1)


def test_one_that_fails_has_no_more_turns() -> None:
    turns: list[str] = []

    def right() -> float:
        turns.append("right")
        return 1.0

    def wrong() -> float:
        turns.append("wrong")
        if turns.count("wrong") == 2:
            raise MemoryError("no more")
        return 2.0

    found = take_turns([right, wrong], 4)
    assert found[0] == [1.0] * 4 and isinstance(found[1], MemoryError)
    assert turns.count("right") == 4 and turns.count("wrong") == 2


def test_a_call_is_timed_over_as_many_as_last(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"slow": 0, "fast": 0}
    clock = [0.0]

    def call(name: str, seconds: float) -> None:
        calls[name] += 1
        clock[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    contenders = [Contender("slow", [lambda: call("slow", 1.0)]), Contender("fast", [lambda: call("fast", 0.001)])]
    timings = CpuTimer(rounds=3, least=0.01).measure(contenders)
    assert calls == {"slow": 2 + 3, "fast": 2 + 3 * 10}
    assert timings["slow"].seconds == pytest.approx([1.0] * 3) and timings["fast"].seconds == pytest.approx([0.001] * 3)
    assert timings["slow"].mode == "eager"


@pytest.mark.parametrize("timer", [CpuTimer(rounds=2), DryTimer()])
def test_a_failure_while_timing_is_a_row_like_a_failed_check(timer: CpuTimer | DryTimer) -> None:
    def fails() -> None:
        raise RuntimeError("no such file: /home/someone/secret.so")

    section = Section("a group")
    Bench(Shape(), torch.float32, "cpu", timer).run(section, [Entrant("bad", [fails]), Entrant("good", [lambda: None])])
    bad, good = section.rows
    assert good.seconds and not good.wrong
    assert bad.wrong and not bad.seconds
    assert bad.trouble == "FAILED while it was timed, RuntimeError: no such file: secret.so"


def test_the_cache_is_what_the_system_says(tmp_path: Path) -> None:
    size = tmp_path / "size"
    for text, found in (("32768K\n", 32 << 20), ("256M", 256 << 20), ("4096", 4096), ("much", 7)):
        size.write_text(text)
        assert last_level_cache(size, otherwise=7) == found
    assert last_level_cache(tmp_path / "absent", otherwise=7) == 7
