"""Keys and values for tests of page formats: random rows, and every kind of row that is easy to get wrong."""

from __future__ import annotations

import torch

from longlive_rag_ops.bank.page_format import PageFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
EIGHT_BITS = ("int8", "fp8")


def page_format(storage: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> PageFormat:
    """Two layers, two samples, 6 tokens, 3 heads of 16 channels, unless said otherwise."""
    small = {"layers": 2, "samples": 2, "tokens_per_frame": 6, "kv_heads": 3, "head_dim": 16}
    return PageFormat(storage=storage, dtype=dtype, **(small | sizes))


def pair(pages: PageFormat, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal keys and values whose rows differ in magnitude by up to a few powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, pages.layers, pages.samples, *pages.page_shape)
    x = torch.randn(shape, generator=generator) * torch.randn((*shape[:-1], 1), generator=generator).exp()
    keys, values = x.to(pages.dtype).unbind()
    return keys, values


def strange_rows(dtype: torch.dtype, head_dim: int = 16) -> torch.Tensor:
    """``(rows, head_dim)``: zeros, one large entry, subnormals of the dtype and of scales, magnitudes up to the
    dtype's largest, ties, steps of every size around the scales' limits; no NaN and no infinity."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(7)
    pattern = torch.randn(head_dim, generator=generator).double()
    pattern /= pattern.abs().max()
    magnitudes = [info.max, info.tiny, info.smallest_normal, info.max / 2, 65504.0, 1.0, 127.0, 448.0, 3.0]
    magnitudes += [2.0**e for e in range(-45, 30) if info.tiny <= 2.0**e <= info.max]
    magnitudes += [m for m in (127 * 65504.0, 448 * 65504.0, 1e30) if m <= info.max]
    rows = [pattern * magnitude for magnitude in magnitudes]
    rows += [torch.zeros(head_dim).double(), -torch.zeros(head_dim).double()]
    ties = torch.arange(head_dim).double() - head_dim // 2 + 0.5
    for top in (127.0, 448.0):  # a scale of 1, entries half-way between integers and between fp8 values
        rows += [torch.cat([ties[:-1], ties.new_tensor([top])]), torch.cat([ties[:-1] / 512, ties.new_tensor([top])])]
    one = torch.zeros(head_dim).double()
    one[0] = -1.0
    rows += [one, one * info.max]
    return torch.stack(rows).clamp(info.min, info.max).to(dtype)


def strange_pair(storage: str, dtype: torch.dtype, samples: int = 1) -> tuple[PageFormat, torch.Tensor, torch.Tensor]:
    """A format of one token a row, and keys and values of `strange_rows`, values in reverse order."""
    rows = strange_rows(dtype)
    pages = page_format(storage, dtype, layers=1, samples=samples, tokens_per_frame=len(rows), kv_heads=1)
    keys = rows[None, None, :, None].repeat(1, samples, 1, 1, 1)
    return pages, keys, keys.flip(2)


def every_other(x: torch.Tensor) -> torch.Tensor:
    """The same entries in the middle of gaps: no stride, and not the offset, is that of a dense tensor."""
    shape = [2 * size + 1 for size in x.shape]
    wide = torch.full(shape, 3, dtype=torch.float32).to(x.dtype).to(x.device)
    view = wide[tuple(slice(1, None, 2) for _ in shape)]
    view.copy_(x)
    return view
