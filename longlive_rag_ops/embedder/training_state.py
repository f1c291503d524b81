"""The state of a training in its file ``last.pt``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..safetensors_file import replacing
from .checkpoint import read_pickle
from .latent_file import LatentFile
from .training_config import TrainingConfig
from .training_progress import Progress, progress_from

WHAT = "training state"
SHOWN = 5  # differences of a kind that an error lists


class ClipIdentity(NamedTuple):
    """What is remembered of a clip, to know it again without reading all of it.

    Attributes:
        name: of the file, without folders.
        frames: in it.
        size: of the file in bytes.
        digest: BLAKE2b of the first frame in float32, 32 hexadecimal digits.
    """

    name: str
    frames: int
    size: int
    digest: str

    @classmethod
    def of(cls, clip: LatentFile) -> ClipIdentity:
        """Of a file on disk, whose first frame is read.

        Raises:
            ValueError: it is refused, see `LatentFile.read`. OSError: it is gone.
        """
        first = hashlib.blake2b(clip.read(0, 1).numpy().tobytes(), digest_size=16)
        return cls(clip.path.name, clip.frames, clip.path.stat().st_size, first.hexdigest())


@dataclass(frozen=True)
class DataIdentity:
    """What is remembered of the clips, in their order, and their frames' shape."""

    clips: list[ClipIdentity]
    frame_shape: tuple[int, ...]

    @classmethod
    def of(cls, clips: Sequence[LatentFile]) -> DataIdentity:
        """Of files on disk; raises as `ClipIdentity.of` does."""
        return cls([ClipIdentity.of(clip) for clip in clips], clips[0].frame_shape)

    def differences(self, other: DataIdentity) -> list[str]:
        """What is another in another folder, in words."""
        mine, theirs = ({clip.name: clip for clip in data.clips} for data in (self, other))
        both = [name for name in mine if name in theirs]
        longer = [name for name in both if mine[name].frames != theirs[name].frames]
        changed = [name for name in both if mine[name] != theirs[name] and name not in longer]
        if self.frame_shape != other.frame_shape:
            changed = []  # all of them, which the shape says already
        lines = [
            f"{kind} {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            for kind, names in (
                ("clips are gone:", [name for name in mine if name not in theirs]),
                ("clips are new:", [name for name in theirs if name not in mine]),
                (
                    "clips have another length:",
                    [f"{name} ({theirs[name].frames}, was {mine[name].frames})" for name in longer],
                ),
                ("clips have another content:", changed),
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
        clips, shape = [ClipIdentity(*clip) for clip in found["clips"]], tuple(found["frame_shape"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{WHAT} {path}: data must have clips and frame_shape; got {error!r}") from None
    good = all(tuple(map(type, clip)) == (str, int, int, str) for clip in clips)
    if not good or not all(type(size) is int for size in shape):
        raise ValueError(
            f"{WHAT} {path}: data must have clips ({', '.join(ClipIdentity._fields)}) and frame_shape, of ints"
        )
    return DataIdentity(clips, shape)


def _progress(path: Path, content: Mapping[str, Any]) -> Progress:
    try:
        return progress_from(content.get("progress"))
    except ValueError as error:
        raise ValueError(f"{WHAT} {path}: {error}") from None
