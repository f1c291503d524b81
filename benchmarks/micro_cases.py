"""Points that the micro suite measures at, and tensors of one layer for each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.figures import Shape
from benchmarks.gpu_contenders import Layer, Tensors, clone
from benchmarks.harness import Absent, Bench

# Where the samples of a batch stand in each tensor of an op. What is not named, or has one axis only, is shared.
SAMPLES = {
    **dict.fromkeys(("q", "k", "v", "staging", "query", "index", "index_ids", "window_state", "frame_slot"), 0),
    **dict.fromkeys(("slots", "source", "positions", "k_pages", "v_pages", "k_scale", "v_scale"), 0),
    **dict.fromkeys(("pool_layer", "outs", "lses"), 1),
}


@dataclass(frozen=True)
class Point:
    """Where an op is measured.

    Attributes:
        dtype: of queries, and of plain pages.
        batch: samples.
        stored: eight-bit dtype of the pages that are attended to, or placed, with a float16 factor for each token and
            head; None for plain pages.
        k: frames retrieved.
        rows: of the index.
        parts: partial results that `merge_attention` joins.
    """

    shape: Shape
    dtype: torch.dtype
    batch: int = 1
    stored: torch.dtype | None = None
    k: int = 6
    rows: int = 480
    parts: int = 2

    def with_shape(self, **sizes: Any) -> Point:
        """The same with other sizes of the layer."""
        return replace(self, shape=replace(self.shape, **sizes))

    def facts(self) -> dict[str, Any]:
        """For a record's shape."""
        shape = self.shape
        return {
            "window": shape.window,
            "tokens": shape.tokens,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "batch": self.batch,
            "dtype": dtype_name(self.dtype),
            "pages": dtype_name(self.stored or self.dtype),
            "k": self.k,
            "rows": self.rows,
            "parts": self.parts,
        }

    def text(self) -> str:
        shape = self.shape
        return (
            f"{shape.window} frames of {shape.tokens} tokens, {shape.heads} heads x {shape.head_dim}, "
            f"batch {self.batch}, {dtype_name(self.dtype)}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def joined(samples: Sequence[Tensors]) -> Tensors:
    """One call's arguments for a batch, of those of its samples."""
    first = samples[0]
    if len(samples) == 1:
        return first
    batch = dict(first)
    for name, axis in SAMPLES.items():
        if isinstance(first.get(name), torch.Tensor) and first[name].dim() > 1:
            batch[name] = torch.cat([sample[name] for sample in samples], dim=axis)
    return batch


def first_case(point: Point, device: str, make: Callable[[Layer], Tensors]) -> Tensors:
    """A call's arguments: the same at each call of this."""
    return joined([make(Layer(point.shape, point.dtype, device, seed)) for seed in range(point.batch)])


def cases(bench: Bench, point: Point, make: Callable[[Layer], Tensors], bytes_each: int) -> list[Tensors]:
    """As many calls' arguments as keep the cache cold; ``bytes_each`` is what one sample of a call touches.

    They have the same values, which cost more to draw than to copy: what counts is that they are not the same memory.
    """
    first = first_case(point, bench.device, make)
    return bench.copies(lambda number: clone(first) if number else first, point.batch * bytes_each)


@contextlib.contextmanager
def refusable(stored: torch.dtype | None) -> Iterator[None]:
    """Within it an op that takes no pages stored so raises `Absent`, with what it says."""
    try:
        yield
    except TypeError as error:
        if stored is None or "dtype" not in str(error):
            raise
        raise Absent(f"refused: {error}") from error


def attend_case(layer: Layer, stored: torch.dtype | None = None) -> Tensors:
    """`window_attend` over the first slots of a pool that has more."""
    case = layer.attend()
    if stored is not None:
        case["pool_layer"], scales = layer.quantised(case["pool_layer"], stored)
        case["k_scale"], case["v_scale"] = scales
    return case


def place_case(layer: Layer, position: int, stored: torch.dtype | None = None) -> Tensors:
    """`place_frames` of the memory frames into the first slots, out of buffers of pages beside the pool."""
    case = layer.place(position, stored)
    if stored is None:
        pages = layer.shape.new_pages
        case["k_pages"], case["v_pages"] = case["pool_layer"][:, :, pages:].clone()
        case["source"] = case["slots"].clone()
    return case


def search_case(layer: Layer, point: Point, unit: bool) -> Tensors:
    """`topk_retrieve`; with ``unit`` the rows have unit length beforehand, as `MemoryWindow` keeps them."""
    case = layer.search(point.rows) | {"k": point.k, "normalized": unit}
    if unit:
        case["index"] = torch.nn.functional.normalize(case["index"].float(), dim=-1).to(layer.dtype)
    return case


def merge_case(layer: Layer, parts: int) -> Tensors:
    """`merge_attention` of a block's partial results."""
    shape = layer.shape
    outs = layer.normal(parts, 1, shape.queries, shape.heads, shape.head_dim)
    return {"outs": outs, "lses": layer.normal(parts, 1, shape.heads, shape.queries, dtype=torch.float32)}


def merge_bytes(point: Point) -> int:
    """Partial outputs and their float32 log-sum-exps read once, output and log-sum-exp written once; of one sample."""
    rows = point.shape.queries * point.shape.heads
    return (point.parts + 1) * rows * (point.shape.head_dim * point.dtype.itemsize + 4)
