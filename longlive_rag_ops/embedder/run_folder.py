"""The folder of a training: which files it has, and whose it is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..safetensors_file import replacing
from .folder_lock import FolderLock
from .training_config import SIZES, TrainingConfig
from .training_state import DataIdentity, SavedTraining, read_config, read_training

# What `replacing` leaves of a file when the process is killed while it writes.
PARTIAL = re.compile(r"\.(last\.pt|best\.safetensors|config\.json|metrics\.jsonl|epoch-\d+\.safetensors)-[a-z0-9_]{8}")


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

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """Keeps other trainings out of the folder in a ``with`` block; it is made where it is not there.

        Args:
            resume: there must be a run; without one nothing is written.

        Raises:
            ValueError: another training holds it, there is no run to resume, or it is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out must be a folder, got {self.path}")
        if resume:
            self._check_there()
        self.path.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.path):
            yield

    def check_new(self) -> None:
        """Raises ValueError where there is a run, or anything that a new one would write."""
        if self.last.exists():
            raise ValueError(
                f"out holds a run already ({self.last.name} in {self.path}); go on with it by resume (--resume), or "
                "take another folder"
            )
        files = (self.best, self.config, self.metrics, self.tensorboard, *sorted(self.path.glob("epoch-*.safetensors")))
        found = [file.name for file in files if file.exists()]
        if found:
            raise ValueError(
                f"out must not hold what a new run would write over: {', '.join(found)} in {self.path}, and no "
                f"{self.last.name} to resume from; move them away, or take another folder"
            )

    def remove_partial(self) -> None:
        """Removes what runs that were killed while they wrote have left; only while the folder is held."""
        for file in list(self.path.iterdir()):
            if PARTIAL.fullmatch(file.name):
                file.unlink()

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
    words = ["longlive-rag", "train-embedder"]
    words += option_words("data", data.resolve().name) + option_words("out", out.resolve().name)
    for name, value in config.to_mapping().items():
        option = name.replace("_", "-")
        if name in SIZES or getattr(config, name) == getattr(default, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += option_words(option, *(value if isinstance(value, list) else [value]))
    return shlex.join(words)


def option_words(name: str, *values: object) -> list[str]:
    """The words of an option; argparse would take a value such as ``-1e-05`` for an option of its own."""
    first, *more = map(str, values)
    return [f"--{name}={first}", *more] if first.startswith("-") else [f"--{name}", first, *more]
