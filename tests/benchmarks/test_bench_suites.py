"""All suites on preset tiny: they run, and targets, plots and tables find what they look for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.preset import make_preset
from benchmarks.record import Record, read_records
from benchmarks.report_plots import PICTURES
from benchmarks.run_suites import SUITES, count_groups, run_suites
from benchmarks.targets import RULES
from longlive_rag_ops.cli import main
from longlive_rag_ops.cli.bench import _NoBar

pytestmark = pytest.mark.slow


class Bar(_NoBar):
    """Counts, for each suite, how often it advances."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def __enter__(self) -> Bar:
        return self

    def set_description(self, text: str) -> None:
        self.suite = text

    def update(self, count: int) -> None:
        self.counts[self.suite] = self.counts.get(self.suite, 0) + count


@pytest.fixture(scope="module")
def bar() -> Bar:
    return Bar()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, bar: Bar) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert run_suites([], make_preset("tiny"), out, bar) == 0
    return out


def records(results: Path, suite: str) -> list[Record]:
    (path,) = results.glob(f"*/{suite}.jsonl")
    return read_records(path)


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_ours_and_others_in_every_group(results: Path, suite: str) -> None:
    own = records(results, suite)
    assert {record.suite for record in own} == {suite}
    assert [f"{record.group}: {record.absent}" for record in own if record.wrong] == []
    names = [(record.group, record.contender) for record in own]
    assert len(set(names)) == len(names)
    for title, _ in names:
        assert any(record.median is not None and record.role == "ours" for record in own if record.group == title), (
            title
        )
    assert all(record.environment["preset"] == "tiny" for record in own)
    assert {record.mode for record in own if record.median is not None and record.unit == "s"} <= {"dry"}


def test_the_bar_knows_how_far_it_goes(results: Path, bar: Bar) -> None:
    assert bar.counts == {suite: count_groups([suite], make_preset("tiny")) for suite in SUITES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}: {rule.what}")
def test_every_target_finds_its_records(results: Path, rule: object) -> None:
    own = [
        replace(record, environment={**record.environment, "kind": rule.kind})  # type: ignore[attr-defined]
        for record in records(results, rule.suite)  # type: ignore[attr-defined]
    ]
    assert rule.judge(own).got is not None  # type: ignore[attr-defined]


def test_every_picture_is_drawn(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the bench extra)")
    assert main(["bench-report", str(results), "--out", str(tmp_path)]) == 0
    drawn = {path.stem.rpartition("-")[2] for path in tmp_path.glob("*.png")}
    assert drawn == {name for name, *_ in PICTURES}
