"""The quality suite: all of its code once on tiny tensors and synthetic latents, its numbers where they are known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import choice_error, sample_latents, suite_quality
from benchmarks.attention_coverage import BEST, SLIDING, coverages
from benchmarks.choice_error import choice_errors
from benchmarks.error_records import ErrorGroups, Pair
from benchmarks.figures import Shape
from benchmarks.gpu_timer import DryTimer
from benchmarks.harness import Absent, Bench
from benchmarks.preset import Preset
from benchmarks.record import Record
from benchmarks.sample_latents import Sample, samples, synthetic_clip
from benchmarks.streamed_error import StreamedClip, streamed_errors
from longlive_rag_ops import MemoryWindow, WindowConfig
from longlive_rag_ops.demo.probe import Probe
from longlive_rag_ops.evaluation.choice import choosing_blocks
from longlive_rag_ops.evaluation.clip import Clip
from longlive_rag_ops.evaluation.full_attention import FullAttention
from longlive_rag_ops.evaluation.named_embedder import NamedEmbedder, load_embedder

TINY = Preset("tiny", "cpu", torch.float32, 1, 1, {"kind": "cpu"})
CONFIG = WindowConfig()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices on many threads are slow where other processes want the cores as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Of the whole suite, which must have said after each measurement what it had."""
    so_far: list[int] = []
    bench = Bench(Shape(), torch.float32, "cpu", DryTimer(), dry=True)
    with torch.inference_mode():
        made = suite_quality.run(bench, TINY, lambda records: so_far.append(len(records)))
    assert so_far == sorted(set(so_far)) and so_far[-1] == len(made)
    return made


def numbers(records: list[Record], *words: str) -> dict[str, float]:
    """By contender, of the one group whose title has these words."""
    found = [record for record in records if all(word in record.group for word in words)]
    assert len({record.group for record in found}) == 1, words
    return {record.contender: record.median for record in found if record.median is not None}


def test_nothing_is_wrong_and_what_is_absent_says_why(records: list[Record]) -> None:
    assert [(record.contender, record.absent) for record in records if record.wrong] == []
    names = [(record.group, record.contender) for record in records]
    assert len(set(names)) == len(names)
    assert all(record.suite == "quality" and record.unit == "1" for record in records)
    absent = [record for record in records if record.absent]
    assert all("triton" in record.contender or "float8_e4m3fn pages" in record.contender for record in absent)
    refused = [record.absent for record in absent if "float8_e4m3fn pages" in record.contender]
    assert refused and all(text.startswith("refused: pool_layer must have dtype") for text in refused)


@pytest.mark.parametrize("what", ["window_attend", "retrieve_attend"])
def test_errors_are_of_the_size_of_their_dtype(records: list[Record], what: str) -> None:
    point = "normal: " if what == "window_attend" else ""
    for kind, least in (("on the same tensors", 0.0), ("with rounding", 1e-8)):
        found = numbers(records, kind, what, "root mean square")
        worst = numbers(records, kind, what, "worst vector")
        for dtype, low, high in (("float32", least, 2e-6), ("float16", 1e-4, 2e-3), ("bfloat16", 1e-3, 1e-2)):
            for engine in ("auto", "reference"):
                name = f"{point}{dtype} pages, {engine}"
                assert low < found[name] < high and found[name] <= worst[name] < 10 * high, name
    if what == "window_attend":
        same, rounded = (
            numbers(records, kind, what, "root mean square") for kind in ("on the same tensors", "with rounding")
        )
        int8 = "normal: int8 pages, float32 queries, auto"
        assert same[int8] < 2e-6 and 2e-3 < rounded[int8] < 3e-2, "the error is the pages', not the engine's"
        assert "peaked: bfloat16 pages, SDPA of PyTorch" in same


def test_stored_pages_cost_what_their_storage_does(records: list[Record]) -> None:
    found = numbers(records, "streamed window", "root mean square")
    assert found["float32: ours, plain pages, reference"] < 1e-6 > found["float32: ours, plain pages, auto"]
    assert found["float32: as published"] < 1e-6
    int8, fp8 = (found[f"float32: ours, {storage} pages of memory, auto"] for storage in ("int8", "fp8"))
    assert 1e-5 < int8 < fp8 < 0.03
    assert 5e-4 < found["bfloat16: ours, plain pages, auto"] < 0.02 > found["bfloat16: as published"]


def test_retrieval_s_errors(records: list[Record]) -> None:
    for name in ("random embeddings", "by average_pool", "by grid_pool", "by trained"):
        found = numbers(records, "error of cosines", name, "largest")
        assert found["ours, float32 index"] < 1e-6 < found["ours, bfloat16 index"] < found["as published, bfloat16"]
        share = numbers(records, "share of the frames", name)
        assert share["ours, float32 index"] == share["as published, float32"] == 1.0
        assert all(0 < value <= 1 for value in share.values())


