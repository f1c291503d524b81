"""``topk_retrieve``: one pass over the index writes a sortable key a row, then the largest keys are selected."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import config
from .cosine import EMPTY, apply_factors, may_be_chosen, row_cosines, sort_key
from .diversity import choose_diverse
from .launch import device_of, launch
from .topk_select import select

LARGEST_K = 64
LARGEST_EMBEDDING = 4096
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["N", "X", "first_frame", "recent_exclude"])
def score_rows(
    query,
    index,
    index_ids,
    index_scale,
    index_length,
    end_frame,
    exclude,
    s_qb,
    s_qe,
    s_ib,
    s_in,
    s_ie,
    s_fb,
    s_fn,
    s_sb,
    s_sn,
    s_xb,
    s_xx,
    first_frame,
    recent_exclude,
    min_score,
    N,
    X,
    keys,
    E: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """Writes the key of each row: its cosine with the query and its frame, or `EMPTY` if it may not be chosen."""
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    p_key = keys + i_b * N + o_n
    length = tl.minimum(tl.load(index_length), N)
    if i_n * BN >= length:  # rows in reserve: no need to read them
        tl.store(p_key, tl.full([BN], EMPTY, tl.int64), o_n < N)
        return
    m_n = o_n < length
    end = tl.minimum(tl.load(end_frame) - recent_exclude, 2**31)
    b_id = tl.load(index_ids + i_b * s_fb + o_n * s_fn, m_n, -1)  # [BN]
    p_index = index + i_b * s_ib
    b_cosine = row_cosines(
        p_index, query + i_b * s_qb, o_n, m_n, s_in, s_ie, s_qe, BN, E, BE, NORMALIZED, False
    )  # [BN]
    if index_scale is not None:
        b_factor = tl.load(index_scale + i_b * s_sb + o_n * s_sn, m_n, 0).to(tl.float32)  # [BN]
        b_cosine = apply_factors(b_cosine, b_factor, p_index, o_n, m_n, s_in, s_ie, BN, E, BE, NORMALIZED)
    b_cosine = tl.where(b_cosine == 0, 0.0, b_cosine)  # -0 ties with 0
    m_n = may_be_chosen(b_id, m_n, first_frame, end, exclude if exclude is None else exclude + i_b * s_xb, s_xx, X, BX)
    m_n = m_n & (tl.abs(b_cosine) < float("inf")) & (b_cosine >= min_score)  # NaN compares as false
    tl.store(p_key, tl.where(m_n, sort_key(b_cosine, b_id), EMPTY), o_n < N)


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
    """Frames most similar to the query, as `reference.topk_retrieve`.

    Args:
        query: ``(B, E)`` float32, float16 or bfloat16, ``E`` at most 4096.
        index: ``(B, N, E)`` of these or int8.
        k: at most 64.

    Returns:
        ids ``(B, k)`` int64, scores ``(B, k)`` float32.
    """
    _check(query, index, k)
    samples, rows, embedding = index.shape
    ids = torch.empty((samples, k), dtype=torch.int64, device=query.device)
    scores = torch.empty((samples, k), dtype=torch.float32, device=query.device)
    if ids.numel() == 0:
        return ids, scores
    row = config("score_rows", device_of(query).architecture, f"{8 * index.element_size()} bits")
    piece = max(2, min(row.constants["BE"], triton.next_power_of_2(embedding)))
    tile = min(row.constants["MOST_ROWS"], row.constants["ENTRIES"] // piece)
    search = (
        query,
        index,
        index_ids,
        index_scale,
        index_length,
        end_frame,
        exclude,
        *query.stride(),
        *index.stride(),
        *index_ids.stride(),
        *((0, 0) if index_scale is None else index_scale.stride()),
        *((0, 0) if exclude is None else exclude.stride()),
        first_frame,
        recent_exclude,
        float("-inf") if min_score is None else min_score,
        rows,
        0 if exclude is None else exclude.shape[1],
    )
    options = {
        "E": embedding,
        "BE": piece,
        "BN": tile,
        "BX": row.constants["BX"],
        "NORMALIZED": normalized,
        "num_warps": row.num_warps,
        "enable_fp_fusion": False,  # see cosine.py
    }
    if diversity > 0:
        choose_diverse(search, options, diversity, ids, scores)
    else:
        keys = torch.empty((samples, rows), dtype=torch.int64, device=query.device)
        launch(score_rows, (triton.cdiv(rows, tile), samples), *search, keys, **options)
        select(keys, ids, scores)
    return ids, scores


def _check(query: torch.Tensor, index: torch.Tensor, k: int) -> None:
    for name, x, allowed in (("query", query, FLOATS), ("index", index, (*FLOATS, torch.int8))):
        if x.dtype not in allowed:
            raise TypeError(
                f"engine 'triton' takes float32, float16 or bfloat16 for {name}, got {x.dtype}; "
                "engines that take it: dense, reference"
            )
    if k > LARGEST_K:
        raise ValueError(f"engine 'triton' takes k up to {LARGEST_K}, got {k}; engines that take it: dense, reference")
    if query.shape[1] > LARGEST_EMBEDDING:
        raise ValueError(
            f"engine 'triton' takes embeddings of up to {LARGEST_EMBEDDING} entries, got {query.shape[1]}; "
            "engines that take it: dense, reference"
        )
