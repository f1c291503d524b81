"""The bytes of a page: layout, addresses that the core copies by, views, strides, the manifest's description."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_cases import EIGHT_BITS, FLOATS, every_other, page_format, pair

from longlive_rag_ops.bank.page_format import ALIGNMENT, STORAGES, PageFormat

EVERY_DTYPE = (torch.float64, *FLOATS)
PAPER = {"layers": 30, "samples": 1, "tokens_per_frame": 1560, "kv_heads": 12, "head_dim": 128}


def memory(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def raw(x: torch.Tensor) -> bytes:
    return bytes(x.contiguous().flatten().view(torch.uint8).tolist())


def test_alignment_is_the_cores() -> None:
    header = (Path(__file__).parents[2] / "csrc" / "bank" / "page_layout.h").read_text()
    found = re.search(r"kAlignment = (\d+);", header)
    assert found is not None and int(found[1]) == ALIGNMENT


@pytest.mark.parametrize("tokens", [1, 16, 1560])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_eight_bits_take_at_most_a_1_9th_at_head_dim_128(storage: str, dtype: torch.dtype, tokens: int) -> None:
    sizes = PAPER | {"tokens_per_frame": tokens}
    plain, stored = (PageFormat(storage=name, dtype=dtype, **sizes) for name in ("plain", storage))
    assert plain.used_bytes / stored.used_bytes >= 1.9
    if tokens == 1560:  # a page is so large that padding counts for nothing
        assert plain.page_bytes / stored.page_bytes >= 1.9
        assert plain.record_bytes / stored.record_bytes >= 1.9


def test_sizes_of_the_papers_pages() -> None:
    plain, int8 = (PageFormat(storage=name, dtype=torch.bfloat16, **PAPER) for name in ("plain", "int8"))
    data = 1560 * 12 * 128
    assert (plain.data_bytes, plain.used_bytes, plain.page_bytes) == (2 * data, 4 * data, 9_584_640)
    assert (int8.data_bytes, int8.used_bytes) == (data, 2 * data + 2 * 2 * 1560 * 12)
    assert int8.page_bytes == 4_870_144 and int8.record_bytes == 30 * 4_870_144
    assert plain.segments == [(0, 2 * data), (2 * data, 2 * data)] and int8.segments == [(0, 4_870_144)]
    for pages in (plain, int8):
        assert pages.page_bytes % ALIGNMENT == 0 and 0 <= pages.page_bytes - pages.used_bytes < ALIGNMENT


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_a_plain_page_is_keys_then_values_then_zeros(dtype: torch.dtype) -> None:
    pages = page_format("plain", dtype)
    keys, values = pair(pages)
    stored = pages.encode(keys, values)
    for layer in range(pages.layers):
        for sample in range(pages.samples):
            want = raw(keys[layer, sample]) + raw(values[layer, sample])
            assert bytes(stored[layer, sample].tolist()) == want.ljust(pages.page_bytes, b"\0")
    for one, other in zip(pages.decode(stored), (keys, values), strict=True):
        assert torch.equal(one, other) and one.dtype == dtype and one.is_contiguous()


@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_a_quantised_page_is_data_then_scales_then_zeros(storage: str) -> None:
    pages = page_format(storage)
    keys, values = pair(pages)
    stored = pages.encode(keys, values)
    tokens, heads, channels = pages.page_shape
    for layer in range(pages.layers):
        for sample in range(pages.samples):
            page = bytes(stored[layer, sample].tolist())
            n, m = tokens * heads * channels, tokens * heads * 2
            for at, (x, data) in enumerate(((keys, page[:n]), (values, page[n : 2 * n]))):
                scales = page[2 * n + at * m : 2 * n + (at + 1) * m]
                for row in range(tokens * heads):
                    scale = torch.frombuffer(bytearray(scales[2 * row : 2 * row + 2]), dtype=torch.float16).double()
                    kind = pages.stored_dtype
                    codes = torch.frombuffer(bytearray(data[row * channels : (row + 1) * channels]), dtype=kind)
                    want = x[layer, sample].flatten(0, 1)[row].double()
                    error = (codes.double() * scale - want).abs().max() / want.abs().max()
                    assert error < (0.5 / 127 if storage == "int8" else 1 / 16) * 1.01
            assert not any(page[2 * n + 2 * m :])


@pytest.mark.parametrize("storage", STORAGES)
def test_any_strides_give_the_same_bytes(storage: str) -> None:
    pages = page_format(storage)
    keys, values = pair(pages)
    want = pages.encode(keys, values)
    assert torch.equal(pages.encode(every_other(keys), every_other(values)), want)
    staging = torch.full(
        (2, 2, 9, *pages.page_shape), 3.0, dtype=pages.dtype
    )  # as the window has it: (layers, B, rows)
    staging[:, :, 4] = keys
    pool = torch.full(pages.slots_shape(5) if storage == "plain" else (2, 2, 2, 5, *pages.page_shape), 3.0)
    pool = pool.to(pages.dtype)
    pool[:, 1, :, 2] = values
    assert torch.equal(pages.encode(staging[:, :, 4], pool[:, 1, :, 2]), want)
    assert torch.equal(pages.encode(keys.expand_as(keys), values.requires_grad_()), want)


@pytest.mark.parametrize("storage", STORAGES)
def test_out_is_filled_padding_included_and_nothing_else_is(storage: str) -> None:
    pages = page_format(storage)
    keys, values = pair(pages)
    want = pages.encode(keys, values)
    slots = torch.full((2, 2, 4, pages.page_bytes), 0xAB, dtype=torch.uint8)
    out = slots[:, :, 2]
    assert pages.encode(keys, values, out) is out and torch.equal(out, want)
    assert (slots[:, :, [0, 1, 3]] == 0xAB).all()
    for one, other in zip(pages.decode(out), pages.decode(want), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("storage", STORAGES)
def test_views_write_through_and_have_the_shapes_of_place_frames(storage: str) -> None:
    pages = page_format(storage)
    layer = torch.zeros(2, 4, pages.page_bytes, dtype=torch.uint8)
    views = pages.views(layer)
    assert set(views) == {"k_pages", "v_pages"} | ({"k_scale", "v_scale"} if pages.quantised else set())
    for name, view in views.items():
        assert view.shape == ((2, 4, 6, 3) if "scale" in name else (2, 4, 6, 3, 16))
        assert view.dtype == (torch.float16 if "scale" in name else pages.stored_dtype)
        view.view(torch.uint8).fill_(1)
    assert (layer[..., : pages.used_bytes] == 1).all() and not layer[..., pages.used_bytes :].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_addresses_of_plain_slots_are_those_of_their_pages(dtype: torch.dtype) -> None:
    pages = page_format("plain", dtype)
    slots = pages.slots(5, "cpu")
    assert slots.shape == (2, 2, 2, 5, 6, 3, 16) and slots.dtype == dtype and not slots.any()
    slots.copy_(torch.randn(slots.shape))
    for tensor in (slots, slots[:, :, :, 1:4]):
        parts = pages.slot_parts(tensor)
        for side, (base, by_layer, by_sample, by_slot) in enumerate(parts):
            for layer in range(2):
                for sample in range(2):
                    for slot in range(tensor.shape[3]):
                        address = base + layer * by_layer + sample * by_sample + slot * by_slot
                        assert memory(address, pages.data_bytes) == raw(tensor[layer, side, sample, slot])


@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_addresses_of_quantised_slots_are_those_of_their_bytes(storage: str) -> None:
    pages = page_format(storage)
    slots = pages.slots(5, "cpu")
    assert slots.shape == (2, 2, 5, pages.page_bytes) and slots.dtype == torch.uint8 and not slots.any()
    slots.random_()
    ((base, by_layer, by_sample, by_slot),) = pages.slot_parts(slots)
    for layer, sample, slot in ((0, 0, 0), (1, 0, 3), (0, 1, 4), (1, 1, 2)):
        address = base + layer * by_layer + sample * by_sample + slot * by_slot
        assert memory(address, pages.page_bytes) == raw(slots[layer, sample, slot])


def test_addresses_of_sources() -> None:
    pages = page_format("plain", torch.float16)
    pool = torch.randn(2, 2, 2, 5, 6, 3, 16).half()
    staging = torch.randn(2, 2, 7, 6, 3, 16).half()
    for side, part in enumerate(pages.source_parts(staging[:, :, 3], pool[:, 1, :, 4])):
        base, by_layer, by_sample = part
        for layer, sample in ((0, 0), (1, 0), (0, 1), (1, 1)):
            want = pool[layer, 1, sample, 4] if side else staging[layer, sample, 3]
            assert memory(base + layer * by_layer + sample * by_sample, pages.data_bytes) == raw(want)
    shared = torch.randn(1, 2, 6, 3, 16).half().expand(2, -1, -1, -1, -1)  # all layers the same: may be read
    assert pages.source_parts(shared, shared)[0][1] == 0
    pages = page_format("int8")
    stored = pages.encode(*pair(pages))
    ((base, by_layer, by_sample),) = pages.source_parts(stored)
    assert memory(base + by_layer + by_sample, pages.page_bytes) == raw(stored[1, 1])


def test_a_format_survives_json() -> None:
    for storage in STORAGES:
        for dtype in EVERY_DTYPE:
            pages = page_format(storage, dtype)
            assert PageFormat.from_dict(json.loads(json.dumps(pages.to_dict()))) == pages


GOOD = {**PAPER, "storage": "int8", "dtype": "bfloat16"}
WRONG: list[tuple[Any, type[Exception], str]] = [
    (GOOD | {"storage": "int4"}, ValueError, "storage must be one of plain, int8, fp8; got 'int4'"),
    (GOOD | {"storage": 8}, ValueError, "storage must be one of"),
    (GOOD | {"storage": []}, ValueError, "storage must be one of"),
    (GOOD | {"layers": 0}, ValueError, "layers must be at least 1, got 0"),
    (GOOD | {"samples": True}, TypeError, "samples must be an int, got bool"),
    (GOOD | {"kv_heads": "12"}, TypeError, "kv_heads must be an int, got str"),
    (GOOD | {"head_dim": 127}, ValueError, "head_dim must be even"),
    (GOOD | {"dtype": "int8"}, ValueError, "dtype must be one of float64, float32, float16, bfloat16; got 'int8'"),
    (GOOD | {"dtype": None}, ValueError, "dtype must be one of"),
    (GOOD | {"extra": 1}, ValueError, "must have the fields .*got .*extra"),
    ({name: value for name, value in GOOD.items() if name != "layers"}, ValueError, "must have the fields .*layers"),
    ([], ValueError, "must have the fields .*got list"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG)
def test_wrong_fields_are_named(fields: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PageFormat.from_dict(fields)
    if isinstance(fields, dict) and set(fields) == set(GOOD) and not str(message).startswith("dtype"):
        with pytest.raises(error, match=message):
            PageFormat(**(fields | {"dtype": torch.bfloat16}))


def test_a_dtype_that_is_no_float_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype must be torch.float64 or .*, got torch.int8"):
        page_format("plain", torch.int8)


def test_wrong_tensors_are_named() -> None:
    plain, int8 = page_format("plain"), page_format("int8")
    keys, values = pair(plain)
    stored = int8.encode(keys, values)
    for pages in (plain, int8):
        with pytest.raises(TypeError, match=r"keys must have dtype torch.bfloat16, got torch.float32"):
            pages.encode(keys.float(), values)
        with pytest.raises(ValueError, match=r"values must have shape \(2, 2, 6, 3, 16\), got \(2, 2, 6, 3, 8\)"):
            pages.encode(keys, values[..., :8])
        with pytest.raises(ValueError, match=r"values must be on cpu, got meta"):
            pages.encode(keys, values.to("meta"))
        before = torch.zeros(2, 2, pages.page_bytes - 1, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"out must have shape \(2, 2, "):
            pages.encode(keys, values, before)
        with pytest.raises(TypeError, match=r"out must have dtype torch.uint8"):
            pages.encode(keys, values, torch.zeros(2, 2, pages.page_bytes))
        with pytest.raises(ValueError, match="engine must be one of"):
            int8.encode(keys, values, engine="fast")
    wide = torch.zeros(2, 2, 2 * int8.page_bytes, dtype=torch.uint8)
    for odd in (wide[..., ::2], wide[..., 1 : int8.page_bytes + 1]):
        with pytest.raises(ValueError, match="pages must have contiguous bytes and begin at multiples of 2"):
            int8.encode(keys, values, odd)
        with pytest.raises(ValueError, match="pages must have contiguous bytes"):
            int8.decode(odd)
    assert not wide.any()
    with pytest.raises(ValueError, match="values must be given together with keys"):
        plain.source_parts(keys)
    with pytest.raises(ValueError, match="'int8' takes encoded pages and no values"):
        int8.source_parts(stored, stored)
    with pytest.raises(ValueError, match=r"keys must have contiguous pages \(6, 3, 16\), got strides"):
        plain.source_parts(every_other(keys), values)
    with pytest.raises(ValueError, match=r"values must have contiguous pages"):
        plain.source_parts(keys, values.transpose(2, 3).contiguous().transpose(2, 3))


def test_slots_that_cannot_be_copied_to_are_refused() -> None:
    plain, int8 = page_format("plain"), page_format("int8")
    slots, bytes_ = plain.slots(4, "cpu"), int8.slots(4, "cpu")
    with pytest.raises(ValueError, match=r"slots must have shape \(2, 2, 2, 4, 6, 3, 16\), got"):
        plain.slot_parts(slots[:, :, :1])
    with pytest.raises(ValueError, match="slots must have shape"):
        int8.slot_parts(bytes_[0])
    with pytest.raises(TypeError, match=r"slots must have dtype torch.bfloat16, got torch.float16"):
        plain.slot_parts(slots.half())
    with pytest.raises(ValueError, match="slots must have contiguous pages"):
        plain.slot_parts(slots.transpose(4, 5).contiguous().transpose(4, 5))
    for repeated in (
        slots[:, :, :, :1].expand(-1, -1, -1, 4, -1, -1, -1),
        slots[:, :1].expand(-1, 2, *slots.shape[2:]),
    ):
        with pytest.raises(ValueError, match="slots must have pages that do not overlap"):
            plain.slot_parts(repeated)
    with pytest.raises(ValueError, match="slots must have pages that do not overlap"):
        int8.slot_parts(bytes_.as_strided(bytes_.shape, (4 * int8.page_bytes, 4 * int8.page_bytes, 4096 - 1, 1)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_drawn_formats_keep_their_promises(data: st.DataObject) -> None:
    draw = data.draw
    sizes = {name: draw(st.integers(1, 4)) for name in ("layers", "samples", "tokens_per_frame", "kv_heads")}
    pages = PageFormat(
        storage=draw(st.sampled_from(STORAGES)),
        dtype=draw(st.sampled_from(EVERY_DTYPE)),
        head_dim=2 * draw(st.integers(1, 80)),
        **sizes,
    )
    end = 0
    for offset, size in pages.segments:
        assert offset == end and size > 0
        end = offset + size
    assert pages.used_bytes <= pages.page_bytes == -(-end // ALIGNMENT) * ALIGNMENT
    assert pages.page_bytes - pages.used_bytes < ALIGNMENT
    keys, values = pair(pages, draw(st.integers(0, 9)))
    stored = pages.encode(keys, values)
    assert stored.numel() == pages.record_bytes and not stored[..., pages.used_bytes :].any()
    bound = {"plain": 0.0, "int8": 0.5 / 127, "fp8": 1 / 16}[pages.storage] * 1.002
    rounding = 0 if pages.storage == "plain" else torch.finfo(pages.dtype).eps
    for one, other in zip(pages.decode(stored), (keys, values), strict=True):
        error = (one.double() - other.double()).abs()
        assert (error <= (bound + rounding) * other.double().abs().amax(-1, keepdim=True) + 1e-7).all()
    assert PageFormat.from_dict(pages.to_dict()) == pages
