"""`benchmarks.bench_check`: ratios of a fresh run held against recorded ones; the run itself is made up."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import record_cases as cases
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import bench_check
from benchmarks.bench_check import compare
from benchmarks.record import Record, device_folder, environment, write_records

STEP = "attention step, 12 frames of 390 tokens"
PUBLISHED, NATIVE = "ours over as published", "ours over native"


def by_name(recorded: list[Record], fresh: list[Record]) -> dict[str, bench_check.Ratio]:
    return {ratio.name: ratio for ratio in compare(recorded, fresh)}


def test_ratios_are_compared_and_absolute_times_are_not() -> None:
    slower = cases.group(  # a machine of a tenth of the speed, and ours lost a tenth over native
        "micro", "attention step, 12 frames of 390 tokens", {"as published": 15.0, "native": 10.0, "ours": 11.0}
    )
    found = by_name(cases.attention_step(), slower)
    assert set(found) == {PUBLISHED, NATIVE}
    assert found[NATIVE].loss == pytest.approx(0.1) and not found[NATIVE].lost


@pytest.mark.parametrize(("native", "lost"), [(0.81, False), (0.79, True), (2.0, False)])
def test_more_than_a_quarter_is_lost(native: float, lost: bool) -> None:
    ratio = by_name(cases.attention_step(native=1.0), cases.attention_step(native=native))[NATIVE]
    assert ratio.loss == pytest.approx(1 / native - 1) and ratio.lost == lost


def test_the_largest_loss_comes_first_and_no_number_before_it() -> None:
    fresh = cases.attention_step(published=1.0, native=0.9)
    assert [ratio.name for ratio in compare(cases.attention_step(), fresh)] == [PUBLISHED, NATIVE]
    ours = fresh[2]
    over = {**ours.over, "native": {**ours.over["native"], "median": math.nan}}
    fresh[2] = replace(ours, over=over)
    first = compare(cases.attention_step(), fresh)[0]
    assert first.name == NATIVE and math.isnan(first.loss) and first.lost


def gone(record: Record, **changes: Any) -> Record:
    return replace(record, median=None, low=None, high=None, runs=0, over={}, **changes)


def test_what_is_ours_and_not_measured_any_more_is_lost() -> None:
    *others, ours = cases.attention_step()
    others = [replace(other, over={}) for other in others]
    for fresh in ([*others, gone(ours, absent="WRONG by 1", wrong=True)], others):
        found = by_name(cases.attention_step(), fresh)
        assert set(found) == {PUBLISHED, NATIVE}
        assert all(ratio.fresh is None and ratio.lost for ratio in found.values())


def test_a_peer_that_is_absent_here_is_left_out_and_a_wrong_one_is_not() -> None:
    published, native, ours = cases.attention_step()
    ours = replace(ours, over={"native": ours.over["native"]})
    absent = by_name(cases.attention_step(), [gone(published, absent="not here"), native, ours])
    assert set(absent) == {NATIVE}
    wrong = by_name(cases.attention_step(), [gone(published, absent="WRONG", wrong=True), native, ours])
    assert wrong[PUBLISHED].lost and not wrong[NATIVE].lost


def test_groups_that_were_not_run_again_say_nothing() -> None:
    recorded = cases.micro()
    found = compare(recorded, cases.attention_step())
    assert {ratio.name for ratio in found} == {PUBLISHED, NATIVE}
    every = {ratio.name for ratio in compare(recorded, recorded)}
    assert "ours, dense over copy" in every  # the device's own rate counts
    assert not any(name.endswith(("over ours, triton", "over ours, auto")) for name in every)
    with pytest.raises(ValueError, match="no group error against float64, window_attend: record them anew"):
        compare(recorded, cases.quality())
    with pytest.raises(ValueError, match="no ratio in common"):
        compare(cases.quality(), cases.quality())


def test_a_group_with_a_loss_is_run_again_and_what_is_lost_each_time_is_lost() -> None:
    recorded = cases.micro()
    steps = iter([cases.attention_step(native=native) for native in (0.4, 0.5, 0.45)])
    ran: list[str] = []

    def step() -> list[Record]:
        ran.append("step")
        return next(steps)

    def ops() -> list[Record]:
        ran.append("ops")
        return [record for record in recorded if record.group != STEP]

    found, records = bench_check.check(recorded, [step, ops])
    assert ran == ["step", "ops", "step", "step"]
    assert len(records) == 3 * len(cases.attention_step()) + len(ops())
    assert (found[0].name, found[0].fresh, found[0].lost) == (NATIVE, pytest.approx(2.0), True)
    assert not any(ratio.lost for ratio in found[1:]) and len(found) == len(compare(recorded, recorded))
    noisy = iter([cases.attention_step(native=0.4), cases.attention_step()])
    assert not any(ratio.lost for ratio in bench_check.check(cases.attention_step(), [lambda: next(noisy)])[0])


def test_a_number_is_not_replaced_by_none() -> None:
    """The second attempt fails; what the first one has shown to be no loss stays so."""
    failed = [gone(r, absent="FAILED", wrong=True) if r.role == "ours" else r for r in cases.attention_step()]
    steps = iter([cases.attention_step(native=0.4), failed, failed])
    found, records = bench_check.check(cases.attention_step(), [lambda: next(steps)])
    assert {ratio.name: ratio.lost for ratio in found} == {PUBLISHED: False, NATIVE: True}
    assert bench_check.troubles_text(records) == f"{STEP}: ours: FAILED"


def test_a_group_of_other_sizes_is_refused() -> None:
    fresh = cases.attention_step(shape={"tokens": 1560})
    with pytest.raises(
        ValueError, match=r"attention step.*recorded for \{'tokens': 390\}, this run has \{'tokens': 1560\}"
    ):
        compare(cases.attention_step(shape={"tokens": 390}), fresh)


def test_results_are_this_device_s_or_else_the_newest_of_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results of a CPU"):
        bench_check.find_results(tmp_path)
    for name, facts in (
        ("old", cases.CPU | {"date": "2025-12-31"}),
        ("new", cases.CPU | {"date": "2026-01-02"}),
        ("gpu", cases.GPU | {"date": "2026-02-01"}),
    ):
        write_records(tmp_path / name / "micro.jsonl", cases.attention_step(facts=facts))
    assert bench_check.find_results(tmp_path) == tmp_path / "new"
    own = tmp_path / device_folder(environment())
    write_records(own / "micro.jsonl", cases.attention_step(facts=cases.CPU | {"date": "2024-01-01"}))
    assert bench_check.find_results(tmp_path) == own


@pytest.mark.parametrize(("native", "status"), [(1.0, 0), (0.5, 1)])
def test_exit_status(
    native: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    facts = cases.CPU | {"threads": threads}
    write_records(tmp_path / "micro.jsonl", cases.attention_step(facts=facts))
    asked = []
    step = cases.attention_step(native=native, facts=facts)
    monkeypatch.setattr(bench_check, "chosen_groups", lambda preset: asked.append(preset) or [lambda: step])
    assert bench_check.main(["--results", str(tmp_path), "--rounds", "3"]) == status
    assert (asked[0].name, asked[0].rounds, asked[0].threads) == ("cpu", 3, threads)
    printed = capsys.readouterr().out
    assert (f"lost more than 25 %, or not measured:\n  {STEP}: {NATIVE}" in printed) == bool(status)
    assert ("none of 2 ratios lost more than 25 %" in printed) == (not status)


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_check.main(["--results", str(tmp_path)]) == 2
    assert "has no micro.jsonl" in capsys.readouterr().err
    for records in (cases.attention_step(facts=cases.GPU), cases.attention_step(mode="dry"), []):
        write_records(tmp_path / "micro.jsonl", records)
        assert bench_check.main(["--results", str(tmp_path)]) == 2
        assert "must hold measurements of a CPU" in capsys.readouterr().err
