"""Inputs of attention tests, plain PyTorch in the same precision to hold kernels against, and both ways they read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import cases
import pytest
import torch
from tolerance import assert_close_enough

from longlive_rag_ops import reference
from longlive_rag_ops.rotary import default_split, rotary_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS = 32


def make(
    tokens: int = 24,
    head_dim: int = 64,
    heads: int = 2,
    kv_heads: int = 1,
    samples: int = 2,
    length: int = 20,
    slots: int = 7,
    dtype: torch.dtype = torch.float32,
    table: str = "slots",
    seed: int = 0,
) -> dict[str, Any]:
    """``table``: slots (holes, another order in each sample), run, shifts (slots that count as moved), int8."""
    rng = cases.generator(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE, dtype)

    case = {
        "q": normal(samples, length, heads, head_dim),
        "pool_layer": normal(2, samples, slots, tokens, kv_heads, head_dim),
        "return_lse": True,
    }
    if table == "run":
        return case | {"run": 5}
    rows = torch.stack([torch.randperm(slots, generator=rng)[:5] for _ in range(samples)])
    for b in range(samples):
        rows[b, b % 5] = -1
    case["slots"] = rows.to(DEVICE)
    if table == "shifts":
        moved = torch.randint(1 - POSITIONS, POSITIONS, rows.shape, generator=rng)
        moved[rows < 0] = 10**6  # of an entry that is not there: not read
        case |= {"shifts": moved.to(DEVICE), **rotation(head_dim)}
    if table == "int8":
        quantise(case)
    return case


def rotation(head_dim: int) -> dict[str, Any]:
    return {
        "rope": rotary_table(head_dim, POSITIONS, dtype=torch.float32).to(DEVICE),
        "rope_split": list(default_split(head_dim)),
    }


def quantise(case: dict[str, Any]) -> None:
    """Turns a case's pool into int8 pages with scales a token and head."""
    pages = case["pool_layer"].float()
    scale = pages.abs().amax(-1) / 127
    case["pool_layer"] = (pages / scale[..., None]).round().to(torch.int8)
    case["k_scale"], case["v_scale"] = scale.to(torch.float16)


def exact(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's result, left in float64."""
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in case.items()
    }
    return reference.window_attend(**wide | {"pool_layer": case["pool_layer"].double(), "return_lse": True})


def plain(case: dict[str, Any]) -> torch.Tensor:
    """Matrix product, softmax, matrix product in the precision of the queries."""
    q, pool = case["q"], case["pool_layer"]
    heads, kv_heads = q.shape[2], pool.shape[4]
    scale = case["scale"] if case.get("scale") is not None else q.shape[3] ** -0.5
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        table = list(range(case["run"])) if "run" in case else case["slots"][b].tolist()
        logits, values = [], []
        for j, slot in enumerate(table):
            if slot < 0:
                continue
            key, value, query = pool[0, b, slot], pool[1, b, slot], q[b]
            if "k_scale" in case:
                key = (key.float() * case["k_scale"][b, slot].float()[..., None]).to(q.dtype)
                value = (value.float() * case["v_scale"][b, slot].float()[..., None]).to(q.dtype)
            if "shifts" in case:
                by = -int(case["shifts"][b, j])
                query = reference.turn_in_time(query.float(), case["rope"], case["rope_split"], by).to(q.dtype)
            key, value = (x.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for x in (key, value))
            logits.append(query.transpose(0, 1) @ key.transpose(1, 2) * scale)
            values.append(value)
        if values:
            out[b] = (torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 1)).transpose(0, 1)
    return out


def check(case: dict[str, Any], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Holds a result against the oracle."""
    want, total = exact(case)
    assert out.dtype == case["q"].dtype and out.is_contiguous() and lse.dtype == torch.float32
    values = case["pool_layer"][1].double()
    if "v_scale" in case:
        values = values * case["v_scale"].double()[..., None]
    largest = values[values.isfinite()].abs().max().item() if values.numel() else 0.0
    # float32 only: half precision's results are rounded to far less than what cancelling loses.
    assert_close_enough(out, plain(case), want, largest=largest if out.dtype == torch.float32 else 0.0)
    # The log-sum-exp is float32 whatever the queries are; a turned query is rounded to their precision.
    rounded = "shifts" in case and case["q"].dtype != torch.float32
    torch.testing.assert_close(lse.double(), total, rtol=1e-5, atol=4e-3 if rounded else 2e-5)


@contextlib.contextmanager
def read_by(way: str) -> Iterator[None]:
    """Within it, tiles are read by ``pointers`` or by ``descriptors`` (the tensor memory accelerator)."""
    from longlive_rag_ops.triton_kernels import launch, window_plan

    if DEVICE == "cpu":
        # Few multiprocessors: the keys are split where a test splits them, the interpreter has enough to do.
        model = launch.MODELS[90 if way == "descriptors" else 80]
        with launch.assume(dataclasses.replace(model, multiprocessors=2)):
            yield
        return
    if way == "descriptors" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("this GPU's kernels do not use descriptors")
    if way == "pointers":
        how = "elements" if torch.cuda.get_device_capability()[0] in (9, 10) else "pointers"
        with mock.patch.object(window_plan, "reading", lambda *_: how):
            yield
    else:
        yield
