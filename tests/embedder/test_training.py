"""Training: it learns, it goes on bit for bit where it was stopped, and it keeps what it has when something fails."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import SHAPE, assert_same, assert_same_run, files_of, read_last, read_metrics, tiny, write_clips

from longlive_rag_ops.embedder import AutoencoderEmbedder, load_autoencoder, training_loop, training_state
from longlive_rag_ops.embedder.clip_dataset import EpochBatches, split_clips, usable_clips
from longlive_rag_ops.embedder.latent_file import LatentFile, latent_files, save_latents
from longlive_rag_ops.embedder.stop_signal import StopSignal
from longlive_rag_ops.embedder.training import find_device, train
from longlive_rag_ops.embedder.training_loop import TrainingLoop
from longlive_rag_ops.embedder.training_progress import Progress
from longlive_rag_ops.embedder.training_state import read_training, write_training
from longlive_rag_ops.safetensors_file import read_safetensors


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sends this process a signal inside the n-th call of a method of the loop."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def arrange(call: int, method: str = "_step", number: int = signal.SIGINT) -> None:
        original, calls = getattr(TrainingLoop, method), 0

        def counted(loop: TrainingLoop, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                signal.raise_signal(number)
            return original(loop, *args)

        monkeypatch.setattr(TrainingLoop, method, counted)

    yield arrange
    for number, handler in before.items():
        signal.signal(number, handler)


def test_losses_go_down_and_the_best_model_embeds(tmp_path: Path) -> None:
    data, out = write_clips(tmp_path / "clips", 16), tmp_path / "out"
    sizes = {"hidden_dims": (16, 32), "latent_dim": 16, "batch_size": 4, "chunks_per_clip": 4}
    config = tiny(**sizes, lr=1e-3, val_split=0.25, epochs=40, save_every=15)
    state = torch.random.get_rng_state()
    result = train(data, out, config, device="cpu", progress=False)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers were taken"
    lines = read_metrics(out)
    assert [line["epoch"] for line in lines] == list(range(1, 41))
    assert lines[-1]["train"]["total"] < 0.5 * lines[0]["train"]["total"]
    assert lines[-1]["validation"]["total"] < 0.5 * lines[0]["validation"]["total"]
    for part in ("train", "validation"):
        losses = dict(lines[3][part])
        assert losses.pop("total") == pytest.approx(sum(losses.values()), rel=1e-5)
        assert set(losses) == {"reconstruction", "window_temporal_delta", "smoothness"}

    best = min(lines, key=lambda line: line["validation"]["total"])
    assert (result.epochs, result.best_epoch, result.best_loss) == (40, best["epoch"], best["validation"]["total"])
    assert result.best == out / "best.safetensors" and result.signal is None and not result.early
    metadata = read_safetensors(result.best)[0]
    assert int(metadata["epoch"]) == best["epoch"] and json.loads(metadata["validation"]) == best["validation"]
    assert json.loads(metadata["training"])["lr"] == 1e-3
    assert metadata["command"].startswith("longlive-rag train-embedder --data clips --out out --latent-dim 16 ")
    assert str(tmp_path) not in "".join(metadata.values()) + (out / "config.json").read_text()
    embeddings = AutoencoderEmbedder.load(result.best)(latent_files(data)[0].read(0, 5))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(5))
    assert embeddings.shape == (5, 16)

    assert {path.name for path in out.glob("epoch-*")} == {"epoch-0015.safetensors", "epoch-0030.safetensors"}
    # What is exported last and what would go on are the same model.
    last, model = read_last(out), load_autoencoder(out / "last.pt")
    assert_same(dict(model.state_dict()), dict(last["model"]))
    described = json.loads((out / "config.json").read_text())
    assert described["config"] == config.fitted(latent_files(data)[0]).to_mapping()
    assert described["data"]["clips"] == 16 and len(described["data"]["validation_clips"]) == 4


def test_two_trainings_are_the_same_and_another_seed_is_not(data: Path, tmp_path: Path) -> None:
    for other, (name, seed) in enumerate((("one", 1), ("two", 1), ("three", 2))):
        torch.manual_seed(other)  # the caller's, which has no say
        train(data, tmp_path / name, tiny(seed=seed), device="cpu", progress=False)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert read_metrics(tmp_path / "one") != read_metrics(tmp_path / "three")


def test_losses_are_means_over_chunks(data: Path, tmp_path: Path) -> None:
    """Seven chunks in batches of 3, 3 and 1, and in one of 7, with steps too small to change anything."""
    for name, size in (("three", 3), ("one", 7)):
        train(data, tmp_path / name, tiny(epochs=1, lr=1e-30, batch_size=size), device="cpu", progress=False)
    three, one = (read_metrics(tmp_path / name)[0] for name in ("three", "one"))
    assert three["train"] == pytest.approx(one["train"], rel=1e-5)
    assert three["validation"] == pytest.approx(one["validation"], rel=1e-5)


def test_resume_after_whole_epochs(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "whole", tiny(epochs=4), device="cpu", progress=False)
    train(data, tmp_path / "parts", tiny(epochs=2), device="cpu", progress=False)
    result = train(data, tmp_path / "parts", tiny(epochs=4), resume=True, device="cpu", progress=False)
    assert result.epochs == 4
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    # Nothing is left to do, by the run's own configuration too.
    before = read_last(tmp_path / "parts")
    assert train(data, tmp_path / "parts", resume=True, device="cpu", progress=False).epochs == 4
    assert_same(read_last(tmp_path / "parts"), before)


@pytest.mark.parametrize(("method", "call"), [("_step", 1), ("_step", 5), ("_step", 6), ("_validate", 2)])
def test_resume_in_the_middle_of_an_epoch(
    data: Path, tmp_path: Path, interrupt: Callable[..., None], method: str, call: int
) -> None:
    """Three steps and one batch of validation an epoch: at its first step, inside, at its last, while validating."""
    config = tiny()
    train(data, tmp_path / "whole", config, device="cpu", progress=False)
    interrupt(call, method, signal.SIGTERM if call == 5 else signal.SIGINT)
    result = train(data, tmp_path / "parts", config, device="cpu", progress=False)
    assert result.signal == (signal.SIGTERM if call == 5 else signal.SIGINT)
    progress = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["progress"]
    steps = call if method == "_step" else 6
    assert (progress["epoch"], progress["step"]) == ((steps - 1) // 3, (steps - 1) % 3 + 1)
    assert result.epochs == progress["epoch"] == len(read_metrics(tmp_path / "parts"))
    assert result.best is None if steps == 1 else result.best is not None
    # Behind the state's end, as after a run that was killed.
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"epoch": 99}\n')
    result = train(data, tmp_path / "parts", config, resume=True, device="cpu", progress=False)
    assert result.signal is None and result.epochs == 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_from_a_state_written_on_the_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[..., None]
) -> None:
    """A process that is killed leaves what the clock had it write last."""
    train(data, tmp_path / "whole", tiny(), device="cpu", progress=False)
    monkeypatch.setattr(training_loop, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        calls = []
        step = TrainingLoop._step

        def dies(loop: TrainingLoop, *args: Any) -> list[float]:
            calls.append(1)
            if len(calls) == 6:
                raise SystemExit("killed")
            return step(loop, *args)

        patch.setattr(TrainingLoop, "_step", dies)
        with pytest.raises(SystemExit):
            train(data, tmp_path / "parts", tiny(), device="cpu", progress=False)
    progress = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    train(data, tmp_path / "parts", tiny(), resume=True, device="cpu", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_interrupt_raises_at_once(data: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    interrupt(3)
    interrupt(3)  # around the first: two signals in the third step
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "out", tiny(), device="cpu", progress=False)
    assert read_training(tmp_path / "out" / "last.pt").progress == Progress()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_elsewhere_are_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)

    def enter() -> None:
        with StopSignal():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[Any] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_processes_that_read_change_no_number(data: Path, tmp_path: Path) -> None:
    config = tiny(epochs=2, chunks_per_clip=2)
    train(data, tmp_path / "none", config, device="cpu", progress=False)
    train(data, tmp_path / "one", tiny(epochs=2, chunks_per_clip=2, num_workers=1), device="cpu", progress=False)
    assert_same_run(tmp_path / "none", tmp_path / "one")


@pytest.mark.parametrize("workers", [0, 1])
def test_latents_with_nan_name_their_file(data: Path, tmp_path: Path, workers: int) -> None:
    latents = latent_files(data)[3].read()
    latents[1:, 0, 0, 0] = float("nan")
    save_latents(data / "clip3.safetensors", latents)
    with pytest.raises(ValueError, match=r"^latent file \S*clip3\.safetensors: latents must be finite, frame \d+ has"):
        train(data, tmp_path / "out", tiny(num_workers=workers), device="cpu", progress=False)
    assert read_training(tmp_path / "out" / "last.pt").progress == Progress()


def test_a_loss_that_is_not_finite_stops_the_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"not finite in epoch 1, step 2: total (nan|inf).* the batch is of .*clip\d"
    ):
        train(data, tmp_path / "out", tiny(lr=1e30), device="cpu", progress=False)
    saved = read_training(tmp_path / "out" / "last.pt")
    assert saved.progress == Progress() and all(value.isfinite().all() for value in saved.states["model"].values())


def test_patience_ends_a_training_early(data: Path, tmp_path: Path) -> None:
    # So small a step that the losses stay, to the last digit or nearly: the validation loss stops falling at once.
    config = tiny(epochs=50, patience=2, lr=1e-30)
    result = train(data, tmp_path / "out", config, device="cpu", progress=False)
    assert (result.epochs, result.best_epoch, result.early) == (3, 1, True)
    assert len(read_metrics(tmp_path / "out")) == 3
    again = train(data, tmp_path / "out", config, resume=True, device="cpu", progress=False)
    assert (again.epochs, again.early) == (3, True)
    more = tiny(epochs=5, patience=0, lr=1e-30)
    assert train(data, tmp_path / "out", more, resume=True, device="cpu", progress=False).epochs == 5


def test_nothing_is_written_when_a_run_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for config in (None, tiny()):
        with pytest.raises(ValueError, match=r"resume needs a run, and \S*out has none: there is no last\.pt"):
            train(data, out, config, resume=True, device="cpu", progress=False)
    assert not out.exists()
    train(data, out, tiny(epochs=1), device="cpu", progress=False)
    before = files_of(out)
    with pytest.raises(ValueError, match=r"out holds a run already \(last\.pt in .*resume"):
        train(data, out, tiny(epochs=1), device="cpu", progress=False)
    with pytest.raises(
        ValueError, match=r"only as it was started: batch_size is 2, was 3; lr is 0\.01, was 0\.003\. Ta"
    ):
        train(data, out, tiny(batch_size=2, lr=0.01), resume=True, device="cpu", progress=False)

    (data / "clip7.safetensors").rename(data / "other.safetensors")
    save_latents(data / "clip0.safetensors", torch.zeros(5, *SHAPE))
    with pytest.raises(ValueError) as caught:
        train(data, out, tiny(), resume=True, device="cpu", progress=False)
    assert "clips are gone: clip7.safetensors; clips are new: other.safetensors; " in str(caught.value)
    assert "clips have another length: clip0.safetensors (5, was 9)." in str(caught.value)
    wider = tmp_path / "wider"
    wider.mkdir()
    for clip in latent_files(write_clips(tmp_path / "again")):
        save_latents(wider / clip.path.name, torch.zeros(clip.frames, 4, 6, 10))
    with pytest.raises(ValueError, match=r"spatial_w is 10, was 8; frames are \(4, 6, 10\), were \(4, 6, 8\)\."):
        train(wider, out, tiny(), resume=True, device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"clip0\.safetensors has \(4, 6, 10\), the configuration says \(4, 6, 8\)"):
        train(wider, out, None, resume=True, device="cpu", progress=False)
    assert files_of(out) == before


def test_data_that_is_refused(tmp_path: Path, data: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"there is none in \S*empty"):
        train(empty, out, tiny(), device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"at least two clips, .*; got 1 of 1 \(\S*clip0\.safetensors\)"):
        train(write_clips(tmp_path / "single", 1), out, tiny(), device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"got 1 of 8 .* with data_percentage 0\.2"):
        train(data, out, tiny(data_percentage=0.2), device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"clip0\.safetensors has 9 frames, a chunk has 10 \(seq_len\)"):
        train(data, out, tiny(seq_len=10), device="cpu", progress=False)
    with pytest.raises(
        ValueError, match=r"clip0\.safetensors has \(4, 6, 8\), the configuration says \(16, None, None\)"
    ):
        train(data, out, tiny(in_channels=16), device="cpu", progress=False)
    with pytest.raises(ValueError, match="out must be another folder than data"):
        train(data, data / ".." / data.name, tiny(), device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"out must be a folder, got \S*clip0"):
        train(data, data / "clip0.safetensors", tiny(), device="cpu", progress=False)
    assert not out.exists()


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", ""):
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got"):
            find_device(name)
    with pytest.raises(RuntimeError, match="device cuda:99: torch finds"):
        find_device("cuda:99")


class Evil:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_state_that_would_run_code_is_refused(data: Path, tmp_path: Path) -> None:
    out, marker = tmp_path / "out", tmp_path / "marker"
    train(data, out, tiny(epochs=1), device="cpu", progress=False)
    content = torch.load(out / "last.pt", weights_only=True)
    torch.save({**content, "progress": Evil(marker)}, out / "last.pt")
    before = files_of(out)
    for config in (None, tiny()):
        with pytest.raises(ValueError, match=r"training state \S*last\.pt is refused: .*could run code"):
            train(data, out, config, resume=True, device="cpu", progress=False)
    assert not marker.exists() and files_of(out) == before
    torch.load(out / "last.pt", weights_only=False)
    assert marker.exists(), "the file is harmless and this test shows nothing"


def test_a_state_that_is_damaged_is_refused_and_stays(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(data, out, tiny(epochs=1), device="cpu", progress=False)
    whole = (out / "last.pt").read_bytes()
    content = torch.load(out / "last.pt", weights_only=True)

    def refused(message: str) -> None:
        before = files_of(out)
        with pytest.raises(ValueError, match=r"training state \S*last\.pt" + message):
            train(data, out, tiny(), resume=True, device="cpu", progress=False)
        assert files_of(out) == before

    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (out / "last.pt").write_bytes(whole[:size])
        refused(" is (damaged|refused)")
    for change, message in (
        ({"config": None}, " must be a mapping with config"),
        ({"config": {**content["config"], "momentum": 1}}, ": config must have the settings of .* momentum"),
        ({"config": {**content["config"], "lr": -1.0}}, ": lr must be above 0"),
        ({"optimizer": None}, ": optimizer must be state dicts"),
        ({"data": {"clips": []}}, ": data must have clips and frame_shape"),
        ({"progress": {"epoch": 1}}, ": progress must have the entries of Progress"),
        ({"progress": {**content["progress"], "more": 1}}, ": progress must have the entries of Progress"),
        ({"model": {}}, " does not fit its own configuration: .*Missing key"),
        ({"optimizer": {"state": {}, "param_groups": []}}, " does not fit its own configuration: "),
    ):
        torch.save({**content, **change}, out / "last.pt")
        refused(message)
    torch.save([1], out / "last.pt")
    refused(" must be a mapping with config")


def test_a_write_that_fails_leaves_the_old_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    train(data, tmp_path / "whole", tiny(), device="cpu", progress=False)
    with monkeypatch.context() as patch:
        interrupt(4)
        train(data, out, tiny(), device="cpu", progress=False)
        before = files_of(out)

        def full(content: Any, file: Any) -> None:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")

        patch.setattr(training_state.torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            train(data, out, tiny(), resume=True, device="cpu", progress=False)
    assert files_of(out)["last.pt"] == before["last.pt"]
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".lock"]
    train(data, out, tiny(), resume=True, device="cpu", progress=False)
    assert_same_run(tmp_path / "whole", out)


def test_weights_that_are_not_finite_are_never_written(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(data, out, tiny(epochs=1), device="cpu", progress=False)
    saved, before = read_training(out / "last.pt"), (out / "last.pt").read_bytes()
    states = {**saved.states, "model": {**saved.states["model"], "encoder.fc.bias": torch.full((8,), float("nan"))}}
    with pytest.raises(
        RuntimeError, match=r"last\.pt is left as it was: tensor encoder\.fc\.bias of the model has NaN"
    ):
        write_training(out / "last.pt", saved.config, saved.data, saved.progress, states)
    assert (out / "last.pt").read_bytes() == before


@pytest.mark.parametrize("saved", [0, 1])
def test_tensorboard_has_every_loss_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[..., None], saved: int
) -> None:
    """After a run that was killed with this many epochs saved and one more, which comes twice, or two more, done."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are in the order of this number as a text.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    interrupt(1 + 3 * saved)
    assert train(data, tmp_path / "out", tiny(epochs=3), device="cpu", progress=False).epochs == saved
    kept = (tmp_path / "out" / "last.pt").read_bytes()
    train(data, tmp_path / "out", tiny(epochs=2), resume=True, device="cpu", progress=False)
    (tmp_path / "out" / "last.pt").write_bytes(kept)
    train(data, tmp_path / "out", tiny(epochs=3), resume=True, device="cpu", progress=False)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    lines = read_metrics(tmp_path / "out")
    for part in ("train", "validation"):
        for name in lines[0][part]:
            found = [(event.step, event.value) for event in events.Scalars(f"{name}/{part}")]
            assert [step for step, _ in found] == [1, 2, 3]
            assert [value for _, value in found] == pytest.approx([line[part][name] for line in lines], rel=1e-6)


