"""The kernel that encodes pages, byte for byte against plain PyTorch; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_cases import DEVICE, EIGHT_BITS, FLOATS, every_other, page_format, pair, strange_pair

from longlive_rag_ops.bank import quantise as module
from longlive_rag_ops.bank.page_format import PageFormat

pytest.importorskip("triton")
pytestmark = pytest.mark.triton


def check(pages: PageFormat, keys: torch.Tensor, values: torch.Tensor) -> None:
    want = pages.encode(keys, values, engine="dense")
    keys, values = keys.to(DEVICE), values.to(DEVICE)
    slots = torch.full((pages.layers, pages.samples, 3, pages.page_bytes), 0xAB, dtype=torch.uint8, device=DEVICE)
    pages.encode(keys, values, slots[:, :, 1], engine="triton")
    assert torch.equal(slots[:, :, 1].cpu(), want)
    assert (slots[:, :, [0, 2]] == 0xAB).all()
    kept = slots.clone()
    pages.encode(every_other(keys), every_other(values), slots[:, :, 2], engine="triton")
    assert torch.equal(slots[:, :, 2].cpu(), want) and torch.equal(slots[:, :, :2], kept[:, :, :2])


@pytest.mark.parametrize("head_dim", [2, 16, 96, 128])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_the_kernel_makes_the_bytes_of_plain_torch(storage: str, dtype: torch.dtype, head_dim: int) -> None:
    pages = page_format(storage, dtype, head_dim=head_dim, tokens_per_frame=11)
    check(pages, *pair(pages))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_strange_rows(storage: str, dtype: torch.dtype) -> None:
    check(*strange_pair(storage, dtype, samples=2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_nan_and_infinity(storage: str, dtype: torch.dtype) -> None:
    pages = page_format(storage, dtype)
    keys, values = pair(pages)
    keys[0, 0, 0, 0, 3], keys[1, 1, 5, 2, 15], keys[1, 0, 3, 1] = torch.nan, -torch.inf, torch.inf
    values[0, 1, 2, 1], values[1, 0, 2, 0, 0] = torch.nan, torch.inf
    check(pages, keys, values)


@pytest.mark.parametrize("storage", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_a_half(storage: str, dtype: torch.dtype) -> None:
    """All 65536 patterns, each in a row with neighbours and in a row with numbers of every other size."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    pages = PageFormat(storage, 1, 1, 256, 8, 32, dtype)
    check(pages, every.reshape(1, 1, *pages.page_shape), every.reshape(32, -1).T.reshape(1, 1, *pages.page_shape))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_drawn_bits(data: st.DataObject) -> None:
    draw = data.draw
    dtype, storage = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(EIGHT_BITS))
    sizes = [draw(st.integers(1, size)) for size in (3, 2, 20, 4, 24)]
    pages = PageFormat(storage, *sizes[:4], 2 * sizes[4], dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    limits, shape = torch.iinfo(bits), (pages.layers, pages.samples, *pages.page_shape)
    # Exponents near one another, or rows would hold one large entry and zeros; any mantissa.
    low = draw(st.integers(limits.min, limits.max - 1))
    high = min(limits.max, low + draw(st.sampled_from([4, 4 * torch.finfo(dtype).bits ** 4, limits.max])))
    keys, values = (
        torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64).to(bits).view(dtype)
        for _ in range(2)
    )
    check(pages, keys, values)


def test_the_kernel_is_chosen_as_the_ops_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    from longlive_rag_ops.triton_kernels import encode_pages

    calls: list[Any] = []
    launcher = encode_pages.encode_pages
    monkeypatch.setattr(encode_pages, "encode_pages", lambda *given: (calls.append(given), launcher(*given)))
    pages = page_format("int8")
    keys, values = (x.to(DEVICE) for x in pair(pages))
    for engine, variable, kernel in (
        ("auto", None, DEVICE == "cuda"),
        ("auto", "triton", True),
        ("auto", "dense", False),
        ("dense", "triton", False),
        ("reference", None, False),
        ("triton", None, True),
    ):
        if variable:
            monkeypatch.setenv("LONGLIVE_ENGINE", variable)
        else:
            monkeypatch.delenv("LONGLIVE_ENGINE", raising=False)
        calls.clear()
        pages.encode(keys, values, engine=engine)
        assert bool(calls) == kernel, (engine, variable)


def test_auto_encodes_float64_without_the_kernel_which_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = page_format("fp8", torch.float64)
    keys, values = (x.to(DEVICE) for x in pair(pages))
    with pytest.raises(TypeError, match=r"engine 'triton' takes .* for keys, got torch.float64; .*: dense, reference"):
        pages.encode(keys, values, engine="triton")
    monkeypatch.setattr(module, "engine_name", lambda name, device: "auto")  # as on a GPU with Triton
    assert torch.equal(pages.encode(keys, values).cpu(), pages.encode(keys.cpu(), values.cpu(), engine="dense"))
