"""Files in, evaluation, files out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import WindowConfig
from ..demo.out_folder import prepare_folder
from ..demo.video import Size
from ..extras import need
from ..safetensors_file import replacing
from .clip import ARGUMENT, find_clip
from .evaluate import evaluate, make_plan
from .named_embedder import load_embedder
from .names import check_names
from .report import build_report, write_json
from .table import summary_markdown

Bar = Callable[..., Any]


def run_evaluation(
    clips: Sequence[str],
    embedders: Sequence[str],
    config: WindowConfig,
    *,
    size: Size = (320, 176),
    edits: bool = True,
    out: Path | None = None,
    threads: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Reads clips and embedders, evaluates them, and writes what was found.

    Args:
        clips: see `clip.find_clip`.
        embedders: see `named_embedder.load_embedder`.
        config: sizes of the window.
        size: width and height in pixels that videos are scaled to.
        edits: make an edit of every ordered pair of clips.
        out: folder for ``evaluation.json``, ``evaluation.md`` and pictures; None writes nothing.
        threads: CPU threads, 0 is torch's choice. Matrices are small.
        progress: show progress bars on standard error.

    Returns:
        The report, see `report`.

    Raises:
        ValueError: what cannot be read or does not fit; the message names it. RuntimeError: a missing dependency.
    """
    began = time.perf_counter()
    if threads < 0:
        raise ValueError(f"--threads: got {threads}; must be 0 (torch's choice) or positive")
    bar: Bar | None = need("tqdm", "showing progress").tqdm if progress else None
    if out is not None:  # found missing now, not after the work
        need("matplotlib.figure", "drawing the pictures")
    files = [find_clip(text) for text in clips]
    check_names((file.name for file in files), ARGUMENT)
    found_embedders = [load_embedder(text) for text in embedders]
    if out is not None:
        prepare_folder(out)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with _ticks(bar, "reading", None, " latent frames") as tick:
            found_clips = [file.read(size, tick) for file in files]
        plan = make_plan(found_clips, found_embedders, config, edits=edits)
        with _ticks(bar, "evaluating", plan.steps, "step") as tick:
            found = evaluate(plan, tick)
        report = build_report(found, size)
    finally:
        torch.set_num_threads(before)
    report["pictures"] = []
    if out is not None:
        from .plots import draw_plots

        report["pictures"] = draw_plots(found, out)
    report["seconds"] = round(time.perf_counter() - began, 2)
    if out is not None:
        with replacing(out / "evaluation.md") as file:
            file.write(summary_markdown(report).encode())
        write_json(report, out / "evaluation.json")
    return report


@contextmanager
def _ticks(bar: Bar | None, text: str, total: int | None, unit: str) -> Iterator[Callable[[], None]]:
    if bar is None:
        yield lambda: None
        return
    with bar(desc=text, total=total, unit=unit) as line:
        yield line.update
