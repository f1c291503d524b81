"""``torch.ops.longlive.topk_retrieve``."""

from __future__ import annotations

import torch

from . import arguments
from .registration import Pair, implementation, register


@register
def topk_retrieve(
    query: torch.Tensor,
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    end_frame: torch.Tensor,
    k: int,
    *,
    first_frame: int = 0,
    recent_exclude: int = 0,
    exclude: torch.Tensor | None = None,
    normalized: bool = False,
    index_scale: torch.Tensor | None = None,
    min_score: float | None = None,
    diversity: float = 0.0,
    engine: str = "auto",
) -> Pair:
    """Frames whose embeddings are most similar to the query's (cosine in float32; LongLive-RAG, arXiv 2606.02553).

    Candidates are the frames ``first_frame <= id < end_frame - recent_exclude`` among the first ``index_length`` rows,
    decided by the row's id, never by its number. Equal scores: the older frame first. A zero embedding has
    similarity 0; a row with NaN or infinity is never chosen; a query with NaN or infinity retrieves nothing.

    Args:
        query: ``(B, E)`` float64, float32, float16 or bfloat16.
        index: ``(B, N, E)``, any of these dtypes or int8: one embedding a row.
        index_ids: ``(B, N)`` int64, the row's frame, below ``2**31``; -1 for a removed row.
        index_length: int64 with one element, on the device: rows in use.
        end_frame: int64 with one element, on the device: one past the newest frame evicted from the window.
        k: frames to choose, at least 0.
        first_frame: oldest frame that may be chosen (the sink's size).
        recent_exclude: recency guard: the newest candidates left out.
        exclude: ``(B, X)`` int64, frames not to choose; -1 names none.
        normalized: the rows already have unit length.
        index_scale: ``(B, N)``, factor of each row of an int8 index.
        min_score: frames with a smaller cosine are not chosen.
        diversity: ``0 <= d < 1``. Above 0 each choice is the frame with the largest ``(1 - d) cos(query, x) -
            d max_s cos(x, s)`` over the frames ``s`` chosen before, 0 for the first (maximal marginal relevance,
            Carbonell and Goldstein, SIGIR 1998); it costs a pass over the index for each choice. Scores stay cosines.
        engine: ``auto``, ``dense``, ``triton`` or ``reference``.

    Returns:
        ids ``(B, k)`` int64, most similar first, -1 past the last; scores ``(B, k)`` float32 (float64 for a float64
        query), -inf past the last.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, size or device is not allowed, or the engine is unknown.
            Values of index tables are checked on a CPU only.
        RuntimeError: an input requires grad in grad mode, or the engine is not available.
    """
    arguments.check_topk(
        query,
        index,
        index_ids,
        index_length,
        end_frame,
        k,
        first_frame,
        recent_exclude,
        exclude,
        index_scale,
        min_score,
        diversity,
    )
    return implementation(engine, query).topk_retrieve(
        query,
        index,
        index_ids,
        index_length,
        end_frame,
        k,
        first_frame,
        recent_exclude,
        exclude,
        normalized,
        index_scale,
        min_score,
        diversity,
    )
