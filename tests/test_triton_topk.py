"""``topk_retrieve`` under the Triton engine, on a GPU or in Triton's interpreter, against the oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from longlive_rag_ops.triton_kernels import configs

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEAR = 2e-6  # float32 cosines summed in another order


def retrieve(case: dict[str, Any], engine: str = "triton", **change: Any) -> tuple[torch.Tensor, torch.Tensor]:
    case = case | change
    if engine == "triton":
        case = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in case.items()}
    ids, scores = torch.ops.longlive.topk_retrieve(**case, engine=engine)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32
    return ids.cpu(), scores.cpu()


def search(rows: torch.Tensor, query: torch.Tensor, **change: Any) -> dict[str, Any]:
    """A search of one sample for all rows, which are frames 0, 1, 2 and so on."""
    count = torch.tensor([len(rows)])
    ids = torch.arange(len(rows))[None]
    case = {"query": query[None], "index": rows[None], "index_ids": ids, "index_length": count, "end_frame": count}
    return case | {"k": len(rows)} | change


def assert_agrees(case: dict[str, Any]) -> None:
    """The frames and scores are the oracle's, except that frames whose scores are nearly the same may change places."""
    ids, scores = retrieve(case)
    want_ids, want_scores = retrieve(case, "reference")
    every = retrieve(case, "reference", k=case["index"].shape[1])
    assert torch.equal(ids == -1, want_ids == -1)
    assert torch.equal(scores == -math.inf, ids == -1)
    torch.testing.assert_close(scores, want_scores, rtol=0, atol=NEAR)
    for b, frames in enumerate(ids.tolist()):
        known = dict(zip(every[0][b].tolist(), every[1][b].tolist(), strict=True))
        found = [frame for frame in frames if frame >= 0]
        assert len(set(found)) == len(found)
        for rank, frame in enumerate(found):
            assert abs(known[frame] - want_scores[b, rank].item()) < NEAR


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("embedding", [1, 8, 100, 300])
def test_agrees_with_the_oracle(embedding: int, dtype: torch.dtype, normalized: bool) -> None:
    int8 = dtype == torch.int8
    case = cases.topk(torch.float32 if int8 else dtype, rows=50, embedding=embedding, options="int8" if int8 else "")
    if normalized and int8:
        case["index_scale"] /= (case["index"].float() * case["index_scale"][..., None]).norm(dim=-1)
    elif normalized:
        case["index"] = torch.nn.functional.normalize(case["index"].float(), dim=-1).to(dtype)
    assert_agrees(case | {"exclude": torch.tensor([[3, -1, 40], [7, 7, 8]]), "normalized": normalized})


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(0, 130),
    embedding=st.sampled_from([1, 3, 16, 33]),
    k=st.sampled_from([1, 4, 9, 33]),
    first=st.integers(0, 30),
    recent=st.integers(0, 30),
    excluded=st.integers(0, 70),
    gate=st.sampled_from([None, -0.501, 0.1003]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_agrees_on_drawn_shapes(
    seed: int,
    rows: int,
    embedding: int,
    k: int,
    first: int,
    recent: int,
    excluded: int,
    gate: float | None,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    case = cases.topk(rows=rows, embedding=embedding, seed=seed)
    case |= {"query": case["query"].to(dtypes[0]), "index": case["index"].to(dtypes[1])}
    case |= {"index_length": torch.tensor([max(0, rows - 3)]), "end_frame": torch.tensor([rows]), "min_score": gate}
    case |= {"exclude": torch.randint(-1, rows + 5, (2, excluded), generator=cases.generator(seed))}
    assert_agrees(case | {"k": k, "first_frame": first, "recent_exclude": recent})


@pytest.mark.parametrize("view", [cases.gapped, cases.strided])
@pytest.mark.parametrize("options", ["", "int8", "diverse"])
def test_takes_any_strides(view: Any, options: str) -> None:
    case = cases.topk(rows=30, options=options) | {"exclude": torch.tensor([[3, 4], [7, 8]])}
    wanted = retrieve(case)
    tensors = ("query", "index", "index_ids", "exclude", *(("index_scale",) if options == "int8" else ()))
    if view is cases.strided:  # it fills the space between with NaN or 99: none of it may be read
        case = case | {name: view(case[name]) for name in tensors}
    else:
        case = case | {name: (view(case[name].double()).to(case[name].dtype)) for name in tensors}
        case |= {name: torch.stack([case[name]] * 2, -1)[..., 0] for name in tensors}
    assert not case["index"].is_contiguous()
    for got, want in zip(retrieve(case), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "k"), [(0, 5), (31, 5), (32, 2), (33, 7), (200, 6)])
def test_selects_in_levels(rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"level": {"BC": 16}, "last": {"BC": 32}}  # two levels from 33 keys on
    table = [
        dataclasses.replace(row, constants=small[row.shape]) if row.kernel == "select_keys" else row
        for row in configs.CONFIGS
    ]
    monkeypatch.setattr(configs, "CONFIGS", tuple(table))
    case = cases.topk(rows=max(rows, 3)) | {"first_frame": 0, "recent_exclude": 0}
    case |= {"index_length": torch.tensor([rows]), "end_frame": torch.tensor([rows])}
    assert_agrees(case | {"index": case["index"][:, :rows], "index_ids": case["index_ids"][:, :rows], "k": k})


def test_thousands_of_rows() -> None:
    rng = cases.generator(5)
    case = search(torch.randn(4200, 8, generator=rng), torch.randn(8, generator=rng), k=2)
    got, want = retrieve(case), retrieve(case, "reference")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=NEAR)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_equal_rows_tie_wherever_they_lie(dtype: torch.dtype) -> None:
    rng = cases.generator(1)
    kinds = torch.randn(3, 100, generator=rng)
    rows = kinds[torch.arange(30) % 3]
    case = search(rows.to(dtype), kinds[0] + 0.5 * kinds[1], k=14)
    if dtype == torch.int8:
        scale = rows.abs().amax(-1, keepdim=True) / 127
        case |= {"index": (rows / scale).round().to(torch.int8)[None], "index_scale": scale[None, :, 0]}
    ids, scores = retrieve(case)
    assert ids[0].tolist() == [*range(0, 30, 3), 1, 4, 7, 10]
    assert scores[0, :10].unique().numel() == 1 and scores[0, 10:].unique().numel() == 1
    order = torch.randperm(30, generator=rng)
    moved = {n: case[n][:, order] for n in ("index", "index_ids", "index_scale") if n in case}
    for diversity in (0.0, 0.5):
        one = retrieve(case, diversity=diversity, k=8)
        other = retrieve(case | moved, diversity=diversity, k=8)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_zeros_of_both_signs_tie() -> None:
    rows = torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, 0.0], [-0.0, -2.0], [1e-30, 0.0], [-1.0, 0.0]])
    ids, scores = retrieve(search(rows, torch.tensor([1.0, 0.0])))
    assert ids[0].tolist() == [4, 0, 1, 2, 3, 5]
    assert scores[0].tolist() == [1, 0, 0, 0, 0, -1]
    assert not scores[0, 1:5].signbit().any()
    int8 = search(torch.tensor([[0, 1], [0, 1], [0, 0]], dtype=torch.int8), torch.tensor([1.0, 0.0]))
    ids, scores = retrieve(int8, index_scale=torch.tensor([[-0.5, 0.5, -0.5]]))
    assert ids[0].tolist() == [0, 1, 2] and not scores.signbit().any()


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("diversity", [0.0, 0.3])
def test_rows_that_are_not_finite_are_never_chosen(normalized: bool, diversity: float) -> None:
    rows = torch.nn.functional.normalize(torch.randn(9, 5, generator=cases.generator(3)), dim=-1)
    rows[1, 2], rows[4, 0], rows[6] = math.nan, math.inf, -math.inf
    case = search(rows, torch.ones(5), normalized=normalized, diversity=diversity)
    ids, scores = retrieve(case)
    assert sorted(ids[0].tolist()) == [-1, -1, -1, 0, 2, 3, 5, 7, 8]
    assert scores[0, :6].isfinite().all() and (scores[0, 6:] == -math.inf).all()
    for bad in (math.nan, math.inf):
        query = torch.ones(1, 5)
        query[0, 3] = bad
        assert (retrieve(case, query=query)[0] == -1).all()


