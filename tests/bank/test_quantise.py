"""Rows in eight bits: errors, limits, NaN, and equality with what ``place_frames`` makes of them in every engine."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_cases import DEVICE, EIGHT_BITS, FLOATS, page_format, pair, strange_pair, strange_rows

from longlive_rag_ops.bank.page_format import PageFormat
from longlive_rag_ops.bank.quantise import SMALLEST_SCALE, STORED, TOP, largest_scale
from longlive_rag_ops.rotary import default_split, rotary_table

EVERY_DTYPE = (torch.float64, *FLOATS)
ENGINES = ("reference", "dense", pytest.param("triton", marks=pytest.mark.triton))


def rows_of(storage: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, scales and decoded rows ``(n, D)`` of rows stored as a page of one layer, sample and head."""
    pages = PageFormat(storage, 1, 1, len(rows), 1, rows.shape[1], rows.dtype)
    stored = pages.encode(rows[None, None, :, None], rows[None, None, :, None])
    views = pages.views(stored)
    for one, other in zip(("k_pages", "k_scale"), ("v_pages", "v_scale"), strict=True):
        assert torch.equal(views[one].view(torch.uint8), views[other].view(torch.uint8))
    return views["k_pages"][0, 0, :, 0], views["k_scale"][0, 0, :, 0], pages.decode(stored)[0][0, 0, :, 0]


def nearest_half_above(exact: float) -> float:
    """The smallest float16 that is not below a positive number, by search over all of them."""
    every = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).double()
    return float(every[every >= exact].min())


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_the_scale_is_the_smallest_float16_that_clips_nothing(storage: str, dtype: torch.dtype) -> None:
    rows = strange_rows(dtype)
    stored, top = STORED[storage], TOP[STORED[storage]]
    most = largest_scale(stored, dtype)
    _, scale, _ = rows_of(storage, rows)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for row, got in zip(rows, scale, strict=True):
        exact = float(row.abs().max().to(compute) / torch.tensor(top, dtype=compute))
        want = most if exact >= most else nearest_half_above(max(exact, SMALLEST_SCALE))
        assert float(got) == want, exact


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_the_largest_scale_times_top_is_finite_and_the_next_is_not_allowed(storage: str, dtype: torch.dtype) -> None:
    stored = STORED[storage]
    scale = torch.tensor(largest_scale(stored, dtype), dtype=torch.float16)
    assert float(scale) == largest_scale(stored, dtype)
    assert (scale.double() * TOP[stored]).to(dtype).isfinite()
    assert float(scale) * TOP[stored] <= torch.finfo(dtype).max
    following = (scale.view(torch.int16) + 1).view(torch.float16)
    assert following.isinf() or float(following) * TOP[stored] > torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_strange_rows_come_back_within_a_step_finite_and_saturated_at_the_limit(
    storage: str, dtype: torch.dtype
) -> None:
    rows = strange_rows(dtype)
    data, scale, decoded = rows_of(storage, rows)
    top, reach = TOP[STORED[storage]], TOP[STORED[storage]] * largest_scale(STORED[storage], dtype)
    assert decoded.isfinite().all() and data.double().abs().max() == top
    for row, s, got in zip(rows.double(), scale.double(), decoded.double(), strict=True):
        want = row.clamp(-reach, reach)
        # Steps of fp8 are 2**-3 of a binade, and 2**-9 of a scale at least; and the result is rounded to its dtype.
        step = s if storage == "int8" else torch.maximum((want / s).abs().log2().floor().exp2() / 8, s * 0 + 2**-9) * s
        rounding = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((got - want).abs() <= step * (0.5 + 1e-6) + rounding).all()


@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_a_row_of_zeros_is_zeros(storage: str) -> None:
    data, scale, decoded = rows_of(storage, torch.zeros(3, 16))
    assert not data.double().any() and not decoded.any() and (scale == SMALLEST_SCALE).all()


