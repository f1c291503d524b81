"""What goes wrong around a training: nobody reads its lines, a file cannot be written, a reader is stuck."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info
from training_cases import OPTIONS, files_of, read_metrics, tiny, write_clips

from longlive_rag_ops.embedder import training, training_loop
from longlive_rag_ops.embedder.clip_dataset import leave_signals
from longlive_rag_ops.embedder.latent_file import LatentFile, latent_files
from longlive_rag_ops.embedder.run_folder import RunFolder
from longlive_rag_ops.embedder.stop_signal import NUMBERS, StopSignal
from longlive_rag_ops.embedder.training import train
from longlive_rag_ops.embedder.training_log import Bar, TrainingLog
from longlive_rag_ops.embedder.training_state import read_training

PROGRAM = "import sys; from longlive_rag_ops.cli import main; sys.exit(main())"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_clips(tmp_path / "clips", 4)


def test_a_reader_that_goes_away_ends_no_training(data: Path, tmp_path: Path) -> None:
    """As under ``| head -1``."""
    out = tmp_path / "out"
    words = ["train-embedder", "--data", str(data), "--out", str(out), *OPTIONS, "--device", "cpu", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words, "--epochs", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    assert len(read_metrics(out)) == read_training(out / "last.pt").progress.epoch == 4


def test_a_terminal_that_is_closed_ends_no_bar() -> None:
    class Gone:
        disable, calls = False, 0

        def update(self) -> None:
            self.calls += 1
            raise OSError(5, "Input/output error")

    gone = Gone()
    bar = Bar(gone)
    bar.update()
    bar.update()
    bar.close()
    assert gone.calls == 1 and gone.disable


@pytest.mark.parametrize("method", ["write_metrics", "epoch"])
def test_a_file_that_cannot_be_written_leaves_the_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """metrics.jsonl, or what the log writes, fails after the second epoch."""
    original = getattr(RunFolder if method == "write_metrics" else TrainingLog, method)

    def full(self: Any, *args: Any) -> None:
        lines = args[0] if method == "write_metrics" else [None] * args[0]["epoch"]
        if len(lines) == 2:
            raise OSError(28, "No space left on device")
        original(self, *args)

    monkeypatch.setattr(RunFolder if method == "write_metrics" else TrainingLog, method, full)
    with pytest.raises(OSError, match="No space left"):
        train(data, tmp_path / "out", tiny(), device="cpu", progress=False)
    assert read_training(tmp_path / "out" / "last.pt").progress.epoch == 2
    assert (tmp_path / "out" / "best.safetensors").exists()


@pytest.mark.parametrize("number", NUMBERS)
def test_signals_that_stop(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = training_loop.TrainingLoop._step

    def stops(loop: Any, *args: Any) -> list[float]:
        signal.raise_signal(number)
        return original(loop, *args)

    monkeypatch.setattr(training_loop.TrainingLoop, "_step", stops)
    before = signal.signal(number, signal.SIG_DFL)  # a shell may have it ignored
    try:
        result = train(data, tmp_path / "out", tiny(), device="cpu", progress=False)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert result.signal == number and read_training(tmp_path / "out" / "last.pt").progress.step == 1
    assert signal.SIGHUP in NUMBERS


def test_processes_that_read_leave_the_signals(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with StopSignal():
        child = os.fork()
        if not child:  # what is raised in here must not reach pytest
            try:
                leave_signals(0)
                found = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
                good = found == [signal.SIG_IGN, signal.SIG_DFL, signal.SIG_IGN] and os.getpgrp() == os.getpid()
                os.write(writer, b"good" if good else repr(found).encode())
            finally:
                os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 1000) == b"good"
    os.close(reader)


@dataclass(frozen=True)
class BadFile(LatentFile):
    """A clip that a loader's process cannot read, or waits for."""

    wait: float = 0.0

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if stop != 1:  # the first frame alone is read to know the file again
            time.sleep(self.wait)
            if not self.wait:
                raise RuntimeError("the library says\nmore than a line")
            assert get_worker_info() is not None
        return super().read(start, stop)


def bad_files(patch: pytest.MonkeyPatch, data: Path, wait: float) -> None:
    clips: list[LatentFile] = [BadFile(clip.path, clip.frames, clip.frame_shape, wait) for clip in latent_files(data)]
    patch.setattr(training, "latent_files", lambda folder: clips)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_cannot_be_read_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    bad_files(monkeypatch, data, 0.0)
    with pytest.raises(RuntimeError, match=r"^latent file \S*clip\d\.safetensors cannot be read: the library says$"):
        train(data, tmp_path / "out", tiny(num_workers=workers), device="cpu", progress=False)


def test_a_batch_that_does_not_come_is_an_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_loop.LOADER_SECONDS == 300
    bad_files(monkeypatch, data, 0.5)
    monkeypatch.setattr(training_loop, "LOADER_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.2 seconds"):
        train(data, tmp_path / "out", tiny(num_workers=1), device="cpu", progress=False)
    assert read_training(tmp_path / "out" / "last.pt").progress.step == 0


def test_a_tensorboard_that_cannot_be_imported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, out = builtins.__import__, tmp_path / "out"
    seen = []

    def breaks(name: str, *args: Any, **options: Any) -> Any:
        if name == "torch.utils.tensorboard":
            seen.append(set(files_of(out)))
            raise TypeError("Descriptors cannot be created directly")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", breaks)
    train(data, out, tiny(epochs=1), device="cpu")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        "no TensorBoard files: tensorboard cannot be imported, TypeError: Descriptors cannot be created directly"
    )
    assert seen == [{".lock"}] and len(read_metrics(out)) == 1 and not (out / "tensorboard").exists()
