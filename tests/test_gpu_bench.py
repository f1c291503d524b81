"""The GPU benchmark without a GPU: its arithmetic, its targets and its checks, with times made up by the test."""

# ruff: noqa: E402  benchmarks is not installed: its folder is added to the path before it is imported
from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import figures, gpu_ops, gpu_sections
from benchmarks.figures import Row, Section, Shape, Target
from benchmarks.gpu_contenders import Layer, clone, difference, exact_attention, exact_retrieve, poisoned
from benchmarks.gpu_timer import Contender, DryTimer, GpuTimer, Timing
from benchmarks.harness import Absent, Bench, Entrant, compared
from longlive_rag_ops import engines

SMALL = Shape(grid=(2, 3), block=2, window=8, heads=2, head_dim=32, new_pages=3, embedding=64)


@dataclass
class FakeTimer:
    """Times by name, the same in each round but for a factor of the round."""

    seconds: Callable[[str], float]
    rounds: int = 3
    cache_bytes: int = 1
    seen: list[str] = field(default_factory=list)

    def measure(self, contenders: Sequence[Contender]) -> dict[str, Timing]:
        self.seen += [contender.name for contender in contenders]
        factors = [1.0 + 0.5 * number for number in range(self.rounds)]
        return {c.name: Timing([self.seconds(c.name) * f for f in factors], "graph") for c in contenders}


def bench(seconds: Callable[[str], float], shape: Shape = SMALL) -> Bench:
    return Bench(shape, torch.float32, "cpu", FakeTimer(seconds), dry=True)


def test_operations_and_bytes_of_the_paper_s_shape() -> None:
    shape, item = Shape(), 2
    assert (shape.tokens, shape.queries, shape.page) == (1560, 4680, 2_396_160)
    flops = figures.attention_flops(shape.queries, shape.window * shape.tokens, shape.heads, shape.head_dim)
    assert flops == pytest.approx(538e9, rel=0.01)  # as counted independently in the design
    assert figures.place_bytes(shape, 6, item, item, scaled=False) == 6 * 2 * 2 * shape.page * item
    # int8: a byte an element and a float16 factor a token and head in, two bytes an element out
    assert figures.place_bytes(shape, 1, 1, item, scaled=True) == 2 * (3 * shape.page + 2 * 1560 * 12)
    assert figures.write_bytes(shape, item) == 7 * 3 * shape.page * item
    assert figures.attention_bytes(shape, 12, item) == (3 + 3 + 12 + 12) * shape.page * item
    assert figures.index_bytes(100_000, 1024, item) == 205_600_000


@pytest.mark.parametrize(("each", "cache", "copies"), [(1, 0, 2), (100, 50, 4), (10**9, 6 * 10**7, 3), (1, 10**6, 256)])
def test_tensors_taken_in_turn_exceed_the_cache(each: int, cache: int, copies: int) -> None:
    assert figures.copies_for_cold_cache(each, cache) == copies
    assert copies == 256 or (copies - 1) * each >= 4 * cache


def test_medians_and_ratios() -> None:
    spread = figures.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert figures.Spread.of([7.0]) == figures.Spread(7.0, 7.0, 7.0)
    # A slow round slows both: the ratio of medians would be 4 here.
    assert figures.ratio([2.0, 40.0, 4.0], [1.0, 20.0, 1.0]).median == 2.0
    assert figures.added([1.0, 2.0], [10.0, 20.0]) == [11.0, 22.0]
    with pytest.raises(ValueError, match="zip"):
        figures.ratio([1.0], [1.0, 2.0])


def test_targets() -> None:
    assert Target("", 0.55, 0.55, least=True).met and not Target("", 0.549, 0.55, least=True).met
    assert Target("", 1.05, 1.05, least=False).met and not Target("", 1.051, 1.05, least=False).met
    for nothing in (None, float("nan"), float("inf")):
        assert not Target("", nothing, 1.0, least=True).met
    assert Target("", None, 1.0, least=True).verdict == "NOT MEASURED"


