"""Dense attention over a table of slots without reading the table: torch's `varlen_attn` with a table of pages.

It walks the table on the device, so it costs no host synchronisation and no copy, where its pages can be ours.
"""

from __future__ import annotations

import inspect
import math
from functools import lru_cache

import torch

from . import dense_backends

PAGE = 256  # tokens: FlashAttention-2 takes pages of a multiple of this


@lru_cache
def missing() -> str | None:
    """Why this torch does not have it, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "torch has no varlen_attn"
    if not {"block_table", "seqused_k", "num_splits"} <= set(inspect.signature(varlen_attn).parameters):
        return f"varlen_attn of torch {torch.__version__} takes no table of pages"
    return None


def obstacle(q: torch.Tensor, pool_layer: torch.Tensor) -> str | None:
    """Why it cannot serve a table of slots of this pool, or None. Costs no device synchronisation."""
    if q.device.type != "cuda":
        return f"it runs on CUDA devices only, the tensors are on {q.device.type}"
    if missing() is not None:
        return missing()
    if torch.nn.attention.current_flash_attention_impl() is not None:
        return "another FlashAttention was activated in torch, with other rules for pages"
    tokens = pool_layer.shape[3]
    if tokens % PAGE:
        return f"tokens_per_frame must be a multiple of {PAGE}, got {tokens}"
    if not (pool_layer.select(0, 0).is_contiguous() and q.numel() > 0):
        return "the pool's keys and values must be contiguous, and there must be queries"
    wanted = dense_backends.Facts("cuda", dense_backends.architecture_of(q.device), q.dtype, q.shape[3], tokens)
    return dense_backends.why_not(dense_backends.FLASH, wanted)


def attend(
    q: torch.Tensor, pool_layer: torch.Tensor, slots: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``q (B, S, Hq, D)`` over each sample's slots; out like q, lse ``(B, Hq, S)`` float32."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    samples, length, heads, head_dim = q.shape
    entries, (pool_slots, tokens, kv_heads) = slots.shape[1], pool_layer.shape[2:5]
    pages = tokens // PAGE  # pages of a slot
    # Slots in use first: the order of keys does not matter, but the kernel reads a table from its start.
    first = (slots < 0).sort(dim=1, stable=True).indices
    packed = slots.gather(1, first).clamp(min=0) + torch.arange(samples, device=q.device)[:, None] * pool_slots
    table = packed[..., None] * pages + torch.arange(pages, device=q.device)
    used = (slots >= 0).sum(1)
    keys, values = pool_layer.flatten(1, 3).unflatten(1, (-1, PAGE))
    if scale is not None and scale < 0:  # the kernel takes the largest product for the largest logit
        q, scale = -q, -scale
    out, lse = varlen_attn(
        q.reshape(samples * length, heads, head_dim),
        keys,
        values,
        torch.arange(samples + 1, dtype=torch.int32, device=q.device) * length,
        torch.arange(samples + 1, dtype=torch.int32, device=q.device) * entries * tokens,
        length,
        entries * tokens,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        enable_gqa=heads != kv_heads,
        seqused_k=(used * tokens).int(),
        block_table=table.flatten(1).int(),
        num_splits=1,  # one order of summation
    )
    # The kernel leaves +inf, in some versions NaN, for a sample without keys. Its log-sum-exp is (Hq, B * S).
    empty = (used == 0)[:, None, None]
    out = torch.where(empty[..., None], 0, out.reshape(q.shape))
    return out, torch.where(empty, -math.inf, lse.reshape(heads, samples, length).transpose(0, 1)).contiguous()
