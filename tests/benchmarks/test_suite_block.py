"""The block suite without a GPU: its model, the choices it plans, its clocks, its checks, its records."""

# ruff: noqa: E402  benchmarks is not installed: its folder is added to the path before it is imported
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import block_groups, block_roster, block_runs, suite_block
from benchmarks.block_choice import PlannedChoice
from benchmarks.block_clock import NO_CLOCK, PARTS, HostMarks, PartClock, SteadyTimer
from benchmarks.block_contenders import Ours
from benchmarks.block_embedder import embedder_config, latent_frames
from benchmarks.block_model import ModelSize, VideoTransformer
from benchmarks.block_native import Native
from benchmarks.block_published import AsPublished
from benchmarks.block_roster import (
    BEST,
    DEVICE,
    HOST,
    INT8,
    NATIVE,
    PUBLISHED,
    Checker,
    Participant,
    disagreements,
    participants,
)
from benchmarks.block_stream import BlockStream, Scene
from benchmarks.gpu_contenders import difference
from benchmarks.gpu_timer import Contender
from benchmarks.preset import make_bench, make_preset
from benchmarks.record import Record
from longlive_rag_ops import preferences

SIZE = ModelSize(layers=2, heads=2, head_dim=16, grid=(2, 3), ffn=48, text=5, channels=8)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """The whole suite, once."""
    preset = make_preset("tiny")
    seen: list[int] = []
    with torch.inference_mode():
        found = suite_block.run(make_bench(preset), preset, lambda so_far: seen.append(len(so_far)))
    assert seen == sorted(set(seen)) and seen[-1] == len(found)
    assert len(seen) == suite_block.group_count(preset)
    return found


class Counted:
    """Marks that pass a second each, a device that never has to be waited for."""

    def __init__(self) -> None:
        self.now, self.settled = 0.0, 0

    def mark(self) -> float:
        self.now += 1
        return self.now

    def between(self, first: float, last: float) -> float:
        return last - first

    def settle(self) -> None:
        self.settled += 1


# -- the model


def test_operations_of_the_paper_s_model() -> None:
    size = ModelSize()
    assert (size.width, size.tokens, size.rows) == (1536, 1560, 4680)
    assert size.page_bytes(2) == pytest.approx(287.5e6, rel=1e-3)  # as counted independently in the design
    attention = 538e9 * 30
    assert size.flops(12) - size.flops(0) == pytest.approx(attention, rel=1e-3)
    per_token = 2 * 1536 * (6 * 1536 + 2 * 8960) + 4 * 512 * 1536  # linear layers and the text's 512 keys
    assert size.flops(0) == pytest.approx(30 * 4680 * per_token, rel=1e-3)


@pytest.mark.parametrize("preset", ["cpu", "tiny"])
def test_self_attention_s_share_of_the_small_model_is_the_paper_s(preset: str) -> None:
    def share(size: ModelSize) -> float:
        return 1 - size.flops(0) / size.flops(12)

    assert preset == "tiny" or share(suite_block.SIZES[preset].model) == pytest.approx(share(ModelSize()), rel=0.05)
    assert suite_block.SIZES["gpu"].model == ModelSize()


