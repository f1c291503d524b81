"""How `window_attend` runs on a device: which form of the kernel, which row of configurations, how pages are read."""

from __future__ import annotations

import torch
import triton

from .configs import Config, config, family
from .dtypes import refuse_float64
from .launch import INTERPRETED, Device

# The tensor memory accelerator reads whole tiles from sm_90 on. On sm_120 it is slower than cp.async at these tile
# sizes (published microbenchmark, kekzl/imp pull request 169), and on older ones Triton would emulate it.
TMA_FAMILIES = (90, 100)


def check_dtype(q: torch.Tensor) -> None:
    """Refuses what the kernels do not compute.

    Raises:
        TypeError: float64.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    refuse_float64("q", q)
    if INTERPRETED and q.dtype == torch.bfloat16:
        raise RuntimeError(
            "engine 'triton' runs in Triton's interpreter here, whose matrix product is wrong in torch.bfloat16; use "
            "torch.float32 or torch.float16, or engine 'dense'"
        )


def row_of(device: Device, dtype: torch.dtype, head_dim: int, form: str, how: str) -> Config:
    """The row for a form of the kernel.

    Args:
        form: run (one stretch of memory), pages, turned (pages that count as moved); int8 pages, int8 turned.
        how: see `reading`.

    Raises:
        ValueError: heads wider than any row.
        RuntimeError: the device has less shared memory than the row needs.
    """
    if head_dim > 256:
        raise ValueError(
            f"engine 'triton' takes heads of up to 256 channels, got {head_dim}; engines that take more: dense, "
            "reference"
        )
    wide = block_d(head_dim)
    if dtype == torch.float32:
        row = config("window_attend", device.architecture, f"float32 D {max(wide, 64)}")
    elif how == "elements":
        row = config("window_attend", device.architecture, f"elements D {max(wide, 64)}")
    else:
        row = config("window_attend", device.architecture, f"{form} D {max(wide, 64)} {how}")
    needed = row.constants["SHARED"]
    if needed > device.shared_memory:
        raise too_much_shared(needed, device.shared_memory)
    return row


def too_much_shared(needed: int, available: int) -> RuntimeError:
    """What is raised when a block needs more shared memory than the device gives."""
    return RuntimeError(
        f"engine 'triton' needs {needed} bytes of shared memory a block for window_attend here, the device gives "
        f"{available}; engines that work here: dense, reference"
    )


def block_d(head_dim: int) -> int:
    """Channels of a tile: tiles have powers of two, and matrix products at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def is_joined(pool_layer: torch.Tensor) -> bool:
    """Whether consecutive slots are one stretch of tokens."""
    return pool_layer.stride(2) == pool_layer.shape[3] * pool_layer.stride(3) or pool_layer.shape[2] == 1


def reading(device: Device, pool_layer: torch.Tensor, dtype: torch.dtype) -> str:
    """How tiles of the pool are read for queries of ``dtype``.

    Returns:
        descriptors: by the tensor memory accelerator; pointers: 16 bytes at a time; elements: where base and strides
        are not multiples of 16 bytes, or channels not side by side. Both hardware copies ask for the same: CUDA driver
        API, ``cuTensorMapEncodeTiled``. On sm_90 and sm_100 there is nothing between the first and the last.
    """
    unit = 16 // pool_layer.element_size()
    whole = (
        pool_layer.numel() > 0
        and (pool_layer.stride(5) == 1 or pool_layer.shape[5] == 1)
        and all(0 < s < 2**36 * unit and s % unit == 0 for s in _described_strides(pool_layer))
        and all(plane.data_ptr() % 16 == 0 for plane in (pool_layer[0], pool_layer[1]))
    )
    if family(device.architecture) not in TMA_FAMILIES:
        return "pointers" if whole else "elements"
    # Wide float32 heads spill by descriptors, and have no tensor cores to feed.
    wide = dtype == torch.float32 and pool_layer.shape[5] > 128
    return "descriptors" if whole and not wide else "elements"


def _described_strides(pool_layer: torch.Tensor) -> list[int]:
    """Of (sample, slot, token, head); an axis of one entry is never stepped along and may have any."""
    unit = 16 // pool_layer.element_size()
    axes = zip(pool_layer.shape[1:5], pool_layer.stride()[1:5], strict=True)
    return [stride if size > 1 else unit for size, stride in axes]


def descriptors(pool_layer: torch.Tensor, joined: bool, block_n: int, wide: int) -> tuple[object, object]:
    """Descriptors of keys and of values for tiles of ``block_n`` tokens by ``wide`` channels.

    Axes are (sample, slot, head, token, channel); with ``joined`` the slots are one long page. Each is an axis of its
    own, so that strides need not be those of a contiguous pool, and reading past a page's end, or past the channels,
    gives zeros.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    _, samples, slots, tokens, heads, head_dim = pool_layer.shape
    s_sample, s_slot, s_token, s_head = _described_strides(pool_layer)
    shape = [samples, slots, heads, tokens, head_dim]
    if joined:
        shape[1], shape[3] = 1, slots * tokens
        s_token = s_token if tokens > 1 else s_slot
    block = [1, 1, 1, block_n, wide]
    keys, values = (
        TensorDescriptor(pool_layer[plane], shape, [s_sample, s_slot, s_head, s_token, 1], block) for plane in (0, 1)
    )
    return keys, values
