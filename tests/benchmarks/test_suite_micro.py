"""The micro suite: all of its code once on tiny tensors, its checks against outputs that are wrong."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import attention_peers, attention_step, micro_cases, micro_ops, peers, suite_micro
from benchmarks.attention_step import Stream, disagreement
from benchmarks.contenders import AsPublished, Ours, RollingWindow, SlidingWindow
from benchmarks.contenders import Shape as StepShape
from benchmarks.figures import Section, Shape
from benchmarks.gpu_contenders import Layer
from benchmarks.gpu_timer import DryTimer
from benchmarks.harness import Absent, Bench, Entrant
from benchmarks.history_stream import TwoChoices
from benchmarks.micro_cases import Point
from benchmarks.micro_ops import OPS
from benchmarks.preset import Preset
from benchmarks.record import Record

TINY = Preset("tiny", "cpu", torch.float32, 1, 1, {"kind": "cpu"})
POINT = Point(Shape(grid=(2, 3), heads=2, head_dim=32, embedding=32), torch.float32, rows=60)
CONTENDERS = (AsPublished, RollingWindow, SlidingWindow, Ours)


def bench(shape: Shape = POINT.shape) -> Bench:
    return Bench(shape, torch.float32, "cpu", DryTimer(), dry=True)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Of the whole suite, which must have said after each group what it had."""
    so_far: list[int] = []
    with torch.inference_mode():
        made = suite_micro.run(bench(), TINY, lambda records: so_far.append(len(records)))
    titles = list(dict.fromkeys(record.group for record in made))
    assert len(so_far) == len(titles) and so_far == sorted(set(so_far)) and so_far[-1] == len(made)
    return made


def test_nothing_is_wrong_and_what_is_absent_says_why(records: list[Record]) -> None:
    assert [(record.group, record.contender, record.absent) for record in records if record.wrong] == []
    names = [(record.group, record.contender) for record in records]
    assert len(set(names)) == len(names)
    for record in records:
        assert record.suite == "micro" and (record.median is None) == bool(record.absent)
    absent = {record.contender: record.absent for record in records if record.absent}
    assert {"varlen, table of pages", "FlashInfer, table of pages", "SDPA cuDNN"} <= set(absent)


def test_every_op_is_measured_beside_a_peer_and_a_ceiling_of_its_device(records: list[Record]) -> None:
    for op in OPS:
        groups = {record.group for record in records if record.group.startswith(f"{op}, ")}
        for title in groups:
            group = [record for record in records if record.group == title]
            assert {record.role for record in group if record.median} == {"ours", "peer", "ceiling"}, title
            mine = [record for record in group if record.role == "ours" and record.median]
            assert all(record.of_ceiling and record.ceiling for record in mine), title
            assert all(record.extra["engine"] == "dense" for record in mine if record.contender.endswith("auto"))
        assert len(groups) >= 4, op
        assert any("the paper's shape" in title for title in groups)


@pytest.mark.parametrize(
    ("op", "parameter", "values"),
    [
        ("window_attend", "window", {6, 12}),
        ("window_attend", "tokens", {6, 12}),
        ("window_attend", "head_dim", {16, 32}),
        ("window_attend", "batch", {1, 2}),
        ("window_attend", "pages", {"float32", "bfloat16", "int8", "float8_e4m3fn"}),
        ("place_frames", "pages", {"float32", "bfloat16", "int8", "float8_e4m3fn"}),
        ("retrieve_attend", "window", {6, 12}),
        ("write_frames", "tokens", {6, 12}),
        ("merge_attention", "parts", {2, 3}),
        ("topk_retrieve", "k", {1, 6}),
        ("topk_retrieve", "batch", {1, 2}),
    ],
)
def test_one_parameter_is_varied_at_a_time(records: list[Record], op: str, parameter: str, values: set[Any]) -> None:
    sweeps: dict[str, list[Record]] = {}
    for record in records:
        if record.group.startswith(f"{op}, ") and record.role == "ours":
            sweeps.setdefault(record.group, []).append(record)
    found = []
    for group in sweeps.values():
        shapes = [record.shape for record in group]
        if {shape[parameter] for shape in shapes} == values:
            found.append({name for name in shapes[0] if len({shape[name] for shape in shapes}) > 1})
    together = {"pages": {"pages", "dtype"}, "head_dim": {"head_dim", "heads"}}
    assert together.get(parameter, {parameter}) in found


