"""The scaling suite: all of its code once on tiny tensors, its checks against what is wrong, every preset's sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import bank_traffic, history_attention, history_search, suite_scaling
from benchmarks.bank_traffic import BankVideo, Traffic, frame_bytes, page_format, traffic, trouble
from benchmarks.block_choice import PlannedChoice
from benchmarks.contenders import AsPublished, Shape
from benchmarks.figures import Shape as LayerShape
from benchmarks.gpu_sections import op
from benchmarks.gpu_timer import Contender, DryTimer, Timing
from benchmarks.harness import Bench
from benchmarks.history_attention import OURS, attention
from benchmarks.history_stream import OursVideo, StreamedVideo, TwoChoices, Video
from benchmarks.line_plots import _lines
from benchmarks.planted_index import ExactChoice, PlantedIndex
from benchmarks.preset import Preset
from benchmarks.record import Record
from longlive_rag_ops import WindowConfig
from longlive_rag_ops.config import candidate_end

TINY = Preset("tiny", "cpu", torch.float32, 1, 1, {"kind": "cpu"})
LAYER = Shape(grid=(2, 3), heads=2, head_dim=32)
BEGINNINGS = ("retrieval against history", "attention against history", "bank traffic against repeat rate")


def bench(timer: Any = None) -> Bench:
    return Bench(LayerShape(), torch.float32, "cpu", timer or DryTimer(), dry=True)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Of the whole suite, which must have said after each group what it had."""
    so_far: list[int] = []
    with torch.inference_mode():
        made = suite_scaling.run(bench(), TINY, lambda records: so_far.append(len(records)))
    titles = list(dict.fromkeys(record.group for record in made))
    assert len(so_far) == len(titles) and so_far == sorted(set(so_far)) and so_far[-1] == len(made)
    return made


def beginning(records: list[Record], text: str) -> list[Record]:
    """Records of the groups that the report looks for by this beginning."""
    return [record for record in records if record.group.split(",")[0] == text]


def test_nothing_is_wrong_and_what_is_absent_says_why(records: list[Record]) -> None:
    assert [(record.contender, record.absent) for record in records if record.wrong] == []
    names = [(record.group, record.contender) for record in records]
    assert len(set(names)) == len(names)
    assert sum(len(beginning(records, text)) for text in BEGINNINGS) == len(records)
    assert all(record.suite == "scaling" and (record.median is None) == bool(record.absent) for record in records)


def test_each_length_of_history_is_a_group_with_a_ceiling(records: list[Record]) -> None:
    found = beginning(records, BEGINNINGS[0])
    assert sorted({record.shape["history"] for record in found}) == [40, 100]
    for history in (40, 100):
        group = {record.contender: record for record in found if record.shape["history"] == history}
        assert group["read"].role == "ceiling" and group["read"].bytes == 4 * 64 * history
        assert group["copy"].role == "ceiling" and group["copy"].bytes == 2 * 4 * 64 * history
        assert group["ours, auto"].ceiling == "read" and group["ours, auto"].over["copy"]
        assert group["ours, auto"].role == "ours" and group["ours, auto"].extra["engine"] == "dense"
        assert group["ours, auto"].bytes == (4 * 64 + 8) * history and group["ours, auto"].of_ceiling
        assert group["torch.topk(unit rows @ query)"].role == "peer" and "faiss, IndexFlatIP" in group
        assert ("ours, int8 index, auto" in group) == ("as published" in group) == (history == 40)
    (int8,) = [record for record in found if record.shape.get("index") == "int8"]
    assert int8.bytes == (64 + 4 + 8) * 40
    assert {r.role for r in found if r.contender == "as published"} == {"published"}


