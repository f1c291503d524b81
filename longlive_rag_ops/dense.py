"""The dense engine: rotation by complex products, search by matrix products, dense attention over the window run.

Same functions and arguments as `reference`, which they are tested against. The attention is in `dense_attention`:
the best dense kernel that is installed, over the contiguous run of window slots in place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import chain, reference
from .dense_attention import window_attend
from .reference import lse_dtype, row_scores, unit_rows

__all__ = ["merge_attention", "place_frames", "retrieve_attend", "topk_retrieve", "window_attend", "write_frames"]

# Numbers of an index that are converted at once: in float32 4 MiB, which caches hold. With fewer, threads that meet at
# the end of each step of each chunk would cost more than memory does, most of all where others want the cores, too.
CHUNK = 2**20


def topk_retrieve(
    query: torch.Tensor,
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    end_frame: torch.Tensor,
    k: int,
    first_frame: int = 0,
    recent_exclude: int = 0,
    exclude: torch.Tensor | None = None,
    normalized: bool = False,
    index_scale: torch.Tensor | None = None,
    min_score: float | None = None,
    diversity: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix products rank all rows; the few that rounding could move into the best k are scored again exactly."""
    if diversity > 0:  # every round scores all rows anew: nothing here is faster than the oracle's vector operations
        return reference.topk_retrieve(
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
    samples, embedding = query.shape
    dtype = lse_dtype(query.dtype)
    ids = torch.full((samples, k), reference.NO_FRAME, dtype=torch.int64, device=query.device)
    scores = torch.full((samples, k), -math.inf, dtype=dtype, device=query.device)
    length, end = int(index_length), int(end_frame) - recent_exclude
    # Two unit vectors' product, summed in any order, is off by at most about E * eps (Higham, 2002, eq. 3.5);
    # the exact and the fast score may both be, in opposite directions, for the k-th row and for a contender.
    slack = 4 * embedding * torch.finfo(dtype).eps
    for b in range(samples):
        frames = index_ids[b, :length]
        allowed = (frames >= max(first_frame, 0)) & (frames < end)
        if exclude is not None:
            allowed &= ~torch.isin(frames, exclude[b])
        rows, factors = index[b, :length], None if index_scale is None else index_scale[b, :length]
        unit_query = unit_rows(query[b])
        rough = _rough_scores(unit_query, rows, factors, normalized)
        if min_score is not None:
            allowed &= rough >= min_score - slack
        rough = torch.where(allowed & rough.isfinite(), rough, -math.inf)
        best = min(k, int((rough > -math.inf).sum()))
        if best == 0:
            continue
        contenders = (rough >= rough.topk(best).values[-1] - slack).nonzero().flatten()
        chosen = rows.index_select(0, contenders).to(dtype)
        if factors is not None:
            chosen = chosen * factors[contenders, None].to(dtype)
        exact = row_scores(unit_query, chosen if normalized else unit_rows(chosen))
        frames = frames[contenders]
        if min_score is not None:
            passed = exact >= min_score
            exact, frames = exact[passed], frames[passed]
            best = min(best, len(frames))
        older_first = frames.argsort()
        ranked = older_first[exact[older_first].argsort(descending=True, stable=True)][:best]
        ids[b, :best], scores[b, :best] = frames[ranked], exact[ranked]
    return ids, scores


def _rough_scores(
    unit_query: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor | None, normalized: bool
) -> torch.Tensor:
    """Cosines ``(N,)`` of a unit query ``(E,)`` with rows ``(N, E)``, NaN or infinite where a row has none.

    What is stored as it is searched is read once; other rows are converted a chunk at a time, and on a GPU at once.
    """
    dtype = unit_query.dtype
    if rows.dtype == dtype and normalized and factors is None:
        return torch.mv(rows, unit_query)
    size = max(1, CHUNK // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    scores = unit_query.new_empty(len(rows))
    converted = unit_query.new_empty(min(size, len(rows)), rows.shape[1])  # once: a new page of memory costs as much
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        part = converted[: len(chunk)].copy_(chunk)
        if factors is not None and not normalized:
            part *= factors[first : first + size, None].to(dtype)
        scores[first : first + size] = torch.mv(part if normalized else unit_rows(part), unit_query)
    if factors is not None and normalized:
        scores *= factors.to(dtype)
    return scores


def merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in float64, as in `reference`; the outputs are summed in float32 (float64 stays)."""
    compute = lse_dtype(outs.dtype)
    parts = lses.double()
    total = parts.logsumexp(0)
    shift = torch.where(total == -math.inf, 0.0, total)  # all parts empty: exp(-inf - 0) = 0, never exp(nan)
    weights = (parts - shift).exp().transpose(2, 3)[..., None]  # (P, B, S, H, 1)
    unused = weights == 0  # such a part must not make the sum NaN
    guarded = outs.is_cuda or bool(unused.any())  # a look is cheap on a CPU; on a GPU the host would wait
    joined = torch.zeros(outs.shape[1:], dtype=compute, device=outs.device)
    for weight, out, dropped in zip(weights.to(compute), outs, unused, strict=True):
        joined.addcmul_(weight, out.masked_fill(dropped, 0.0).to(compute) if guarded else out.to(compute))
    return joined.to(outs.dtype), total.to(lses.dtype)


def write_frames(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_layer: torch.Tensor,
    staging: torch.Tensor,
    slots: torch.Tensor,
    staging_rows: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    grid: Sequence[int],
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Products are written straight into the pool and the staging buffer where dtype and strides allow it."""
    compute = lse_dtype(q.dtype)
    still, turned = _phases(torch.view_as_complex(rope.to(compute).contiguous()), rope_split, grid, positions)
    frames = len(slots)
    keys = _as_complex(rms_norm(k, k_weight, eps).unflatten(1, (frames, -1)), compute)  # (B, n, T, H, D/2)
    values = v.unflatten(1, (frames, -1))
    for part, rows in _runs(staging_rows.tolist()):
        _multiply_into(staging[:, rows], keys[:, part], still)
    for part, at in _runs(slots.tolist()):
        _multiply_into(pool_layer[0, :, at], keys[:, part], turned[part])
        pool_layer[1, :, at] = values[:, part]
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    queries = _as_complex(rms_norm(q, q_weight, eps).unflatten(1, (frames, -1)), compute)
    _multiply_into(rotated.unflatten(1, (frames, -1)), queries, turned)
    return rotated


def _runs(targets: list[int]) -> list[tuple[slice, slice]]:
    """Frames that go to consecutive places, as (slice of the block, slice of the places); -1 is left out.

    A block mostly is one run, and one large product costs less than one for each frame.
    """
    runs: list[tuple[slice, slice]] = []
    for i, target in enumerate(targets):
        if target < 0:
            continue
        if runs and runs[-1][0].stop == i and runs[-1][1].stop == target:
            runs[-1] = (slice(runs[-1][0].start, i + 1), slice(runs[-1][1].start, target + 1))
        else:
            runs.append((slice(i, i + 1), slice(target, target + 1)))
    return runs


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm over the model width, in float32 (float64 stays), not rounded back before rotation."""
    if weight is None:
        return x
    compute = lse_dtype(x.dtype)
    wide = x.flatten(-2).to(compute)
    return torch.nn.functional.rms_norm(wide, wide.shape[-1:], weight.to(compute), eps).unflatten(-1, x.shape[-2:])


def _phases(
    table: torch.Tensor, rope_split: Sequence[int], grid: Sequence[int], positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex turns of a frame's tokens at temporal position 0 ``(T, 1, D/2)`` and at each position ``(n, T, 1, D/2)``.

    Multiplying a temporal channel by the ``1 + 0i`` of position 0 changes no bit of a finite key.
    """
    time, high = rope_split[0] // 2, rope_split[1] // 2
    height, width = grid
    still = torch.cat(
        [
            table.new_ones(height, width, time),
            table[:height, None, time : time + high].expand(-1, width, -1),
            table[None, :width, time + high :].expand(height, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 1)[:, None]
    turned = still.repeat(len(positions), 1, 1, 1)
    turned[..., :time] = table[positions, None, None, :time]
    return still, turned


def _as_complex(x: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Interleaved channel pairs as complex numbers: ``(..., D)`` to ``(..., D/2)``."""
    pairs = x.to(compute).unflatten(-1, (-1, 2))
    return torch.view_as_complex(pairs if _viewable(pairs) else pairs.contiguous())


def _viewable(pairs: torch.Tensor) -> bool:
    """Whether `view_as_complex` takes the strides and offset of real pairs."""
    return pairs.stride(-1) == 1 and pairs.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in pairs.stride()[:-1])


def _multiply_into(target: torch.Tensor, x: torch.Tensor, phase: torch.Tensor) -> None:
    """Writes ``x * phase`` (complex) into a real buffer, in place where dtype and strides allow it."""
    pairs = target.unflatten(-1, (-1, 2))
    if target.dtype == x.real.dtype and _viewable(pairs):
        torch.mul(x, phase, out=torch.view_as_complex(pairs))
    else:
        target.copy_(torch.view_as_real(x * phase).flatten(-2))


def place_frames(
    pool_layer: torch.Tensor,
    slots: torch.Tensor,
    source: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    k_pages: torch.Tensor | None = None,
    v_pages: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """A plain copy where the temporal position is 0, else one complex product of the whole page.

    The product runs over the same axes as in `write_frames`, so that a page placed again has the same bits as one
    placed when it was written; spatial channels are multiplied by ``1 + 0i``.
    """
    compute = lse_dtype(pool_layer.dtype)
    keys = pool_layer[0] if k_pages is None else k_pages
    values = pool_layer[1] if k_pages is None else v_pages
    table = torch.view_as_complex(rope[:, : rope_split[0] // 2].to(compute).contiguous())
    phase = table.new_ones(pool_layer.shape[3], 1, rope.shape[1])  # (T, 1, D/2)
    for b, (to, from_, at) in enumerate(zip(slots.tolist(), source.tolist(), positions.tolist(), strict=True)):
        for slot, page, position in zip(to, from_, at, strict=True):
            if slot < 0 or page < 0:
                continue
            key = _dequantise(keys[b, page], None if k_scale is None else k_scale[b, page], compute)
            if position == 0:
                pool_layer[0, b, slot].copy_(key)
            else:
                phase[..., : table.shape[1]] = table[position]
                _multiply_into(pool_layer[0, b, slot], _as_complex(key, compute), phase)
            if values is not None:
                scale = None if v_scale is None else v_scale[b, page]
                pool_layer[1, b, slot].copy_(_dequantise(values[b, page], scale, compute))


def _dequantise(page: torch.Tensor, scale: torch.Tensor | None, compute: torch.dtype) -> torch.Tensor:
    return page if scale is None else page.to(compute) * scale.to(compute)[..., None]


def retrieve_attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of `chain.retrieve_attend` with this engine's steps."""
    return chain.retrieve_attend(sys.modules[__name__], *args, **kwargs)
