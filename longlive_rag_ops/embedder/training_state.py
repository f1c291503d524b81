"""How far a training has come, in memory and in its file ``last.pt``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..safetensors_file import replacing
from .checkpoint import read_pickle
from .latent_file import LatentFile
from .losses import RetrievalTerms
from .training_config import TrainingConfig

WHAT = "training state"
SHOWN = 5  # differences of a kind that an error lists


@dataclass
class Progress:
    """Plain numbers; with the weights, the optimizer and the configuration they decide all that follows.

    Attributes:
        epoch: whole epochs done.
        step: training batches done in the epoch after those.
        sums: of each loss over that epoch's chunks so far, see `RetrievalTerms`.
        chunks: so far in that epoch.
        seconds: spent on that epoch.
        best_epoch: the epoch, counted from 1, with the smallest validation loss; 0 before there is one.
        best_loss: that loss.
        history: the lines of metrics.jsonl, one for each epoch done.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(RetrievalTerms._fields))
    chunks: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_loss: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def since_best(self) -> int:
        """Epochs done since the best one."""
        return self.epoch - self.best_epoch


@dataclass(frozen=True)
class DataIdentity:
    """What is remembered of the clips, to know them again: names and lengths, in order, and their frames' shape."""

    clips: list[tuple[str, int]]
    frame_shape: tuple[int, ...]

    @classmethod
    def of(cls, clips: Sequence[LatentFile]) -> DataIdentity:
        """Of files on disk."""
        return cls([(clip.path.name, clip.frames) for clip in clips], clips[0].frame_shape)

    def differences(self, other: DataIdentity) -> list[str]:
        """What is another in another folder, in words."""
        mine, theirs = dict(self.clips), dict(other.clips)
        changed = [name for name in mine if name in theirs and mine[name] != theirs[name]]
        lines = [
            f"{kind} {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            for kind, names in (
                ("clips are gone:", [name for name in mine if name not in theirs]),
                ("clips are new:", [name for name in theirs if name not in mine]),
                ("clips have another length:", [f"{name} ({theirs[name]}, was {mine[name]})" for name in changed]),
            )
            if names
        ]
        if self.frame_shape != other.frame_shape:
            lines.append(f"frames are {other.frame_shape}, were {self.frame_shape}")
        return lines


@dataclass(frozen=True)
class SavedTraining:
    """What ``last.pt`` holds, checked as far as it can be without a model.

    Attributes:
        path: the file.
        config, data, progress: of the training.
        states: state dicts of the model, the optimizer and the gradient scaler, under those names.
    """

    path: Path
    config: TrainingConfig
    data: DataIdentity
    progress: Progress
    states: dict[str, Mapping[str, Any]]


def write_training(
    path: Path,
    config: TrainingConfig,
    data: DataIdentity,
    progress: Progress,
    states: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes ``last.pt``, whole or not at all. It has the released checkpoints' layout, so `load_autoencoder` reads it.

    Raises:
        RuntimeError: the model has a NaN or infinity, from which no training goes on. OSError: it cannot be written.
        In both cases the file that was there stays.
    """
    for name, value in states["model"].items():
        if not value.isfinite().all():
            raise RuntimeError(f"{path.name} is left as it was: tensor {name} of the model has NaN or infinity")
    content = {
        **states,
        "config": config.to_mapping(),
        "data": {"clips": [list(clip) for clip in data.clips], "frame_shape": list(data.frame_shape)},
        "progress": asdict(progress),
    }
    with replacing(path) as file:
        torch.save(content, file)


def read_config(path: Path) -> TrainingConfig:
    """The configuration in ``last.pt``; weights are not read.

    Raises:
        ValueError: see `read_training`.
    """
    return _config(path, read_pickle(path, WHAT, mmap=True))


def read_training(path: Path) -> SavedTraining:
    """Reads ``last.pt``; nothing in it is executed.

    Raises:
        ValueError: it cannot be read, is truncated, or is no state of a training; the message names it.
    """
    content = read_pickle(path, WHAT)
    config = _config(path, content)
    states = {name: content.get(name) for name in ("model", "optimizer", "scaler")}
    wrong = [name for name, state in states.items() if not isinstance(state, Mapping)]
    if wrong:
        raise ValueError(f"{WHAT} {path}: {', '.join(wrong)} must be state dicts")
    return SavedTraining(path, config, _data(path, content), _progress(path, content), states)


def _config(path: Path, content: Any) -> TrainingConfig:
    if not isinstance(content, Mapping) or not isinstance(content.get("config"), Mapping):
        raise ValueError(f"{WHAT} {path} must be a mapping with config, a mapping of settings")
    names = {setting.name for setting in fields(TrainingConfig)}
    if content["config"].keys() != names:
        raise ValueError(
            f"{WHAT} {path}: config must have the settings of this version; other are "
            f"{', '.join(sorted(map(str, content['config'].keys() ^ names)))}"
        )
    try:
        return TrainingConfig(**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{WHAT} {path}: {error}") from None


def _data(path: Path, content: Mapping[str, Any]) -> DataIdentity:
    try:
        found = content["data"]
        clips = [(str(name), int(frames)) for name, frames in found["clips"]]
        return DataIdentity(clips, tuple(int(size) for size in found["frame_shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{WHAT} {path}: data must have clips and frame_shape; got {error!r}") from None


def _progress(path: Path, content: Mapping[str, Any]) -> Progress:
    try:
        progress = Progress(**content["progress"])
        lines = [dict(line) for line in progress.history]
        numbers = [progress.epoch, progress.step, progress.chunks, progress.best_epoch]
        good = all(isinstance(number, int) and number >= 0 for number in numbers)
        good = good and all(isinstance(number, float) for number in (*progress.sums, progress.seconds))
        good = good and len(progress.sums) == len(RetrievalTerms._fields) and len(lines) == progress.epoch
        good = good and isinstance(progress.best_loss, float)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{WHAT} {path}: progress must have the entries of Progress; got {error!r}") from None
    if not good:
        raise ValueError(f"{WHAT} {path}: progress must have the entries of Progress, of their types")
    return progress
