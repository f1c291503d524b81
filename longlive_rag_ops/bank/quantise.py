"""Eight-bit rows: the channels of one token and head as int8 or float8 e4m3fn, and one float16 scale for them.

The scale is the smallest float16 that is not below ``largest magnitude / top`` (top: 127 for int8, 448 for fp8), and
data are ``row / scale``, rounded to nearest, ties to even. Rounded up, a scale clips nothing, not where float16 is
subnormal and coarse either: an int8 entry is off by half a scale at most. Kept between 2**-24, the smallest float16
(a row of zeros has it too), and the largest scale whose product with top is finite in the pages' dtype: magnitudes
beyond that product saturate, which no float16 page can notice by more than half a step, and bfloat16 or float32 ones
only beyond 127 * 65504 (int8) or 448 * 65504 (fp8).

A row that holds NaN or infinity is passed on as NaN, all of it: its data are 0 and its scale is NaN, so that every
engine makes NaN of it. It is never made a number, and nothing asks the device whether there is one.

Products of data and scale have at most 18 significant bits, so float32 and float64 hold them exactly, and every
engine of ``place_frames`` rounds the same number once. Divisions are IEEE divisions and every row is for itself: bytes
depend on the row alone, whatever the device, the engine and the shape of the batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..engines import engine_name
from ..reference import lse_dtype

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TOP = {torch.int8: 127, torch.float8_e4m3fn: 448}
SCALE = torch.float16
SMALLEST_SCALE = 2.0**-24
NAN_BITS = 0x7E00  # of a scale; written as bits, because devices convert NaN to different ones


@lru_cache
def largest_scale(stored: torch.dtype, dtype: torch.dtype) -> float:
    """The largest float16 whose product with the top of ``stored`` is finite in ``dtype``."""
    limit = min(torch.finfo(dtype).max / TOP[stored], torch.finfo(SCALE).max)
    scale = torch.tensor(limit, dtype=SCALE)
    if float(scale) > limit:
        scale = (scale.view(torch.int16) - 1).view(SCALE)
    return float(scale)


@torch.no_grad()
def quantise(
    keys: torch.Tensor,
    values: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    padding: torch.Tensor,
    engine: str = "auto",
) -> None:
    """Writes quantised pages: on a GPU with one kernel, else in plain PyTorch; the same bytes.

    Args:
        keys, values: ``(layers, samples, T, H, D)``, float64 (never on the kernel), float32, float16 or bfloat16.
        k_pages, v_pages: as ``keys``, int8 or float8_e4m3fn; written.
        k_scale, v_scale: ``(layers, samples, T, H)`` float16; written.
        padding: ``(layers, samples, n)`` uint8, fewer than 4096 bytes a page; set to 0.
        engine: as the ops take it.

    Raises:
        TypeError: the engine ``triton`` is asked for float64.
        RuntimeError: the engine is not available.
    """
    name = engine_name(engine, keys.device.type)
    if name == "triton" or (name == "auto" and keys.dtype != torch.float64):
        from ..triton_kernels.encode_pages import encode_pages

        largest = largest_scale(k_pages.dtype, keys.dtype)
        encode_pages(keys, values, k_pages, v_pages, k_scale, v_scale, padding, TOP[k_pages.dtype], largest)
        return
    for x, pages, scale in ((keys, k_pages, k_scale), (values, v_pages, v_scale)):
        for layer in range(len(x)):  # one at a time: the wide copies of all would be as large as the pages of a window
            _quantise_rows(x[layer], pages[layer], scale[layer])
    padding.zero_()


def _quantise_rows(x: torch.Tensor, pages: torch.Tensor, scale: torch.Tensor) -> None:
    top, largest = TOP[pages.dtype], largest_scale(pages.dtype, x.dtype)
    wide = x.to(lse_dtype(x.dtype))
    most = wide.abs().amax(-1)
    finite = most < torch.inf  # false for NaN
    # Divided by a tensor: CUDA multiplies by the reciprocal of a number, and that is not the same.
    exact = (most / torch.full_like(most, top)).clamp(SMALLEST_SCALE, largest)
    rounded = exact.to(SCALE)
    bits = rounded.view(torch.int16) + (rounded.to(exact.dtype) < exact).to(torch.int16)
    scales = bits.masked_fill(~finite, NAN_BITS).view(SCALE)
    scale.copy_(scales)
    units = (wide / scales.to(wide.dtype)[..., None]).masked_fill(~finite[..., None], 0.0)
    if pages.dtype == torch.int8:
        units = units.round()
    pages.copy_(units.clamp(-top, top).to(pages.dtype))


def dequantise(pages: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``data * scale`` ``(..., D)`` rounded once to ``dtype``: what ``place_frames`` writes at position 0.

    Args:
        pages: ``(..., D)`` int8 or float8_e4m3fn.
        scale: ``(...)`` float16.
    """
    compute = lse_dtype(dtype)
    return (pages.to(compute) * scale.to(compute)[..., None]).to(dtype)