def test_rates_compare_like_with_like() -> None:
    section = Section("", yardstick="copy")
    section.rows = [Row("copy", [2.0, 4.0], bytes=100), Row("half", [4.0, 8.0], bytes=100)]
    section.rows += [Row("product", [1.0, 1.0], flops=5), Row("absent", trouble="none here"), Row("bare", [1.0, 1.0])]
    assert section.fraction("half") == 0.5 and section.fraction("copy") == 1.0
    assert section.fraction("product") is None and section.fraction("absent") is None
    assert section.fraction("bare") is None and section.over("half", "copy") == 2.0
    assert figures.fastest(section, ["copy", "half", "absent"]) == "copy"
    assert figures.fastest(section, ["absent"]) is None
    text = figures.section_text(section)
    assert "50.0 %" in text and "not timed: absent: none here" in text
    json.dumps(figures.as_data([section]), allow_nan=False)


def test_what_is_wrong_or_absent_is_not_timed() -> None:
    made, section = bench(lambda name: 1.0), Section("")

    def fail(error: Exception) -> str:
        raise error

    made.run(
        section,
        [
            Entrant("right", [lambda: None], lambda: ""),
            Entrant("wrong", [lambda: None], lambda: compared((torch.ones(2, 3), torch.ones(2, 3) * 1.1))),
            Entrant("absent", [], lambda: fail(Absent("no such library"))),
            Entrant("failing", [lambda: None], lambda: fail(RuntimeError("first line\nsecond"))),
        ],
    )
    assert made.timer.seen == ["right"]
    assert [(row.name, bool(row.seconds), row.wrong) for row in section.rows] == [
        ("right", True, False),
        ("wrong", False, True),
        ("absent", False, False),
        ("failing", False, True),
    ]
    assert section.rows[3].trouble == "FAILED, RuntimeError: first line"


def test_one_wrong_vector_among_many_shows() -> None:
    exact = torch.randn(60_000, 16, generator=torch.Generator().manual_seed(0))
    got = exact * (1 + 2**-10)
    assert compared((got, exact)) == ""
    got[777] = 0  # 0.4 % of the whole's root mean square
    assert difference(got, exact)[0] < 0.005
    assert compared((got, exact)).startswith("WRONG")
    got[777] = torch.nan
    assert compared((got, exact)).startswith("WRONG")


def test_attention_targets() -> None:
    """Sections at work on tiny tensors: the matrix product at 4096 operations a second, ours at 60 % of its rate."""
    size, flops = 2 * 16**3, figures.attention_flops(12, 48, 2, 32)
    seconds = {"matmul": 2.0, "triton": flops / (0.6 * size / 2.0), "dense": 5.0, "auto": 6.0, "SDPA": 4.0}
    section = gpu_sections.attention(bench(lambda name: seconds.get(name, 8.0)))
    by_name = {target.what.split(":")[0]: target for target in section.targets}
    if section.find("triton"):
        assert by_name["window_attend, triton"].got == pytest.approx(0.6) and by_name["window_attend, triton"].met
    assert by_name["window_attend, auto"].got == pytest.approx(1.5) and not by_name["window_attend, auto"].met
    assert "best dense back end (SDPA)" in section.targets[1].what


def test_retrieve_targets() -> None:
    """A block of five forwards is held against five times the parts."""
    seconds = {"auto, unchanged": 10.2, "write_frames alone": 1.0}
    section = gpu_sections.retrieve(bench(lambda name: seconds.get(name, 52.5 if "block" in name else 9.0)))
    got = {target.what: target for target in section.targets if " auto," in target.what}
    assert [round(target.got or 0, 6) for target in got.values()] == [1.02, 1.05]
    assert all(target.met for target in got.values())


def test_new_memory_is_poisoned_only_within() -> None:
    with poisoned():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("plan", ["same", "new", "select"])
