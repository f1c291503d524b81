"""What is seen of a training while it goes on: a bar, a line for each epoch, TensorBoard's files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PARTS = ("train", "validation")


class TrainingLog:
    """Shows epochs.

    Args:
        folder: of TensorBoard's files, which are written where tensorboard is installed.
        epochs: that were asked for.
        done: epochs done before; what TensorBoard knows of later ones is taken back.
        shown: print lines, and a bar where standard error is a terminal and tqdm is installed.
    """

    def __init__(self, folder: Path, epochs: int, done: int, shown: bool) -> None:
        self.epochs, self.shown = epochs, shown
        self._writer = self._tensorboard(folder, done)

    def print(self, text: str) -> None:
        """A line, if lines are shown."""
        if self.shown:
            print(text, flush=True)

    def bar(self, epoch: int, batches: int, done: int) -> Any:
        """tqdm's bar over an epoch's batches, which shows nothing where it is not to be seen; to be closed."""
        if not self.shown or not sys.stderr.isatty():
            return _NoBar()
        try:
            from tqdm import tqdm
        except ImportError:
            return _NoBar()
        return tqdm(total=batches, initial=done, desc=f"epoch {epoch}/{self.epochs}", unit="batch", leave=False)

    def epoch(self, line: dict[str, Any], best: bool) -> None:
        """An epoch that is done, a line of metrics.jsonl."""
        texts = []
        for part in PARTS:
            losses = line[part]
            terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items() if name != "total")
            texts.append(f"{part} {losses['total']:.6g} ({terms})")
            if self._writer is not None:
                for name, value in losses.items():
                    self._writer.add_scalar(f"{name}/{part}", value, line["epoch"])
        if self._writer is not None:
            self._writer.flush()
        end = ", best so far" if best else ""
        self.print(f"epoch {line['epoch']}/{self.epochs}  {'  '.join(texts)}  {line['seconds']:.1f} s{end}")

    def close(self) -> None:
        """Ends TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()

    def _tensorboard(self, folder: Path, done: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.print(f'no TensorBoard files: {error}; pip install "longlive-rag-ops[train]" installs it')
            return None
        return SummaryWriter(str(folder), purge_step=done + 1 if done else None)


class _NoBar:
    def update(self) -> None:
        """Nothing to be seen."""

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Nothing to be seen."""

    def close(self) -> None:
        """Nothing to be seen."""
