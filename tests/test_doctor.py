"""The report about an installation: complete, printable, and without a crash where things are missing."""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longlive_rag_ops import doctor, engines
from longlive_rag_ops.cli import doctor as command
from longlive_rag_ops.version import __version__


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["doctor", *words])
    return args.run(args)


def test_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(json.dumps(doctor.collect()))
    assert report["package"]["version"] == __version__
    assert torch.__version__.startswith(report["libraries"]["torch"])  # the second may lack "+cu130"
    assert [row["name"] for row in report["engines"]] == [row["name"] for row in engines.report()]


def test_text_names_every_engine_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command() == 0
    text = capsys.readouterr().out
    assert f"longlive-rag-ops {__version__}" in text
    for row in engines.report():
        assert f"  {row['name']}: {'yes' if row['available'] else 'no: ' + str(row['reason'])}" in text
    if not torch.cuda.is_available():
        assert "torch uses none: " in text


def test_missing_parts_are_reported_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "longlive_rag_ops._C", None)
    monkeypatch.setattr(doctor, "CUDA_DRIVER", "libno_such_driver.so.1")
    monkeypatch.setattr(doctor, "DISTRIBUTIONS", ("torch", "no-such-distribution"))
    monkeypatch.setattr(torch.version, "cuda", None)
    report = doctor.collect()
    assert report["extension"]["available"] is False
    assert report["cuda_code"] is None
    assert report["libraries"]["no-such-distribution"] is None
    text = doctor.format_text(report)
    assert "not installed: no-such-distribution" in text
    assert "not available: longlive_rag_ops._C cannot be loaded" in text
    assert "driver: none found (libno_such_driver.so.1 cannot be loaded" in text
    assert "torch uses none: this torch is built without CUDA" in text


class FakeDriver:
    def __init__(self, status: int) -> None:
        self.status = status

    def cuDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = 13020
        return self.status


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (FakeDriver(0), {"version": "13.2", "reason": None}),
        (FakeDriver(34), {"version": None, "reason": "cuDriverGetVersion failed with CUDA error 34"}),
        (SimpleNamespace(), {"version": None, "reason": "libcuda.so.1 has no cuDriverGetVersion"}),
    ],
)
def test_driver_version(monkeypatch: pytest.MonkeyPatch, library: object, expected: dict[str, Any]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert doctor.collect()["driver"] == expected


def test_a_failing_torch_cuda_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("driver fell over")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    report = doctor.collect()
    assert report["gpu"]["reason"] == "RuntimeError: driver fell over"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no working driver" in doctor.collect()["gpu"]["reason"]


def test_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.collect()
    report["driver"] = {"version": "13.0", "reason": None}
    report["gpu"] = {
        "torch_cuda": "13.0",
        "reason": None,
        "devices": [{"name": "Test GPU", "capability": [9, 0], "memory_bytes": 80 * 2**30, "multiprocessors": 132}],
    }
    report["extension"] = {
        **dict.fromkeys(("version", "compiler", "build_type", "python"), "x"),
        "available": True,
        "reason": None,
        "cuda": True,
        "cuda_reason": None,
        "cuda_archs": "80-real;90-real",
    }
    seen = {"name": "Test GPU", "capability": [9, 0], "image": 90, "image_error": None}
    old = {"name": "Old GPU", "capability": [7, 0], "image": 0, "image_error": "no kernel image"}
    report["cuda_code"] = {"toolkit": "13.0", "error": None, "devices": [seen, old]}
    text = doctor.format_text(report)
    assert "driver: supports CUDA 13.0" in text
    assert "Test GPU, sm_90, 80.0 GiB, 132 multiprocessors" in text
    assert "CUDA compiled for 80-real;90-real with toolkit 13.0" in text
    assert "it runs its sm_90 code on Test GPU" in text
    assert "it runs nothing on Old GPU: no kernel image" in text


def test_compiled_cuda_says_why_it_finds_no_device() -> None:
    report = doctor.collect()
    if not report["extension"]["available"] or not report["extension"]["cuda"]:
        pytest.skip("no CUDA code compiled into this build")
    if torch.cuda.is_available():
        assert report["cuda_code"]["device_count"] == torch.cuda.device_count()
    else:
        assert report["cuda_code"]["device_count"] == 0
        assert report["cuda_code"]["error"] in doctor.format_text(report)


@pytest.mark.gpu
def test_compiled_cuda_has_code_for_this_device() -> None:
    report = doctor.collect()
    if report["cuda_code"] is None:
        pytest.skip("no CUDA code compiled into this build")
    for ours, torchs in zip(report["cuda_code"]["devices"], report["gpu"]["devices"], strict=True):
        assert ours["capability"] == torchs["capability"]
        assert ours["image"] > 0, ours["image_error"]
