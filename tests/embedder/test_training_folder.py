"""The folder of a training: one run at a time, what a cut-off run leaves, what is known of the data again."""

from __future__ import annotations

import errno
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import SHAPE, assert_same_run, files_of, read_metrics, tiny, write_clips

from longlive_rag_ops.cli import main
from longlive_rag_ops.embedder import folder_lock
from longlive_rag_ops.embedder.latent_file import LatentFile, save_latents
from longlive_rag_ops.embedder.run_folder import RunFolder, command_line
from longlive_rag_ops.embedder.training import train
from longlive_rag_ops.embedder.training_config import TrainingConfig
from longlive_rag_ops.embedder.training_state import ClipIdentity, DataIdentity

HOLD = """
import sys
from longlive_rag_ops.embedder.run_folder import RunFolder
with RunFolder(sys.argv[1]).held(False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_clips(tmp_path / "clips", 4)


def dies(patch: pytest.MonkeyPatch, method: str) -> None:
    """Has the process end where it would call a method of the folder."""

    def end(*args: Any) -> None:
        raise SystemExit("killed")

    patch.setattr(RunFolder, method, end)


def test_one_training_at_a_time(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    train(data, out, tiny(epochs=1), device="cpu", progress=False)
    before = files_of(out)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            for resume in (False, True):
                with pytest.raises(ValueError, match=r"out \S*/out is in use by another training"):
                    train(data, out, tiny(), resume=resume, device="cpu", progress=False)
            assert main(["train-embedder", "--data", str(data), "--out", str(out), "--resume", "--device", "cpu"]) == 2
            assert re_line(capsys, "is in use by another training") and files_of(out) == before
        finally:
            process.kill()
    # The system has let go of it; in one process it counts as well.
    with RunFolder(out).held(True), pytest.raises(ValueError, match="is in use"):
        train(data, out, tiny(), resume=True, device="cpu", progress=False)
    train(data, out, tiny(epochs=2), resume=True, device="cpu", progress=False)
    assert len(read_metrics(out)) == 2


def re_line(capsys: pytest.CaptureFixture[str], text: str) -> bool:
    errors = capsys.readouterr().err
    return text in errors and errors.count("\n") == 1


def test_a_forked_child_does_not_hold_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    with folder.held(False):
        fork = multiprocessing.get_context("fork")
        up = fork.Event()
        child = fork.Process(target=lambda: (up.set(), time.sleep(60)))
        child.start()
        assert up.wait(60)
        with pytest.raises(ValueError, match="is in use"), folder.held(False):
            pass
    try:
        with folder.held(False):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> Callable[..., None]:
        def flock(*args: Any) -> None:
            raise OSError(number, "no locks")

        return flock

    monkeypatch.setattr(folder_lock.fcntl, "flock", fails(errno.ENOSYS))
    with (
        pytest.warns(RuntimeWarning, match=r"\S*/out is not locked, .*\(no locks\)"),
        RunFolder(tmp_path / "out").held(False),
    ):
        pass
    monkeypatch.setattr(folder_lock.fcntl, "flock", fails(errno.EIO))
    with pytest.raises(OSError, match="no locks"), RunFolder(tmp_path / "out").held(False):
        pass
    assert not folder_lock._open


def test_a_start_that_is_cut_off_can_be_resumed_or_repeated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tmp_path / "whole", tiny(), device="cpu", progress=False)
    # Before anything is saved, and between last.pt and what people read.
    for name, method in (("before", "remove_partial"), ("between", "write_config")):
        with monkeypatch.context() as patch:
            dies(patch, method)
            with pytest.raises(SystemExit):
                train(data, tmp_path / name, tiny(), device="cpu", progress=False)
    assert set(files_of(tmp_path / "before")) == {".lock"}
    assert set(files_of(tmp_path / "between")) == {".lock", "last.pt"}
    with pytest.raises(ValueError, match=r"holds a run already \(last\.pt in .*--resume"):
        train(data, tmp_path / "between", tiny(), device="cpu", progress=False)
    train(data, tmp_path / "before", tiny(), device="cpu", progress=False)
    train(data, tmp_path / "between", tiny(), resume=True, device="cpu", progress=False)
    for name in ("before", "between"):
        assert_same_run(tmp_path / "whole", tmp_path / name)
        assert (tmp_path / name / "config.json").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "best.safetensors", "epoch-0050.safetensors", "tensorboard"]
)
def test_what_is_somebody_elses_is_not_written_over(data: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"write over: {name} in \S*/out, and no last\.pt to resume from") as caught:
        train(data, out, tiny(), device="cpu", progress=False)
    assert "--resume" not in str(caught.value) and (out / name).read_text() == "mine"
    assert set(files_of(out)) == {name, ".lock"}


def test_what_a_killed_write_leaves_is_removed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    gone = [".last.pt-ab3_x9zq", ".best.safetensors-abcdefgh", ".config.json-12345678", ".metrics.jsonl-________"]
    gone.append(".epoch-0050.safetensors-abcdefgh")
    kept = [".last.pt-short", ".last.pt-abcdefghi", ".other-abcdefgh", "last.pt-abcdefgh", ".last.pt-ABCDEFGH"]
    for resume in (False, True):
        for name in gone + kept:
            (out / name).write_text("half of it")
        if resume:  # what is refused changes nothing
            with pytest.raises(ValueError, match="lr is"):
                train(data, out, tiny(lr=0.5), resume=True, device="cpu", progress=False)
            assert all((out / name).exists() for name in gone)
        train(data, out, tiny(epochs=1 + resume), resume=resume, device="cpu", progress=False)
        assert [name for name in gone + kept if (out / name).exists()] == kept


def test_other_data_of_the_same_names_and_lengths(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(data, out, tiny(epochs=1), device="cpu", progress=False)
    for number in (1, 2):
        save_latents(data / f"clip{number}.safetensors", torch.randn(9 + number, *SHAPE))
    save_latents(data / "clip3.safetensors", torch.zeros(3 + 9 + 1, *SHAPE))
    before = files_of(out)
    with pytest.raises(ValueError) as caught:
        train(data, out, tiny(epochs=2), resume=True, device="cpu", progress=False)
    assert "clips have another length: clip3.safetensors (13, was 12); clips have another content: " in str(
        caught.value
    )
    assert "content: clip1.safetensors, clip2.safetensors. " in str(caught.value) and files_of(out) == before


def test_what_tells_a_clip(tmp_path: Path) -> None:
    frames = torch.arange(3.0 * 24).reshape(3, *SHAPE[:1], 2, 3)
    found = []
    for name, latents, more in (
        ("a", frames, {}),
        ("b", frames.half(), {}),  # the same first frame, in a smaller file
        ("c", frames, {"text": "x"}),
        ("d", frames + 1, {}),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_latents(path, latents, more)
        found.append(ClipIdentity.of(LatentFile(path, 3, (4, 2, 3))))
        assert found[-1].size == path.stat().st_size
    assert found[0].digest == found[1].digest == found[2].digest != found[3].digest
    assert len({clip.size for clip in found[:3]}) == 3
    one, other = (DataIdentity([clip._replace(name="x")], (4, 2, 3)) for clip in found[:2])
    assert one.differences(other) == ["clips have another content: x"] and one.differences(one) == []


def test_the_recorded_command_can_be_parsed(data: Path, tmp_path: Path) -> None:
    config = TrainingConfig(delta_margin=-1e-5, hidden_dims=(8, 16), use_amp=False)
    line = command_line(tmp_path / "-clips", tmp_path / "out", config)
    assert line == (
        "longlive-rag train-embedder --data=-clips --out out --hidden-dims 8 16 --delta-margin=-1e-05 --no-use-amp"
    )
    small = ["--seq-len", "4", "--latent-dim", "8", "--epochs", "1", "--device", "cpu", "--quiet"]
    words = line.split()[3:]
    assert main(["train-embedder", "--data", str(data), *words[:1], str(tmp_path / words[1]), *words[2:], *small]) == 0
