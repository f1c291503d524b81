"""The README's example runs as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_wan import Pipeline, ToyWan

sys.path.append(str(Path(__file__).parent / "distributed"))

from rank_processes import run_ranks

README = Path(__file__).parents[1] / "README.md"


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patching, *blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4 and "torch.ops.longlive.retrieve_attend" in blocks[0]
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline(ToyWan(), frames=12)
    monkeypatch.setattr(pipeline, "inference", lambda noise, prompts: pipeline.run(16), raising=False)
    scope: dict[str, Any] = {"pipeline": pipeline, "noise": None, "prompts": None}
    exec(patching, scope)
    assert scope["video"].shape[2] == 32 and (tmp_path / "retrieved.png").stat().st_size > 5000

    scope = {}
    torch.manual_seed(0)
    exec("".join(blocks[:2]), scope)
    assert len(scope["memory"].selected[0]) == 6
    assert scope["y"].shape == (1, 36, 64) and scope["y"].isfinite().all()

    exec(blocks[2], scope)
    loop = blocks[1][blocks[1].index("with torch.inference_mode()") :]
    exec(loop, scope)
    assert len(scope["memory"].selected[0]) == 6
    stats = scope["memory"].bank.stats()
    assert stats["frames"] == 36 and stats["host"]["frames"] + stats["disk"]["frames"] >= 36


def _on_two_ranks(rank: int) -> list[int]:
    import torch.distributed as dist

    _, *blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(blocks[0] + blocks[1] + "from longlive_rag_ops import BankConfig", scope)
    dist.init_process_group = lambda backend: None  # there is one
    exec(blocks[3], scope)
    exec(blocks[1][blocks[1].index("with torch.inference_mode()") :], scope)
    memory = scope["memory"]
    assert memory.transfer == "pages" and len(memory.selected[0]) == 6 and 17 <= len(memory.bank) <= 18
    return list(memory.selected[0])


def test_example_of_ranks_runs() -> None:
    first, second = run_ranks(2, _on_two_ranks)
    assert first == second


def test_table_of_ops_is_complete() -> None:
    from longlive_rag_ops.ops.schemas import SCHEMAS

    text = README.read_text(encoding="utf-8")
    assert all(f"| `{op}` |" in text for op in SCHEMAS)
