"""Errors of retrieval: of the cosines, and of the choice, by the dtype of the index, held against float64.

Exact are the cosines of embeddings as they were before they were stored. The published code normalises, multiplies and
compares in bfloat16, whose steps between 0.5 and 1 are 0.0039: among near-equal candidates the order decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.error_records import SUITE, single
from benchmarks.gpu_contenders import RECENT_EXCLUDE, SINK, first_line
from benchmarks.micro_cases import dtype_name
from benchmarks.preset import Preset
from benchmarks.record import Record
from longlive_rag_ops import reference

SCORES, CHOICE = "error of cosines against float64", "share of the frames that float64 chooses"
Search = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]  # (embeddings, query's frame, end)


def choice_errors(preset: Preset, name: str, embeddings: torch.Tensor, k: int, queries: int) -> list[Record]:
    """Three groups: cosines' root mean square and largest errors, and the share of right frames, over queries.

    Args:
        name: of the embeddings.
        embeddings: ``(N, E)`` float32 in order of frames, on the preset's device; the last ``queries`` are queries.
        k: frames to choose.
    """
    frames, dim = embeddings.shape
    exact = reference.unit_rows(embeddings.double())
    text = f"{name}, {k} of up to {frames} frames by {dim} numbers"
    titles = [f"{SCORES}, {text}, root mean square", f"{SCORES}, {text}, largest", f"{CHOICE}, {text}"]
    groups: list[list[Record]] = [[], [], []]
    for label, role, search, shape in _searches(k):
        known: dict[str, Any] = {
            "shape": {"embeddings": name, "frames": frames, "embedding": dim, "k": k, "queries": queries, **shape},
            "environment": dict(preset.facts),
        }
        try:
            numbers = _measured(search, embeddings, exact, k, queries)
        except Exception as error:  # one that fails must not stop the others
            why = f"FAILED, {first_line(error)}"
            for title, group in zip(titles, groups, strict=True):
                group.append(Record(SUITE, title, label, role, "1", absent=why, wrong=True, **known))
            continue
        for title, group, number in zip(titles, groups, numbers, strict=True):
            group.append(single(title, label, role, number, **known))
    return [record for group in groups for record in group]


def _searches(k: int) -> list[tuple[str, str, Search, dict[str, Any]]]:
    found: list[tuple[str, str, Search, dict[str, Any]]] = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        name = dtype_name(dtype)
        found.append((f"ours, {name} index", "ours", _op(dtype, k), {"index": name, "dtype": "float32"}))
    for dtype in (torch.float32, torch.bfloat16):
        name = dtype_name(dtype)
        found.append((f"as published, {name}", "published", _published(dtype, k), {"index": name, "dtype": name}))
    return found


def _op(stored: torch.dtype, k: int) -> Search:
    """`topk_retrieve` by a float32 query over unit rows stored so."""

    def search(embeddings: torch.Tensor, query: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, scale = reference.unit_rows(embeddings[None, :query]), None
        if stored == torch.int8:
            scale = rows.abs().amax(-1) / 127
            rows = (rows / scale[..., None]).round()
        device = embeddings.device
        ids, scores = torch.ops.longlive.topk_retrieve(
            embeddings[query][None],
            rows.to(stored),
            torch.arange(query, device=device)[None],
            torch.tensor([query], device=device),
            torch.tensor([end], device=device),
            k,
            first_frame=SINK,
            normalized=True,
            index_scale=scale,
        )
        return ids[0], scores[0]

    return search


def _published(dtype: torch.dtype, k: int) -> Search:
    """Normalise, multiply, `torch.topk`, all in one dtype."""

    def search(embeddings: torch.Tensor, query: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = embeddings.to(dtype)
        pool = torch.nn.functional.normalize(rows[None, SINK:end], dim=-1)
        unit = torch.nn.functional.normalize(rows[None, query], dim=-1)
        scores, ids = torch.topk(torch.bmm(pool, unit[..., None])[0, :, 0], k)
        return ids + SINK, scores

    return search


def _measured(
    search: Search, embeddings: torch.Tensor, exact: torch.Tensor, k: int, queries: int
) -> tuple[float, float, float]:
    errors, right = [], 0
    for query in range(len(embeddings) - queries, len(embeddings)):
        end = query - RECENT_EXCLUDE
        ids, scores = search(embeddings, query, end)
        cosines = exact[:end] @ exact[query]
        errors.append(scores.double() - cosines[ids])
        best = cosines[SINK:].topk(k).indices + SINK
        right += len(set(ids.tolist()) & set(best.tolist()))
    error = torch.cat(errors)
    if not error.isfinite().all():
        raise ValueError("scores are not finite")
    return float(error.square().mean().sqrt()), float(error.abs().max()), right / (k * queries)