def test_what_is_printed_and_how_tensorboard_is_missed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(data, tmp_path / "quiet", tiny(epochs=1), device="cpu", progress=False)
    assert capsys.readouterr() == ("", "")
    train(data, tmp_path / "out", tiny(epochs=2), device="cpu")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and not (tmp_path / "out" / "tensorboard").exists()
    assert printed[0].startswith("no TensorBoard files: ") and 'pip install "longlive-rag-ops[train]"' in printed[0]
    assert printed[1].startswith("7 clips to train with, 1 to validate, frames 4 x 6 x 8; ")
    assert printed[2].startswith("epoch 1/2  train ") and printed[2].endswith(" s, best so far")
    assert printed[3].startswith("epoch 2/2  train ")


def test_a_bar_on_a_terminal(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    import tqdm

    bars = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options, self.done, self.shown, self.closed = options, options["initial"], [], False
            bars.append(self)

        def update(self) -> None:
            self.done += 1

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            self.shown.append(text)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(data, tmp_path / "out", tiny(epochs=2), device="cpu")
    assert [bar.options["desc"] for bar in bars] == ["epoch 1/2", "epoch 2/2"]
    assert all(bar.closed and bar.done == bar.options["total"] == 4 for bar in bars)
    assert [len(bar.shown) for bar in bars] == [3, 3]
    total, *terms = map(float, re.findall(r"[\d.]+(?:e-?\d+)?", bars[0].shown[0]))
    assert bars[0].shown[0].startswith("loss ") and total == pytest.approx(sum(terms), rel=1e-3) and len(terms) == 3


def clips(*lengths: int) -> list[LatentFile]:
    return [LatentFile(Path(f"{number:03d}.pt"), frames, SHAPE) for number, frames in enumerate(lengths)]


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    found = clips(*range(10, 30))
    config = tiny(seq_len=4, batch_size=5, val_split=0.1, chunks_per_clip=2)
    batches, again = EpochBatches(found, config), EpochBatches(found, config)
    assert len(batches.train_clips) == 18 and len(batches.validation_clips) == 2
    assert not set(batches.train_clips) & set(batches.validation_clips)
    epochs = []
    for epoch in (0, 1):
        batches.begin(epoch)
        again.begin(epoch, 3)
        listed = list(batches)
        assert listed[:-1] == batches.training and listed[-1:] == batches.validation
        assert list(again) == listed[3:] and len(batches) == len(listed) == 9 and len(again) == 6
        assert [len(batch) for batch in batches.training] == [5] * 7 + [1] and batches.steps == 8
        chunks = [chunk for batch in batches.training for chunk in batch]
        assert sorted(chunk.clip for chunk in chunks) == sorted(2 * batches.train_clips)
        assert all(0 <= chunk.start <= found[chunk.clip].frames - 4 for chunk in chunks)
        epochs.append(chunks)
    assert sorted(epochs[0]) != sorted(epochs[1]), "the same chunks in every epoch"
    assert [chunk.clip for chunk in epochs[0]] != [chunk.clip for chunk in epochs[1]], "the same order in every epoch"
    batches.begin(0)
    assert [chunk for batch in batches.training for chunk in batch] == epochs[0]
    other = EpochBatches(found, tiny(seq_len=4, batch_size=5, val_split=0.1, chunks_per_clip=2, seed=1))
    assert other.validation != batches.validation


def test_every_start_is_drawn() -> None:
    batches = EpochBatches(clips(6, 6), tiny(seq_len=4, chunks_per_clip=1))
    starts = set()
    for epoch in range(40):
        batches.begin(epoch)
        starts |= {chunk.start for batch in batches.training for chunk in batch}
    assert starts == {0, 1, 2}


@pytest.mark.parametrize(("count", "share", "kept"), [(2, 0.1, 1), (2, 0.9, 1), (3, 0.999, 2), (20, 0.1, 2)])
def test_both_parts_have_a_clip(count: int, share: float, kept: int) -> None:
    train_clips, validation_clips = split_clips(clips(*[8] * count), tiny(val_split=share))
    assert len(validation_clips) == kept and sorted(train_clips + validation_clips) == list(range(count))


def test_part_of_the_clips_are_the_first_ones() -> None:
    found = clips(*[8] * 10)
    assert usable_clips(found, tiny(data_percentage=0.45)) == found[:4]
    assert usable_clips(found, tiny()) == found


def test_names_of_a_batch_are_cut() -> None:
    batches = EpochBatches(clips(*[8] * 30), tiny(batch_size=100))
    batches.begin(0)
    assert batches.names(batches.training[0]).endswith(" and 19 more")
    assert batches.names(batches.validation[0]).count(".pt") == 3


@pytest.mark.gpu
def test_float16_on_a_gpu_is_finite_and_goes_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(data, out, tiny(epochs=2), device="cuda", progress=False)
    saved = read_training(out / "last.pt")
    assert saved.states["scaler"], "the gradient scaler was not in use"
    result = train(data, out, tiny(epochs=4), resume=True, device="cuda", progress=False)
    lines = read_metrics(out)
    assert result.epochs == len(lines) == 4
    assert all(value == value and abs(value) < 1e6 for line in lines for value in line["validation"].values())
    # With steps too small to change anything, float16 and float32 differ by rounding alone.
    still = {"epochs": 1, "lr": 1e-30}
    for name, half in (("half", True), ("wide", False)):
        train(data, tmp_path / name, tiny(**still, use_amp=half), device="cuda", progress=False)
    half, wide = (read_metrics(tmp_path / name)[0]["train"]["total"] for name in ("half", "wide"))
    assert half != wide and half == pytest.approx(wide, rel=0.02)
    # A run moves between devices.
    assert train(data, out, tiny(epochs=5), resume=True, device="cpu", progress=False).epochs == 5
    assert train(data, out, tiny(epochs=6), resume=True, device="cuda", progress=False).epochs == 6
