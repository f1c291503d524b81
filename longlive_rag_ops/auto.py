"""The engine ``auto`` on a GPU: Triton's kernels, with the attention that `preferences` names for each call.

Same functions and arguments as `reference`. What decides is known to the host without asking the device. Calls that
the Triton kernels do not take (float64, very wide heads or embeddings, very many frames) go to the dense engine as a
whole, which reads its tables on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from . import dense, dense_backends, preferences
from .triton_kernels import engine as triton
from .triton_kernels import retrieve_attend as resident
from .triton_kernels.topk_retrieve import LARGEST_EMBEDDING, LARGEST_K

__all__ = ["merge_attention", "place_frames", "retrieve_attend", "topk_retrieve", "window_attend", "write_frames"]


def topk_retrieve(
    query: torch.Tensor, index: torch.Tensor, index_ids: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton's, where it takes the arguments."""
    taken = _narrow(query, index) and rest[2] <= LARGEST_K and query.shape[1] <= LARGEST_EMBEDDING
    return (triton if taken else dense).topk_retrieve(query, index, index_ids, *rest)


def write_frames(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Triton's, where it takes the arguments."""
    return (triton if _narrow(q) else dense).write_frames(q, *rest)


def place_frames(pool_layer: torch.Tensor, *rest: Any) -> None:
    """Triton's, where it takes the arguments."""
    (triton if _narrow(pool_layer) else dense).place_frames(pool_layer, *rest)


def merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton's, where it takes the arguments."""
    return (triton if _narrow(outs, lses) else dense).merge_attention(outs, lses)


def window_attend(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    slots: torch.Tensor | None = None,
    run: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    shifts: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    rope_split: Sequence[int] | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the table of preferences."""
    engine = attention_engine(q, pool_layer, preferences.shape_of(run, shifts, k_scale), run)
    return engine.window_attend(
        q, pool_layer, slots, run, scale, return_lse, shifts, rope, rope_split, k_scale, v_scale
    )


def retrieve_attend(q: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton's sequence, whose host waits for nothing, with this module's steps."""
    if preferences.dtype_class(q.dtype, q.shape[3]) == "float64":
        return dense.retrieve_attend(q, *args, **options)
    return resident.run_chain(STEPS, q, *args, **options)


def attention_engine(q: torch.Tensor, pool_layer: torch.Tensor, shape: str, run: int | None = None) -> ModuleType:
    """The engine that attends, for queries ``(B, S, Hq, D)`` and what they attend to; asks the device nothing."""
    architecture = dense_backends.architecture_of(q.device)
    rows = preferences.candidates(architecture, shape, preferences.dtype_class(q.dtype, q.shape[3]))
    back_end = None
    if rows[0].dense_with:
        keys, reach = (run or 0) * pool_layer.shape[3], dense_backends.reach(q, pool_layer[0])
        wanted = dense_backends.Facts(q.device.type, architecture, q.dtype, q.shape[3], keys, reach)
        back_end = dense_backends.select(wanted).name
    return {"dense": dense, "triton": triton}[preferences.choose(rows, back_end).engine]


def _attend(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    counts: torch.Tensor,
    count: int | None,
    most: int,
    scale: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`retrieve_attend`'s last step: a run whose length the host knows, or only the device."""
    if count is None:
        return resident.attend_counted(q, pool_layer, counts, None, most, scale, return_lse)
    return window_attend(q, pool_layer, None, count, scale, return_lse)


def _narrow(*tensors: torch.Tensor) -> bool:
    return all(x.dtype != torch.float64 for x in tensors)


STEPS = resident.Steps(topk_retrieve, write_frames, place_frames, _attend)
