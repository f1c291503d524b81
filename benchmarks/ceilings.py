"""What a device does at best: a product of square matrices, reading a tensor, copying one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.harness import Entrant
from benchmarks.micro_cases import dtype_name

MATMUL, COPY, READ = "matmul", "copy", "read"
SQUARE = 1024  # of a product, where nothing else is said


def product(device: str, dtype: torch.dtype, size: int = SQUARE, name: str = MATMUL) -> Entrant:
    """Floating point operations: a product of two square matrices."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Entrant(name, [lambda: one @ other], flops=2 * size**3)


def products(device: str, sizes: Mapping[torch.dtype, int]) -> dict[torch.dtype, Entrant]:
    """A product in each dtype, of these sizes; a single one has no dtype in its name."""
    return {
        dtype: product(device, dtype, size, MATMUL if len(sizes) == 1 else f"{MATMUL}, {dtype_name(dtype)}")
        for dtype, size in sizes.items()
    }


def reading(device: str, size: int) -> Entrant:
    """Bytes read: a sum over ``size`` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    return Entrant(READ, [source.sum], bytes=source.nbytes)


def copying(device: str, size: int) -> Entrant:
    """Bytes read and written: a copy of ``size`` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Entrant(COPY, [lambda: target.copy_(source)], bytes=2 * source.nbytes)
