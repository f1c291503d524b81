"""``topk_retrieve``: bounds by frame id, ties, non-finite rows, precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import longlive_rag_ops  # noqa: F401  registers the ops

ENGINES = ("reference", "dense")


def retrieve(
    query: torch.Tensor, index: torch.Tensor, k: int, engine: str, **options: Any
) -> tuple[list[int], list[float]]:
    """One sample; by default row i is frame i and every row is a candidate."""
    rows = index.shape[0]
    ids = options.pop("ids", torch.arange(rows))
    length, end = options.pop("length", rows), options.pop("end_frame", 1 << 40)
    chosen, scores = torch.ops.longlive.topk_retrieve(
        query[None], index[None], ids[None], torch.tensor([length]), torch.tensor([end]), k, engine=engine, **options
    )
    return chosen[0].tolist(), scores[0].tolist()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_scores_are_cosines_in_descending_order(engine: str) -> None:
    index = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, -2.0], [-5.0, 0.0]])
    frames, scores = retrieve(torch.tensor([2.0, 0.0]), index, 4, engine)
    assert frames == [0, 1, 2, 3]
    assert scores == pytest.approx([1.0, math.sqrt(0.5), 0.0, -1.0], abs=1e-7)


@pytest.mark.parametrize("rows", [1, 3, 17, 64, 1000, 1023])
@pytest.mark.parametrize("embedding", [3, 16, 64, 1024])
def test_equal_rows_tie_wherever_they_are_stored(engine: str, rows: int, embedding: int) -> None:
    """A matrix product rounds equal rows differently at different places; the older frame must win all the same."""
    row = torch.randn(embedding, generator=torch.Generator().manual_seed(rows))
    query = torch.randn(embedding, generator=torch.Generator().manual_seed(1))
    ids = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    frames, scores = retrieve(query, row.repeat(rows, 1), 8, engine, ids=ids)
    assert frames == [*range(min(rows, 8)), *[-1] * (8 - min(rows, 8))]
    assert len(set(scores[: min(rows, 8)])) == 1


def test_bounds_are_by_frame_id_not_by_row(engine: str) -> None:
    ids = torch.tensor([9, 3, -1, 7, 0, 5])
    index = torch.ones(6, 4)
    frames, _ = retrieve(torch.ones(4), index, 6, engine, ids=ids, first_frame=1, end_frame=9, recent_exclude=2)
    assert frames == [3, 5, -1, -1, -1, -1]
    frames, _ = retrieve(torch.ones(4), index, 6, engine, ids=ids, length=2)
    assert frames == [3, 9, -1, -1, -1, -1]


def test_excluded_frames_are_not_chosen(engine: str) -> None:
    frames, _ = retrieve(torch.ones(2), torch.ones(5, 2), 3, engine, exclude=torch.tensor([[0, 2, -1]]))
    assert frames == [1, 3, 4]


def test_non_finite_rows_are_never_chosen_and_a_non_finite_query_chooses_nothing(engine: str) -> None:
    index = torch.ones(5, 3)
    index[0, 1], index[2, 0], index[3, 2] = torch.nan, torch.inf, -torch.inf
    frames, scores = retrieve(torch.ones(3), index, 5, engine)
    assert frames == [1, 4, -1, -1, -1] and scores[2:] == [-math.inf] * 3
    for bad in (math.nan, math.inf):
        frames, scores = retrieve(torch.tensor([1.0, bad, 0.0]), torch.ones(5, 3), 2, engine)
        assert frames == [-1, -1] and scores == [-math.inf] * 2


def test_zero_embedding_has_similarity_zero(engine: str) -> None:
    index = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert retrieve(torch.tensor([1.0, 0.0]), index, 3, engine) == ([2, 1, 0], [1.0, 0.0, -1.0])
    assert retrieve(torch.zeros(2), index, 3, engine) == ([0, 1, 2], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-12, 1e12, 1e30, 3e38])
def test_cosine_neither_overflows_nor_underflows(engine: str, size: float) -> None:
    index = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]) * size
    frames, scores = retrieve(torch.tensor([0.6, 0.8]) * size, index, 3, engine)
    assert frames == [1, 2, 0]
    assert scores == pytest.approx([1.0, 0.8, 0.6], abs=1e-4 if size < 1e-37 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_engines_choose_alike(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(3)
    for trial in range(20):
        rows = 1 + trial * 37
        index = torch.randn(rows, 48, generator=rng).to(dtype)
        index[rows // 2 :] = index[: rows - rows // 2].clone()  # every row twice
        query = torch.randn(48, generator=rng).to(dtype)
        results = [retrieve(query, index, 16, engine) for engine in ENGINES]
        assert results[0] == results[1]


def test_a_normalised_index_gives_the_same_choice(engine: str) -> None:
    rng = torch.Generator().manual_seed(4)
    index, query = torch.randn(200, 32, generator=rng), torch.randn(32, generator=rng)
    raw = retrieve(query, index, 10, engine)
    unit = retrieve(query, torch.nn.functional.normalize(index), 10, engine, normalized=True)
    assert raw[0] == unit[0] and raw[1] == pytest.approx(unit[1], abs=1e-6)


def test_nothing_asked_for_or_nothing_there(engine: str) -> None:
    assert retrieve(torch.ones(2), torch.ones(3, 2), 0, engine) == ([], [])
    assert retrieve(torch.ones(2), torch.ones(0, 2), 2, engine) == ([-1, -1], [-math.inf] * 2)
    assert retrieve(torch.ones(2), torch.ones(3, 2), 2, engine, end_frame=0) == ([-1, -1], [-math.inf] * 2)


@pytest.mark.parametrize("embedding", [3, 64, 256])
def test_ties_hold_for_rows_that_are_not_contiguous(engine: str, embedding: int) -> None:
    row = torch.randn(embedding, generator=torch.Generator().manual_seed(5))
    query = torch.randn(embedding, generator=torch.Generator().manual_seed(6))
    for rows in range(2, 40):
        index = row.repeat(rows, 1).T.contiguous().T  # stored column by column
        ids = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
        frames, _ = retrieve(query, index, 5, engine, ids=ids)
        assert frames == [*range(min(rows, 5)), *[-1] * (5 - min(rows, 5))]


@pytest.mark.parametrize("query", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("index", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_query_and_index_may_differ_in_dtype(engine: str, query: torch.dtype, index: torch.dtype) -> None:
    frames, _ = retrieve(torch.tensor([1.0, 0.5]).to(query), torch.eye(2).to(index), 2, engine)
    assert frames == [0, 1]


def test_non_finite_rows_of_a_normalised_index_are_not_chosen(engine: str) -> None:
    index = torch.eye(3)
    index[1, 0] = torch.inf
    assert retrieve(torch.tensor([1.0, 0.0, 0.0]), index, 3, engine, normalized=True)[0] == [0, 2, -1]


def test_the_quick_search_never_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense engine scores contenders again: rounding of its matrix product, at its worst, changes nothing."""
    rng = torch.Generator().manual_seed(8)
    index = torch.randn(300, 64, generator=rng)
    index[100:200] = index[:100] * (1 + 1e-6 * torch.randn(100, 64, generator=rng))  # near-ties
    query = torch.randn(64, generator=rng)
    want = retrieve(query, index, 12, "reference")
    exact, worst = torch.mv, 64 * torch.finfo(torch.float32).eps
    for seed in range(10):
        noise = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(
            torch, "mv", lambda a, b, n=noise: exact(a, b) + worst * (2 * torch.rand(len(a), generator=n) - 1)
        )
        assert retrieve(query, index, 12, "dense") == want