def test_no_choice_beats_the_best(records: list[Record]) -> None:
    found = [record for record in records if record.group.startswith("coverage of full-history attention, ")]
    titles = list(dict.fromkeys(record.group for record in found))
    assert len(titles) == 3 and "that returns" in titles[-1]
    for title in titles:
        group = {record.contender: record for record in found if record.group == title}
        assert group[BEST].role == "ceiling" and group[SLIDING].role == "peer"
        ours = [record for record in group.values() if record.role == "ours"]
        assert [record.contender for record in ours] == ["ours, average_pool", "ours, grid_pool", "ours, trained"]
        best = group[BEST].extra["mean"]
        for record in [*ours, group["newest old frames"], group["random old frames"]]:
            assert 0 < group["sink and local frames alone"].extra["mean"] < record.extra["mean"] <= best + 1e-9
            assert record.of_ceiling is not None and record.of_ceiling <= 1 + 1e-9 and record.ceiling == BEST


# -- coverage


def embedder(name: str, rows: torch.Tensor) -> NamedEmbedder:
    """An embedder that gives these rows in turn."""
    left = iter(rows)
    return NamedEmbedder(name, "made for a test", lambda block: torch.stack([next(left) for _ in block]))


def test_coverage_of_known_choices() -> None:
    """Embeddings that choose the newest or the oldest frames cover what these do."""
    clip = Clip("c", synthetic_clip("c", 30, 1).latents[:, :, :4, :6])
    frames = torch.arange(30.0)
    near = torch.stack([torch.cos(frames / 20), torch.sin(frames / 20)], 1)
    with torch.inference_mode():
        made = coverages(TINY, Sample(clip), [embedder("near", near)], CONFIG)
        attention = FullAttention(clip.frame_shape, CONFIG)
        masses = [
            attention.masses(attention.project(clip.latents), block.start)
            for block in choosing_blocks(clip.frames, CONFIG)
        ]
    found = {record.contender: record for record in made}
    assert found["ours, near"].extra == found["newest old frames"].extra
    assert found["ours, near"].runs == len(masses) == 2
    for number, (start, m) in enumerate(zip((24, 27), masses, strict=True)):
        held = [0, *range(start - 2, start + 3), *range(start - 22, start - 16)]
        values = (found["ours, near"].low, found["ours, near"].high)  # quartiles of two: a quarter from either end
        assert len(held) == 12 and min(values) - 0.05 < m[held].sum() < max(values) + 0.05, number
    want = np.mean(
        [m[[0, *range(s - 2, s + 3), *range(s - 22, s - 16)]].sum() for s, m in zip((24, 27), masses, strict=True)]
    )
    assert found["ours, near"].extra["mean"] == pytest.approx(want)


def test_a_sliding_window_s_frames_are_where_it_has_them() -> None:
    """Held against the demo's probe, which looks into a memory window that streams the same."""
    clip = Clip("c", synthetic_clip("c", 30, 1).latents[:, :, :4, :6])
    sliding = FullAttention(clip.frame_shape, WindowConfig(window=12, sink=1, top_k=0, recent_exclude=0))
    model, start = sliding.model, 27
    window = MemoryWindow(
        CONFIG,
        layers=1,
        batch=1,
        tokens_per_frame=model.tokens_per_frame,
        kv_heads=model.heads,
        head_dim=model.head_dim,
    )
    probe, queries = Probe(window, CONFIG, model.head_dim, model.grid), []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        queries[:] = [q]
        return window.attend(layer, q, k, v, first, model.grid)

    with torch.inference_mode():
        for first in range(0, start + 3, 3):
            model.forward(clip.latents[first : first + 3], 0.0, attend)
            if first < start:
                window.finish(first, torch.randn(1, 3, 8))
        want = probe.measure(queries, start)
        got = sliding.masses(sliding.project(clip.latents), start)
    assert np.allclose(got, want.sliding, atol=1e-6) and not np.allclose(got, want.placed, atol=1e-6)


# -- errors


def test_errors_of_known_size() -> None:
    exact = torch.ones(4, 8)
    off = exact.clone()
    off[2] *= 1.2
    groups = ErrorGroups("title", {"a": 1}, {})
    groups.add("known", "ours", lambda: (off, exact), {"b": 2}, more=3)
    whole, worst = groups.records
    assert (whole.median, worst.median) == (pytest.approx(0.1), pytest.approx(0.2))
    assert (whole.group, worst.group) == ("title, root mean square", "title, worst vector")
    assert whole.shape == {"a": 1, "b": 2} and whole.extra == {"more": 3}


