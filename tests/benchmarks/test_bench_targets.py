"""What the suites must show, held against made-up records: met, missed, not measured, dry."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import record_cases as cases

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import targets
from benchmarks.figures import Target
from benchmarks.record import Record


def found(records: list[Record], kind: str = "cuda") -> dict[str, Target]:
    return {target.what: target for target in targets.judged(records, kind)}


def test_every_claim_of_the_issue_is_a_target() -> None:
    assert {(rule.what, rule.suite, rule.kind, rule.limit, rule.least) for rule in targets.RULES} == {
        ("attention step: as published over ours", "micro", "cpu", 1.3, True),
        ("attention step: ours over native", "micro", "cpu", 1.03, False),
        ("attention: longest history over shortest", "scaling", "cpu", 1.1, False),
        ("attention: longest history over shortest", "scaling", "cuda", 1.1, False),
        ("block with memory: ours over native", "block", "cuda", 0.85, False),
        ("block with memory: ours over as published", "block", "cuda", 0.55, False),
        ("embedding and retrieval: share of the block", "block", "cuda", 1.0, False),
        ("fetch stall: share of the block", "block", "cuda", 1.0, False),
        ("long run: last blocks over first blocks", "block", "cuda", 1.03, False),
    }


def test_attention_step_is_a_ratio_of_rounds() -> None:
    ours, native = "attention step: as published over ours", "attention step: ours over native"
    met = found(cases.attention_step(published=1.31, native=0.98), "cpu")
    assert met[ours].got == pytest.approx(1.31) and met[native].got == pytest.approx(1 / 0.98)
    assert [targets.verdict(met[name]) for name in (ours, native)] == ["met", "met"]
    assert met[ours].note == "attention step, 12 frames of 390 tokens: ours"
    missed = found(cases.attention_step(published=1.17, native=0.9), "cpu")
    assert targets.verdict(missed[ours]) == "missed by 10 %"
    assert targets.verdict(missed[native]) == "missed by 7.9 %"  # 1 / 0.9 over 1.03


def test_a_ratio_of_another_kind_of_device_decides_nothing() -> None:
    on_gpu = found(cases.attention_step(facts=cases.GPU), "cpu")
    assert all(target.got is None for target in on_gpu.values())
    assert all(target.got is None for target in found(cases.block(cases.CPU)).values())


def test_the_worst_place_and_repeat_rate_decide_the_block() -> None:
    block = found(cases.block(cases.GPU, over_native=0.84))
    over_native, over_published = (block[f"block with memory: ours over {name}"] for name in ("native", "as published"))
    assert over_native.got == pytest.approx(0.84 * 1.02)  # int8
    assert targets.verdict(over_native) == "missed by 0.8 %"
    assert over_native.note == "ours, memory in host memory as int8, repeat rate 0.95, the worst of 9"
    assert over_published.got == pytest.approx(0.84 * 1.02 / 2) and over_published.met
    assert block["embedding and retrieval: share of the block"].got == pytest.approx(0.6)
    assert targets.verdict(found(cases.block(cases.GPU, over_native=0.8))[over_native.what]) == "met"


def test_the_worst_of_several_steps_decides() -> None:
    records = [
        replace(record, group=f"attention step, {number}")
        for number, published in enumerate((1.5, 1.2, 1.4))
        for record in cases.attention_step(published=published)
    ]
    target = found(records, "cpu")["attention step: as published over ours"]
    assert target.got == pytest.approx(1.2) and target.note == "attention step, 1: ours, the worst of 3"


def test_what_is_lacking_might_have_been_the_worst() -> None:
    records = cases.block(cases.GPU, over_native=0.8)
    lost = {"median": None, "low": None, "high": None, "runs": 0, "over": {}, "absent": "FAILED", "wrong": True}
    fewer = [replace(r, **lost) if r.contender.endswith("int8") and r.role == "ours" else r for r in records]
    what = "block with memory: ours over native"
    target = found(fewer)[what]
    assert not target.met and targets.verdict(target) == "not whole: 3 of ours not measured"
    stopped = Record("block", "suite block", "the rest of block", "ours", absent="stopped", environment=dict(cases.GPU))
    assert targets.verdict(found([*records, stopped])[what]) == "not whole: 1 of ours not measured"
    slow = [replace(r, **lost) if r.contender.endswith("int8") else r for r in cases.block(cases.GPU, over_native=0.9)]
    assert targets.verdict(found(slow)[what]).startswith("missed by")


def test_shares_are_missed_by_points() -> None:
    stall = found(cases.block(cases.GPU, stall=0.035))["fetch stall: share of the block"]
    assert (targets.got_text(stall), targets.verdict(stall)) == ("3.5 %", "missed by 2.5 points")


def test_a_long_run_is_flat_or_not() -> None:
    what = "long run: last blocks over first blocks"
    flat, grows = (found(cases.long_run(cases.GPU, late))[what] for late in (1.02, 1.2))
    assert flat.got == pytest.approx(1.02) and flat.met
    assert grows.got == pytest.approx(1.2) and not grows.met
    assert grows.note == "ours, blocks 601-640 over ours, blocks 1-40"
    assert found(cases.long_run(cases.GPU)[:1])[what].got is None  # the first blocks alone say nothing


def test_attention_is_flat_over_history_or_not() -> None:
    what = "attention: longest history over shortest"
    flat, grows = (found(cases.attention_over_history(growth=growth), "cpu")[what] for growth in (0.02, 0.1))
    assert flat.got == pytest.approx(1.04) and flat.met
    assert grows.got == pytest.approx(1.2) and not grows.met
    both = (f"history of {history} frames: ours, with choice and commit" for history in (10_000, 100))
    assert grows.note == " over ".join(both) + ", the worst of 2"


def test_what_is_not_measured_is_not_met() -> None:
    for kind in ("cpu", "cuda"):
        for target in targets.judged([], kind):
            assert not target.met and targets.verdict(target) == "not measured" and targets.got_text(target) == "-"
    failed = [
        replace(record, median=None, low=None, high=None, runs=0, over={}, absent="WRONG by 1", wrong=True)
        if record.role == "ours"
        else record
        for record in cases.attention_step()
    ]
    assert all(target.got is None for target in targets.judged(failed, "cpu"))


def test_a_dry_run_says_nothing() -> None:
    dry = found(cases.attention_step(mode="dry"), "cpu")
    assert {targets.verdict(target) for target in dry.values() if target.got} == {"dry run, says nothing"}


def test_only_the_targets_of_suites_that_ran() -> None:
    assert {t.what.split(":")[0] for t in targets.judged([], "cuda", ["block"])} >= {
        "embedding and retrieval",
        "fetch stall",
    }
    assert targets.judged([], "cuda", ["quality", "micro"]) == []
