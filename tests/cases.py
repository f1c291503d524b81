"""Inputs for op tests: one set of valid arguments an op, in any dtype, contiguous or strided."""

from __future__ import annotations

from typing import Any

import torch

import longlive_rag_ops  # noqa: F401  registers the ops
from longlive_rag_ops.assignment import empty_window_state
from longlive_rag_ops.config import window_slot
from longlive_rag_ops.rotary import default_split, rotary_table

GRID = (2, 3)
TOKENS = 6
BLOCK = 2  # frames in a block


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gapped(x: torch.Tensor) -> torch.Tensor:
    """The same values with an innermost stride of 2."""
    wide = torch.zeros(*x.shape, 2, dtype=torch.float32, device=x.device).to(x.dtype)
    wide[..., 1] = 77
    view = wide[..., 0]
    view.copy_(x)
    return view


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second element of a larger buffer, in each of the last two axes but the innermost."""
    shape = (*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1] + 6)
    wide = torch.full(shape, torch.nan if x.is_floating_point() else 99, device=x.device).to(x.dtype)
    view = wide[..., 1::2, 4:-2]
    view.copy_(x)
    assert not view.is_contiguous() or x.numel() == 0
    return view


def block(
    dtype: torch.dtype = torch.float32,
    samples: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    seed: int = 0,
    slots: int = 9,
) -> dict[str, Any]:
    """q, k, v of a block, a pool and a staging buffer full of numbers, a rotary table."""
    rng = generator(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "q": normal(samples, BLOCK * TOKENS, heads, head_dim),
        "k": normal(samples, BLOCK * TOKENS, kv_heads, head_dim),
        "v": normal(samples, BLOCK * TOKENS, kv_heads, head_dim),
        "pool_layer": normal(2, samples, slots, TOKENS, kv_heads, head_dim),
        "staging": normal(samples, 7, TOKENS, kv_heads, head_dim),
        "rope": rotary_table(head_dim, 64, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        "rope_split": list(default_split(head_dim)),
        "grid": list(GRID),
    }


def topk(
    dtype: torch.dtype = torch.float32, rows: int = 20, embedding: int = 8, seed: int = 0, options: str = ""
) -> dict[str, Any]:
    """``options``: int8 (a quantised index), gate (a least score) or diverse."""
    rng = generator(seed)
    ids = torch.stack([torch.randperm(rows, generator=rng) for _ in range(2)])
    case = {
        "query": torch.randn(2, embedding, generator=rng, dtype=torch.float64).to(dtype),
        "index": torch.randn(2, rows, embedding, generator=rng, dtype=torch.float64).to(dtype),
        "index_ids": ids,
        "index_length": torch.tensor([rows - 3]),
        "end_frame": torch.tensor([rows - 2]),
        "k": 5,
        "first_frame": 1,
        "recent_exclude": 2,
    }
    if options == "int8":
        case["index_scale"] = case["index"].float().abs().amax(-1) / 127
        case["index"] = (case["index"].float() / case["index_scale"][..., None]).round().to(torch.int8)
    return case | {"gate": {"min_score": 0.1}, "diverse": {"diversity": 0.4}}.get(options, {})


def write(dtype: torch.dtype = torch.float32, weights: bool = False, **sizes: int) -> dict[str, Any]:
    case = block(dtype, **sizes)
    case |= {
        "slots": torch.tensor([3, 1]),
        "staging_rows": torch.tensor([6, 0]),
        "positions": torch.tensor([7, 8]),
    }
    if weights:
        for name in "qk":
            heads, head_dim = case[name].shape[2:]
            case[f"{name}_weight"] = torch.rand(heads * head_dim, generator=generator(3)).to(dtype) + 0.5
        case["eps"] = 0.5
    return case


def place(dtype: torch.dtype = torch.float32, pages: str = "pool", **sizes: int) -> dict[str, Any]:
    """``pages``: pool, keys (a buffer of keys alone), int8 or fp8 (quantised keys and values)."""
    inputs = block(dtype, **sizes)
    case = {name: inputs[name] for name in ("pool_layer", "rope", "rope_split")}
    case |= {
        "slots": torch.tensor([[0, 2, -1], [1, 0, 3]]),
        "source": torch.tensor([[5, 6, 5], [6, -1, 4]]),
        "positions": torch.tensor([[0, 9, 1], [0, 3, 63]]),
    }
    if pages == "keys":
        case["k_pages"] = inputs["staging"]
    elif pages != "pool":
        store = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[pages]
        for offset, name in enumerate("kv"):
            values = torch.randn(inputs["staging"].shape, generator=generator(5 + offset))
            scale = values.abs().amax(-1) / (127 if pages == "int8" else 448)
            quantised = values / scale[..., None]
            case[f"{name}_pages"] = (quantised.round() if pages == "int8" else quantised).to(store)
            case[f"{name}_scale"] = scale.to(torch.float16)
    return case


def attend(dtype: torch.dtype = torch.float32, table: str = "slots", **sizes: int) -> dict[str, Any]:
    """``table``: slots (holes, another order in each sample), run, run without lse, empty (one sample
    has nothing to attend to), shifts (entries moved in time), int8 (quantised pages)."""
    inputs = block(dtype, **sizes)
    case = {"q": inputs["q"], "pool_layer": inputs["pool_layer"], "return_lse": True, "scale": 0.4}
    if table.startswith("run"):
        case |= {"run": 5, "return_lse": table == "run"}
    else:
        first = [-1, -1, -1, -1] if table == "empty" else [4, -1, 0, 7]
        case["slots"] = torch.tensor([first, [1, 2, 3, -1]])
    if table == "shifts":
        case |= {name: inputs[name] for name in ("rope", "rope_split")}
        case["shifts"] = torch.tensor([[5, 63, -63, 0], [0, -4, 12, 99]])
    if table == "int8":
        pages = case["pool_layer"].float()
        scale = pages.abs().amax(-1) / 127
        case["pool_layer"] = (pages / scale[..., None]).round().to(torch.int8)
        case["k_scale"], case["v_scale"] = scale.to(torch.float16)
    return case


def retrieve(dtype: torch.dtype = torch.float32, select: bool = True, **sizes: int) -> dict[str, Any]:
    """The first block of a video, or with ``start`` blocks before it done by the caller."""
    case = block(dtype, **sizes)
    samples = case["q"].shape[0]
    case |= {
        "window_state": empty_window_state(samples, 6),
        "index": torch.randn(samples, 8, 4, generator=generator(9)),
        "index_ids": torch.arange(8).repeat(samples, 1),
        "index_length": torch.tensor([0]),
        "frame_slot": torch.full((samples, 8), -1),
        "start_frame": torch.tensor([0]),
        "sink": 1,
        "top_k": 2,
        "recent_exclude": 1,
        "select": select,
        "place": True,
        "return_lse": True,
    }
    return case


def retrieve_later(
    dtype: torch.dtype = torch.float32, select: bool = True, weights: bool = False, normalized: bool = False
) -> dict[str, Any]:
    """A block in the middle of a video: frames to retrieve, kept, and placed again at new positions.

    With ``select=False`` the state is already that of the block.
    """
    samples, start = 2, 14
    case = retrieve(dtype, slots=6 + 16) | {"index": torch.randn(samples, 16, 4, generator=generator(9))}
    case |= {"index_ids": torch.arange(16).repeat(samples, 1), "frame_slot": torch.full((samples, 16), -1)}
    for earlier in range(0, start, BLOCK):  # the oracle makes the history
        step = case | {name: block(dtype, seed=earlier + 20)[name] for name in "qkv"}
        step |= {"start_frame": torch.tensor([earlier]), "index_length": torch.tensor([earlier])}
        torch.ops.longlive.retrieve_attend(**step, engine="reference")
        for frame in range(earlier, earlier + BLOCK):
            case["pool_layer"][0, :, 6 + frame] = case["staging"][:, frame % 7]
            case["pool_layer"][1, :, 6 + frame] = case["pool_layer"][1, :, window_slot(frame, 1, 3)]
            case["frame_slot"][:, frame] = 6 + frame
    case |= {"start_frame": torch.tensor([start]), "index_length": torch.tensor([start]), "scale": 0.4}
    if normalized:
        case |= {"index": torch.nn.functional.normalize(case["index"], dim=-1), "index_normalized": True}
    if weights:
        rng = generator(3)
        case |= {f"{n}_weight": (torch.rand(case[n].shape[2] * 16, generator=rng) + 0.5).to(dtype) for n in "qk"}
        case["eps"] = 0.5
    if not select:
        probe = clone(case)
        torch.ops.longlive.retrieve_attend(**probe)
        case |= {"window_state": probe["window_state"], "select": False, "count": 6}
    return case


def merge(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rng = generator(2)
    lses = torch.randn(3, 2, 4, 5, generator=rng)
    lses[1, 0] = -torch.inf
    lses[:, 1, 2] = -torch.inf
    return {"outs": torch.randn(3, 2, 5, 4, 8, generator=rng).to(dtype), "lses": lses}


ALL = {
    "topk_retrieve": topk,
    "write_frames": write,
    "place_frames": place,
    "window_attend": attend,
    "retrieve_attend": retrieve,
    "merge_attention": merge,
}


def clone(case: dict[str, Any]) -> dict[str, Any]:
    """A copy whose tensors may be mutated; strides are kept."""
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.items()
    }