def test_the_attention_step_s_records_are_what_targets_look_for(records: list[Record]) -> None:
    group = {record.contender: record for record in records if record.group.split(",")[0] == "attention step"}
    roles = {name: record.role for name, record in group.items()}
    assert list(roles.items()) == [
        ("matmul", "ceiling"),
        ("as published", "published"),
        ("native", "native"),
        ("native, at its best", "native"),
        ("ours", "ours"),
    ]
    assert set(group["ours"].over) == set(roles) - {"ours"} and group["ours"].of_ceiling
    assert "0 % of what it retrieves repeated" in group["ours"].group and group["ours"].shape["repeat_rate"] == 0
    # The choice for the next block is counted with the block that it is made after.
    assert (group["ours"].extra["selected_frames"], group["ours"].extra["repeated_frames"]) == (6, 0)
    assert group["as published"].extra["blocks"] == attention_step.WARM_BLOCKS + 1


def test_each_row_is_held_against_a_product_in_its_own_dtype(records: list[Record]) -> None:
    seen = set()
    for record in records:
        if record.of_ceiling is not None and record.ceiling.startswith("matmul, "):
            assert record.ceiling == f"matmul, {record.shape['dtype']}" and record.role != "ceiling"
            seen.add((record.group.split(",")[0], record.ceiling))
    ops = ("window_attend", "retrieve_attend")
    assert seen == {(op, f"matmul, {dtype}") for op in ops for dtype in ("float32", "bfloat16")}