def test_all_lengths_of_history_take_turns_in_one_group(records: list[Record]) -> None:
    group = beginning(records, BEGINNINGS[1])
    assert len({record.group for record in group}) == 1
    mine = {r.shape["history"]: r for r in group if r.contender.endswith(f": {OURS}")}
    assert sorted(mine) == [42, 54]
    assert mine[42].contender in mine[54].over  # the ratio that must stay 1
    assert {record.role for record in group} == {"ours", "published", "native", "peer", "ceiling"}
    natives = [record.contender for record in group if record.role == "native"]
    assert natives == ["native, which has no history", "native, at its best, which has no history"]
    assert all(record.ceiling == "matmul" for record in group if record.flops and record.role != "ceiling")
    lines = {line.name: line.points for line in _lines(group, BEGINNINGS[1], "history")}
    assert [x for x, _ in lines[OURS]] == [42.0, 54.0] and len(lines) == 4


def test_traffic_falls_with_the_rate_that_was_seen(records: list[Record]) -> None:
    found = beginning(records, BEGINNINGS[2])
    for storage in ("plain", "int8"):
        mine = [record for record in found if record.contender == f"ours, {storage} pages"]
        assert [(r.shape["repeat_rate"], r.extra["measured_rate"]) for r in mine] == [(x, x) for x in (0, 0.5, 0.95)]
        each = [r.median / r.extra["frame_bytes"] for r in mine if r.median is not None]
        # Without repeats a wanted frame may still have its slot, where there are few to want.
        assert 5.5 < each[0] <= 6.0 and each[1:] == pytest.approx([3.0, 0.3])
        assert all(r.unit == "B" and "computed" not in r.extra for r in mine)
    computed = [record for record in found if record.extra.get("computed")]
    assert {record.role for record in computed} == {"published", "peer"} and len(computed) == 6
    page = 2 * 2 * 6 * 2 * 32 * 4  # layers, keys and values, tokens, heads, numbers, bytes
    assert {record.median for record in computed} == {6 * page, 5 * 6 * page}
    waits = [record for record in found if record.role == "part"]
    assert len(waits) == 6 and all(record.unit == "s" and record.extra["of"] in record.contender for record in waits)


@pytest.mark.parametrize("preset", suite_scaling.SIZES)
def test_the_sizes_of_every_preset_are_possible(preset: str) -> None:
    sizes = suite_scaling.SIZES[preset]
    config = WindowConfig()
    for history in sizes.attended:
        assert history % config.frames_per_block == 0
        TwoChoices(history, config, sizes.attended_embedding, "cpu")
    frames = (bank_traffic.WARM + bank_traffic.ROUND * sizes.rounds_of_bank) * config.frames_per_block
    assert frames <= 1024, "the planned choice's codes"
    if preset == "tiny":
        return
    assert (min(sizes.searched), max(sizes.searched), sizes.embedding) == (100, 1_000_000, 1024)
    item = 4 if preset == "cpu" else 2
    page = 2 * sizes.grid[0] * sizes.grid[1] * sizes.heads * sizes.head_dim * item
    held = sum(history + 3 * (16 + 4 * 20) for history in sizes.attended)
    assert held * page < (4 if preset == "cpu" else 50) * 1e9
    assert sizes.layers * page * frames < 16e9


# -- retrieval


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rows", "k"), [(40, 6), (100, 2), (3000, 13), (200, 16)])
def test_planted_rows_are_the_best(rows: int, k: int, dtype: torch.dtype) -> None:
    planted = PlantedIndex(rows, 128, k, "cpu")
    case = planted.case(dtype)
    exact = ExactChoice(case)
    assert exact.frames == planted.wanted and len(set(planted.wanted)) == k
    assert exact.wrong(*op("topk_retrieve", case, "reference")()) == ""
    # By brute force, and with what may not be chosen.
    stored = case["index"][0].double() * (case["index_scale"][0].double()[:, None] if dtype == torch.int8 else 1)
    cosines = stored @ planted.query[0].double() / planted.query[0].double().norm()
    assert {0, rows - 1} == set(cosines.topk(2).indices.tolist())
    assert all(1 <= frame < rows - 5 for frame in planted.wanted)
    rough = [float(cosines[row]) for row in range(rows) if int(case["index_ids"][0, row]) in planted.wanted]
    others = [float(c) for row, c in enumerate(cosines) if row not in (0, rows - 1)]
    assert min(rough) >= sorted(others)[-k] - 1e-6


