"""What `compile_report` compiles: calls of the launchers at the paper's shape and around it, on tensors without data.

The paper's shape is that of Wan 2.1 1.3B at 480 x 832: blocks of 3 latent frames of 30 x 52 tokens, 12 heads of 128
channels, a window of 12 slots, bfloat16. Every row of `configs.CONFIGS` is met by a case.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..assignment import STATE_ROWS
from ..rotary import default_split

GRID = (30, 52)
TOKENS = GRID[0] * GRID[1]
BLOCK = 3  # frames
HEADS, HEAD_DIM = 12, 128
WINDOW, BANK, STAGING = 12, 64, 15  # slots of the window, pages of history, rows of the staging buffer
LAYERS = 30
POSITIONS = 1024  # rows of the rotary table
BF16, FP16, FP32, INT8, FP8, INT64 = (
    *(torch.bfloat16, torch.float16, torch.float32),
    *(torch.int8, torch.float8_e4m3fn, torch.int64),
)
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32", INT8: "int8", FP8: "fp8"}


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        op: module of this package, and the function in it after a dot when that is named otherwise.
        name: what is special about the call.
        arguments: makes them, by name.
    """

    op: str
    name: str
    arguments: Callable[[], Mapping[str, Any]]

    def run(self) -> None:
        """Calls the launcher."""
        module, _, function = self.op.rpartition(".")
        launcher = getattr(importlib.import_module(f".{module or function}", __package__), function)
        launcher(**self.arguments())


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rope(head_dim: int) -> dict[str, Any]:
    return {"rope": _meta(POSITIONS, head_dim // 2, 2, dtype=FP32), "rope_split": list(default_split(head_dim))}


def _write(
    dtype: torch.dtype = BF16,
    head_dim: int = HEAD_DIM,
    heads: int = HEADS,
    kv_heads: int = HEADS,
    norm: bool = True,
    samples: int = 1,
) -> Case:
    def arguments() -> Mapping[str, Any]:
        keys = (samples, BLOCK * TOKENS, kv_heads, head_dim)
        widths = {"q_weight": heads * head_dim, "k_weight": kv_heads * head_dim}
        return {
            "q": _meta(samples, BLOCK * TOKENS, heads, head_dim, dtype=dtype),
            "k": _meta(*keys, dtype=dtype),
            "v": _meta(*keys, dtype=dtype),
            "pool_layer": _meta(2, samples, WINDOW + BANK, TOKENS, kv_heads, head_dim, dtype=dtype),
            "staging": _meta(samples, STAGING, TOKENS, kv_heads, head_dim, dtype=dtype),
            **{name: _meta(BLOCK, dtype=INT64) for name in ("slots", "staging_rows", "positions")},
            **_rope(head_dim),
            "grid": list(GRID),
            **({name: _meta(width, dtype=dtype) for name, width in widths.items()} if norm else {}),
        }

    return Case("write_frames", _shape(dtype, heads, kv_heads, head_dim, samples, norm and "norm"), arguments)


def _place(pages: str = "pool", dtype: torch.dtype = BF16, head_dim: int = HEAD_DIM, samples: int = 1) -> Case:
    def arguments() -> Mapping[str, Any]:
        bank = (samples, BANK, TOKENS, HEADS, head_dim)
        given: dict[str, Any] = {}
        if pages == "keys":
            given["k_pages"] = _meta(samples, STAGING, TOKENS, HEADS, head_dim, dtype=dtype)
        elif pages != "pool":
            given = {f"{name}_pages": _meta(*bank, dtype=INT8 if pages == "int8" else FP8) for name in "kv"}
            given |= {f"{name}_scale": _meta(*bank[:-1], dtype=FP16) for name in "kv"}
        return {
            "pool_layer": _meta(2, samples, WINDOW + BANK, TOKENS, HEADS, head_dim, dtype=dtype),
            **{name: _meta(samples, WINDOW, dtype=INT64) for name in ("slots", "source", "positions")},
            **_rope(head_dim),
            **given,
        }

    return Case("place_frames", _shape(dtype, HEADS, HEADS, head_dim, samples, f"from {pages}"), arguments)


def _encode(pages: str, dtype: torch.dtype = BF16, head_dim: int = HEAD_DIM, padding: int = 1536) -> Case:
    def arguments() -> Mapping[str, Any]:
        frame = (LAYERS, 1, TOKENS, HEADS, head_dim)
        stored = INT8 if pages == "int8" else FP8
        return {
            **{name: _meta(*frame, dtype=dtype) for name in ("keys", "values")},
            **{f"{name}_pages": _meta(*frame, dtype=stored) for name in "kv"},
            **{f"{name}_scale": _meta(*frame[:-1], dtype=FP16) for name in "kv"},
            "padding": _meta(LAYERS, 1, padding, dtype=torch.uint8),
            "top": 127 if pages == "int8" else 448,
            "largest": 65504.0,
        }

    return Case("encode_pages", _shape(dtype, HEADS, HEADS, head_dim, 1, f"to {pages}"), arguments)


TABLES = ("run", "pages", "turned", "int8 pages", "int8 turned")


def _attend(
    table: str = "pages",
    dtype: torch.dtype = BF16,
    head_dim: int = HEAD_DIM,
    heads: int = HEADS,
    kv_heads: int = HEADS,
    *,
    lse: bool = False,
    samples: int = 1,
    length: int = BLOCK * TOKENS,
    odd: bool = False,
) -> Case:
    """``table``: run; pages (a table of slots); turned (with shifts); int8 pages, int8 turned (quantised).

    ``odd``: strides that neither the tensor memory accelerator nor cp.async can take.
    """

    def arguments() -> Mapping[str, Any]:
        pool = (2, samples, WINDOW + BANK, TOKENS, kv_heads, head_dim)
        layer = _meta(*pool[:-1], head_dim + 4 * odd, dtype=INT8 if "int8" in table else dtype)[..., :head_dim]
        given: dict[str, Any] = {"run": WINDOW} if table == "run" else {"slots": _meta(samples, WINDOW, dtype=INT64)}
        if "turned" in table:
            given |= {"shifts": _meta(samples, WINDOW, dtype=INT64), **_rope(head_dim)}
        if "int8" in table:
            given |= {f"{name}_scale": _meta(*pool[1:-1], dtype=FP16) for name in "kv"}
        q = _meta(samples, length, heads, head_dim, dtype=dtype)
        return {"q": q, "pool_layer": layer, "return_lse": lse, **given}

    special = (
        table,
        "lse" if lse else "",
        f"{length} queries" if length != BLOCK * TOKENS else "",
        "odd strides" if odd else "",
    )
    return Case("window_attend", _shape(dtype, heads, kv_heads, head_dim, samples, *special), arguments)


def _attend_counted() -> Case:
    def arguments() -> Mapping[str, Any]:
        return {
            "q": _meta(1, BLOCK * TOKENS, HEADS, HEAD_DIM),
            "pool_layer": _meta(2, 1, WINDOW + BANK, TOKENS, HEADS, HEAD_DIM),
            "counts": _meta(1, dtype=INT64),
            "most": WINDOW,
        }

    return Case("window_attend.attend_run", _shape(BF16, HEADS, HEADS, HEAD_DIM, 1, "run counted"), arguments)


def _merge(dtype: torch.dtype = BF16, head_dim: int = HEAD_DIM, parts: int = 2) -> Case:
    def arguments() -> Mapping[str, Any]:
        return {
            "outs": _meta(parts, 1, BLOCK * TOKENS, HEADS, head_dim, dtype=dtype),
            "lses": _meta(parts, 1, HEADS, BLOCK * TOKENS, dtype=FP32),
        }

    return Case("merge_attention", _shape(dtype, HEADS, HEADS, head_dim, 1, f"{parts} parts"), arguments)


def _retrieve(
    k: int = 6,
    embedding: int = 1024,
    dtype: torch.dtype = BF16,
    *,
    rows: int = 4096,
    normalized: bool = True,
    min_score: float | None = None,
    diversity: float = 0.0,
    exclude: int = 0,
    samples: int = 1,
) -> Case:
    """``dtype``: that of the index; the query of an int8 index is bfloat16."""

    def arguments() -> Mapping[str, Any]:
        return {
            "query": _meta(samples, embedding, dtype=BF16 if dtype == INT8 else dtype),
            "index": _meta(samples, rows, embedding, dtype=dtype),
            "index_ids": _meta(samples, rows, dtype=INT64),
            "index_length": _meta(1, dtype=INT64),
            "end_frame": _meta(1, dtype=INT64),
            "k": k,
            "first_frame": 1,
            "recent_exclude": 5,
            "exclude": _meta(samples, exclude, dtype=INT64) if exclude else None,
            "normalized": normalized,
            **({"index_scale": _meta(samples, rows, dtype=FP32)} if dtype == INT8 else {}),
            **({"min_score": min_score} if min_score is not None else {}),
            **({"diversity": diversity} if diversity else {}),
        }

    words = (
        f"k {k}",
        f"E {embedding}",
        SHORT[dtype],
        "unit rows" if normalized else "raw rows",
        f"{rows} rows" if rows != 4096 else "",
        "min_score" if min_score is not None else "",
        "diversity" if diversity else "",
        "exclude" if exclude else "",
        f"{samples} samples" if samples > 1 else "",
    )
    return Case("topk_retrieve", ", ".join(word for word in words if word), arguments)


def _shape(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, samples: int, *special: str | bool) -> str:
    words = [word for word in special if isinstance(word, str) and word]
    words += [SHORT[dtype], f"D {head_dim}"]
    words += [f"heads {heads}/{kv_heads}"] if (heads, kv_heads) != (HEADS, HEADS) else []
    return ", ".join([*words, *([f"{samples} samples"] if samples > 1 else [])])


def _assign(window: int, top_k: int, *, select: bool = True, rule: str = "slot") -> Case:
    def arguments() -> Mapping[str, Any]:
        return {
            "window_state": _meta(1, STATE_ROWS, window, dtype=INT64),
            "chosen": _meta(1, top_k, dtype=INT64) if select else None,
            "frame_slot": _meta(1, BANK, dtype=INT64),
            "start_frame": _meta(1, dtype=INT64),
            "frames": BLOCK,
            "sink": 1,
            "top_k": top_k,
            "staging_rows": STAGING,
            "pool_slots": window + BANK,
            "positions": POSITIONS,
            "position_rule": rule,
        }

    words = [f"window {window}, {top_k} of it memory", "" if select else "no choice", rule if rule != "slot" else ""]
    return Case("assign_window", ", ".join(word for word in words if word), arguments)


CASES: tuple[Case, ...] = (
    _retrieve(),
    _retrieve(dtype=INT8),
    _retrieve(dtype=FP32),
    _retrieve(k=64),
    _retrieve(k=64, rows=20000),
    _retrieve(diversity=0.3),
    _retrieve(embedding=768, normalized=False),
    _retrieve(min_score=0.2, exclude=3),
    _retrieve(dtype=INT8, normalized=False, embedding=768),
    _retrieve(dtype=INT8, diversity=0.3),
    _retrieve(dtype=FP16, samples=2),
    _assign(WINDOW, 6),
    _assign(WINDOW, 6, select=False),
    _assign(WINDOW, 6, rule="absolute"),
    _assign(WINDOW, 6, rule="before_window"),
    _assign(240, 64),
    _write(),
    _write(norm=False),
    _write(head_dim=64),
    _write(head_dim=96),
    _write(dtype=FP32),
    _write(kv_heads=3),
    _place(),
    _place("keys"),
    _place("int8"),
    _place("fp8"),
    _place("int8", head_dim=96),
    _place(dtype=FP32),
    _encode("int8"),
    _encode("fp8"),
    _encode("int8", head_dim=96),
    _encode("fp8", head_dim=64),
    _encode("int8", FP32),
    _encode("fp8", FP32),
    *(_attend(table, head_dim=head_dim) for table in TABLES for head_dim in (HEAD_DIM, 64, 96, 256)),
    *(_attend(table, FP32, head_dim) for table in TABLES for head_dim in (HEAD_DIM, 64, 256)),
    *(_attend(table, head_dim=head_dim, odd=True) for table in TABLES for head_dim in (HEAD_DIM, 64, 256)),
    _attend(dtype=FP16),
    _attend("int8 pages", FP16),
    _attend(lse=True),
    _attend(kv_heads=3),
    _attend("run", samples=2, length=TOKENS),
    _attend_counted(),
    _merge(),
    _merge(dtype=FP32),
    _merge(head_dim=96),
)
