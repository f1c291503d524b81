"""Training of the retrieval autoencoder, which can be stopped at any step and goes on as if it had not been."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .clip_dataset import usable_clips
from .latent_file import latent_files
from .run_folder import RunFolder, command_line
from .stop_signal import StopSignal
from .training_config import TrainingConfig
from .training_log import TrainingLog
from .training_loop import TrainingLoop
from .training_state import DataIdentity


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    Attributes:
        out: its folder.
        epochs: whole epochs done, by all of its parts.
        best_epoch: the epoch with the smallest validation loss, counted from 1; 0 when none is done.
        best_loss: that loss.
        best: the model of that epoch; None when none is done.
        signal: number of the signal that stopped it; None when it came to its end.
        early: whether ``patience`` ended it.
    """

    out: Path
    epochs: int
    best_epoch: int
    best_loss: float
    best: Path | None
    signal: int | None
    early: bool


def train(
    data: str | Path,
    out: str | Path,
    config: TrainingConfig | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> TrainingResult:
    """Trains a retrieval autoencoder on a folder of latent files.

    ``out`` gets ``config.json``, ``metrics.jsonl`` (losses, a line for each epoch), ``last.pt`` (all that is needed to
    go on), ``best.safetensors`` (the model with the smallest validation loss, for `AutoencoderEmbedder`),
    ``epoch-NNNN.safetensors`` every ``save_every`` epochs, and ``tensorboard``. ``last.pt`` and ``best.safetensors``
    are written together: at the start, every minute, and at the end. SIGINT, SIGTERM and SIGHUP end the training
    after the step that is being computed; a second one raises KeyboardInterrupt at once. ``.lock`` keeps a second
    training out while there is one.

    A resumed training computes what one in a single part would have: on a CPU, with as many threads, bit for bit.

    Args:
        data: the folder, see `latent_files`.
        out: the run's folder, made when it is not there.
        config: hyper-parameters; the released ones by default, and those of the run where one is resumed.
        resume: go on with the run in ``out``.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: CUDA where there is a device.
        progress: print lines, show a bar.

    Raises:
        ValueError: data or configuration are refused, ``out`` holds a run that is not to be resumed, or holds none or
            another one, or is in use. Nothing but ``.lock`` has been written then.
        RuntimeError: no such device; a loss is NaN or infinite; a process that reads clips has died or is stuck.
            ``last.pt`` is as it was last written.
        OSError: a file cannot be written. ``last.pt`` has the last step, if it could be.
    """
    target = find_device(device)
    folder = RunFolder(out)
    if folder.path.resolve() == Path(data).resolve():
        raise ValueError(f"out must be another folder than data, got {out} for both")
    if config is None:
        config = folder.saved_config() if resume else TrainingConfig()
    clips = usable_clips(latent_files(data), config)
    config = config.fitted(clips[0])
    identity = DataIdentity.of(clips)
    with folder.held(resume):
        if not resume:
            folder.check_new()
        saved = folder.resumed(config, identity) if resume else None
        loop = TrainingLoop(config, clips, identity, folder, target, command_line(Path(data), folder.path, config))
        log = TrainingLog(folder.tensorboard, config.epochs, progress)
        loop.start(saved)
        log.begin(loop.progress.epoch if resume else None)
        try:
            with StopSignal() as stop:
                loop.run(stop, log)
        finally:
            log.close()
    done = loop.progress
    return TrainingResult(
        out=folder.path,
        epochs=done.epoch,
        best_epoch=done.best_epoch,
        best_loss=done.best_loss,
        best=folder.best if done.best_epoch else None,
        signal=stop.received,
        early=loop.out_of_patience and done.epoch < config.epochs,
    )


def find_device(device: str) -> torch.device:
    """The device of this name, see `train`.

    Raises:
        ValueError: no such name. RuntimeError: torch does not find it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise RuntimeError(f"device {device}: torch finds {count} CUDA devices on this machine")
    return found
