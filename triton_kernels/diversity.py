"""Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) over a whole index, one pass a choice.

A pass compares every row with the frame chosen last, keeps the row's largest cosine with a chosen frame, and leaves
the best row of each block; a second kernel takes the best of the blocks. Nothing comes back to the host between.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import config
from .cosine import EMPTY, apply_factors, key_frame, may_be_chosen, row_cosines, sort_key
from .launch import device_of, launch


@triton.jit(do_not_specialize=["N", "X", "first_frame", "recent_exclude"])
def score_diverse(
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
    relevance,
    redundancy,
    chosen,
    best_key,
    best_row,
    weight,
    penalty,
    FIRST: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """Leaves the best row of each block of ``BN`` and its key, by ``weight * relevance - penalty * redundancy``.

    ``relevance`` ``(B, N)`` holds cosines with the query, -inf for a row that may not be chosen or has been;
    ``redundancy`` ``(B, N)`` the largest cosine with a chosen row. The first pass fills them.
    """
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_best = i_b * tl.num_programs(0) + i_n
    length = tl.minimum(tl.load(index_length), N)
    if i_n * BN >= length:
        if FIRST:
            tl.store(best_key + o_best, EMPTY)  # and so it stays in later passes
        return
    m_n = o_n < length
    b_id = tl.load(index_ids + i_b * s_fb + o_n * s_fn, m_n, -1)  # [BN]
    p_index, p_relevance, p_redundancy = index + i_b * s_ib, relevance + i_b * N + o_n, redundancy + i_b * N + o_n
    if index_scale is not None:
        p_factor = index_scale + i_b * s_sb
        b_factor = tl.load(p_factor + o_n * s_sn, m_n, 0).to(tl.float32)  # [BN]
    if FIRST:
        end = tl.minimum(tl.load(end_frame) - recent_exclude, 2**31)
        b_cosine = row_cosines(
            p_index, query + i_b * s_qb, o_n, m_n, s_in, s_ie, s_qe, BN, E, BE, NORMALIZED, False
        )  # [BN]
        if index_scale is not None:
            b_cosine = apply_factors(b_cosine, b_factor, p_index, o_n, m_n, s_in, s_ie, BN, E, BE, NORMALIZED)
        p_exclude = exclude if exclude is None else exclude + i_b * s_xb
        m_may = may_be_chosen(b_id, m_n, first_frame, end, p_exclude, s_xx, X, BX)
        m_may = m_may & (tl.abs(b_cosine) < float("inf")) & (b_cosine >= min_score)
        b_relevance = tl.where(m_may, b_cosine, float("-inf"))
        b_redundancy = tl.full([BN], 0.0, tl.float32)
        tl.store(p_redundancy, tl.full([BN], float("-inf"), tl.float32), m_n)
    else:
        row = tl.load(chosen + i_b)
        if row < 0:  # nothing was left to choose
            return
        p_row = p_index + row * s_in
        b_cosine = row_cosines(p_index, p_row, o_n, m_n, s_in, s_ie, s_ie, BN, E, BE, NORMALIZED, NORMALIZED)
        if index_scale is not None:
            b_cosine = apply_factors(b_cosine, b_factor, p_index, o_n, m_n, s_in, s_ie, BN, E, BE, NORMALIZED)
            factor = tl.load(p_factor + row * s_sn).to(tl.float32)
            if not NORMALIZED:
                factor = tl.where(factor > 0, 1.0, tl.where(factor < 0, -1.0, 0.0))
            b_cosine = b_cosine * factor
        b_redundancy = tl.maximum(tl.load(p_redundancy, m_n, 0.0), b_cosine)
        tl.store(p_redundancy, b_redundancy, m_n)
        b_relevance = tl.where(o_n == row, float("-inf"), tl.load(p_relevance, m_n, float("-inf")))
    tl.store(p_relevance, b_relevance, m_n)
    b_value = weight * b_relevance - penalty * b_redundancy
    b_value = tl.where(b_value == 0, 0.0, b_value)  # -0 ties with 0
    b_key = tl.where(tl.abs(b_value) < float("inf"), sort_key(b_value, b_id), EMPTY)  # [BN]
    best = tl.max(b_key, 0)
    tl.store(best_key + o_best, best)
    tl.store(best_row + o_best, tl.min(tl.where(b_key == best, o_n, N), 0))


@triton.jit(do_not_specialize=["rank", "blocks", "N", "k"])
def pick_best(best_key, best_row, relevance, chosen, ids, scores, rank, blocks, N, k, BC: tl.constexpr):
    """Chooses the best of the blocks' best rows as number ``rank`` of its sample."""
    i_b = tl.program_id(0).to(tl.int64)
    b_key = tl.full([BC], EMPTY, tl.int64)
    b_row = tl.full([BC], 0, tl.int64)
    for i_c in range(0, blocks, BC):
        o_c = i_c + tl.arange(0, BC)
        b_new = tl.load(best_key + i_b * blocks + o_c, o_c < blocks, EMPTY)  # [BC]
        b_new_row = tl.load(best_row + i_b * blocks + o_c, o_c < blocks, 0)
        m_better = b_new > b_key
        b_key, b_row = tl.where(m_better, b_new, b_key), tl.where(m_better, b_new_row, b_row)
    best = tl.max(b_key, 0)
    row = tl.min(tl.where(b_key == best, b_row, N), 0)
    found = best != EMPTY  # once nothing is left, all blocks are empty, and later passes leave them so
    tl.store(chosen + i_b, tl.where(found, row, -1))
    tl.store(ids + i_b * k + rank, tl.where(found, key_frame(best), -1))
    tl.store(scores + i_b * k + rank, tl.load(relevance + i_b * N + row, found, float("-inf")))


def choose_diverse(
    search: tuple[Any, ...], options: dict[str, Any], diversity: float, ids: torch.Tensor, scores: torch.Tensor
) -> None:
    """Writes the frames chosen and their cosines with the query to ``ids`` and ``scores`` ``(B, k)``.

    Args:
        search: arguments of `topk_retrieve.score_rows` before its output.
        options: its constants and launch options.
    """
    (samples, k), rows = ids.shape, search[1].shape[1]
    blocks = triton.cdiv(rows, options["BN"])
    row = config("pick_best", device_of(ids).architecture)
    relevance, redundancy = scores.new_empty(2, samples, rows).unbind()
    best_key, best_row = ids.new_empty(2, samples, blocks).unbind()
    chosen = ids.new_empty(samples)
    state = (relevance, redundancy, chosen, best_key, best_row, 1 - diversity, diversity)
    for rank in range(k):
        launch(score_diverse, (blocks, samples), *search, *state, FIRST=rank == 0, **options)
        launch(
            pick_best,
            (samples,),
            best_key,
            best_row,
            relevance,
            chosen,
            ids,
            scores,
            rank,
            blocks,
            rows,
            k,
            BC=row.constants["BC"],
            num_warps=row.num_warps,
        )