def test_factors_that_are_not_finite_or_overflow() -> None:
    rows = torch.tensor([[3, 4], [3, 4], [3, 4], [127, 0], [1, 0], [-4, -3], [0, 0]], dtype=torch.int8)
    factors = torch.tensor([math.nan, math.inf, 0.5, 3e38, 3e38, -0.25, math.inf])
    case = search(rows, torch.tensor([0.0, 1.0]), index_scale=factors[None])
    assert_agrees(case)
    assert retrieve(case)[0][0].tolist() == [2, 5, 4, -1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-25, 1e-12, 1e12, 1e25, 2e38])
def test_large_and_small_embeddings(dtype: torch.dtype, size: float) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16 and size == 1e-38:
        pytest.skip("the interpreter reads subnormal bfloat16 numbers wrongly")
    rng = cases.generator(4)
    ordinary, query = torch.rand(12, 70, generator=rng) - 0.5, torch.rand(70, generator=rng) - 0.5
    rows = ordinary.clone()
    rows[::3] *= size
    assert_agrees(search(rows.to(dtype), query.to(dtype)))
    assert_agrees(search(rows.to(dtype), (query * size).to(dtype)))
    if 1e-30 < size < 1e30:  # scaling by a power of two changes no bit, on either side of the range of squares
        power = 2.0 ** round(math.log2(size))
        plain, scaled = (search(x.to(dtype), query.to(dtype)) for x in (ordinary, ordinary * power))
        assert torch.equal(retrieve(plain)[1], retrieve(scaled)[1])


