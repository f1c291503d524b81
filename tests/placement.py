"""Inputs for the Triton kernels of ``write_frames`` and ``place_frames``, and how their results are checked."""

from __future__ import annotations

import copy
from typing import Any

import cases
import torch
from tolerance import RELATIVE_RMS, assert_close_enough

from longlive_rag_ops.rotary import default_split, rotary_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def call(op: str, case: dict[str, Any], engine: str = "triton") -> Any:
    return getattr(torch.ops.longlive, op)(**case, engine=engine)


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=cases.generator(seed)).to(dtype)


def write_case(
    dtype: torch.dtype = torch.float32,
    grid: tuple[int, int] = (4, 6),
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 16,
    slots: tuple[int, ...] = (3, 1),
    rows: tuple[int, ...] = (4, 0),
    positions: tuple[int, ...] = (7, 8),
    weights: torch.dtype | None = None,
    rope: torch.dtype = torch.float32,
    split: tuple[int, int, int] | None = None,
    samples: int = 2,
) -> dict[str, Any]:
    tokens, kv_heads, length = grid[0] * grid[1], kv_heads or heads, len(slots) * grid[0] * grid[1]
    split = split or default_split(head_dim)
    case = {
        "q": normal(samples, length, heads, head_dim, seed=0, dtype=dtype),
        "k": normal(samples, length, kv_heads, head_dim, seed=1, dtype=dtype),
        "v": normal(samples, length, kv_heads, head_dim, seed=2, dtype=dtype),
        "pool_layer": normal(2, samples, 5, tokens, kv_heads, head_dim, seed=3, dtype=dtype),
        "staging": normal(samples, 6, tokens, kv_heads, head_dim, seed=4, dtype=dtype),
        "slots": torch.tensor(slots),
        "staging_rows": torch.tensor(rows),
        "positions": torch.tensor(positions),
        "rope": rotary_table(head_dim, 64, split=split, dtype=rope),
        "rope_split": list(split),
        "grid": list(grid),
    }
    if weights is not None:
        widths = {"q_weight": heads * head_dim, "k_weight": kv_heads * head_dim}
        case |= {name: 1 + 0.3 * normal(width, seed=5, dtype=weights) for name, width in widths.items()}
        case["eps"] = 0.25
    return case


def place_case(
    dtype: torch.dtype = torch.float32,
    kinds: tuple[str, str | None] | None = None,
    tokens: int = 24,
    heads: int = 4,
    head_dim: int = 16,
    scale: torch.dtype = torch.float16,
    rope: torch.dtype = torch.float32,
    split: tuple[int, int, int] | None = None,
    samples: int = 2,
) -> dict[str, Any]:
    """``kinds``: how keys and values are stored (plain, int8, fp8; no values: None), or None for pages of the pool."""
    split = split or default_split(head_dim)
    case = {
        "pool_layer": normal(2, samples, 8, tokens, heads, head_dim, seed=0, dtype=dtype),
        "slots": torch.tensor([[0, 2, -1, 4], [1, 0, 3, 2]]).repeat(1 + samples // 2, 1)[:samples],
        "source": torch.tensor([[5, 6, 5, 6], [6, -1, 5, 5]]).repeat(1 + samples // 2, 1)[:samples],
        "positions": torch.tensor([[0, 9, 1, 11], [0, 3, 63, 2]]).repeat(1 + samples // 2, 1)[:samples],
        "rope": rotary_table(head_dim, 64, split=split, dtype=rope),
        "rope_split": list(split),
    }
    for seed, (name, kind) in enumerate(zip("kv", kinds or (None, None), strict=True)):
        pages = normal(samples, 7, tokens, heads, head_dim, seed=10 + seed, dtype=torch.float32)
        largest = pages.abs().amax(-1)
        if kind == "plain":
            case[f"{name}_pages"] = pages.to(dtype)
        elif kind is not None:
            case[f"{name}_scale"] = (largest / (127 if kind == "int8" else 448)).to(scale)
            units = pages / case[f"{name}_scale"].float()[..., None]
            case[f"{name}_pages"] = units.round().clamp(-127, 127).to(torch.int8)
            if kind == "fp8":
                case[f"{name}_pages"] = units.clamp(-448, 448).to(torch.float8_e4m3fn)
    return case


def storage(x: torch.Tensor) -> torch.Tensor:
    """All that lies in a tensor's storage, gaps too, as integers."""
    flat = x.view(BITS[x.element_size()])
    return flat.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def copied(case: dict[str, Any]) -> dict[str, Any]:
    """On the device, with strides, offsets and the contents of gaps."""

    def copy_of(x: torch.Tensor) -> torch.Tensor:
        return storage(x).to(DEVICE, copy=True).as_strided(x.shape, x.stride(), x.storage_offset()).view(x.dtype)

    return {name: copy_of(x) if isinstance(x, torch.Tensor) else copy.copy(x) for name, x in case.items()}


def written(op: str, case: dict[str, Any]) -> list[torch.Tensor]:
    """Views of what the call writes."""
    pool, views = case["pool_layer"], []
    if op == "write_frames":
        views += [pool[:, :, slot] for slot in case["slots"].tolist() if slot >= 0]
        views += [case["staging"][:, row] for row in case["staging_rows"].tolist() if row >= 0]
    else:
        whole = case.get("k_pages") is None or case.get("v_pages") is not None
        for b, (to, source) in enumerate(zip(case["slots"].tolist(), case["source"].tolist(), strict=True)):
            places = [slot for slot, page in zip(to, source, strict=True) if slot >= 0 and page >= 0]
            views += [pool[: 2 if whole else 1, b, slot] for slot in places]
    return views


def check(op: str, case: dict[str, Any]) -> None:
    """Runs the kernel, the oracle on float64 and plain PyTorch; compares what was written, and what was not."""
    dtype = case["pool_layer"].dtype
    got, plain, exact = copied(case), on_cpu(copied(case)), on_cpu(copied(case))
    exact = {name: x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for name, x in exact.items()}
    results = [call(op, x, e) for x, e in ((got, "triton"), (plain, "dense"), (exact, "reference"))]
    if op == "write_frames":
        assert results[0].is_contiguous() and results[0].dtype == dtype
        assert_close_enough(*results)
    rms = None if any(f"{name}_scale" in case for name in "kv") else RELATIVE_RMS
    for written_by in zip(*(written(op, x) for x in (got, plain, exact)), strict=True):
        assert_close_enough(*written_by, rms=rms)
    untouched = copied(case)
    for one, other in zip(written(op, got), written(op, untouched), strict=True):
        other.copy_(one)
    for name, x in untouched.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(storage(x), storage(got[name])), f"{name} changed outside of what is written"


def on_cpu(case: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in case.items()}
