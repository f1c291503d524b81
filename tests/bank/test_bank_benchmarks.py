"""The benchmarks of the memory bank without a GPU: they run, and what is wrong is neither timed nor passed over."""

# ruff: noqa: E402  benchmarks is not installed: its folder is added to the path before it is imported
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_bank
from benchmarks.bank_raw import Copies, RawDisk
from benchmarks.figures import Shape
from longlive_rag_ops.bank import MemoryBank


def test_a_dry_run_of_the_gpu_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("triton")  # whose version is among the facts that are printed
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_bank", "--dry-run"],
        cwd=ROOT,
        env=os.environ | {"LONGLIVE_BENCH_OUT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measure NOTHING" in done.stdout and "WRONG" not in done.stdout and "FAILED" not in done.stdout
    for target in ("bank fetch", "bank commit", "share of a fetch of 3", "share of a fetch of 1"):
        assert target in done.stdout
    assert not list(tmp_path.iterdir())  # a dry run leaves no results behind


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_bank.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["copies", "hiding"])
def test_wrong_bytes_are_not_timed(
    section: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    slot = MemoryBank.slot
    monkeypatch.setattr(MemoryBank, "slot", lambda bank, frame: (slot(bank, frame) + 1) % 3)
    if section == "hiding":  # one frame's pages are everywhere: spoil them
        fetch = gpu_bank.fetch

        def spoiling(bank: MemoryBank, frames: list[int]) -> None:
            fetch(bank, frames)
            bank.slots.view(torch.uint8)[0, 0, 0, :, 0, 0, 0] ^= 1

        monkeypatch.setattr(gpu_bank, "fetch", spoiling)
    assert gpu_bank.main(["--dry-run", "--only", section]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "us, median" in out and "eager" not in out


def test_pages_of_the_paper_s_shape() -> None:
    setting = gpu_bank.Setting(Shape(), gpu_bank.LAYERS, torch.bfloat16, "cpu", 1)
    assert setting.format.page_bytes == 9_584_640 and setting.format.record_bytes == 287_539_200


def test_the_yardsticks_move_the_bytes(tmp_path: Path) -> None:
    source = torch.arange(1000, dtype=torch.int64)
    target = torch.zeros_like(source)
    copies = Copies([(target[500:], source[500:]), (target[:500], source[:500])])
    copies.run()
    assert copies.bytes == 8000 and torch.equal(source, target)
    try:
        raw = RawDisk(tmp_path, 8192, 5, 3)
    except OSError as error:
        pytest.skip(f"no direct I/O here: {error}")
    raw.check()
    raw.close()
