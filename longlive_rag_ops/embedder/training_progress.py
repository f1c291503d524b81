"""How far a training has come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .losses import RetrievalTerms

TERMS = RetrievalTerms._fields


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
    sums: list[float] = field(default_factory=lambda: [0.0] * len(TERMS))
    chunks: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_loss: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def since_best(self) -> int:
        """Epochs done since the best one."""
        return self.epoch - self.best_epoch


def progress_from(content: Any) -> Progress:
    """The progress of these entries, which must agree with each other.

    Raises:
        ValueError: an entry is missing, not known, of another type, not finite, or contradicts another.
    """
    names = [entry.name for entry in fields(Progress)]
    if not isinstance(content, Mapping) or content.keys() != set(names):
        raise ValueError(f"progress must have the entries of Progress: {', '.join(names)}")
    progress = Progress(**content)
    fault = next(_faults(progress), None)
    if fault is not None:
        raise ValueError(f"progress: {fault}")
    return progress


def _faults(progress: Progress) -> Iterator[str]:
    """What is wrong, types first: what comes after a fault relies on what comes before it."""
    for name in ("epoch", "step", "chunks", "best_epoch"):
        value = getattr(progress, name)
        if type(value) is not int or value < 0:
            yield f"{name} must be an int of at least 0, got {value!r}"
    for name in ("seconds", "best_loss"):
        if not _finite(getattr(progress, name)):
            yield f"{name} must be a finite float, got {getattr(progress, name)!r}"
    if not isinstance(progress.sums, list) or len(progress.sums) != len(TERMS) or not all(map(_finite, progress.sums)):
        yield f"sums must be {len(TERMS)} finite floats, got {progress.sums!r}"
    if (progress.step > 0) != (progress.chunks > 0):
        yield f"step and chunks must be both 0 or both above, got {progress.step} and {progress.chunks}"
    if not isinstance(progress.history, list) or len(progress.history) != progress.epoch:
        yield f"history must have a line for each of the {progress.epoch} epochs done"
    for number, line in enumerate(progress.history, 1):
        if not _is_line(line, number):
            yield f"history must have epoch {number} with finite losses and seconds, got {line!r}"
    if not min(1, progress.epoch) <= progress.best_epoch <= progress.epoch:
        yield f"best_epoch must be one of the {progress.epoch} epochs done, got {progress.best_epoch}"
    if progress.best_epoch:
        loss = progress.history[progress.best_epoch - 1]["validation"]["total"]
        if loss != progress.best_loss:
            yield f"best_loss must be {loss}, that of epoch {progress.best_epoch}; got {progress.best_loss}"


def _is_line(line: Any, number: int) -> bool:
    if not isinstance(line, Mapping) or line.keys() != {"epoch", "train", "validation", "seconds"}:
        return False
    parts = line["train"], line["validation"]
    if not all(isinstance(part, Mapping) and part.keys() == set(TERMS) for part in parts):
        return False
    values = [line["seconds"], *(value for part in parts for value in part.values())]
    return type(line["epoch"]) is int and line["epoch"] == number and all(map(_finite, values))


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
