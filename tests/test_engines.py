"""Choosing an engine: argument, environment, device."""

from __future__ import annotations

import cases
import pytest
import torch

from longlive_rag_ops import MemoryWindow, WindowConfig, dense, engines, reference


def test_auto_is_the_dense_engine_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(engines.ENVIRONMENT, raising=False)
    assert engines.resolve_engine("auto", "cpu") is dense
    assert engines.resolve_engine("reference", "cpu") is reference


def test_environment_overrides_auto_but_not_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engines.ENVIRONMENT, "reference")
    assert engines.resolve_engine("auto", "cpu") is reference
    assert engines.resolve_engine("dense", "cpu") is dense
    monkeypatch.setenv(engines.ENVIRONMENT, "warp")
    with pytest.raises(ValueError, match="LONGLIVE_ENGINE must be one of auto, reference, dense, triton; got 'warp'"):
        torch.ops.longlive.merge_attention(**cases.merge())


def test_an_engine_that_cannot_run_here_says_why() -> None:
    with pytest.raises(ValueError, match="engine 'dense' runs on cpu; the tensors are on cuda"):
        engines.resolve_engine("dense", "cuda")
    with pytest.raises(ValueError, match="must be on a device that an engine runs on"):
        engines.resolve_engine("auto", "xpu")
    with pytest.raises(ValueError, match="engine must be one of"):
        MemoryWindow(WindowConfig(), layers=1, batch=1, tokens_per_frame=4, kv_heads=1, head_dim=16, engine="warp")


def test_report_lists_every_engine() -> None:
    rows = engines.report()
    assert [row["name"] for row in rows] == ["reference", "dense", "triton"]
    for row in rows:
        assert row["available"] == (row["reason"] is None) and row["devices"] and row["summary"]