def test_ties_by_row_are_wrong() -> None:
    case = PlantedIndex(100, 64, 6, "cpu").case(torch.float32)
    exact = ExactChoice(case)
    rows = {int(frame): row for row, frame in enumerate(case["index_ids"][0])}
    tied = [r for r in range(100) if torch.equal(case["index"][0, r], case["index"][0, rows[exact.frames[-1]]])]
    assert len(tied) == 3 and rows[exact.frames[-1]] == max(tied)
    by_row = torch.tensor([[*exact.frames[:-1], int(case["index_ids"][0, min(tied)])]])
    assert exact.wrong(by_row, exact.cosines[None]).startswith("WRONG frames")
    assert exact.wrong_rows(torch.tensor([[rows[frame] for frame in exact.frames[:-1]] + [min(tied)]])) == ""
    assert exact.wrong(torch.tensor([exact.frames]), exact.cosines[None] + 1e-4).startswith("WRONG scores")
    assert exact.wrong_rows(torch.arange(6)[None]).startswith("WRONG rows")


def measured(**options: Any) -> dict[str, Record]:
    known: dict[str, Any] = {"embedding": 64, "k": 6, "engines": ("auto", "reference"), "forms": (), "published": True}
    with torch.inference_mode():
        return {record.contender: record for record in history_search.retrieval(bench(), TINY, 60, **known | options)}


def test_a_wrong_engine_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_(name: str, case: dict[str, Any], engine: str) -> Callable[[], Any]:
        call = op(name, case, engine)
        return (lambda: [x.flip(-1) for x in call()]) if engine == "auto" else call

    monkeypatch.setattr(history_search, "op", reversed_)
    found = measured()
    assert found["ours, auto"].wrong and "WRONG frames" in found["ours, auto"].absent
    assert found["ours, reference"].median and found["as published"].median


def test_where_memory_is_short_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_search, "available_bytes", lambda: 1000)
    monkeypatch.setattr(history_search, "PlantedIndex", None)
    found = measured()
    assert list(found) == ["ours, auto"] and not found["ours, auto"].wrong
    assert "0.0 GB are free" in found["ours, auto"].absent and found["ours, auto"].shape["history"] == 60


def test_a_large_index_is_cold_by_itself() -> None:
    case = {"index": torch.zeros(1, 64, 4)}
    dry, real = bench(), replace(bench(), dry=False)
    assert len(history_search.cold_copies(dry, case)) == 2
    assert len(history_search.cold_copies(real, case)) == 1  # 1024 bytes, a cache of one
    real.timer.cache_bytes = 128
    assert len(history_search.cold_copies(real, case)) == 3


# -- attention


