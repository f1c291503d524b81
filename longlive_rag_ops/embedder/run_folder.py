"""The folder of a training: which files it has."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..safetensors_file import replacing
from .training_config import SIZES, TrainingConfig
from .training_state import DataIdentity, SavedTraining, read_config, read_training


class RunFolder:
    """Names of the files, and whether a run is there.

    Args:
        path: the folder; it need not be there yet.

    Attributes:
        config: what the run was started with, for people.
        last: all that is needed to go on, see `write_training`.
        best: the model with the smallest validation loss.
        metrics: losses, a line of JSON for each epoch.
        tensorboard: a folder of event files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.safetensors"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"

    def epoch(self, number: int) -> Path:
        """The model after an epoch that is kept."""
        return self.path / f"epoch-{number:04d}.safetensors"

    def check_new(self) -> None:
        """Raises ValueError where there is a run, or part of one, or no folder can be made."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out must be a folder, got {self.path}")
        found = [file.name for file in (self.config, self.last, self.best, self.metrics) if file.exists()]
        if found:
            raise ValueError(
                f"out holds a run already ({', '.join(found)} in {self.path}); go on with it by resume "
                "(--resume), or take another folder"
            )

    def saved_config(self) -> TrainingConfig:
        """The configuration of the run that is there.

        Raises:
            ValueError: there is none, or ``last.pt`` is refused.
        """
        self._check_there()
        return read_config(self.last)

    def resumed(self, config: TrainingConfig, data: DataIdentity) -> SavedTraining:
        """The run that is there, which must have been started with these.

        Raises:
            ValueError: there is none, ``last.pt`` is refused, or something differs; the message lists what.
        """
        self._check_there()
        saved = read_training(self.last)
        differences = saved.config.differences(config) + saved.data.differences(data)
        if differences:
            raise ValueError(
                f"the run in {self.path} can be resumed only as it was started: {'; '.join(differences)}. Take another "
                "folder for another run"
            )
        return saved

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Writes config.json."""
        with replacing(self.config) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Writes metrics.jsonl, all of it: lines of a run that was cut off behind its last state go."""
        with replacing(self.metrics) as file:
            file.write("".join(json.dumps(line) + "\n" for line in history).encode())

    def _check_there(self) -> None:
        if not self.last.is_file():
            raise ValueError(f"resume needs a run, and {self.path} has none: there is no {self.last.name}")


def command_line(data: Path, out: Path, config: TrainingConfig) -> str:
    """The command that starts this training: folders by their last name, and settings that are neither the default nor
    the data's."""
    default = TrainingConfig()
    words = ["longlive-rag", "train-embedder", "--data", data.resolve().name, "--out", out.resolve().name]
    for name, value in config.to_mapping().items():
        option = name.replace("_", "-")
        if name in SIZES or getattr(config, name) == getattr(default, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
