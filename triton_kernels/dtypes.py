"""What the kernels do not compute with, and who does."""

from __future__ import annotations

import torch


def refuse_float64(name: str, x: torch.Tensor, allowed: str = "float32, float16 or bfloat16") -> None:
    """Raises TypeError for float64, naming the argument and the engines that take it."""
    if x.dtype == torch.float64:
        raise TypeError(
            f"engine 'triton' takes {allowed} for {name}, got {x.dtype}; engines that take it: dense, reference"
        )
