"""Which tests are skipped where, and Triton's interpreter for the kernels where torch sees no CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

from longlive_rag_ops.engines import ENGINES

if not torch.cuda.is_available():
    # Read when Triton is imported. Tests that compile kernels do so in a process of their own, without it.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked ``gpu`` without a GPU; what is marked ``triton``, and every file named so, without Triton.

    Those files are imported all the same, and so ask for triton themselves before they import any kernel.
    """
    on_gpu = torch.cuda.is_available()
    reason = ENGINES["triton"].obstacle("cuda" if on_gpu else "cpu")
    for item in items:
        if not on_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if reason is not None and (item.path.name.startswith("test_triton_") or item.get_closest_marker("triton")):
            item.add_marker(pytest.mark.skip(reason=f"triton engine: {reason}"))
