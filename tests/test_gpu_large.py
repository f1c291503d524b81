"""On a GPU: the paper's shape, and tensors with more than 2**31 elements. ``LONGLIVE_GPU_TESTS_ON`` as in test_gpu."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tolerance import assert_close_enough

import longlive_rag_ops  # noqa: F401  registers the ops
from longlive_rag_ops import reference
from longlive_rag_ops.rotary import default_split, rotary_table

ON_CPU = os.environ.get("LONGLIVE_GPU_TESTS_ON") == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda"
HALF = torch.float16 if ON_CPU else torch.bfloat16
pytestmark = [] if ON_CPU else pytest.mark.gpu
OPS = torch.ops.longlive


def normal(*size: int, seed: int = 0, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=dtype)


def need(gib: float) -> None:
    if ON_CPU:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, found {free:.1f}")


def rope(head_dim: int) -> dict[str, Any]:
    table = rotary_table(head_dim, 128, dtype=torch.float32, device=DEVICE)
    return {"rope": table, "rope_split": list(default_split(head_dim))}


@pytest.mark.parametrize("engine", ["triton", "dense", "auto"])
def test_attention_at_the_shape_of_the_paper(engine: str) -> None:
    """Every number, one head after another: the logits of all heads would take 8 GiB in float64."""
    need(6)
    frames, tokens, heads, head_dim = (4, 6, 2, 32) if ON_CPU else (12, 1560, 12, 128)
    q = normal(1, 3 * tokens, heads, head_dim)
    pool = normal(2, 1, frames + 1, tokens, heads, head_dim, seed=1)
    out, lse = OPS.window_attend(q, pool, run=frames, return_lse=True, engine=engine)
    for head in range(heads):
        one = slice(head, head + 1)
        exact, exact_lse = reference.window_attend(q[:, :, one].double(), pool[..., one, :], None, frames, None, True)
        key, value = pool[:, 0, :frames, :, head].flatten(1, 2)
        logits = q[0, :, head] @ key.T * head_dim**-0.5
        plain = (logits.softmax(-1) @ value)[None, :, None]
        assert_close_enough(out[:, :, one], plain, exact)
        assert_close_enough(lse[:, one], logits.float().logsumexp(-1)[None, None], exact_lse)


@pytest.mark.parametrize("engine", ["triton", "auto"])
def test_pages_and_attention_beyond_two_to_the_31(engine: str) -> None:
    """A plane of the pool has more than 2**31 elements: what is computed there equals the same in a small pool."""
    need(24)
    tokens, heads, head_dim = (8, 2, 32) if ON_CPU else (1024, 16, 128)
    slots = 8 if ON_CPU else 2**31 // (tokens * heads * head_dim) + 4
    pool = torch.empty(2, 1, slots, tokens, heads, head_dim, device=DEVICE, dtype=HALF)
    last = slots - 1
    small = normal(2, 1, 4, tokens, heads, head_dim)  # stands for slots 0, last - 2, last - 1, last
    where = torch.tensor([0, last - 2, last - 1, last], device=DEVICE)
    pool[:, :, where] = small
    block = {name: normal(1, tokens, heads, head_dim, seed=seed) for seed, name in enumerate("qkv", 2)}
    outs = []
    for target, table in ((small, torch.arange(4, device=DEVICE)), (pool, where)):
        staging = torch.zeros(1, 2, tokens, heads, head_dim, device=DEVICE, dtype=HALF)
        one = torch.tensor([1], device=DEVICE)
        rotated = OPS.write_frames(
            **block,
            pool_layer=target,
            staging=staging,
            slots=table[3:],
            staging_rows=one,
            positions=7 * one,
            grid=[8, tokens // 8],
            **rope(head_dim),
            engine=engine,
        )
        OPS.place_frames(target, table[None, 2:3], table[None, 1:2], 5 * one[None], **rope(head_dim), engine=engine)
        attended, lse = OPS.window_attend(rotated, target, table[None], return_lse=True, engine=engine)
        outs.append((rotated, attended, lse, staging, target[:, :, table]))
    for got, want in zip(outs[1], outs[0], strict=True):
        assert not got.isnan().any() and torch.equal(got, want)


@pytest.mark.parametrize("engine", ["triton", "auto"])
def test_search_beyond_two_to_the_31(engine: str) -> None:
    need(24)
    embedding = 32 if ON_CPU else 1024
    rows = 300 if ON_CPU else 2**31 // embedding + 5
    index = torch.zeros(1, rows, embedding, device=DEVICE, dtype=HALF)
    query = normal(1, embedding)
    best = [rows - 1, rows - 4]
    for rank, row in enumerate(best):
        index[0, row] = query[0] + (rank + 1) * 0.5 * normal(embedding, seed=row)
    ids, scores = OPS.topk_retrieve(
        query,
        index,
        torch.arange(rows, device=DEVICE)[None],
        torch.tensor([rows], device=DEVICE),
        torch.tensor([rows], device=DEVICE),
        3,
        engine=engine,
    )
    assert ids.tolist() == [[*best, 0]]  # then a zero row: similarity 0, the oldest first
    want = torch.nn.functional.cosine_similarity(query.double(), index[0, best].double(), dim=1)
    torch.testing.assert_close(scores[0, :2].double(), want, rtol=1e-5, atol=1e-5)
    assert scores[0, 2] == 0
