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
    with pytest.raises(ValueError, match="must be on a device that an engine runs on"):
        engines.resolve_engine("dense", "xpu")
    with pytest.raises(ValueError, match="must be on a device that an engine runs on"):
        engines.resolve_engine("auto", "xpu")
    with pytest.raises(ValueError, match="engine must be one of"):
        MemoryWindow(WindowConfig(), layers=1, batch=1, tokens_per_frame=4, kv_heads=1, head_dim=16, engine="warp")


@pytest.mark.parametrize(
    ("version", "words"),
    [((3, 5), "it needs triton >= 3.6, < 3.10; found 3.5"), ((4, 0), "found 4.0"), (None, None), ((3, 9), None)],
)
def test_triton_has_to_be_of_a_known_version(
    version: tuple[int, int] | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(engines, "_version", lambda distribution: version)
    monkeypatch.setattr(engines, "_has_cuda", lambda: False)
    reason = engines._why_not_triton.__wrapped__("cuda", False)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ((3, 6), (2, 4), False),
        ((3, 6), (3, 0), False),
        ((3, 6), (2, 3), True),
        ((3, 7), (2, 4), True),
        (None, None, True),
    ],
)
def test_the_interpreter_of_triton_3_6_does_not_work_with_every_numpy(
    triton: tuple[int, int] | None, numpy: tuple[int, int] | None, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(engines, "_version", {"triton": triton, "numpy": numpy}.get)
    monkeypatch.setattr(engines, "_has_cuda", lambda: False)
    why, words = engines._why_not_triton.__wrapped__, "Triton 3.6's interpreter fails under NumPy 2.4 and newer"
    assert (why("cpu", True) != words) == works
    assert why("cuda", False) is None


def test_triton_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engines.INTERPRETER, "0")
    with pytest.raises(RuntimeError, match=r"engine 'triton' is not available: .*; engines that work here: ref"):
        engines.engine_name("triton", "cpu")
    why = engines._why_not_triton.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(engines.importlib.util, "find_spec", lambda name: None)
        assert "not installed" in why("cuda", False)
    pytest.importorskip("triton")
    assert "set TRITON_INTERPRET=1" in why("cpu", False)
    monkeypatch.setattr(engines, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0 or newer, got 7.5" in why("cuda", False)


def test_auto_on_a_gpu_depends_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(engines.ENVIRONMENT, raising=False)
    monkeypatch.setattr(engines, "_why_not_triton", lambda device, interpreter: None)
    assert engines.engine_name("auto", "cuda") == "auto"
    monkeypatch.setattr(engines, "_why_not_triton", lambda device, interpreter: "no")
    assert engines.engine_name("auto", "cuda") == "dense"


def test_report_lists_every_engine() -> None:
    rows = engines.report()
    assert [row["name"] for row in rows] == ["reference", "dense", "triton"]
    for row in rows:
        assert row["available"] == (row["reason"] is None) and row["devices"] and row["summary"]