def test_what_fails_or_is_no_number_is_wrong() -> None:
    def fail() -> Pair:
        raise OSError("no\nmore")

    def absent() -> Pair:
        raise Absent("not here")

    groups = ErrorGroups("title", {}, {})
    groups.add("nan", "ours", lambda: (torch.full((1, 2), torch.nan), torch.ones(1, 2)))
    groups.add("failing", "ours", fail)
    groups.add("another shape", "ours", lambda: (torch.ones(1, 3), torch.ones(1, 2)))
    assert all(record.wrong and record.median is None for record in groups.records)
    assert [record.absent for record in groups.records[:2]] == ["WRONG: NaN or infinity", "FAILED, OSError: no"]
    assert groups.present(["auto", "triton"], replace(TINY, name="cpu")) == ["auto"]
    assert not groups.records[-1].wrong and "interpreter" in groups.records[-1].absent
    groups.add("absent", "ours", absent)
    assert not groups.records[-1].wrong and groups.records[-1].absent == "not here"


def test_cosines_that_bfloat16_takes_for_equal() -> None:
    """Forty rows whose cosines are five numbers in bfloat16, the largest of which six have; four are chosen."""
    shares = []
    for seed in range(5):  # ties may happen to be in order
        angles = torch.linspace(0.70, 0.72, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
        rows = torch.stack([torch.cos(angles), torch.sin(angles)], 1)
        rows = torch.cat([-torch.ones(1, 2), rows, torch.zeros(5, 2), torch.tensor([[1.0, 0.0]])])
        made = choice_errors(TINY, "rows", rows, 4, 1)
        found = {record.contender: record.median for record in made if record.group.startswith("share")}
        assert found["ours, float32 index"] == found["as published, float32"] == 1.0
        shares.append(found["as published, bfloat16"])
    assert None not in shares and min(shares) < 1.0


def test_a_search_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_error.reference, "unit_rows", lambda x: x / torch.zeros(1))
    assert all(r.wrong for r in choice_errors(TINY, "rows", torch.ones(20, 4), 2, 1))


def test_other_frames_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip("c", synthetic_clip("c", 27, 1).latents[:, :, :4, :6])
    right = StreamedClip.published

    def off(self: StreamedClip, dtype: torch.dtype) -> tuple[torch.Tensor, list[list[int]]]:
        out, chosen = right(self, dtype)
        return out, [[*chosen[0][:-1], 99], *chosen[1:]]

    with torch.inference_mode():
        assert not any(r.wrong for r in streamed_errors(TINY, clip, CONFIG, 9, ("auto",)))
        monkeypatch.setattr(StreamedClip, "published", off)
        made = streamed_errors(TINY, clip, CONFIG, 9, ("auto",))
    assert {r.contender for r in made if r.wrong} == {f"{x}: as published" for x in ("float32", "float16", "bfloat16")}
    assert all("it retrieved" in record.absent for record in made if record.wrong)


# -- clips


def test_without_clips_coverage_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Clip:
        raise RuntimeError("the sample clips could not be fetched")

    monkeypatch.setattr(sample_latents, "sample_clip", missing)
    sizes = replace(suite_quality.SIZES["tiny"], synthetic=None, clips=("speaker", "speaker+bunny"))
    monkeypatch.setitem(suite_quality.SIZES, "tiny", sizes)
    measures = suite_quality.groups(TINY)
    absent = measures[-1]()
    assert [record.group.rpartition(", ")[2] for record in absent] == ["speaker", "speaker+bunny"]
    assert all("could not be fetched" in record.absent and not record.wrong for record in absent)
    with torch.inference_mode():
        streamed = measures[2]()
    assert {record.shape["source"] for record in streamed} == {"synthetic scenes"}
    assert not any(record.wrong for record in streamed)


def test_clips_by_name() -> None:
    one, two = samples(("one", "one+four"), CONFIG, (30, 18))
    assert one.edit is None and one.clip.frames == 30 and one.clip.frame_shape == sample_latents.FRAME
    assert two.edit is not None and two.edit.first == two.edit.last == 12 and two.clip.frames == 12 + 18 + 12
    assert torch.equal(two.clip.latents[:12], one.clip.latents[:12])
    with pytest.raises(ValueError, match="needs"):
        samples(("one+four",), CONFIG, (12, 18))


@pytest.mark.parametrize("preset", suite_quality.SIZES)
def test_the_embedders_take_the_clips_of_every_preset(preset: str) -> None:
    sizes = suite_quality.SIZES[preset]
    clip = synthetic_clip("c", 1, 0)
    for name in suite_quality.EMBEDDERS:
        load_embedder(name).check(clip)
    width, height = sample_latents.SIZE
    assert (16, height // 8, width // 8) == sample_latents.FRAME
    assert (sizes.synthetic is None) == (preset != "tiny") and sizes.engines[0] == "auto"
