"""The whole demo: decode, stream, measure, draw, report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..extras import need
from .clips import resolve
from .codec import Codec
from .contact_sheet import draw_contact_sheet
from .coverage_chart import draw_coverage_chart
from .footage import EDITS, Footage, load_edit, load_video
from .measures import WindowRule
from .model import WEIGHT_KINDS
from .out_folder import prepare_folder
from .report import build_report, write_report
from .settings import FRAMES_PER_BLOCK, DemoSettings
from .similarity_map import draw_similarity_map
from .stream import Streamed, stream
from .tiers import check_tiers
from .video import probe_video

__all__ = ["Shown", "show"]


@dataclass(frozen=True)
class Shown:
    """The report and where everything lies; on ranks other than the first, what lies there is written by that one."""

    report: dict[str, Any]
    report_path: Path
    pictures: tuple[Path, ...]


def _load(video: str | Path | None, codec: Codec, settings: DemoSettings, tick: Callable[[], None]) -> list[Footage]:
    if video is not None:
        return [load_video(video, codec, settings, tick)]
    return [load_edit(edit, codec, settings, tick) for edit in EDITS]


def _load_in_turn(
    video: str | Path | None, codec: Codec, settings: DemoSettings, tick: Callable[[], None]
) -> list[Footage]:
    """One rank before the others: it may fetch sample clips, which they then find."""
    if settings.mesh is None:
        return _load(video, codec, settings, tick)
    from .ranks import first_before_others

    return first_before_others(settings.mesh, lambda: _load(video, codec, settings, tick))


def show(video: str | Path | None, out: str | Path, settings: DemoSettings, *, progress: bool = True) -> Shown:
    """Runs the demo.

    Args:
        video: a file, ``sample:NAME``, or None for the two edits of sample clips.
        out: folder for ``report.json`` and the pictures; made where it does not exist.
        settings: window sizes, seed and the like. With a mesh, all of its ranks call this.
        progress: show progress bars on standard error.

    Raises:
        ValueError: a video that cannot be read or is too short; settings that do not fit; a folder that cannot be
            written.
        RuntimeError: a missing optional dependency; sample clips that cannot be fetched.
    """
    began = time.perf_counter()
    bar = need("tqdm", "showing progress").tqdm
    # Asked for now: a missing module is better found before the work than after it.
    need("matplotlib.figure", "drawing the pictures")
    need("av", "reading a video")
    folder = Path(out)
    first = settings.mesh is None or settings.mesh.rank == settings.mesh.ranks[0]
    progress = progress and first
    if video is not None and first:
        probe_video(resolve(video))  # a wrong name is found before a folder is made
    if first:
        prepare_folder(folder)
    threads = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        codec = Codec.shipped()
        with bar(desc="decoding", unit=" latent frames", disable=not progress) as decoding:
            footages = _load_in_turn(video, codec, settings, decoding.update)
        runs: list[Streamed] = []
        for footage in footages:
            for weights in WEIGHT_KINDS:
                blocks = footage.frames // FRAMES_PER_BLOCK
                with bar(total=blocks, desc=f"{footage.name}, {weights}", unit="block", disable=not progress) as line:
                    runs.append(stream(footage, weights, settings, line.update))
        check, compared = None, None
        if settings.mesh is not None:
            from .rank_check import check_ranks

            blocks = footages[0].frames // FRAMES_PER_BLOCK
            with bar(total=blocks, desc="ranks and one process", unit="block", disable=not progress) as line:
                compared = check_ranks(footages[0], settings, line.update)
        elif settings.bank is not None:
            blocks = 2 * (footages[0].frames // FRAMES_PER_BLOCK)
            with bar(total=blocks, desc="tiers, bit for bit", unit="block", disable=not progress) as line:
                check = check_tiers(footages[0], settings, line.update)
        pictures = _draw(runs, folder, settings) if first else []
        report = build_report(runs, codec, settings, check, compared)
    finally:
        torch.set_num_threads(threads)
    report["pictures"] = [picture.name for picture in pictures]
    report["seconds"] = round(time.perf_counter() - began, 2)
    path = folder / "report.json"
    if first:
        write_report(report, path)
    return Shown(report, path, tuple(pictures))


def _draw(runs: Sequence[Streamed], folder: Path, settings: DemoSettings) -> list[Path]:
    """Three pictures a footage; what was retrieved is the same for all weights."""
    rule = WindowRule(settings.window, settings.sink, settings.top_k)
    groups: dict[str, list[Streamed]] = {}
    for run in runs:
        groups.setdefault(run.footage.name, []).append(run)
    pictures = []
    for name, group in groups.items():
        ending = "" if name in ("return", "video") else f"_{name.replace('-', '_')}"
        paths = [folder / f"{kind}{ending}.png" for kind in ("contact_sheet", "similarity_map", "coverage")]
        draw_contact_sheet(group[0], paths[0])
        draw_similarity_map(group[0], paths[1])
        draw_coverage_chart(group, rule, paths[2])
        pictures += paths
    return pictures
