"""Checks of single tensors: shape, dtype, device, and what a pool, a rotary table or a grid must be.

Values of index tables are checked too, where that costs no device synchronisation (on a CPU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..engines import DEVICES
from ..rotary import check_split

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
INTEGERS = (torch.int64,)
LARGEST_FRAME = 2**31 - 1  # engines may sort scores and frame numbers as one 64-bit key


def check(
    name: str, x: torch.Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], like: torch.Tensor
) -> None:
    """Checks one tensor: a size of None in ``shape`` takes any; the device must be that of ``like``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {None if x is None else type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {x.dtype}")
    if x.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(x.shape, shape, strict=True)
    ):
        allowed = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({allowed}), got {tuple(x.shape)}")
    _check_device(name, x, like)


def _check_device(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device}, got {x.device}: every engine needs all tensors of a call on one device "
            f"({', '.join(DEVICES)})"
        )


def check_scalar(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    """Checks a tensor that holds one int64."""
    if x.dtype != torch.int64 or x.numel() != 1:
        raise TypeError(f"{name} must be an int64 tensor with one element, got {x.dtype} of shape {tuple(x.shape)}")
    _check_device(name, x, like)


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """Checks ``low <= value`` and, when given, ``value <= high``."""
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor has no data: a fake tensor of the compiler, or one on the meta device."""
    return isinstance(x, FakeTensor) or x.is_meta


def has_readable_values(x: torch.Tensor) -> bool:
    """Whether reading an index table costs no device synchronisation."""
    return x.device.type == "cpu" and x.numel() > 0 and not is_fake(x)


def check_values(name: str, x: torch.Tensor, low: int, high: int) -> None:
    """Checks that an index table lies in ``[low, high]``; on a CPU only, elsewhere it would synchronise."""
    if not has_readable_values(x):
        return
    smallest, largest = (int(end) for end in torch.aminmax(x))
    if smallest < low or largest > high:
        got = smallest if smallest < low else largest
        raise ValueError(f"{name} must lie between {low} and {high}, got {got}")


def check_finite(name: str, x: torch.Tensor, nan: bool = False) -> None:
    """Checks that factors are finite, or with ``nan`` finite or NaN; on a CPU only."""
    if not has_readable_values(x):
        return
    wrong = x.isinf() if nan else ~x.isfinite()
    if bool(wrong.any()):
        raise ValueError(f"{name} must be finite{' or NaN' if nan else ''}, got {x[wrong][0].item()}")


def check_scale(scale: float | None) -> None:
    """Checks the factor of the logits."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_rotary(rope: torch.Tensor, rope_split: Sequence[int], head_dim: int, like: torch.Tensor) -> None:
    """Checks the rotary table against the head dimension."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, because channels are rotated in pairs; got {head_dim}")
    check("rope", rope, (None, head_dim // 2, 2), (torch.float32, torch.float64), like)
    check_split(rope_split, head_dim)


def check_grid(grid: Sequence[int], tokens: int, rope: torch.Tensor) -> None:
    """Checks that the grid covers a page's tokens and the rotary table reaches its edges."""
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] != tokens:
        raise ValueError(f"grid must be (h, w) with h * w = tokens_per_frame ({tokens}), got {list(grid)}")
    if max(grid) > rope.shape[0]:
        raise ValueError(f"grid must fit the rope table of {rope.shape[0]} positions, got {list(grid)}")


def check_pool(pool_layer: torch.Tensor, q: torch.Tensor, quantised: bool = False) -> None:
    """Checks a layer's pool ``(2, B, slots, T, Hkv, D)`` against queries ``(B, S, Hq, D)``."""
    if q.dim() != 4:
        raise ValueError(f"q must have shape (samples, tokens, heads, head_dim), got {tuple(q.shape)}")
    if q.dtype not in FLOATS:
        raise TypeError(f"q must have dtype {' or '.join(str(dtype) for dtype in FLOATS)}, got {q.dtype}")
    allowed = (q.dtype, torch.int8) if quantised else (q.dtype,)
    check("pool_layer", pool_layer, (2, q.shape[0], None, None, None, q.shape[3]), allowed, q)
    check_range("head_dim", q.shape[3], 1)
    check_range("pool_layer's tokens_per_frame", pool_layer.shape[3], 1)
    kv_heads = pool_layer.shape[4]
    if kv_heads < 1 or q.shape[2] < kv_heads or q.shape[2] % kv_heads:
        raise ValueError(f"q must have a multiple of the pool's {kv_heads} key-value heads, got shape {tuple(q.shape)}")
