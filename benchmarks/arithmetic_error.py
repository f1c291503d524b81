"""Errors of attention on random tensors, by engine and by the dtype of pages, held against float64.

Two kinds. On the same tensors: exact is float64 arithmetic on the numbers that the op was given, already rounded; the
error is the engine's. With rounding: exact is float64 on the numbers before they were rounded to the pages' dtype; the
error is what a user sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import gpu_contenders as contenders
from benchmarks.error_records import ErrorGroups, Pair
from benchmarks.figures import Shape
from benchmarks.gpu_contenders import Layer, Tensors, clone
from benchmarks.gpu_sections import op
from benchmarks.harness import Absent
from benchmarks.micro_cases import dtype_name, refusable
from benchmarks.preset import Preset
from benchmarks.record import Record

SAME, ROUNDED = "error on the same tensors", "error with rounding to the pages' dtype"
PEAKED = 4.0  # factor of queries that makes softmax attend to few keys
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED = (torch.int8, torch.float8_e4m3fn)


def attention_errors(preset: Preset, shape: Shape, engines: Sequence[str]) -> list[Record]:
    """`window_attend`: two kinds of error, of all outputs and of the worst vector.

    Pages in eight bits are attended to by queries in the preset's dtype.
    """
    groups = _groups("window_attend", preset, shape)
    engines, _ = (group.present(engines, preset) for group in groups)
    for label, peak in (("normal", 1.0), ("peaked", PEAKED)):
        base = Layer(shape, torch.float64, preset.device).attend()
        base["q"] = base["q"] * peak
        before = contenders.exact_attention(**base)
        for dtype in DTYPES:
            for stored in (None, *(STORED if dtype == preset.dtype else ())):
                case = _cast(base, dtype) if stored is None else _stored(shape, preset, base, dtype, stored)
                exact = (contenders.exact_attention(**case), before)
                form = dtype_name(stored or dtype)
                pages = f"{form} pages" if stored is None else f"{form} pages, {dtype_name(dtype)} queries"
                known = {"pages": form, "dtype": dtype_name(dtype), "tensors": label}
                for engine in engines:
                    made = functools.partial(_attended, case, engine, stored)
                    _add(groups, f"{label}: {pages}, {engine}", "ours", made, exact, known)
                if stored is None:
                    made = functools.partial(_ready, case)
                    _add(groups, f"{label}: {pages}, SDPA of PyTorch", "peer", made, exact, known)
    return [record for group in groups for record in group.records]


def retrieval_attention_errors(preset: Preset, shape: Shape, engines: Sequence[str]) -> list[Record]:
    """`retrieve_attend` of a block that places all memory frames: rotation, placing and attention."""
    groups = _groups("retrieve_attend", preset, shape)
    engines, _ = (group.present(engines, preset) for group in groups)
    base = Layer(shape, torch.float64, preset.device).retrieve("new")
    before, _, _ = contenders.exact_retrieve(base)
    for dtype in DTYPES:
        case = _cast(base, dtype)
        exact = (contenders.exact_retrieve(case)[0], before)
        known = {"pages": dtype_name(dtype), "dtype": dtype_name(dtype), "tensors": "normal"}
        for engine in engines:
            made = functools.partial(_retrieved, case, engine)
            _add(groups, f"{dtype_name(dtype)} pages, {engine}", "ours", made, exact, known)
    return [record for group in groups for record in group.records]


def _groups(what: str, preset: Preset, shape: Shape) -> tuple[ErrorGroups, ErrorGroups]:
    text = f"{what}, {shape.window} frames of {shape.tokens} random tokens, {shape.heads} heads x {shape.head_dim}"
    facts = {"window": shape.window, "tokens": shape.tokens, "heads": shape.heads, "head_dim": shape.head_dim}
    same, rounded = (ErrorGroups(f"{kind}, {text}", facts, preset.facts) for kind in (SAME, ROUNDED))
    return same, rounded


def _add(
    groups: Sequence[ErrorGroups],
    name: str,
    role: str,
    make: Callable[[], torch.Tensor],
    exact: Sequence[torch.Tensor],
    known: dict[str, Any],
) -> None:
    """One result, held against each group's exact one."""
    made = functools.cache(make)

    def pair(want: torch.Tensor) -> Pair:
        return made(), want

    for group, want in zip(groups, exact, strict=True):
        group.add(name, role, functools.partial(pair, want), known)


def _attended(case: Tensors, engine: str, stored: torch.dtype | None) -> torch.Tensor:
    _check_dtype(case, engine)
    with refusable(stored):
        out: torch.Tensor = op("window_attend", case, engine)()[0]  # type: ignore[index]
    return out


def _retrieved(case: Tensors, engine: str) -> torch.Tensor:
    _check_dtype(case, engine)
    out: torch.Tensor = op("retrieve_attend", clone(case), engine)()[0]  # type: ignore[index]
    return out


def _check_dtype(case: Tensors, engine: str) -> None:
    if engine == "triton" and case["q"].device.type == "cpu" and case["q"].dtype == torch.bfloat16:
        raise Absent("the matrix product of Triton's interpreter is wrong in bfloat16")


def _ready(case: Tensors) -> torch.Tensor:
    """What one would call on a contiguous window."""
    keys, values = case["pool_layer"][:, :, : case["run"]].flatten(2, 3)
    q, k, v = (x.transpose(1, 2) for x in (case["q"], keys, values))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cast(case: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating point tensors but the rotary table in another dtype."""
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "rope" else x
        for name, x in case.items()
    }


def _stored(shape: Shape, preset: Preset, case: Tensors, dtype: torch.dtype, stored: torch.dtype) -> Tensors:
    """The pool in eight bits with a float16 factor for each token and head."""
    pool, (k_scale, v_scale) = Layer(shape, dtype, preset.device).quantised(case["pool_layer"], stored)
    return {**case, "q": case["q"].to(dtype), "pool_layer": pool, "k_scale": k_scale, "v_scale": v_scale}