def test_every_block_places_all_memory_frames_anew() -> None:
    """For longer than any run lasts, by this package's choice and by the published one."""
    config = WindowConfig()
    with torch.inference_mode():
        video = Video(LAYER, 42, 256)
        mine, published = OursVideo(video, "auto", 4), StreamedVideo(video, AsPublished(LAYER))
        before = set(mine.window.selected[0])
        for _ in range(60):
            assert mine.wrong() == "" and published.wrong() == ""
            mine.block()
            published.block()
            chosen = set(mine.window.selected[0])
            assert len(chosen) == config.top_k and not chosen & before
            before = chosen
    assert mine.start == published.start == 42 + 3 * 60
    end = candidate_end(42, config.window, config.sink) - config.recent_exclude
    assert max(max(part) for part in video.choices.sets) == end - 1
    with pytest.raises(ValueError, match="12 candidates"):
        TwoChoices(24, config, 256, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_rules(dtype: torch.dtype) -> None:
    """The float64 output is made of the rules alone; the oracle's window must come to the same."""
    shape = Shape((2, 3), 2, 32, "cpu", dtype)
    with torch.inference_mode():
        video = Video(shape, 54, 128)
        oracle = OursVideo(video, "reference", 4)
        for _ in range(3):
            start, again = oracle.start, oracle.attend()
            out = oracle.block()
            assert torch.equal(again, out), "a block may be attended again"
            error = (out.double() - video.exact(start)).abs().max()
            assert error < (1e-6 if dtype == torch.float32 else 2**-8)


class Counted:
    """Notes who is timed."""

    rounds, cache_bytes = 2, 1

    def __init__(self) -> None:
        self.seen: list[Contender] = []

    def measure(self, contenders: list[Contender]) -> dict[str, Timing]:
        self.seen += contenders
        return {contender.name: Timing([1.0, 1.0], "eager") for contender in contenders}


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AsPublished.fetch
    monkeypatch.setattr(AsPublished, "fetch", lambda self, history, chosen: right(self, history, chosen) + 1)
    timer = Counted()
    with torch.inference_mode():
        found = attention(
            bench(timer), TINY, (42,), shape=LAYER, embedding=128, published_up_to=42, all_up_to=0, engine="auto"
        )
    (wrong,) = [record for record in found if record.wrong]
    assert wrong.role == "published" and "WRONG by" in wrong.absent
    assert [(x.name, x.launched) for x in timer.seen[:1]] == [("matmul", False)]
    assert [contender.launched for contender in timer.seen[1:]] == [True] * 4


def test_attention_to_all_of_history_stays_what_it_is_called() -> None:
    """The blocks that others have made meanwhile do not add to it."""
    with torch.inference_mode():
        mine = OursVideo(Video(LAYER, 42, 128), "auto", 8)
        for slot in range(42, mine.window.pool[0].shape[2]):
            mine.window.pool[0][:, :, slot] = 0
        before = mine.attend_to_all()
        for _ in range(4):
            mine.block()
        assert history_attention._wrong_all(mine) == ""
        mine.window.pool[0][:, :, 42:] = torch.nan
        after = mine.attend_to_all()
    assert mine.start == 54 and after.isfinite().all() and before.shape == after.shape


def test_other_frames_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        mine = OursVideo(Video(LAYER, 42, 128), "auto", 4)
        monkeypatch.setattr(mine.video.choices, "sets", ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]))
        assert mine.wrong().startswith("WRONG frames")


# -- traffic


def test_what_is_wrong_with_traffic_shows() -> None:
    plan, form = PlannedChoice(24, 0.5, LAYER.config), page_format(LAYER, 2, "plain")
    with torch.inference_mode():
        seen = BankVideo(LAYER, 2, plan, 24, "plain").run()
    assert trouble(seen, plan, form) == "" and seen.error == 0 and len(seen.fetched) == 24
    assert sum(seen.fetched[14:]) == 30 * frame_bytes(form)
    assert trouble(replace(seen, error=1e-7), plan, form).startswith("WRONG outputs")
    stored = page_format(LAYER, 2, "int8")
    smaller = [value // frame_bytes(form) * frame_bytes(stored) for value in seen.fetched]
    assert trouble(replace(seen, error=0.02, fetched=smaller), plan, stored) == ""
    more = [*seen.fetched[:-1], 7 * frame_bytes(form)]
    assert "bytes fetched for block 23" in trouble(replace(seen, fetched=more), plan, form)
    still = replace(seen, fetched=[0] * 24)
    assert trouble(still, plan, form).startswith("WRONG: 0 bytes fetched for block 14"), "a counter that is stuck"
    assert trouble(replace(seen, hits=[1] * 24), plan, form).startswith("WRONG"), "fetched all the same"
    fewer = [value - frame_bytes(form) for value in seen.fetched]
    assert trouble(replace(seen, fetched=fewer, hits=[1] * 24), plan, form) == "", "one that was on the device"
    other = PlannedChoice(24, 0.0, LAYER.config)
    assert trouble(seen, other, form).startswith("WRONG frames")


def test_wrong_traffic_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BankVideo.run

    def off(self: BankVideo) -> Traffic:
        return replace(right(self), error=0.5)

    monkeypatch.setattr(BankVideo, "run", off)
    with torch.inference_mode():
        found = traffic(TINY, LAYER, 0.95, layers=2, rounds=1, storages=("plain", "int8"), forwards=5)
    assert [record.contender for record in found if record.wrong] == ["ours, plain pages", "ours, int8 pages"]
    assert len(found) == 4 and all(record.extra["computed"] for record in found if not record.wrong)