def test_the_whole_call_s_inputs_are_valid_and_do_what_they_say(plan: str) -> None:
    layer = Layer(SMALL, torch.float32, "cpu")
    case = layer.retrieve(plan)
    planned = Layer(SMALL, torch.float32, "cpu").retrieve("same" if plan == "same" else "new")
    exact, pool, staging = exact_retrieve(planned)
    mine = clone(case)
    out, _ = torch.ops.longlive.retrieve_attend(**mine, engine="reference")
    assert compared((out, exact), (mine["pool_layer"], pool), (mine["staging"], staging)) == ""
    assert torch.equal(mine["window_state"], planned["window_state"])
    assert int((mine["window_state"][0, 2] >= 0).sum()) == (0 if plan == "same" else SMALL.new_pages)


def test_attention_a_head_at_a_time_equals_all_at_once() -> None:
    layer = Layer(SMALL, torch.float32, "cpu")
    case = layer.attend()
    whole, _ = torch.ops.longlive.window_attend(**case, engine="reference")
    assert compared((whole, exact_attention(**case))) == ""


def test_dry_run(tmp_path: Path) -> None:
    """In a process of its own: it puts Triton into its interpreter, which a GPU's tests must not meet."""
    pytest.importorskip("triton")
    if (reason := engines.interpreter_obstacle()) is not None:
        pytest.skip(reason)
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_ops", "--dry-run", "--only", "pages", "--only", "search"],
        cwd=ROOT,
        env=os.environ | {"LONGLIVE_BENCH_OUT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "measure NOTHING" in ran.stdout and "commit" in ran.stdout and "triton, 200 rows" in ran.stdout
    assert not [*tmp_path.iterdir()]


def test_results_are_written_and_strictness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(lambda name: 1.0)
    written: list[int] = []
    sections = gpu_ops.measure(made, ["attention"], lambda done: written.append(len(done)))
    assert written == [1] and len(sections) == 1
    monkeypatch.setitem(gpu_ops.SECTIONS, "attention", lambda made: 1 / 0)
    failed = gpu_ops.measure(made, ["attention"], lambda done: None)
    assert failed[0].rows[0].wrong and "ZeroDivisionError" in failed[0].rows[0].trouble


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_ops.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out


def test_dry_timer_calls_once() -> None:
    calls: list[int] = []
    timings = DryTimer().measure([Contender("one", [lambda: calls.append(1), lambda: calls.append(2)])])
    assert calls == [1] and timings["one"].mode == "dry"


class FakeCuda:
    """As much of ``torch.cuda`` as the timer uses: a clock that each call moves, graphs that call again."""

    def __init__(self) -> None:
        self.now, self.mode, self.captured = 0.0, 0, None
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            seconds = 0.0

            def replay(self) -> None:
                clock.now += self.seconds

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def Stream(self) -> None: ...

    def synchronize(self) -> None: ...

    def get_device_properties(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1)

    def stream(self, stream: None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: SimpleNamespace, stream: None) -> Iterator[None]:
        began = self.now
        yield
        graph.seconds, self.now = self.now - began, began  # captured, not run

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode: str | int) -> None:
        self.mode = mode


def test_gpu_timer_divides_by_the_calls_and_launches_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    order: list[str] = []

    def work(name: str, seconds: float, waits: bool = False) -> None:
        if waits and cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        order.append(name)
        cuda.now += seconds

    timer = GpuTimer(rounds=4, device="cpu")
    contenders = [
        Contender("graphed", [lambda: work("a", 1.0), lambda: work("b", 3.0)]),
        Contender("waiting", [lambda: work("c", 5.0, waits=True), lambda: work("d", 7.0, waits=True)]),
    ]
    timings = timer.measure(contenders)
    assert timings["graphed"] == Timing([2.0] * 4, "graph")  # four seconds for two calls
    assert timings["waiting"].mode == "eager" and sorted(timings["waiting"].seconds) == [5.0, 5.0, 7.0, 7.0]
    assert cuda.mode == 0 and order.count("b") == 1
    broken = timer.measure([Contender("broken", [lambda: exec("raise RuntimeError('out of memory')")])])["broken"]
    assert broken.seconds == [] and str(broken.error) == "out of memory"