def test_a_dtype_without_a_product_has_no_share() -> None:
    sizes = replace(suite_micro.SIZES["tiny"], no_product=(torch.bfloat16,))
    points = {dtype: replace(POINT, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    parts = [suite_micro.Part(point, ("auto",), f"{dtype}: ") for dtype, point in points.items()]
    with torch.inference_mode():
        found = suite_micro.group(bench(), TINY, sizes, "title", "window_attend", parts)
    shares = {record.contender: record.ceiling for record in found}
    assert shares["torch.float32: auto"] == "matmul" and shares["torch.bfloat16: auto"] == shares["matmul"] == ""


def test_pages_that_an_op_does_not_take_are_absent_with_what_it_says(records: list[Record]) -> None:
    name = "float8_e4m3fn pages, float32 queries: auto"
    found = {record.group.split(",")[0]: record for record in records if record.contender == name}
    assert set(found) == {"window_attend", "place_frames"} and found["place_frames"].median
    refused = found["window_attend"]
    assert refused.absent.startswith("refused: pool_layer must have dtype") and not refused.wrong
    with pytest.raises(TypeError), micro_cases.refusable(None):
        raise TypeError("a dtype that plain pages have must be taken")
    with pytest.raises(TypeError, match="argument"), micro_cases.refusable(torch.int8):
        raise TypeError("an argument is missing")


@pytest.mark.parametrize("preset", suite_micro.SIZES)
def test_the_sizes_of_every_preset_are_possible(preset: str) -> None:
    """No tensor is made: a GPU's sizes are checked here, too."""
    sizes = suite_micro.SIZES[preset]
    made = Preset(preset, "cpu", torch.float32, 1, 1)
    for sweep in suite_micro.sweeps(sizes, made):
        assert len(sweep.points) > 1 and set(sweep.ops) <= set(OPS)
        for label, point in sweep.points.items():
            shape = point.shape
            assert shape.window - 1 - shape.new_pages >= shape.block, label
            assert shape.heads * shape.head_dim == sizes.layer.heads * sizes.layer.head_dim, label
    for tokens in (*sizes.tokens, sizes.paper, sizes.around):
        height, width = suite_micro.GRIDS[tokens]
        assert height * width == tokens
    if preset != "tiny":
        assert (min(sizes.windows), max(sizes.windows)) == (6, 30) and (min(sizes.ks), max(sizes.ks)) == (1, 32)
        assert set(sizes.head_dims) == {64, 128} and max(sizes.batches) == 4


# -- what is wrong


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_op_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our engines' results are a little off: a tenth more of everything they return or write. Peers do not mind."""
    right = micro_ops.op

    def off(name: str, case: dict[str, Any], engine: str) -> Callable[[], Any]:
        call = right(name, case, engine)

        def changed() -> Any:
            out = call()
            results = out if isinstance(out, tuple) else (case["pool_layer"] if out is None else out,)
            for result in results:
                if result.is_floating_point():
                    result.mul_(1.1)
            return out

        return call if engine == "reference" else changed

    monkeypatch.setattr(micro_ops, "op", off)
    section = Section("")
    with torch.inference_mode():
        bench().run(section, OPS[op](bench(), POINT, ("auto",), "", False))
    rows = {row.name: row for row in section.rows}
    assert rows["auto"].wrong and "WRONG" in rows["auto"].trouble and not rows["auto"].seconds
    assert [row.name for row in section.rows if row.seconds] == [name for name in rows if name != "auto"]


@pytest.mark.parametrize("fault", ["other frames", "one frame twice", "no candidate", "its last one is another"])
def test_wrong_frames_with_right_scores_are_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours and of peers."""

    def off(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.clone()
        if fault == "other frames":
            ids = torch.arange(7, 7 + ids.shape[1])[None].expand_as(ids)
        elif fault == "one frame twice":
            ids[:, 1] = ids[:, 0]
        elif fault == "no candidate":
            ids[:] = -5
        else:
            ids[:, -1] = next(i for i in range(1, 50) if i not in ids)
        return ids

    def changed(call: Callable[[], Any]) -> Callable[[], Any]:
        def changing() -> Any:
            ids, scores = call()
            return off(ids), scores

        return changing

    op, matmul_topk = micro_ops.op, peers.matmul_topk
    monkeypatch.setattr(micro_ops, "op", lambda *arguments: changed(op(*arguments)))
    monkeypatch.setattr(peers, "matmul_topk", lambda case: changed(matmul_topk(case)))
    section = Section("")
    bench().run(section, OPS["topk_retrieve"](bench(), POINT, ("auto", "reference"), "", False))
    assert [(row.name, row.wrong) for row in section.rows] == [(n, True) for n in ("auto", "reference", "torch.topk")]
    assert all(row.trouble.startswith("WRONG frames") for row in section.rows)


def test_a_peer_that_fails_is_absent_and_one_that_is_wrong_is_wrong() -> None:
    def fail(case: Any) -> Any:
        raise OSError("no compiler\nmore")

    def missing(case: Any) -> Any:
        return peers.module("a_library_that_nobody_has")

    entrants = [
        peers.peer("fails", [{}], fail, lambda out: ""),
        peers.peer("missing", [{}], missing, lambda out: ""),
        peers.peer("told", [{}], fail, lambda out: "", missing="not here"),
        peers.peer("wrong", [{}], lambda case: lambda: 1, lambda out: f"WRONG {out}"),
        peers.peer("right", [{}, {}], lambda case: lambda: 1, lambda out: ""),
    ]
    section = Section("")
    bench().run(section, entrants)
    assert [(row.name, row.trouble, row.wrong) for row in section.rows] == [
        ("fails", "does not work here: OSError: no compiler", False),
        ("missing", "a_library_that_nobody_has is not installed", False),
        ("told", "not here", False),
        ("wrong", "WRONG 1", True),
        ("right", "", False),
    ]
    assert len(entrants[-1].calls) == 2


def test_triton_is_absent_where_it_would_be_interpreted() -> None:
    measured = Bench(POINT.shape, torch.float32, "cpu", DryTimer(), dry=False)
    entrant = micro_ops.ours(measured, "merge_attention", "", [{}], "triton", lambda case: "")
    assert entrant.check is not None
    with pytest.raises(Absent, match="interpreter"):
        entrant.check()


# -- cases and peers


def test_a_batch_is_its_samples() -> None:
    point = Point(POINT.shape, torch.float32, batch=2)
    (both, again) = micro_cases.cases(bench(), point, functools.partial(micro_cases.attend_case, stored=torch.int8), 1)
    assert both["q"].shape[0] == 2 and torch.equal(both["q"], again["q"]) and both["q"] is not again["q"]
    out = torch.ops.longlive.window_attend(**both, engine="reference")[0]
    for sample in range(2):
        one = micro_cases.attend_case(Layer(POINT.shape, torch.float32, "cpu", sample), torch.int8)
        assert torch.equal(out[sample], torch.ops.longlive.window_attend(**one, engine="reference")[0][0])


def test_int8_pages_on_a_ready_window_are_dequantised() -> None:
    case = micro_cases.attend_case(Layer(POINT.shape, torch.float32, "cpu"), torch.int8)
    out = attention_peers.ready_window(case)()
    want = torch.ops.longlive.window_attend(**case, engine="reference")[0]
    assert (out - want).abs().max() < 1e-5


def test_flex_attention_leaves_out_slots_not_in_use() -> None:
    case = micro_cases.attend_case(Layer(POINT.shape, torch.float32, "cpu"))
    case["pool_layer"][:, :, case["run"] :] = 100.0
    out = attention_peers.flex_attention(case, "eager")()
    want = torch.ops.longlive.window_attend(**case, engine="reference")[0]
    assert (out - want).abs().max() < 1e-5


def test_faiss_finds_the_same_frames() -> None:
    pytest.importorskip("faiss")
    case = micro_cases.search_case(Layer(POINT.shape, torch.float32, "cpu"), POINT, unit=True)
    want = torch.ops.longlive.topk_retrieve(**case, engine="reference")[0]
    assert torch.equal(peers.faiss_search(case)()[0], want) and torch.equal(peers.matmul_topk(case)()[0], want)


def test_a_faiss_without_a_gpu_index_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "module", lambda name: SimpleNamespace(__version__="1.2"))
    with pytest.raises(Absent, match=r"faiss 1.2 .* no GPU index"):
        peers.faiss_search({"index": torch.empty(1, 1, 1, device="meta")})


def test_no_graph_is_asked_to_hold_a_copy_out_of_pageable_memory() -> None:
    entrants = OPS["place_frames"](bench(), POINT, ("auto",), "", True)
    launched = [entrant.name for entrant in entrants if entrant.launched]
    assert launched == [f"torch.Tensor.to, from {memory} host memory" for memory in ("pageable", "page-locked")]


# -- the attention step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", CONTENDERS)
def test_contenders_agree_with_the_oracle(make: Callable[[StepShape], Any], dtype: torch.dtype) -> None:
    assert disagreement(make, "cpu", dtype) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("make", [*CONTENDERS, lambda shape: AsPublished(shape, pageable=True)])
def test_contenders_agree_with_the_oracle_on_a_gpu(make: Callable[[StepShape], Any]) -> None:
    assert disagreement(make, "cuda", torch.bfloat16) == ""


@pytest.mark.gpu
def test_history_as_published_is_in_host_memory() -> None:
    shape = StepShape(grid=(2, 3), heads=2, head_dim=32, device="cuda", dtype=torch.bfloat16)
    for pageable in (False, True):
        contender = AsPublished(shape, pageable)
        Stream(contender, shape, 1).warm()
        frame = contender.history_k[0]
        assert frame.device.type == "cpu" and frame.is_pinned() != pageable


class Late(AsPublished):
    """Rotates retrieved frames to position 1."""

    def rotate(self, x: torch.Tensor, first: int, frames: int, still: bool = False) -> torch.Tensor:
        return super().rotate(x, first + still, frames, still)


class Aliased(AsPublished):
    """Keeps views of the ring, which is overwritten, instead of copies."""

    def offload(self, frame: torch.Tensor) -> torch.Tensor:
        return frame

    def roll(self, ring: torch.Tensor, frames: int) -> None:
        super().roll(ring, frames)
        for history in (self.history_k, self.history_v):
            for frame in history[:1]:
                frame.zero_()


class Unturned(SlidingWindow):
    """Does not know where in time a frame is."""

    def phase(self, frame: int) -> torch.Tensor:
        return super().phase(0)


class Unrolled(RollingWindow):
    """Turns keys to where they are in the ring, not in the video."""

    def run_block(self, start: int, forwards: list[Any], embeddings: torch.Tensor) -> torch.Tensor:
        right = self.rotation
        self.rotation = lambda x, first, frames, still=False: right(x, min(first, 9), frames, still)  # type: ignore[assignment]
        try:
            return super().run_block(start, forwards, embeddings)
        finally:
            self.rotation = right


class RolledAgain(RollingWindow):
    """Moves what stays before every forward."""

    def run_block(self, start: int, forwards: list[Any], embeddings: torch.Tensor) -> torch.Tensor:
        return [super(RolledAgain, self).run_block(start, [forward], embeddings) for forward in forwards][-1]


@pytest.mark.parametrize("make", [Late, Aliased, Unturned, Unrolled, RolledAgain])
def test_a_contender_that_is_wrong_shows(make: Callable[[StepShape], Any]) -> None:
    assert disagreement(make, "cpu", torch.float32).startswith("WRONG")


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_step, "AsPublished", Late)
    with torch.inference_mode():
        section, _ = attention_step.attention_step(bench())
    rows = {row.name: row for row in section.rows}
    assert rows["as published"].wrong and not rows["as published"].seconds
    assert "at the timed size" in rows["ours"].trouble, "there it is held against what is published"
    assert rows["native"].seconds and rows["native, at its best"].seconds and rows["matmul"].seconds


def test_what_is_repeated_though_the_title_says_that_nothing_is_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(TwoChoices):
        """Retrieves one set of frames all the time."""

        def wanted(self, start: int) -> list[int]:
            return self.sets[0]

    monkeypatch.setattr(attention_step, "TwoChoices", Same)
    with torch.inference_mode():
        section, _ = attention_step.attention_step(bench())
    rows = {row.name: row for row in section.rows}
    assert rows["ours"].trouble == "WRONG: 6 of 6 frames repeated" and not rows["ours"].seconds


@pytest.mark.parametrize("make", [AsPublished, Ours])
def test_the_next_blocks_retrieve_what_is_planned(make: Callable[[StepShape], Any]) -> None:
    shape = StepShape(grid=(2, 3), heads=2, head_dim=32)
    with torch.inference_mode():
        stream = Stream(make(shape), shape, 1, blocks=14)
        stream.warm()
        before = set(stream.choices.wanted(33))
        for _ in range(6):  # beyond those embeddings that were made beforehand
            assert stream.wrong() == ""
            now = set(stream.choices.wanted(3 * stream.blocks))
            assert len(now) == 6 and not now & before
            before = now
            stream()
        stream.choices.sets = stream.choices.sets[::-1]
    assert stream.wrong().startswith("WRONG frames")


def test_blocks_go_on_from_call_to_call() -> None:
    starts: list[tuple[int, int]] = []

    class Fake:
        def run_block(self, start: int, forwards: list[Any], embeddings: torch.Tensor) -> torch.Tensor:
            starts.append((start, len(forwards)))
            return embeddings

    stream = Stream(Fake(), StepShape(grid=(2, 3), heads=2, head_dim=32), forwards=5)
    stream.warm(2)
    first, second = stream(), stream()
    assert starts == [(0, 1), (3, 1), (6, 5), (9, 5)] and stream.blocks == 4
    assert not torch.equal(first, second)


def test_a_stateful_call_is_launched_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Entrant] = []
    made = bench()
    monkeypatch.setattr(Bench, "run", lambda self, section, entrants: seen.extend(entrants))
    with torch.inference_mode():
        attention_step.attention_step(made)
    assert [entrant.name for entrant in seen if not entrant.launched] == ["matmul"] and len(seen) == 5
    assert all(len(entrant.calls) == 1 for entrant in seen)
