"""The Triton kernels of ``write_frames`` and ``place_frames`` against the oracle; without a GPU, in the interpreter."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placement import BITS, FLOATS, call, check, copied, place_case, storage, write_case

from longlive_rag_ops.rotary import default_split, rotary_table

pytest.importorskip("triton")


def in_turn(table: dict[str, dict[str, Any]]) -> list[Any]:
    """Each entry in one of the dtypes; the drawn cases below mix them."""
    return [pytest.param(name, FLOATS[i % 3], id=name) for i, name in enumerate(table)]


WRITES: dict[str, dict[str, Any]] = {
    "one token": {"grid": (1, 1), "heads": 3, "head_dim": 128},
    "one token, one head, two channels": {"grid": (1, 1), "heads": 1, "head_dim": 2, "weights": torch.float32},
    "24 tokens, weights": {"weights": torch.float32},
    "130 tokens, grouped": {"grid": (10, 13), "heads": 4, "kv_heads": 2, "weights": torch.float16, "samples": 1},
    "many queries a key": {"heads": 12, "kv_heads": 1, "head_dim": 64},
    "12 heads of 128": {"grid": (1, 3), "heads": 12, "head_dim": 128, "weights": torch.bfloat16},
    "head of 96": {"grid": (3, 3), "heads": 5, "head_dim": 96, "weights": torch.float64, "samples": 1},
    "odd heads, odd channels": {"grid": (5, 2), "heads": 7, "head_dim": 42, "rope": torch.float64},
    "largest head": {"grid": (3, 2), "heads": 2, "head_dim": 256, "weights": torch.float32},
    "40 heads": {"grid": (1, 3), "heads": 40, "head_dim": 128, "weights": torch.float32, "samples": 1},
    "nothing placed": {"slots": (-1, -1), "rows": (2, -1)},
    "partly placed": {"slots": (-1, 4, 0), "rows": (5, 2, -1), "positions": (0, 0, 63), "weights": torch.float32},
    "no time": {"split": (0, 8, 8)},
    "time alone": {"split": (16, 0, 0), "weights": torch.float32},
    "no height": {"split": (6, 0, 10), "rope": torch.float64},
    "three samples": {"samples": 3, "slots": (2, 0, 1), "rows": (1, 2, 0), "positions": (5, 4, 9)},
}


@pytest.mark.parametrize(("name", "dtype"), in_turn(WRITES))
def test_writing_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    check("write_frames", write_case(dtype, **WRITES[name]))


def test_writing_whole_frames_of_1560_tokens() -> None:
    check(
        "write_frames", write_case(grid=(30, 52), heads=2, head_dim=4, samples=1, slots=(4,), rows=(1,), positions=(3,))
    )


PLACES: dict[str, dict[str, Any]] = {
    "pool": {},
    "one token": {"tokens": 1, "heads": 3, "head_dim": 128},
    "130 tokens, odd heads": {"tokens": 130, "heads": 3, "head_dim": 64},
    "12 heads of 128": {"tokens": 5, "heads": 12, "head_dim": 128, "rope": torch.float64},
    "keys": {"kinds": ("plain", None), "head_dim": 96},
    "pages": {"kinds": ("plain", "plain"), "heads": 5, "head_dim": 42},
    "int8": {"kinds": ("int8", "int8"), "heads": 3},
    "int8 keys": {"kinds": ("int8", None), "head_dim": 128, "tokens": 7},
    "fp8": {"kinds": ("fp8", "fp8"), "head_dim": 128, "tokens": 7},
    "fp8, scales float64": {"kinds": ("fp8", "fp8"), "scale": torch.float64, "head_dim": 22},
    "mixed": {"kinds": ("fp8", "int8"), "scale": torch.float32},
    "quantised keys, plain values": {"kinds": ("int8", "plain"), "scale": torch.bfloat16},
    "plain keys, quantised values": {"kinds": ("plain", "fp8")},
    "no time": {"split": (0, 6, 10)},
    "time alone": {"split": (16, 0, 0), "kinds": ("int8", "int8")},
    "three samples": {"samples": 3, "kinds": ("int8", "int8")},
}


@pytest.mark.parametrize(("name", "dtype"), in_turn(PLACES))
def test_placing_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    check("place_frames", place_case(dtype, **PLACES[name]))


def layouts() -> list[Any]:
    """Every tensor of a call with gaps between its elements, and between its rows if it has any."""
    calls = {"write_frames": write_case(weights=torch.float32), "place_frames": place_case(kinds=("fp8", "int8"))}
    named = [(op, name, x) for op, case in calls.items() for name, x in case.items() if isinstance(x, torch.Tensor)]
    forms = [(cases.gapped, *one) for one in named] + [(cases.strided, *one) for one in named if one[2].dim() > 1]
    return [pytest.param(op, name, layout, id=f"{op}-{name}-{layout.__name__}") for layout, op, name, _ in forms]


@pytest.mark.parametrize(("op", "name", "layout"), layouts())
def test_any_strides(op: str, name: str, layout: Any) -> None:
    small = {"heads": 3, "head_dim": 12}
    case = place_case(kinds=("fp8", "int8"), **small) if op == "place_frames" else None
    case = case or write_case(torch.bfloat16, weights=torch.float32, **small)
    x, fp8 = case[name], case[name].dtype == torch.float8_e4m3fn
    case[name] = layout(x.view(torch.int8)).view(x.dtype) if fp8 else layout(x)
    assert not case[name].is_contiguous()
    check(op, case)


def test_channels_outermost_and_sides_innermost() -> None:
    """No stride of the pool is where a kernel would like it."""
    case = write_case(torch.float16, weights=torch.float32)
    for name in ("q", "k", "v", "staging", "pool_layer", "rope"):
        order = list(reversed(range(case[name].dim())))
        case[name] = case[name].permute(order).contiguous().permute(order)
    check("write_frames", case)
    case = place_case(torch.float16)
    order = list(reversed(range(6)))
    case["pool_layer"] = case["pool_layer"].permute(order).contiguous().permute(order)
    check("place_frames", case)


SPLITS = st.tuples(*[st.integers(0, 6).map(lambda pairs: 2 * pairs)] * 3).filter(lambda split: sum(split) > 0)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_drawn_blocks_agree_with_the_oracle(data: st.DataObject) -> None:
    draw = data.draw
    frames, kv_heads, split = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(SPLITS)
    places = st.permutations(range(5)).map(lambda order: [*order, -1, -1])
    case = write_case(
        draw(st.sampled_from(FLOATS)),
        grid=(draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=sum(split),
        split=split,
        slots=tuple(draw(places)[-frames - draw(st.integers(0, 2)) :][:frames]),
        rows=tuple(draw(places)[-frames - draw(st.integers(0, 2)) :][:frames]),
        positions=tuple(draw(st.lists(st.integers(0, 63), min_size=frames, max_size=frames))),
        weights=draw(st.sampled_from([None, *FLOATS])),
        rope=draw(st.sampled_from([torch.float32, torch.float64])),
        samples=draw(st.integers(1, 2)),
    )
    check("write_frames", case)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_drawn_pages_agree_with_the_oracle(data: st.DataObject) -> None:
    draw, split = data.draw, data.draw(SPLITS)
    kinds = st.tuples(st.sampled_from(["plain", "int8", "fp8"]), st.sampled_from([None, "plain", "int8", "fp8"]))
    case = place_case(
        draw(st.sampled_from(FLOATS)),
        kinds=draw(st.none() | kinds),
        tokens=draw(st.integers(1, 30)),
        heads=draw(st.integers(1, 7)),
        head_dim=sum(split),
        split=split,
        scale=draw(st.sampled_from(FLOATS)),
        samples=draw(st.integers(1, 3)),
    )
    check("place_frames", case)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_key_placed_again_has_the_bits_of_the_key_placed_at_once(dtype: torch.dtype) -> None:
    case = write_case(dtype, heads=3, head_dim=42, positions=(0, 9))
    first = case["k"][:, : len(case["k"][0]) // 2]
    first[..., 0], first[..., 1], first[..., 2] = -0.0, -1.0, torch.inf  # multiplying by 1 and 0 would change them
    case = copied(case)
    call("write_frames", case)
    slots, rows, positions = (case[name].repeat(2, 1) for name in ("slots", "staging_rows", "positions"))
    at_once = storage(case["pool_layer"][0][:, case["slots"]]).clone()
    case["pool_layer"][0] = 0
    again = {name: case[name] for name in ("pool_layer", "rope", "rope_split")}
    again |= {"slots": slots, "source": rows, "positions": positions, "k_pages": case["staging"]}
    call("place_frames", again)
    assert torch.equal(storage(case["pool_layer"][0][:, case["slots"]]), at_once) and at_once.any()


def strange(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Every kind of bit pattern, NaN with payloads and both zeros among them."""
    bits = BITS[dtype.itemsize]
    limits = torch.iinfo(bits)
    x = torch.randint(limits.min, limits.max + 1, shape, generator=cases.generator(8), dtype=bits)
    x[..., 0], x[..., 1] = limits.min, limits.max  # -0.0, NaN
    return x.view(dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_copied_keeps_every_bit(dtype: torch.dtype) -> None:
    """Values, and plain pages at position 0, whatever their bits; keys at other positions but for temporal channels."""
    case = write_case(dtype)
    case["v"] = strange(case["v"].shape, dtype)
    case = copied(case)
    call("write_frames", case)
    for frame, slot in enumerate(case["slots"].tolist()):
        values = case["v"].unflatten(1, (2, -1))[:, frame]
        assert torch.equal(storage(case["pool_layer"][1, :, slot].contiguous()), storage(values.contiguous()))
    case = place_case(dtype, samples=1)
    case["pool_layer"] = strange(case["pool_layer"].shape, dtype)
    case = copied(case)
    call("place_frames", case)
    pool, time = case["pool_layer"].view(BITS[dtype.itemsize]), case["rope_split"][0]
    assert torch.equal(pool[:, 0, 0], pool[:, 0, 5])
    assert torch.equal(pool[1, 0, 2], pool[1, 0, 6])
    assert torch.equal(pool[0, 0, 2, ..., time:], pool[0, 0, 6, ..., time:])
    assert not torch.equal(pool[0, 0, 2, ..., :time], pool[0, 0, 6, ..., :time])


def test_every_fp8_code_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 4, 4, 16).view(torch.float8_e4m3fn)
    case = {
        "pool_layer": torch.zeros(2, 1, 1, 4, 4, 16),
        **{name: torch.zeros(1, 1, dtype=torch.int64) for name in ("slots", "source", "positions")},
        "rope": rotary_table(16, 4, dtype=torch.float32),
        "rope_split": list(default_split(16)),
        **{f"{name}_pages": codes for name in "kv"},
        **{f"{name}_scale": torch.ones(1, 1, 4, 4) for name in "kv"},
    }
    case = copied(case)
    call("place_frames", case)
    for side in case["pool_layer"]:
        torch.testing.assert_close(side[0, 0].cpu(), codes[0, 0].float(), rtol=0, atol=0, equal_nan=True)


