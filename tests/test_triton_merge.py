"""merge_attention in Triton, and into how many parts the keys are split: in the interpreter or on a GPU."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from attention_cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_enough

from longlive_rag_ops import reference

pytest.importorskip("triton")
from longlive_rag_ops.triton_kernels.kv_splits import MERGE, START, kv_splits
from longlive_rag_ops.triton_kernels.merge_attention import merge_attention

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def check(outs: torch.Tensor, lses: torch.Tensor) -> None:
    out, lse = merge_attention(outs, lses)
    want, total = reference.merge_attention(outs.double(), lses.double())
    weights = torch.where(lses == -torch.inf, 0.0, (lses - lses.amax(0).clamp(min=-1e30)).exp())
    spread = weights.transpose(2, 3)[..., None].to(outs.dtype)
    plain = torch.where(spread > 0, spread * outs, 0).sum(0) / spread.sum(0).clamp(min=1e-6)
    assert out.dtype == outs.dtype and lse.dtype == torch.float32 and out.is_contiguous()
    assert_close_enough(out, plain, want)
    torch.testing.assert_close(lse.double(), total, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", [None, cases.gapped, cases.strided], ids=["contiguous", "gapped", "strided"])
def test_against_the_oracle(layout: object, dtype: torch.dtype) -> None:
    case = {name: x if layout is None else layout(x) for name, x in cases.merge(dtype).items()}  # type: ignore[operator]
    check(case["outs"].to(DEVICE), case["lses"].to(DEVICE))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 9),
    st.tuples(st.integers(0, 2), st.integers(0, 21), st.integers(1, 3), st.sampled_from([1, 8, 80])),
    st.sampled_from(FLOATS),
    st.integers(0, 2**31),
    st.floats(0, 1),
)
def test_any_number_of_parts_some_empty(
    parts: int, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, empty: float
) -> None:
    samples, length, heads, head_dim = shape
    rng = cases.generator(seed)
    outs = torch.randn(parts, samples, length, heads, head_dim, generator=rng).to(dtype)
    lses = torch.randn(parts, samples, heads, length, generator=rng) * 10
    gone = torch.rand(lses.shape, generator=rng) < empty
    lses[gone] = -torch.inf
    outs[gone.transpose(2, 3)] = torch.nan  # whatever an empty part holds adds nothing
    check(outs.to(DEVICE), lses.to(DEVICE))


def test_all_parts_empty() -> None:
    outs = torch.full((3, 1, 2, 2, 8), torch.nan, device=DEVICE)
    out, lse = merge_attention(outs, torch.full((3, 1, 2, 2), -torch.inf, device=DEVICE))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_a_single_part_and_an_empty_one_change_nothing() -> None:
    case = cases.merge()
    outs, lses = case["outs"][:1].to(DEVICE), case["lses"][:1].to(DEVICE)
    out, lse = merge_attention(torch.cat([outs, outs * torch.nan]), torch.cat([lses, lses - torch.inf]))
    there = (lses[0] > -torch.inf).transpose(1, 2)
    assert torch.equal(out[there], outs[0][there]) and torch.equal(lse, lses[0])


def test_the_same_bits_twice_and_large_logarithms() -> None:
    case = {name: x.to(DEVICE) for name, x in cases.merge().items()}
    one, other = merge_attention(**case), merge_attention(**case)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    far = merge_attention(case["outs"], case["lses"] + 3e4)
    torch.testing.assert_close(far[0], one[0], rtol=2e-2, atol=1e-2)  # lses of 3e4 have steps of 2e-3
    assert far[1].isfinite().equal(one[1].isfinite())


def test_float64_is_refused() -> None:
    outs, lses = torch.zeros(1, 1, 2, 1, 4, device=DEVICE), torch.zeros(1, 1, 1, 2, device=DEVICE)
    with pytest.raises(TypeError, match=r"for outs, got torch.float64; engines that take it: dense, reference"):
        merge_attention(outs.double(), lses)
    with pytest.raises(TypeError, match=r"float32 for lses, got torch.float64"):
        merge_attention(outs, lses.double())


def estimate(parts: int, blocks: int, tiles: int, places: int, keys: int = 64) -> float:
    """The time that `kv_splits` makes least, written a second time: whole waves, then the merge."""
    waves = (blocks * parts + places - 1) // places
    return waves * ((tiles + parts - 1) // parts * keys / 64 + START) + (
        MERGE * blocks * parts / places if parts > 1 else 0
    )


def test_splits_of_the_paper_s_shape_fill_the_last_wave() -> None:
    """4680 queries in tiles of 128 and 12 heads are 444 blocks; 12 frames of 1560 keys are 293 tiles of 64."""
    assert kv_splits(444, 293, 132) == 2  # 888 blocks are 6.7 waves of 7: 96 % busy, 444 are 3.4 of 4: 84 %
    assert kv_splits(444, 147, 132, keys=128) == 2
    assert kv_splits(444, 12, 132, keys=1600) == 2  # whole pages of 25 tiles
    assert kv_splits(13 * 12, 12, 132, keys=1600) == 4  # 1560 queries


@pytest.mark.parametrize(("blocks", "tiles", "places"), [(132, 300, 132), (264, 300, 132), (10000, 300, 132)])
def test_whole_waves_and_many_are_not_split(blocks: int, tiles: int, places: int) -> None:
    assert kv_splits(blocks, tiles, places) == 1


def test_few_blocks_are_split_to_fill_the_device() -> None:
    assert 8 <= kv_splits(12, 293, 132) <= 11
    assert kv_splits(1, 1, 132) == 1
    assert kv_splits(0, 0, 132) == 1
    assert kv_splits(1, 3, 132) <= 3


@given(st.integers(0, 5000), st.integers(0, 400), st.integers(1, 300), st.sampled_from([16, 64, 128, 1600]))
def test_splits_are_the_cheapest_and_never_more_than_tiles(blocks: int, tiles: int, places: int, keys: int) -> None:
    chosen = kv_splits(blocks, tiles, places, keys)
    assert 1 <= chosen <= max(1, tiles)
    costs = [estimate(parts, blocks, tiles, places, keys) for parts in range(1, max(1, min(tiles, 64)) + 1)]
    assert costs[chosen - 1] == pytest.approx(min(costs))
    assert all(cost > costs[chosen - 1] for cost in itertools.islice(costs, chosen - 1))
