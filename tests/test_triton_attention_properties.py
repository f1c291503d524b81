"""What must not change the attention, whatever the shapes: drawn by hypothesis, run in the interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DEVICE, POSITIONS, check, make, read_by, rotation
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_rag_ops import reference

pytest.importorskip("triton")
from longlive_rag_ops.triton_kernels.window_attend import window_attend

HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16
SEEDS = st.integers(0, 2**31)
WAYS = st.sampled_from(["pointers", "descriptors"])


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 2))
    return {
        "tokens": draw(st.sampled_from([1, 2, 7, 24, 63, 64, 65, 100])),
        "head_dim": draw(st.sampled_from([2, 8, 16, 30, 64])),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 2)),
        "samples": draw(st.integers(1, 2)),
        "length": draw(st.sampled_from([1, 5, 20])),
        "dtype": draw(st.sampled_from([torch.float32, HALF])),
        "seed": draw(SEEDS),
    }


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...], tolerance: float = 2e-5) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(sizes(), st.sampled_from(["slots", "run", "shifts", "int8"]), WAYS, st.data())
def test_any_shape_and_table(shape: dict[str, Any], table: str, way: str, data: st.DataObject) -> None:
    case = make(**shape, table=table)
    if table == "run":
        case["run"] = data.draw(st.integers(0, case["pool_layer"].shape[2]))
    elif data.draw(st.booleans()):
        case["slots"][data.draw(st.integers(0, shape["samples"] - 1))] = -1
    with read_by(way):
        check(case, *window_attend(**case))


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(5)), SEEDS, WAYS)
def test_order_of_the_table(order: list[int], seed: int, way: str) -> None:
    case = make(24, table="shifts", samples=1, seed=seed)
    with read_by(way):
        one = window_attend(**case)
        same(one, window_attend(**case | {name: case[name][:, order] for name in ("slots", "shifts")}))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 69), SEEDS, WAYS)
def test_splitting_a_page_in_two(cut: int, seed: int, way: str) -> None:
    """Pages of 70 tokens, and the same keys as pages of ``cut`` and of the rest, merged."""
    case = make(70, table="slots", samples=1, heads=1, seed=seed)
    pool = case["pool_layer"]
    with read_by(way):
        whole = window_attend(**case)
        parts = [window_attend(**case | {"pool_layer": part}) for part in (pool[:, :, :, :cut], pool[:, :, :, cut:])]
    outs, lses = (torch.stack([part[i] for part in parts]) for i in (0, 1))
    same(whole, reference.merge_attention(outs, lses))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), SEEDS, WAYS)
def test_equal_keys_count_as_often_as_they_are_there(copies: int, seed: int, way: str) -> None:
    """A table that names all its pages n times attends alike, with log n more."""
    case = make(24, table="slots", samples=1, seed=seed)
    with read_by(way):
        out, lse = window_attend(**case)
        more = window_attend(**case | {"slots": case["slots"].repeat(1, copies)})
    same((out, lse + torch.tensor(float(copies)).log().to(DEVICE)), more)


@settings(max_examples=8, deadline=None)
@given(st.integers(-10, 10), SEEDS, WAYS)
def test_moving_all_in_time_equally(by: int, seed: int, way: str) -> None:
    """Queries turned by t and pages that count as moved by t: only differences of time matter."""
    case = make(24, table="shifts", samples=1, seed=seed)
    case["shifts"] = torch.where(case["slots"] >= 0, case["shifts"] % 11, 0)  # so that all stay within the table
    later = case | {
        "q": reference.turn_in_time(case["q"], case["rope"], case["rope_split"], by).to(case["q"].dtype),
        "shifts": case["shifts"] + by,
    }
    with read_by(way):
        same(window_attend(**case), window_attend(**later))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, POSITIONS - 1), min_size=4, max_size=4), SEEDS, WAYS)
def test_placing_pages_or_counting_them_as_moved(positions: list[int], seed: int, way: str) -> None:
    """Canonical pages placed by the oracle and attended to, and canonical pages with their positions as shifts."""
    case = make(24, head_dim=32, samples=1, slots=8, seed=seed) | {"slots": torch.tensor([[4, 5, 6, 7]], device=DEVICE)}
    rotary, at = rotation(32), torch.tensor([positions], device=DEVICE)
    placed = case["pool_layer"].clone()
    targets = torch.tensor([[0, 1, 2, 3]], device=DEVICE)
    reference.place_frames(placed, targets, case["slots"], at, rotary["rope"], rotary["rope_split"])
    with read_by(way):
        moved = window_attend(**case, shifts=at, **rotary)
        same(window_attend(**case | {"pool_layer": placed, "slots": targets}), moved)


def test_pages_that_stay_are_those_of_no_shift() -> None:
    case = make(70, table="shifts", dtype=HALF)
    case["shifts"] = torch.zeros_like(case["shifts"])
    plain = {name: x for name, x in case.items() if name in ("q", "pool_layer", "slots", "return_lse")}
    for one, other in zip(window_attend(**case), window_attend(**plain), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_samples_do_not_see_each_other() -> None:
    case = make(24, table="shifts", samples=2)
    both = window_attend(**case)
    for b in (0, 1):
        one = {name: case[name][b : b + 1] for name in ("q", "slots", "shifts")}
        alone = window_attend(**case | one | {"pool_layer": case["pool_layer"][:, b : b + 1]})
        same((both[0][b : b + 1], both[1][b : b + 1]), alone, 1e-6)
