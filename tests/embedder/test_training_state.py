"""A ``last.pt`` whose parts do not go together is refused by name, before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import files_of, tiny, write_clips

from longlive_rag_ops.embedder.stop_signal import StopSignal
from longlive_rag_ops.embedder.training import train
from longlive_rag_ops.embedder.training_loop import TrainingLoop
from longlive_rag_ops.embedder.training_optimizer import check_scaler
from longlive_rag_ops.embedder.training_progress import Progress, progress_from

NAN = float("nan")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Data, folder and last.pt of a run that was stopped in epoch 2 after 1 of 3 steps."""
    folder = tmp_path_factory.mktemp("state")
    data, out = write_clips(folder / "clips"), folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        original = TrainingLoop._step

        def stops(loop: TrainingLoop, *args: Any) -> list[float]:
            if loop.progress.epoch == 1:
                stop.received = 2
            return original(loop, *args)

        stop = StopSignal()
        patch.setattr(TrainingLoop, "_step", stops)
        patch.setattr("longlive_rag_ops.embedder.training.StopSignal", lambda: stop)
        train(data, out, tiny(), device="cpu", progress=False)
    return data, out, torch.load(out / "last.pt", weights_only=True)


Change = Callable[[dict[str, Any]], Any]


def refused(run: tuple[Path, Path, dict[str, Any]], change: Change, message: str) -> None:
    data, out, content = run
    changed = copy.deepcopy(content)
    change(changed)
    torch.save(changed, out / "last.pt")
    before = files_of(out)
    with pytest.raises(ValueError, match=r"^training state \S*last\.pt\b.*" + message):
        train(data, out, tiny(), resume=True, device="cpu", progress=False)
    assert files_of(out) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3, "chunks": 0}, "step and chunks must be both 0 or both above, got 3 and 0"),
        ({"step": 0}, "step and chunks must be both 0 or both above, got 0 and 3"),
        ({"step": 99}, "an epoch has 3 steps, got step 99 after 3 chunks"),
        ({"chunks": 2}, "an epoch has 3 steps, got step 1 after 2 chunks"),
        ({"step": True}, "step must be an int of at least 0, got True"),
        ({"epoch": -1}, "epoch must be an int of at least 0, got -1"),
        ({"epoch": 2}, "history must have a line for each of the 2 epochs done"),
        ({"history": [{}]}, "history must have epoch 1 with finite losses and seconds, got {}"),
        ({"history": [None]}, "history must have epoch 1 with"),
        ({"history": 1}, "history must have a line for each"),
        ({"best_epoch": 2}, "best_epoch must be one of the 1 epochs done, got 2"),
        ({"best_epoch": 0}, "best_epoch must be one of the 1 epochs done, got 0"),
        ({"best_loss": NAN}, "best_loss must be a finite float, got nan"),
        ({"best_loss": 0.5}, r"best_loss must be \d\S*, that of epoch 1; got 0\.5"),
        ({"seconds": float("inf")}, "seconds must be a finite float, got inf"),
        ({"sums": [NAN] * 4}, "sums must be 4 finite floats, got"),
        ({"sums": [0.0]}, r"sums must be 4 finite floats, got \[0\.0\]"),
    ],
)
def test_progress_that_contradicts_itself(
    run: tuple[Path, Path, dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    refused(run, lambda content: content["progress"].update(changes), message)


def test_lines_of_the_history(run: tuple[Path, Path, dict[str, Any]]) -> None:
    content = run[2]["progress"]
    assert progress_from(content) == Progress(**content) and progress_from(vars(Progress())) == Progress()
    line = content["history"][0]
    for change in (
        {"epoch": 2},
        {"epoch": 1.0},
        {"train": {}},
        {"train": {**line["train"], "total": NAN}},
        {"validation": {**line["validation"], "total": "1"}},
        {"validation": None},
        {"seconds": None},
        {"more": 1},
    ):
        with pytest.raises(ValueError, match=r"^progress: history must have epoch 1 with finite losses"):
            progress_from({**content, "history": [{**line, **change}]})


def group(**changes: Any) -> Change:
    return lambda content: content["optimizer"]["param_groups"][0].update(changes)


def state(**changes: Any) -> Change:
    return lambda content: content["optimizer"]["state"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (group(lr="x"), r"optimizer must have lr 0\.003, got 'x'"),
        (group(lr=99.0), r"optimizer must have lr 0\.003, got 99\.0"),
        (group(lr=torch.tensor(0.003)), r"optimizer must have lr 0\.003, got tensor"),
        (group(weight_decay=0.5), r"optimizer must have weight_decay 0\.0001, got 0\.5"),
        (group(params=[0]), r"optimizer must have params \[0, 1, 2, "),
        (group(amsgrad=True), "optimizer must have amsgrad False, got True"),
        (lambda content: content["optimizer"].update(param_groups={}), "optimizer must have 1 param_groups"),
        (lambda content: content["optimizer"].update(state=[]), r"a state for each of \d+ parameters, or none"),
        (lambda content: content["optimizer"]["state"].pop(3), r"a state for each of \d+ parameters, or none"),
        (lambda content: content["optimizer"]["state"].update({0: {}}), "exp_avg_sq for encoder.*, got nothing"),
        (lambda content: content["optimizer"]["state"].update({0: 1}), "exp_avg_sq for encoder.*, got int"),
        (state(exp_avg=torch.zeros(3)), r"exp_avg of encoder\S* must be .* of shape \(8, 4, 3, 3\), got shape \(3,\)"),
        (
            state(exp_avg=torch.zeros(8, 4, 3, 3).long()),
            r"exp_avg of encoder\S* must be floating point .* torch\.int64",
        ),
        (state(exp_avg=[0.0]), r"exp_avg of encoder\S* must be a tensor, got list"),
        (state(exp_avg=torch.full((8, 4, 3, 3), NAN)), r"exp_avg of encoder\S* must be finite$"),
        (state(exp_avg_sq=torch.full((8, 4, 3, 3), -1.0)), r"exp_avg_sq of encoder\S* must be finite, at least 0"),
        (state(step=torch.tensor([1.0])), r"step of encoder\S* must be floating point of shape \(\)"),
    ],
)
def test_an_optimizer_that_is_not_the_configurations(
    run: tuple[Path, Path, dict[str, Any]], change: Change, message: str
) -> None:
    refused(run, change, message)


@pytest.mark.parametrize("clips", [[], [["a.pt", 9]], [["a.pt", 9, 1.0, "ff"]], [1]])
def test_data_that_is_no_list_of_clips(run: tuple[Path, Path, dict[str, Any]], clips: list[Any]) -> None:
    shape = "x" if not clips else (4, 6, 8)
    refused(run, lambda content: content["data"].update(clips=clips, frame_shape=shape), "data must have clips")


def test_a_gradient_scaler_that_is_none() -> None:
    own = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    check_scaler({**own, "scale": 1024.0, "_growth_tracker": 7}, own)
    check_scaler({}, own)  # saved without float16
    check_scaler({"scale": "x"}, {})  # not in use here
    for change in ({"scale": "x"}, {"scale": NAN}, {"scale": 0.0}, {"growth_factor": 3.0}, {"_growth_tracker": -1}):
        with pytest.raises(ValueError, match="scaler must have the entries of"):
            check_scaler({**own, **change}, own)
    with pytest.raises(ValueError, match="scaler must have the entries of"):
        check_scaler({"scale": 1.0}, own)
