"""``evaluation.json``, schema 1.

================ =====================================================================================================
``schema``       1
``what``         what was measured
``caveats``      sentences to read before quoting a number
``device``       CPU, threads, load, versions, see `demo.report.describe_device`
``settings``     sizes of the window, the size videos were scaled to, ``recall_at``
``clips``        ``name``, ``source`` (latents or video), ``frames``, ``frame_shape`` (C, h, w)
``embedders``    ``name``, ``what``, ``embedding_dim``
``rules``        what the rows ``random`` and ``newest`` are
``edits``        ``name``, ``outer``, ``inner``, ``frames``, ``scenes`` (start and stop of A1, B, A2), ``left_out``
                 (frames of the outer clip between A1 and A2)
``blocks``       of each clip and edit: blocks with more eligible frames than are retrieved, which overlap is of
``neighbours``   ``offsets`` and, by embedder, mean cosines at them: of ``clips``, and their ``mean``
``spread``       by embedder: ``deviation``, ``low`` (5 %), ``median``, ``high`` (95 %) of ``clips``, and their ``mean``
``overlap``      by row: ``frames`` and ``mass`` (see `overlap.Overlap`) of ``clips`` and ``edits``, ``mean_of_clips``,
                 ``mean_of_edits``
``recall``       by row: at each number of frames, of ``edits``, and their ``mean``
``notes``        what is left out, and why
``pictures``     file names, relative to the report
``seconds``      wall time
================ =====================================================================================================

Shares are 0..1, frames are latent frames; what could not be measured is null, and means leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..demo.report import describe_device
from ..demo.video import Size
from ..safetensors_file import replacing
from .evaluate import Evaluation
from .named_embedder import RULES
from .returning_scene import Edit
from .similarity import OFFSETS

WHAT = (
    "Embedders of latent frames, judged without a generator: how alike they make neighbouring frames, how wide they "
    "spread cosines, whether the frames they choose are those that attention over the whole history weighs most, and "
    "whether they find a scene that returns."
)
CAVEATS = (
    "Full-history attention is a toy's: the first layer of the demo's transformer, untrained, in which tokens attend "
    "to tokens like them. It depends on the clean latents alone and favours no embedder, but says nothing about what a "
    "trained generator attends to.",
    "Edits join two clips with hard cuts. Where a clip is one steady shot, its scene returns with the same framing, "
    "which is easy to find; where it drifts or has cuts, its end need not show what its beginning does.",
    "An embedder that was trained on these clips, or on ones like them, has an advantage here that it lacks elsewhere.",
    "Cosines of different embedders are not on one scale: what counts is the order in which one embedder puts frames.",
    "Blocks within a clip resemble each other, so a mean over blocks is less certain than their number suggests.",
)
DIGITS = 6


def build_report(found: Evaluation, size: Size) -> dict[str, Any]:
    """The report without ``pictures`` and ``seconds``, which are known last; ``size`` is that of videos in pixels."""
    plan, config = found.plan, found.plan.config
    clips, edits = [clip.name for clip in plan.clips], [edit.name for edit in plan.edits]
    return {
        "schema": 1,
        "what": WHAT,
        "caveats": list(CAVEATS),
        "device": describe_device(),
        "settings": {
            "window": config.window,
            "sink": config.sink,
            "top_k": config.top_k,
            "recent_exclude": config.recent_exclude,
            "frames_per_block": config.frames_per_block,
            "size": list(size),
            "recall_at": list(plan.recall_at),
        },
        "clips": [
            {"name": c.name, "source": c.source, "frames": c.frames, "frame_shape": list(c.frame_shape)}
            for c in plan.clips
        ],
        "embedders": [
            {"name": e.name, "what": e.what, "embedding_dim": found.embeddings[e.name][clips[0]].shape[1]}
            for e in plan.embedders
        ],
        "rules": RULES,
        "edits": [_edit(edit) for edit in plan.edits],
        "blocks": found.blocks,
        "neighbours": {
            "offsets": list(OFFSETS),
            "cosine": {
                row: {"clips": {name: _rounded(values) for name, values in by_clip.items()}}
                | {"mean": [_mean(column) for column in zip(*by_clip.values(), strict=True)]}
                for row, by_clip in found.neighbours.items()
            },
        },
        "spread": {
            row: _group(
                {name: None if s is None else s._asdict() for name, s in by_clip.items()}, clips, "clips", "mean"
            )
            for row, by_clip in found.spread.items()
        },
        "overlap": {row: _overlap_row(by_name, clips, edits) for row, by_name in found.overlap.items()},
        "recall": {
            row: _group({n: {str(k): v for k, v in at.items()} for n, at in by_edit.items()}, edits, "edits", "mean")
            for row, by_edit in found.recall.items()
        },
        "notes": list(plan.notes),
    }


def write_json(report: dict[str, Any], path: Path) -> None:
    """Writes the report, whole or not at all."""
    with replacing(path) as file:
        file.write(json_text(report).encode())


def json_text(report: dict[str, Any]) -> str:
    """The report as JSON, without NaN."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def _edit(edit: Edit) -> dict[str, Any]:
    ends = (0, edit.first, edit.returned, edit.frames)
    return {
        "name": edit.name,
        "outer": edit.outer,
        "inner": edit.inner,
        "frames": edit.frames,
        "scenes": [list(scene) for scene in pairwise(ends)],
        "left_out": edit.resume - edit.first,
    }


def _overlap_row(by_name: Mapping[str, Any], clips: list[str], edits: list[str]) -> dict[str, Any]:
    values = {name: None if found is None else found._asdict() for name, found in by_name.items()}
    return _group(values, clips, "clips", "mean_of_clips") | _group(values, edits, "edits", "mean_of_edits")


def _group(
    values: Mapping[str, dict[str, float | None] | None], names: Iterable[str], group: str, mean: str
) -> dict[str, Any]:
    """The values of some clips or edits, and the mean of each of their parts."""
    chosen = {name: values[name] for name in names}
    rows = [row for row in chosen.values() if row is not None]
    rounded = {
        name: None if row is None else dict(zip(row, _rounded(row.values()), strict=True))
        for name, row in chosen.items()
    }
    return {group: rounded, mean: {key: _mean(row[key] for row in rows) for key in rows[0]} if rows else None}


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else round(value, DIGITS) for value in values]


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(sum(there) / len(there), DIGITS) if there else None
