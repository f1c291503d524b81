"""Arithmetic intensity of the ops: operations for each byte that has to move at least; the x axis of a roofline."""

from __future__ import annotations

from benchmarks import figures
from benchmarks.micro_cases import Point, merge_bytes

ROTATION = 3  # operations an element: four products and two sums turn a pair of channels


def intensity(op: str, point: Point) -> float:
    """Operations a byte of one sample; 0 for what only copies. Bytes are those that records count, see `figures`."""
    shape, item = point.shape, point.dtype.itemsize
    block = shape.block * shape.page  # elements of a block's keys
    if op == "topk_retrieve":  # a product and a sum for each number of the index
        done, moved = 2 * point.rows * shape.embedding, figures.index_bytes(point.rows, shape.embedding, item)
    elif op == "write_frames":  # queries, keys, and keys without their place in time
        done, moved = 3 * ROTATION * block, figures.write_bytes(shape, item)
    elif op in ("window_attend", "retrieve_attend"):
        keys = shape.window * shape.tokens
        done = figures.attention_flops(shape.queries, keys, shape.heads, shape.head_dim)
        moved = figures.attention_bytes(shape, shape.window, item)
        if op == "retrieve_attend":
            done, moved = done + 3 * ROTATION * block, moved + figures.write_bytes(shape, item)
    elif op == "merge_attention":  # a product and a sum for each number of each part
        done, moved = 2 * point.parts * block, merge_bytes(point)
    else:
        return 0.0
    return done / moved