def test_bounds_removed_rows_and_exclusion() -> None:
    rows = torch.randn(12, 4, generator=cases.generator(2))
    frames = torch.tensor([[11, -1, 3, 5, -(2**40), 2**31 - 1, 0, 7, 1, 9, 4, 2]])
    case = search(rows, torch.ones(4), index_ids=frames, first_frame=1, recent_exclude=2, end_frame=torch.tensor([12]))
    assert sorted(retrieve(case)[0][0].tolist()) == [-1] * 5 + [1, 2, 3, 4, 5, 7, 9]
    kept = retrieve(case, exclude=torch.tensor([[5, -1, 9, 100, *range(20, 60), 2]]))[0][0].tolist()
    assert sorted(kept) == [-1] * 8 + [1, 3, 4, 7]
    short = retrieve(case, index_length=torch.tensor([4]))[0][0].tolist()
    assert sorted(short) == [-1] * 10 + [3, 5]
    last = retrieve(case, end_frame=torch.tensor([2**40]))[0][0].tolist()
    assert 2**31 - 1 in last and 11 in last
    for nothing in ({"index_length": torch.tensor([0])}, {"end_frame": torch.tensor([3])}, {"min_score": 1.5}):
        for diversity in (0.0, 0.5):
            ids, scores = retrieve(case, diversity=diversity, **nothing)
            assert (ids == -1).all() and (scores == -math.inf).all()


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_empty_sizes(diversity: float) -> None:
    case = cases.topk() | {"diversity": diversity}
    assert [x.shape for x in retrieve(case, k=0)] == [(2, 0)] * 2
    no_rows = {name: case[name][:, :0] for name in ("index", "index_ids")} | {"index_length": torch.tensor([0])}
    ids, scores = retrieve(case | no_rows)
    assert (ids == -1).all() and (scores == -math.inf).all()
    no_samples = {name: case[name][:0] for name in ("query", "index", "index_ids")}
    assert [x.shape for x in retrieve(case | no_samples)] == [(0, 5)] * 2


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 70),
    k=st.integers(1, 9),
    diversity=st.sampled_from([0.01, 0.4, 0.99]),
    gate=st.sampled_from([None, 0.1003]),
    normalized=st.booleans(),
    int8=st.booleans(),
)
def test_diversity_is_greedy_over_all_candidates(
    seed: int, rows: int, k: int, diversity: float, gate: float | None, normalized: bool, int8: bool
) -> None:
    rng = cases.generator(seed)
    index = torch.nn.functional.normalize(torch.randn(rows, 6, generator=rng), dim=-1)
    query, exact, change = torch.randn(6, generator=rng), index.double().numpy(), {}
    if int8:
        sign = torch.randn(rows, generator=rng).sign()  # a factor may be negative
        quantised = (index * 127 * sign[:, None]).round()
        factor = sign / quantised.norm(dim=-1)
        index, change = quantised.to(torch.int8), {"index_scale": factor[None]}
        exact = quantised.double().numpy() * factor.double().numpy()[:, None]
    case = search(index, query, k=k, diversity=diversity, min_score=gate, normalized=normalized, **change)
    ids, scores = retrieve(case)
    exact = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    cosine = exact @ (query.double().numpy() / query.double().norm().item())
    left = {row for row in range(rows) if gate is None or cosine[row] >= gate}
    chosen: list[int] = []
    for frame, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True):
        if not left:
            assert frame == -1 and score == -math.inf
            continue
        shared = (exact @ exact[chosen].T).max(1) if chosen else np.zeros(rows)
        value = (1 - diversity) * cosine - diversity * shared
        assert frame in left and value[frame] > max(value[row] for row in left) - NEAR
        assert abs(score - cosine[frame]) < NEAR
        chosen.append(frame)
        left.remove(frame)


def test_what_the_engine_does_not_take() -> None:
    case = cases.topk()
    with pytest.raises(ValueError, match="k up to 64, got 65; engines that take it: dense, reference"):
        retrieve(case, k=65)
    with pytest.raises(ValueError, match="up to 4096 entries, got 4097; engines that take it: dense, reference"):
        retrieve(cases.topk(embedding=4097))
    for name in ("query", "index"):
        with pytest.raises(TypeError, match=f"bfloat16 .*{name}, got torch.float64; .* dense, reference"):
            retrieve(case | {name: case[name].double()})
    assert_agrees(cases.topk(rows=5, embedding=4096))
