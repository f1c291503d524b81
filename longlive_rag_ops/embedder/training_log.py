"""What is seen of a training while it goes on: a bar, a line for each epoch, TensorBoard's files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PARTS = ("train", "validation")


def show(text: str) -> bool:
    """Prints a line; False where nobody can read it any more: ``| head -1``, a terminal that was closed."""
    try:
        print(text, flush=True)
    except OSError:
        return False
    return True


class TrainingLog:
    """Shows epochs. What cannot be shown stops no training: from the first line on that fails it is silent.

    Args:
        folder: of TensorBoard's files, which are written where tensorboard is installed.
        epochs: that were asked for.
        shown: print lines, and a bar where standard error is a terminal and tqdm is installed.
    """

    def __init__(self, folder: Path, epochs: int, shown: bool) -> None:
        self.folder, self.epochs, self.shown = folder, epochs, shown
        self._writer_type = self._tensorboard()
        self._writer: Any = None

    def begin(self, done: int | None) -> None:
        """Opens TensorBoard's file.

        Args:
            done: epochs done before, by a run that is resumed; what TensorBoard knows of later ones is taken back.
                None for a new run.

        Raises:
            OSError: it cannot be written.
        """
        if self._writer_type is not None:
            self._writer = self._writer_type(str(self.folder), purge_step=None if done is None else done + 1)

    def print(self, text: str) -> None:
        """A line, if lines are shown."""
        self.shown = self.shown and show(text)

    def bar(self, epoch: int, batches: int, done: int) -> Bar:
        """A bar over an epoch's batches, which shows nothing where it is not to be seen; to be closed."""
        if not self.shown or not sys.stderr.isatty():
            return Bar(None)
        try:
            from tqdm import tqdm
        except ImportError:
            return Bar(None)
        options = {"desc": f"epoch {epoch}/{self.epochs}", "unit": "batch", "leave": False}
        try:
            return Bar(tqdm(total=batches, initial=done, **options))
        except OSError:
            return Bar(None)

    def epoch(self, line: dict[str, Any], best: bool) -> None:
        """An epoch that is done, a line of metrics.jsonl.

        Raises:
            OSError: TensorBoard's file cannot be written.
        """
        texts = []
        for part in PARTS:
            losses = line[part]
            terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items() if name != "total")
            texts.append(f"{part} {losses['total']:.6g} ({terms})")
        end = ", best so far" if best else ""
        self.print(f"epoch {line['epoch']}/{self.epochs}  {'  '.join(texts)}  {line['seconds']:.1f} s{end}")
        if self._writer is not None:
            for part in PARTS:
                for name, value in line[part].items():
                    self._writer.add_scalar(f"{name}/{part}", value, line["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """Ends TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()

    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.print(f'no TensorBoard files: {error}; pip install "longlive-rag-ops[train]" installs it')
        # Its import runs protobuf's and numpy's, which raise anything where versions do not go together.
        except Exception as error:
            self.print(f"no TensorBoard files: tensorboard cannot be imported, {type(error).__name__}: {error}")
        else:
            return SummaryWriter
        return None


class Bar:
    """tqdm's bar, or none; one whose terminal was closed is none from then on."""

    def __init__(self, shown: Any) -> None:
        self._shown = shown

    def update(self, text: str = "") -> None:
        """A batch is done; ``text`` stands behind the bar."""
        if text:
            self._call("set_postfix_str", text, refresh=False)
        self._call("update")

    def close(self) -> None:
        """Takes the bar away."""
        self._call("close")

    def _call(self, method: str, *args: Any, **options: Any) -> None:
        if self._shown is None:
            return
        try:
            getattr(self._shown, method)(*args, **options)
        except OSError:
            self._shown.disable = True  # or it would write once more when it is deleted
            self._shown = None