@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_what_a_dtype_may_hold_beyond_the_scales_saturates(storage: str) -> None:
    top = TOP[STORED[storage]]
    rows = torch.tensor([[1e30, -1e30, 65504.0 * top, 0.0], [-3e38, 1.0, 0.0, 5e37]])
    _, scale, decoded = rows_of(storage, rows)
    assert (scale == 65504).all()
    reach = 65504.0 * top
    assert decoded.tolist() == [[reach, -reach, reach, 0.0], [-reach, 0.0, 0.0, reach]]


def test_int8_of_known_numbers() -> None:
    row = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49]])
    data, scale, decoded = rows_of("int8", row)
    assert scale.tolist() == [1.0]
    assert data.tolist() == [[127, -127, 0, 2, 2, 0, -2, 0]]
    assert decoded.tolist() == [[127.0, -127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 0.0]]


def test_fp8_of_known_numbers() -> None:
    # 17 and 19 lie half-way between e4m3's 16, 18 and 20; 2**-10 between 0 and the smallest.
    row = torch.tensor([[448.0, -440.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -(2.0**-9), 433.0]])
    data, scale, _ = rows_of("fp8", row)
    assert scale.tolist() == [1.0]
    assert data.double().tolist() == [[448.0, -448.0, 16.0, 20.0, 0.0, 2 * 2.0**-9, -(2.0**-9), 448.0]]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_a_row_with_nan_or_infinity_is_nan_and_no_other_row_changes(
    storage: str, dtype: torch.dtype, poison: float
) -> None:
    pages = page_format(storage, dtype)
    keys, values = pair(pages)
    clean = pages.decode(pages.encode(keys, values))
    keys[1, 0, 2, 1, 5] = poison
    values[0, 1, 5, 2, 0] = poison
    stored = pages.encode(keys, values)
    got = pages.decode(stored)
    assert got[0][1, 0, 2, 1].isnan().all() and got[1][0, 1, 5, 2].isnan().all()
    for one, other, row in zip(got, clean, ((1, 0, 2, 1), (0, 1, 5, 2)), strict=True):
        other[row] = torch.nan
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    views = pages.views(stored)
    assert views["k_scale"].view(torch.int16)[1, 0, 2, 1] == 0x7E00
    assert not views["k_pages"].view(torch.uint8)[1, 0, 2, 1].any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bytes_of_a_row_depend_on_the_row_alone(data: st.DataObject) -> None:
    draw = data.draw
    dtype, storage = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(EIGHT_BITS))
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(bits)
    entries = st.integers(limits.min, limits.max)
    row = torch.tensor(draw(st.lists(entries, min_size=4, max_size=4)), dtype=bits).view(dtype)
    layers, samples, tokens, heads = (draw(st.integers(1, 3)) for _ in range(4))
    pages = PageFormat(storage, layers, samples, tokens, heads, 4, dtype)
    keys, values = pair(pages, draw(st.integers(0, 9)))
    place = tuple(draw(st.integers(0, size - 1)) for size in (layers, samples, tokens, heads))
    values[place] = row
    views = pages.views(pages.encode(keys, values))
    alone, scale, _ = rows_of(storage, row[None])
    assert torch.equal(views["v_pages"][place].view(torch.uint8), alone[0].view(torch.uint8))
    assert torch.equal(views["v_scale"][place].view(torch.int16), scale[0].view(torch.int16))


def placed(pages: PageFormat, stored: torch.Tensor, engine: str, dtype: torch.dtype) -> torch.Tensor:
    """What ``place_frames`` makes at position 0 of a stored frame's pages: ``(layers, 2, samples, T, H, D)``."""
    pool = torch.full((pages.layers, 2, pages.samples, 3, *pages.page_shape), 5.0, dtype=dtype, device=DEVICE)
    table = {name: torch.full((pages.samples, 1), at, device=DEVICE) for name, at in (("slots", 1), ("source", 0))}
    for layer in range(pages.layers):
        torch.ops.longlive.place_frames(
            pool[layer],
            **table,
            positions=torch.zeros(pages.samples, 1, dtype=torch.int64, device=DEVICE),
            rope=rotary_table(pages.head_dim, 8, dtype=torch.float32, device=DEVICE),
            rope_split=list(default_split(pages.head_dim)),
            **pages.views(stored[layer, :, None].to(DEVICE)),
            engine=engine,
        )
    assert (pool[:, :, :, [0, 2]] == 5.0).all()
    return pool[:, :, :, 1].cpu()