def test_attention_of_placed_pages_depends_on_relative_time_only() -> None:
    products = []
    for shift in (0, 11):
        case = copied(write_case(head_dim=42, positions=(3 + shift, 5 + shift)))
        q = call("write_frames", case).unflatten(1, (2, -1))
        products.append(torch.einsum("bthd,bshd->bths", q[:, 1], case["pool_layer"][0, :, case["slots"][0]]))
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-5)


def test_nothing_to_do() -> None:
    case = copied({name: x[:0] if name in "qkv" else x for name, x in write_case().items()})
    case |= {"pool_layer": case["pool_layer"][:, :0], "staging": case["staging"][:0]}
    assert call("write_frames", case).shape == case["q"].shape
    for sizes in (slice(0, 0), slice(0, 2)):
        case = copied(place_case())
        before = storage(case["pool_layer"]).clone()
        for name in ("slots", "source", "positions"):
            case[name] = case[name][sizes, :0]
        case["pool_layer"] = case["pool_layer"][:, sizes]
        call("place_frames", case)
        assert torch.equal(storage(case["pool_layer"]), before)


def test_float64_is_refused() -> None:
    message = r"engine 'triton' takes float32, float16 or bfloat16 .*, got torch.float64; engines .*: dense, reference"
    with pytest.raises(TypeError, match=message):
        call("write_frames", copied(write_case(torch.float64)))
    with pytest.raises(TypeError, match=message):
        call("place_frames", copied(place_case(torch.float64)))
