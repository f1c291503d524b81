"""Buffers that outlive a call must not be inference tensors, whatever mode the caller is in.

A tensor made under `torch.inference_mode` cannot be written outside of it; a window made or grown there would fail the
first time it is used elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def normal_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: tensors made in the function are ordinary ones, without gradients."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call
