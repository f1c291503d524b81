"""The template of an adapter in docs/patching.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from longlive_rag_ops.patch import Adapter, registry

DOCS = Path(__file__).parents[1] / "docs" / "patching.md"


def test_the_template_of_an_adapter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "_registered", [])
    text = DOCS.read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- tests/test_patch_docs.py runs this -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    exec("".join(blocks), scope)
    (chosen,) = scope["handle"].retrieval_log[-1]["frames"]
    assert len(chosen) == 2 and str([chosen]) in capsys.readouterr().out
    assert scope["handle"].adapter.name == "VideoModel" and all(not cache for cache in scope["caches"])
    with pytest.raises(ValueError, match="on_prompt_switch must be keep or drop for VideoModel"):
        scope["longlive_rag_ops"].patch(scope["VideoModel"](), on_prompt_switch="recache")
    # What the docs tell to check: with its own window and without memory it is the model itself.
    model, caches = scope["VideoModel"]().eval(), ([[], []], [[], []])
    with torch.no_grad():
        latents = torch.randn(5, 1, 2, 4, 2, 3)
        expected = [model(x, 2 * i, caches[0]) for i, x in enumerate(latents)]
        with scope["longlive_rag_ops"].patched(model, top_k=0):
            found = [model(x, 2 * i, caches[1]) for i, x in enumerate(latents)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_the_documented_methods_are_there() -> None:
    text = DOCS.read_text(encoding="utf-8")
    own = {"name", "memory_rule", "in_pieces", "modules"}
    public = {name for name in vars(Adapter) if not name.startswith("_")} - own
    assert all(re.search(rf"\b{name}\(", text) for name in public), "every method of the protocol is in the docs"
