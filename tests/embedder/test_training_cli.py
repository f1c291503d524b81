"""``longlive-rag train-embedder``: options, errors without a traceback, Ctrl-C of a real process."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from training_cases import OPTIONS, assert_same_run, files_of, read_metrics

from longlive_rag_ops.cli import main
from longlive_rag_ops.embedder import load_autoencoder
from longlive_rag_ops.embedder.training_config import TrainingConfig

SMALL = (*OPTIONS, "--device", "cpu", "--threads", "1")
# A shell that starts tests in the background has them ignore SIGINT, and a process hands that on.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from longlive_rag_ops.cli import main; sys.exit(main())"
)


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["train-embedder", "--data", str(data), "--out", str(out), *more]


def test_a_training_and_the_way_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(command(data, out, *SMALL, "--epochs", "2")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("epoch ")] == ["1/2", "2/2"]
    assert printed[-2] == "ended after epoch 2 (all epochs done)"
    found = re.fullmatch(
        rf"best: epoch (\d), validation loss (\S+), in {re.escape(str(out))}/best.safetensors", printed[-1]
    )
    best = min(read_metrics(out), key=lambda line: line["validation"]["total"])
    assert (
        found and int(found[1]) == best["epoch"] and float(found[2]) == pytest.approx(best["validation"]["total"], 1e-5)
    )
    # Without the settings: the run has them. Quiet: no line for an epoch.
    assert main(command(data, out, "--resume", "--epochs", "3", "--quiet", "--device", "cpu")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "ended after epoch 3 (all epochs done)" and len(printed) == 2
    assert json.loads((out / "config.json").read_text())["config"]["latent_dim"] == 8
    assert load_autoencoder(out / "best.safetensors").config.hidden_dims == (8, 16)


def test_a_file_and_the_options_over_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "ae.yaml"
    path.write_text(
        "lr: 3e-3\nseq_len: 4\nhidden_dims: [8]\nlatent_dim: 8\nepochs: 7\nuse_amp: true\ngpu: 0\nwandb_project: x\n"
    )
    options = ("--epochs", "1", "--no-use-amp", "--smooth-form", "squared_norm", "--batch-size", "2", "--device", "cpu")
    assert main(command(data, tmp_path / "out", "--config", str(path), *options)) == 0
    assert f"{path}: ignored, they mean nothing here: gpu, wandb_project\n" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {
        "lr": 3e-3,
        "epochs": 1,
        "use_amp": False,
        "smooth_form": "squared_norm",
        "batch_size": 2,
        "hidden_dims": [8],
    }
    assert {name: described["config"][name] for name in wanted} == wanted
    # What is kept of the command starts the same training.
    words = shlex.split(described["command"])
    assert words[:6] == ["longlive-rag", "train-embedder", "--data", "clips", "--out", "out"]
    assert main(command(data, tmp_path / "again", *words[6:], "--device", "cpu")) == 0
    assert_same_run(tmp_path / "out", tmp_path / "again")


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train-embedder", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for setting in fields(TrainingConfig):
        assert f"--{setting.name.replace('_', '-')}" in text


def test_errors_are_one_line_and_write_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    bad = tmp_path / "bad.json"
    bad.write_text('{"learning_rate": 1, "epoch": 3}')
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"epoch": 3}')
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        (command(data, out, "--resume"), r"resume needs a run, and \S*out has none"),
        (command(empty, out), r"there is none in \S*empty"),
        (command(tmp_path / "none", out), r"data must be a folder of latent files .*, got \S*none"),
        (command(data, out, "--config", str(bad)), r"bad\.json has the unknown setting 'learning_rate'; known are"),
        (command(data, out, "--config", str(wrong)), r"unknown setting 'epoch'; is it epochs"),
        (command(data, out, "--lr", "0"), "lr must be above 0, got 0"),
        (command(data, out, "--threads", "-1"), "--threads must be at least 0, got -1"),
        (command(data, out, "--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (command(data, out, "--in-channels", "16", "--device", "cpu"), r"clip0\.safetensors has \(4, 6, 8\)"),
        (command(data, out, "--seq-len", "10", "--device", "cpu"), r"clip0\.safetensors has 9 frames"),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert re.match("error: .*" + message, printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert not out.exists()

    assert main(command(data, out, *SMALL, "--epochs", "1", "--quiet")) == 0
    before = files_of(out)
    assert main(command(data, out, *SMALL)) == 2
    assert main(command(data, out, "--resume", "--lr", "0.5", "--device", "cpu")) == 2
    errors = capsys.readouterr().err
    assert "out holds a run already" in errors and "lr is 0.5, was 0.003" in errors
    assert files_of(out) == before


def test_ctrl_c_of_a_terminal(data: Path, tmp_path: Path) -> None:
    """Every process of the group gets the signal, as from a terminal, those that read clips too."""
    out = tmp_path / "out"
    words = command(data, out, *SMALL, "--epochs", "100000", "--num-workers", "1", "--save-every", "0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (out / "metrics.jsonl").exists() or not read_metrics(out):
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            printed, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and not errors
    lines = printed.splitlines()
    done = len(read_metrics(out))
    assert lines[-3] == f"stopped by SIGINT, {done} epochs and the steps since then are saved"
    assert lines[-2].startswith("best: epoch ")
    way = shlex.split(lines[-1].removeprefix("go on with: "))
    assert way[0] == "longlive-rag" and way[-1] == "--resume"

    epochs = ("--epochs", str(done + 2), "--quiet")
    assert main([*way[1:], *epochs, "--num-workers", "0"]) == 0
    assert main(command(data, tmp_path / "whole", *SMALL, *epochs, "--save-every", "0")) == 0
    for folder in (out, tmp_path / "whole"):
        assert len(read_metrics(folder)) == done + 2
    assert_same_run(tmp_path / "whole", out)
