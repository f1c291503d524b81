"""The largest keys of each sample, by levels of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import config
from .cosine import EMPTY, key_frame, key_score
from .launch import device_of, launch


@triton.jit(do_not_specialize=["n", "s_out", "k"])
def select_keys(keys, out, ids, scores, n, s_out, k, BC: tl.constexpr, BK: tl.constexpr, LAST: tl.constexpr):
    """Writes the ``BK`` largest of each block of ``BC`` keys, sorted; at the last level, frames and scores."""
    i_c, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_c = i_c.to(tl.int64) * BC + tl.arange(0, BC)
    b_key = tl.load(keys + i_b * n + o_c, o_c < n, EMPTY)  # [BC]
    b_top = tl.topk(b_key, BK)  # [BK]
    o_k = tl.arange(0, BK)
    if LAST:
        tl.store(ids + i_b * k + o_k, key_frame(b_top), o_k < k)
        tl.store(scores + i_b * k + o_k, key_score(b_top), o_k < k)
    else:
        tl.store(out + i_b * s_out + i_c.to(tl.int64) * BK + o_k, b_top)


def select(keys: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Writes the frames and scores of the ``k`` largest keys ``(B, n)`` to ``ids`` and ``scores`` ``(B, k)``.

    How many levels are launched follows from the shapes alone.
    """
    samples, k = ids.shape
    architecture = device_of(keys).architecture
    kept = max(2, triton.next_power_of_2(k))
    last = config("select_keys", architecture, "last").constants["BC"]
    row = config("select_keys", architecture, "level")
    while keys.shape[1] > last:
        n, block = keys.shape[1], row.constants["BC"]
        blocks = triton.cdiv(n, block)
        out = keys.new_empty(samples, blocks * kept)
        launch(
            select_keys,
            (blocks, samples),
            keys,
            out,
            ids,
            scores,
            n,
            blocks * kept,
            k,
            BC=block,
            BK=kept,
            LAST=False,
            num_warps=row.num_warps,
        )
        keys = out
    n = keys.shape[1]
    block = max(kept, triton.next_power_of_2(n))
    row = config("select_keys", architecture, "last") if block > row.constants["BC"] else row
    launch(
        select_keys,
        (1, samples),
        keys,
        keys,
        ids,
        scores,
        n,
        0,
        k,
        BC=block,
        BK=kept,
        LAST=True,
        num_warps=row.num_warps,
    )
