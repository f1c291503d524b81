"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2 and "torch.ops.longlive.retrieve_attend" in blocks[0]
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    exec("".join(blocks), scope)
    assert len(scope["memory"].selected[0]) == 6
    assert scope["y"].shape == (1, 36, 64) and scope["y"].isfinite().all()


def test_table_of_ops_is_complete() -> None:
    from longlive_rag_ops.ops.schemas import SCHEMAS

    text = README.read_text(encoding="utf-8")
    assert all(f"| `{op}` |" in text for op in SCHEMAS)