def bit_pattern(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_decoded_pages_are_what_every_engine_places_bit_for_bit(storage: str, dtype: torch.dtype, engine: str) -> None:
    if engine == "triton" and dtype == torch.float64:
        pytest.skip("the kernels refuse float64")
    # The interpreter rounds float32 to bfloat16 towards zero, which no GPU does: there the kernel's float32 is rounded.
    pool = torch.float32 if (engine, DEVICE, dtype) == ("triton", "cpu", torch.bfloat16) else dtype
    normal = page_format(storage, dtype)
    for pages, keys, values in ((normal, *pair(normal)), strange_pair(storage, dtype, samples=2)):
        stored = pages.encode(keys, values)
        got = placed(pages, stored, engine, pool).to(dtype)
        for side, want in enumerate(pages.decode(stored)):
            assert torch.equal(bit_pattern(got[:, side]), bit_pattern(want))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_every_engine_places_nan_for_a_row_that_held_it(storage: str, engine: str) -> None:
    pages = page_format(storage, torch.float16)
    keys, values = pair(pages)
    keys[0, 0, 3, 1, 0], values[1, 1, 0, 2, 7] = torch.nan, torch.inf
    stored = pages.encode(keys, values)
    got = placed(pages, stored, engine, pages.dtype)
    for side, want in enumerate(pages.decode(stored)):
        torch.testing.assert_close(got[:, side], want, rtol=0, atol=0, equal_nan=True)
        assert int(got[:, side].isnan().sum()) == pages.head_dim


@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_quantising_again_what_was_quantised_changes_little(storage: str) -> None:
    """Saving, opening and encoding anew must not drift: after one pass the rows are on the grid of their scales."""
    pages = page_format(storage, torch.float32)
    once = pages.decode(pages.encode(*pair(pages)))
    again = pages.decode(pages.encode(*once))
    for one, other in zip(once, again, strict=True):
        assert ((one - other).abs() <= one.abs().amax(-1, keepdim=True) * 2**-9).all()


def test_threads_and_flush_modes_of_the_host_do_not_change_bytes() -> None:
    """In a process of its own: one thread, and subnormal numbers flushed to zero, as some programs set."""
    script = """
import sys, torch
from longlive_rag_ops.bank.page_format import PageFormat
torch.set_num_threads(int(sys.argv[1]))
torch.set_flush_denormal(sys.argv[2] == "flush")
pages = PageFormat(sys.argv[3], 3, 2, 50, 4, 64, torch.bfloat16)
generator = torch.Generator().manual_seed(1)
shape = (2, 3, 2, 50, 4, 64)
x = torch.randn(shape, generator=generator) * (6 * torch.randn((*shape[:-1], 1), generator=generator)).exp()
sys.stdout.write(bytes(pages.encode(*x.bfloat16().unbind()).flatten().tolist()).hex())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for storage in EIGHT_BITS:
        outputs = {
            subprocess.run(
                [sys.executable, "-c", script, threads, flush, storage],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for threads, flush in (("1", "keep"), ("2", "keep"), ("2", "flush"))
        }
        assert len(outputs) == 1 and len(outputs.pop()) > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["dense", "auto"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_a_gpu_makes_the_bytes_of_the_cpu(storage: str, dtype: torch.dtype, engine: str) -> None:
    normal = page_format(storage, dtype)
    for pages, keys, values in ((normal, *pair(normal)), strange_pair(storage, dtype)):
        keys[0, 0, 1, 0, 3] = torch.nan
        want = pages.encode(keys, values)
        assert torch.equal(pages.encode(keys.cuda(), values.cuda(), engine=engine).cpu(), want)