def test_the_model_is_made_of_its_seed_alone_and_leaves_torch_s() -> None:
    state = torch.get_rng_state()
    one, same, other = (VideoTransformer(SIZE, "cpu", torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.head.weight, same.head.weight) and not torch.equal(one.head.weight, other.head.weight)


def test_the_model_s_output_depends_on_all_that_goes_in() -> None:
    scene = Scene(SIZE, "cpu", torch.float32)
    x = scene.noise[0, 0]

    def out(x: torch.Tensor = x, step: float = 500.0, text: Any = scene.text, factor: float = 1.0) -> torch.Tensor:
        return scene.model(x, step, text, lambda layer, q, k, v: factor * (v + q), NO_CLOCK)

    assert out().shape == x.shape and torch.equal(out(), out())
    for changed in (out(x + 0.1), out(step=250.0), out(text=scene.text[::-1]), out(factor=0.5)):
        assert difference(changed, out())[0] > 1e-3


# -- the planned choices


@pytest.mark.parametrize("rate", suite_block.RATES)
def test_contenders_choose_what_is_planned_at_the_stated_rate(rate: float) -> None:
    blocks = 32
    plan = PlannedChoice(blocks, rate, embedding=128)
    assert plan.steady <= suite_block.Sizes.warm
    scene = Scene(SIZE, "cpu", torch.float32)
    streams = [
        BlockStream(scene, contender, plan)
        for contender in (AsPublished(SIZE, "cpu", torch.float32), Ours(SIZE, "cpu", torch.float32, 3 * blocks))
    ]
    for stream in streams:
        stream.warm(blocks)
        assert [set(choice) for choice in stream.choices] == [set(choice) for choice in plan.wanted]
        assert plan.trouble(stream.choices, plan.steady) == ""
    # Twenty blocks are a whole number of times that 95 % makes a frame new.
    assert plan.measured_rate(streams[0].choices, 12) == pytest.approx(rate)
    assert all(len(set(choice)) == 6 for choice in plan.wanted[9:])


def test_what_returns_was_not_in_the_last_two_choices() -> None:
    """Twelve device slots hold two choices: frames that come back come from the bank."""
    wanted = PlannedChoice(40, 0.0).wanted
    for number in range(suite_block.Sizes.warm + 2, 40):  # where the timed blocks begin
        assert not set(wanted[number]) & {*wanted[number - 1], *wanted[number - 2]}


def test_a_bounded_history_is_asked_for_the_newest_candidates_only() -> None:
    for number, wanted in enumerate(PlannedChoice(60, 0.5, span=30).wanted[14:], 14):
        newest = 3 * number - 17
        assert len(wanted) == 6 and newest - 30 < min(wanted) and max(wanted) <= newest


def test_wrong_choices_and_a_wrong_rate_are_found() -> None:
    plan = PlannedChoice(30, 0.5)
    assert plan.trouble(plan.wanted, 14) == ""
    other = [*plan.wanted[:20], [*plan.wanted[20][:5], 2], *plan.wanted[21:]]
    assert "WRONG frames in block 20" in plan.trouble(other, 14)
    assert "from block" in plan.trouble(plan.wanted, 2)
    plan.rate = 0.95
    assert plan.trouble(plan.wanted, 14).startswith("WRONG rate")


# -- clocks


def test_parts_add_up_to_the_whole() -> None:
    marks = Counted()
    clock = PartClock(marks)
    for part in ("attention", "rest", "attention"):
        clock.lap(part)
    seconds = clock.seconds()
    assert seconds == dict.fromkeys(PARTS, 0.0) | {"attention": 2.0, "rest": 1.0}
    assert sum(seconds.values()) == marks.now - 1 and marks.settled == 1


def test_the_steady_timer_times_the_second_of_two_calls() -> None:
    marks, calls = Counted(), []

    def contender(name: str) -> Contender:
        def call() -> None:
            calls.append(name)
            marks.now += 10 if calls.count(name) % 2 else 1  # only the second of two is short

        return Contender(name, [call])

    timings = SteadyTimer(3, marks).measure([contender("a"), contender("b")])
    assert sorted(calls[:6]) == [*"aaabbb"] and len(calls) == 2 * (1 + 2 * 3)
    turns = "".join(calls[6:])  # each a pair, after the first, which a call that warms up is before
    assert {turns[at : at + 2] for at in range(0, 8, 2)} == {"aa", "bb"}
    assert {name: timing.mode for name, timing in timings.items()} == {"a": "eager", "b": "eager"}
    # After the call that warms up, the lead-in is the second call of a pair and the timed one the first of the next.
    assert timings["a"].seconds == [11.0] * 3 and marks.settled == 12


@pytest.mark.parametrize("storage", ["device", "plain", "int8"])
def test_a_split_block_computes_what_a_timed_one_does(storage: str) -> None:
    scene, plan = Scene(SIZE, "cpu", torch.float32), PlannedChoice(20, 0.0, embedding=64)
    streams = [BlockStream(scene, Ours(SIZE, "cpu", torch.float32, 60, storage), plan) for _ in range(2)]
    for number in range(20):
        out = streams[0](noisy=1)
        clock = PartClock(HostMarks())
        assert torch.equal(out, streams[1](noisy=1, clock=clock)), number
        assert torch.equal(streams[0].seen, streams[1].seen), number
        parts = {name for name, seconds in clock.seconds().items() if seconds > 0}
        stalls = {"fetch stall"} if storage != "device" else set()
        assert parts == {*PARTS} - {"fetch stall"} | stalls
    stats = [stream.contender.window.stats() for stream in streams]  # type: ignore[attr-defined]
    assert stats[0]["placed_pages"] == stats[1]["placed_pages"] > 0
    for stream in streams:
        stream.contender.close()


# -- checks


def test_everyone_computes_what_the_oracle_does() -> None:
    everyone = participants("cpu")
    assert [one.name for one in everyone] == [PUBLISHED, NATIVE, BEST, DEVICE, HOST, INT8]
    assert disagreements(everyone, suite_block.CHECKED, "cpu", torch.float32) == dict.fromkeys(
        (one.name for one in everyone), ""
    )


def test_other_dtypes_are_checked_in_themselves_too() -> None:
    everyone = participants("cpu")
    assert disagreements(everyone, suite_block.CHECKED, "cpu", torch.bfloat16) == dict.fromkeys(
        (one.name for one in everyone), ""
    )


class Faulty(AsPublished):
    """As published, with one fault in its attention; what it says it chose is right."""

    def __init__(self, fault: str, size: ModelSize, device: str, dtype: torch.dtype) -> None:
        super().__init__(size, device, dtype)
        self.fault, rotate = fault, self._rotate
        if fault == "no rotation":
            self._rotate = lambda x, *_, **__: x  # type: ignore[assignment]
        if fault == "memory at other positions":
            self._rotate = lambda x, first, frames, still=False: rotate(x, first, frames)  # type: ignore[assignment]

    def attend(self, layer: int, *args: Any) -> torch.Tensor:
        chosen = self.chosen
        if self.fault == "no memory":
            self.chosen = []
        if self.fault == "wrong frames":
            self.chosen = [frame + 1 for frame in chosen]
        try:
            return super().attend(layer, *args)
        finally:
            self.chosen = chosen


FAULTS = ("no memory", "wrong frames", "no rotation", "memory at other positions")


def faulty(fault: str, storage: str) -> Participant:
    return Participant(fault, "ours", lambda size, device, dtype, _: Faulty(fault, size, device, dtype), storage)


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_faults_show_in_bfloat16(fault: str) -> None:
    plan = PlannedChoice(20, 0.5, embedding=256)
    checker = Checker(Scene(suite_block.CHECKED, "cpu", torch.bfloat16), plan, 20)
    trouble = checker.trouble(faulty(fault, "int8"))
    assert trouble.startswith("WRONG by") if fault else trouble == ""


@pytest.mark.parametrize("kind", ["no rotation", "forgets"])
def test_faults_of_native_show_in_bfloat16(kind: str) -> None:
    class Broken(Native):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if kind == "no rotation":
                self._rotation = lambda x, *_: x  # type: ignore[assignment]

        def attend(self, layer: int, q: Any, k: Any, v: Any, start: int, clock: Any) -> torch.Tensor:
            return super().attend(layer, q, k, v, min(start, 6) if kind == "forgets" else start, clock)

    plan = PlannedChoice(20, 0.5, embedding=256)
    checker = Checker(Scene(suite_block.CHECKED, "cpu", torch.bfloat16), plan, 20)
    one = Participant(kind, "native", lambda size, device, dtype, _: Broken(size, device, dtype))
    assert checker.trouble(one).startswith("WRONG by")


def warmed(everyone: Sequence[Participant], dtype: torch.dtype = torch.float32) -> list[block_groups.Ready]:
    """As a group has them before it times them, at a size of the suite's."""
    preset, size = replace(make_preset("tiny"), dtype=dtype), suite_block.SIZES["cpu"].endless
    scene, plan = Scene(size, "cpu", dtype), PlannedChoice(10, 0.5)
    ready = [block_groups.Ready(one) for one in everyone]
    for found in ready:
        block_groups.warm_up(make_bench(preset), scene, found, plan, 10, 10)  # as many as can be are retrieved
    return ready


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_show_at_the_timed_size(dtype: torch.dtype) -> None:
    good, bad = participants("cpu"), [faulty(fault, "int8") for fault in FAULTS]
    ready = warmed([*good, *bad], dtype)
    troubles = {found.one.name: block_groups.checked(found, ready) for found in ready}
    assert [name for name, trouble in troubles.items() if not trouble] == [one.name for one in good]
    assert all(f"at the timed size against {PUBLISHED}" in troubles[fault] for fault in FAULTS)


def test_a_native_window_that_is_wrong_at_the_timed_size_is_found() -> None:
    class Late(Native):
        def attend(self, layer: int, q: Any, k: Any, v: Any, start: int, clock: Any) -> torch.Tensor:
            return super().attend(layer, q, k, v, start + 3, clock)

    late = Participant("late", "native", lambda size, device, dtype, _: Late(size, device, dtype))
    ready = warmed([participants("cpu")[1], late])
    assert block_groups.checked(ready[0], ready) == ""
    assert f"against {NATIVE}" in block_groups.checked(ready[1], ready)


def test_without_one_as_published_ours_with_plain_pages_is_the_standard() -> None:
    everyone = participants("cpu")
    ready = warmed([everyone[5], everyone[1], everyone[4], faulty("no memory", "int8")])
    assert [one.one.name for one in block_groups.kin(ready[0], ready)] == [INT8, HOST, "no memory"]
    troubles = [block_groups.checked(found, ready) for found in ready]
    assert troubles[:3] == ["", "", ""] and f"against {HOST}" in troubles[3]
    assert block_groups.kin(ready[1], ready) == [ready[1]]  # is held against nothing, and says so


# -- the embedder


@pytest.mark.parametrize("size", [ModelSize(), SIZE, suite_block.SIZES["cpu"].model])
def test_the_embedder_fits_the_latents(size: ModelSize) -> None:
    config = embedder_config(size)
    assert config.frame_shape == (size.channels // 4, 2 * size.grid[0], 2 * size.grid[1])
    assert (config.hidden_dims == (64, 128, 256)) == (min(size.grid) >= 8)
    assert embedder_config(ModelSize()).frame_shape == (16, 60, 104)


def test_patches_become_frames() -> None:
    x = torch.arange(SIZE.rows * SIZE.channels, dtype=torch.float32).view(1, SIZE.rows, SIZE.channels)
    frames = latent_frames(x, SIZE)
    token = x[0, SIZE.tokens + 4].view(2, 2, 2)  # of the second frame, in row 1 and column 1 of its grid
    assert frames.shape == (3, 2, 4, 6) and torch.equal(frames[1, :, 2:4, 2:4], token)


@pytest.mark.parametrize("kind", [Ours, AsPublished])
def test_a_memory_embeds_the_clean_latents_before_the_clean_forward(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, plan, events = Scene(SIZE, "cpu", torch.float32), PlannedChoice(4, 0.5, embedding=64), []
    contender = kind(SIZE, "cpu", torch.float32, *([25] if kind is Ours else []))
    embed, forward = contender._embed, scene.model.forward

    def embedded(x: torch.Tensor) -> torch.Tensor:
        events.append(x)
        return embed(x)

    def forwarded(x: torch.Tensor, step: float, *args: Any) -> torch.Tensor:
        events.append(x if step == 0 else step)
        return forward(x, step, *args)

    monkeypatch.setattr(contender, "_embed", embedded)
    monkeypatch.setattr(scene.model, "forward", forwarded)
    BlockStream(scene, contender, plan)()
    assert [type(event) for event in events] == [float] * 4 + [torch.Tensor] * 2
    assert events[4] is events[5] and embed(events[4]).norm(dim=-1) == pytest.approx(torch.ones(3))


def broken(kind: str, role: str = "ours") -> Participant:
    """A contender with one fault."""

    class Broken(Ours):
        def attend(self, layer: int, q: Any, k: Any, v: Any, start: int, clock: Any) -> torch.Tensor:
            if kind == "late" and layer == 1 and start > 40:
                v = v * 1.001
            if kind == "fails" and start > 30:
                raise RuntimeError("no more")
            return super().attend(layer, q, k, v, start, clock)

        def begin(self, start: int, clock: Any) -> None:
            super().begin(start, clock)
            if kind == "other frames" and start > 40:
                self.chosen = [frame + 1 for frame in self.chosen]

    return Participant(kind, role, lambda size, device, dtype, frames: Broken(size, device, dtype, frames), "device")


def test_what_is_wrong_is_found_and_stops_nobody() -> None:
    names = ("late", "other frames", "fails")
    good = participants("cpu")[0]
    found = disagreements([*map(broken, names), good], suite_block.CHECKED, "cpu", torch.float32)
    assert found[good.name] == ""
    assert found["late"].startswith("WRONG by") and "as published" in found["late"]
    assert found["other frames"].startswith("WRONG frames")
    assert found["fails"] == "FAILED, RuntimeError: no more"


def test_a_native_window_that_forgets_a_frame_is_found() -> None:
    class Short(Native):
        def attend(self, layer: int, q: Any, k: Any, v: Any, start: int, clock: Any) -> torch.Tensor:
            return super().attend(layer, q, k, v, min(start, 6), clock)

    short = Participant("short", "native", lambda size, device, dtype, frames: Short(size, device, dtype))
    assert disagreements([short], suite_block.CHECKED, "cpu", torch.float32)["short"].startswith("WRONG by")


def test_histories_that_do_not_fit_are_left_out_the_last_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    size, everyone = ModelSize(), participants("cuda")
    assert everyone[-1].name == block_roster.PAGEABLE

    def left_out(there: float) -> list[str]:
        monkeypatch.setattr(block_roster, "available_bytes", lambda: there)
        found = block_roster.too_little_memory(everyone, size, "cuda", torch.bfloat16, 93)
        return [name for name, reason in found.items() if reason]

    frame = size.page_bytes(2)
    whole = 93 * frame * (1 + 0.55 + 2**23 / (1560 * 1536 * 2) + 1) / block_roster.SPARE  # pages are locked as 8 MiB
    assert whole < 128 * 2**30
    assert left_out(1.001 * whole) == [] and left_out(0.999 * whole) == [block_roster.PAGEABLE]
    assert left_out(1e9) == [PUBLISHED, HOST, INT8, block_roster.PAGEABLE]


def test_what_attends_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    size = ModelSize()
    for engine, attends in (("auto", "dense"), ("reference", "reference")):
        assert block_roster.attention_facts("cpu", torch.float32, size, 12, engine)["our_attention"] == attends
    assert set(block_roster.attention_facts("cpu", torch.float32, size, 12)) == {"dense_attention"}
    rows = preferences.candidates(90, "run", preferences.dtype_class(torch.bfloat16, size.head_dim))
    assert preferences.choose(rows, "cudnn").engine == "dense"  # that of the others too


# -- records


def group_of(records: Sequence[Record], beginning: str) -> list[list[Record]]:
    titles = dict.fromkeys(record.group for record in records if record.group.split(",")[0] == beginning)
    return [[record for record in records if record.group == title] for title in titles]


def test_blocks_are_timed_beside_each_other(records: list[Record]) -> None:
    assert [f"{record.contender}: {record.absent}" for record in records if record.absent] == []
    groups = group_of(records, "block")
    assert [group[0].shape["repeat_rate"] for group in groups if group[0].shape] == list(suite_block.RATES)
    for group in groups:
        whole = {record.contender: record for record in group if record.role != "part"}
        assert list(whole) == ["matmul", PUBLISHED, NATIVE, BEST, DEVICE, HOST, INT8]
        assert [name for name, record in whole.items() if "our_attention" in record.shape] == [DEVICE, HOST, INT8]
        assert not any("unchecked_at_size" in record.extra for record in group)
        shape = whole[HOST].shape
        assert {"layers", "heads", "head_dim", "tokens_per_frame", "frames_per_block", "forwards"} <= set(shape)
        assert shape["forwards"] == 5 and whole[HOST].over.keys() >= {NATIVE, PUBLISHED}
        assert whole[HOST].of_ceiling is not None and whole[HOST].ceiling == "matmul"
        assert set(whole[DEVICE].extra["held_bytes"]) == {"device", "host"}
    fetched = [record.extra["bank_fetched_bytes"] for group in groups for record in group if record.contender == HOST]
    assert fetched[0] > fetched[1] > fetched[2]  # the more repeats, the less is fetched


def test_parts_of_a_block(records: list[Record]) -> None:
    for group in group_of(records, "block"):
        parts = [record for record in group if record.role == "part"]
        owners = dict.fromkeys(record.extra["of"] for record in parts)
        assert list(owners) == [PUBLISHED, NATIVE, BEST, DEVICE, HOST, INT8]
        for owner in owners:
            own = {record.extra["part"]: record for record in parts if record.extra["of"] == owner}
            assert tuple(own) == PARTS
            total = sum(record.median or 0.0 for record in own.values())
            assert total == pytest.approx(own["rest"].extra["profiled_block"])
            assert sum(record.over[owner]["median"] for record in own.values()) == pytest.approx(1)
            for part in ("embedding", "retrieval"):
                assert (own[part].median == 0) == (owner in (NATIVE, BEST))
            assert (own["fetch stall"].median == 0) == (owner in (NATIVE, BEST, DEVICE))


def test_long_runs(records: list[Record]) -> None:
    minutes, blocks, whole = group_of(records, "long run")  # what a target needs comes first
    sizes = suite_block.SIZES["tiny"]
    set_up = {record.extra["of"]: record.median for record in whole if record.role == "part"}
    whole = [record for record in whole if record.role != "part"]
    assert set_up == {record.contender: record.extra["set_up_seconds"] for record in whole}
    assert all(seconds and seconds > 0 for seconds in set_up.values())
    assert {record.contender for record in blocks} == {PUBLISHED, NATIVE, DEVICE, HOST, INT8}
    for record, total in zip(blocks, whole, strict=True):
        assert record.runs == sizes.video and total.median == record.extra["seconds_in_all"]
        assert record.over == {}
    first, last = minutes
    assert (first.shape["first_block"], first.shape["last_block"]) == (15, 22)
    assert (last.shape["first_block"], last.shape["last_block"]) == (43, 50)
    assert first.contender == "ours, blocks 15-22" and first.contender in last.over


def test_memory_is_recorded_and_does_not_grow_once_the_bank_is_full(records: list[Record]) -> None:
    held = [record for record in records if record.unit == "B"]
    by_name = {record.contender: record.median for record in held}
    assert by_name[f"held in host memory: {PUBLISHED}"] == (3 * 18 - 12) * suite_block.TINY.page_bytes(4)
    window = 12 * suite_block.TINY.page_bytes(4)
    assert by_name[f"held on the device: {NATIVE}"] == by_name[f"held on the device: {PUBLISHED}"] == window
    after = [by_name[f"held in host memory: ours, after block {block}"] for block in (22, 50)]
    assert after[0] == after[1] and after[0]
    assert all(record.group.startswith("memory, ") for record in held)  # they are no times of a block


def test_a_contender_that_fails_is_marked_and_the_others_are_timed() -> None:
    preset = replace(make_preset("tiny"), rounds=1)
    scene = Scene(SIZE, "cpu", torch.float32)
    group = block_groups.Group("block, of a test", 0.5, 14, 1, 1, 16, {}, preset.facts)
    good = participants("cpu")
    everyone = [good[0], good[1], broken("fails"), broken("other frames")]
    troubles = {one.name: "" for one in everyone} | {NATIVE: "WRONG by a test"}
    found = {r.contender: r for r in block_groups.measure(make_bench(preset), scene, group, everyone, troubles)}
    assert found[PUBLISHED].median is not None
    assert found[NATIVE].absent == "WRONG by a test" and found[NATIVE].wrong
    assert found["fails"].absent == "FAILED, RuntimeError: no more" and found["fails"].wrong
    assert found["other frames"].absent.startswith("WRONG frames") and found["other frames"].wrong
    assert not any(name.startswith(("fails: ", "other frames: ", "native: ")) for name in found)


def test_engines_are_told_apart(records: list[Record]) -> None:
    (group,) = group_of(records, "block by engine")
    shapes = {record.contender: record.shape.get("our_attention") for record in group if record.role == "ours"}
    assert shapes == {"ours, auto": "dense", "ours, reference": "reference"}
    parts = {record.extra["of"]: record.shape.get("our_attention") for record in group if record.role == "part"}
    assert parts == {NATIVE: None, **shapes}
    (native,) = (record for record in group if record.contender == NATIVE)
    assert native.extra["unchecked_at_size"]  # there is no other without memory in this group


def test_a_video_has_room_for_the_blocks_that_a_gpu_s_turns_take() -> None:
    calls: list[str] = []
    contender = Contender("a", [lambda: calls.append("a")])
    SteadyTimer(5, Counted()).measure([contender])
    assert block_groups.blocks_needed("cuda", 0, 5) == 1 + len(calls)  # and one before those that are split


def test_a_video_that_fails_is_marked() -> None:
    scene, plan = Scene(SIZE, "cpu", torch.float32), PlannedChoice(18, 0.5)
    one = broken("fails")
    run = block_runs.generate(scene, lambda frames: one.make(SIZE, "cpu", torch.float32, frames), plan, 18, [18], True)
    assert run.wrong and run.trouble == "FAILED, RuntimeError: no more" and run.seconds == []
