"""The evaluation: every embedder on every clip and edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import WindowConfig
from . import returning_scene
from .choice import Block, Chosen, choosing_blocks, most_similar, newest, shortest_choosing
from .clip import Clip, check_clips
from .full_attention import FullAttention, Projected
from .named_embedder import ARGUMENT, RULES, NamedEmbedder
from .names import check_names
from .overlap import Masses, Overlap, overlap, random_overlap
from .returning_scene import Edit, make_edit, searching_blocks
from .similarity import Spread, cosines, neighbour_similarity, spread

RECALL_AT = (1, 3, 6)  # and top_k


@dataclass(frozen=True)
class Plan:
    """What is to be evaluated, checked. See `make_plan`.

    Attributes:
        config: sizes of the window.
        clips, embedders: as given.
        edits: of the clips.
        attention: of the toy; None where it takes no frames of this shape.
        notes: what is left out, and why: sentences.
    """

    config: WindowConfig
    clips: tuple[Clip, ...]
    embedders: tuple[NamedEmbedder, ...]
    edits: tuple[Edit, ...]
    attention: FullAttention | None
    notes: tuple[str, ...]

    @property
    def recall_at(self) -> tuple[int, ...]:
        """The numbers of chosen frames that recall is given for."""
        return tuple(sorted({k for k in RECALL_AT if k < self.config.top_k} | {self.config.top_k}))

    @property
    def steps(self) -> int:
        """How often `evaluate` ticks: once for each embedder on each clip, and for each block measured."""
        lengths = [clip.frames for clip in self.clips] + [edit.frames for edit in self.edits]
        measured = 0 if self.attention is None else sum(len(choosing_blocks(n, self.config)) for n in lengths)
        return len(self.clips) * len(self.embedders) + measured


@dataclass
class Evaluation:
    """What was found, by name of the row (embedder or rule), then of the clip or edit.

    Attributes:
        plan: what was evaluated.
        embeddings: ``(frames, E)`` of each clip, by embedder.
        similarity: cosines of each clip's frames, see `similarity.cosines`.
        neighbours: see `similarity.neighbour_similarity`.
        spread: see `similarity.spread`; None for a clip of one frame.
        overlap: see `overlap.Overlap`; None where no block has a choice.
        recall: of each edit, by number of frames looked at.
        blocks: that have a choice, in each clip and edit.
    """

    plan: Plan
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    similarity: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    neighbours: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    spread: dict[str, dict[str, Spread | None]] = field(default_factory=dict)
    overlap: dict[str, dict[str, Overlap | None]] = field(default_factory=dict)
    recall: dict[str, dict[str, dict[int, float | None]]] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)


def make_plan(
    clips: Sequence[Clip], embedders: Sequence[NamedEmbedder], config: WindowConfig, *, edits: bool = True
) -> Plan:
    """Checks what can be checked before anything is computed.

    Args:
        clips: at least one, with frames of one shape.
        embedders: at least one.
        config: sizes of the window, which retrieves at least one frame for blocks of three.
        edits: make an edit of every ordered pair of clips.

    Raises:
        ValueError: clips of different shapes, names that occur twice, an embedder that was made for other frames, or a
            window that retrieves nothing.
    """
    check_clips(clips)
    if not embedders:
        raise ValueError(f"{ARGUMENT}: at least one embedder is needed, got none")
    check_names((embedder.name for embedder in embedders), ARGUMENT, RULES)
    for embedder in embedders:
        embedder.check(clips[0])
    if config.top_k < 1:
        raise ValueError(f"--top-k: got {config.top_k}; must be at least 1, what is chosen is what is judged")
    notes = []
    try:
        attention = FullAttention(clips[0].frame_shape, config)
    except ValueError as error:  # latents that the toy cannot cut into tokens are no reason to measure nothing else
        attention = None
        notes.append(f"no overlap with full-history attention: the toy transformer takes no such frames ({error})")
    short = [clip.name for clip in clips if not choosing_blocks(clip.frames, config)]
    if short:
        notes.append(
            f"no overlap on {', '.join(short)}: fewer than {shortest_choosing(config)} latent frames, so no block has "
            f"more than {config.top_k} to choose from"
        )
    made, refused = _edits(clips, config) if edits else ([], [])
    notes += [f"no edit {name}: {reason}" for name, reason in refused]
    return Plan(config, tuple(clips), tuple(embedders), tuple(made), attention, tuple(notes))


def _edits(clips: Sequence[Clip], config: WindowConfig) -> tuple[list[Edit], list[tuple[str, str]]]:
    made, refused = [], []
    for outer in clips:
        for inner in clips:
            if outer is not inner:
                edit = make_edit(outer, inner, config)
                if isinstance(edit, Edit):
                    made.append(edit)
                else:
                    refused.append((f"{outer.name}+{inner.name}", edit))
    return made, refused


def evaluate(plan: Plan, tick: Callable[[], None] = lambda: None) -> Evaluation:
    """Computes everything; deterministic. ``tick`` is called `Plan.steps` times.

    Raises:
        ValueError: an embedder returned what is no embedding; the message names it.
    """
    found = Evaluation(plan)
    for embedder in plan.embedders:
        rows = found.embeddings[embedder.name] = {}
        for clip in plan.clips:
            rows[clip.name] = embedder.embeddings(clip)
            tick()
        alike = found.similarity[embedder.name] = {name: cosines(row) for name, row in rows.items()}
        found.neighbours[embedder.name] = {name: neighbour_similarity(matrix) for name, matrix in alike.items()}
        found.spread[embedder.name] = {name: spread(matrix) for name, matrix in alike.items()}
    for name in (*found.embeddings, *RULES):
        found.overlap[name], found.recall[name] = {}, {}
    projected: dict[str, Projected] = {}
    if plan.attention is not None:
        projected = {clip.name: plan.attention.project(clip.latents) for clip in plan.clips}
    for clip in plan.clips:
        embeddings = {name: rows[clip.name] for name, rows in found.embeddings.items()}
        _overlaps(found, clip.name, clip.frames, embeddings, projected.get(clip.name), tick)
    for edit in plan.edits:
        embeddings = {n: edit.join(rows[edit.outer], rows[edit.inner]) for n, rows in found.embeddings.items()}
        joined = None
        if projected:
            joined = Projected(*map(edit.join, projected[edit.outer], projected[edit.inner]))
        _overlaps(found, edit.name, edit.frames, embeddings, joined, tick)
        _recalls(found, edit, embeddings)
    return found


def _overlaps(
    found: Evaluation,
    name: str,
    frames: int,
    embeddings: dict[str, torch.Tensor],
    projected: Projected | None,
    tick: Callable[[], None],
) -> None:
    """Of a clip or edit, whose masses serve all rows."""
    config, attention = found.plan.config, found.plan.attention
    choosing = choosing_blocks(frames, config)
    found.blocks[name] = len(choosing)
    weighed: list[tuple[Block, Masses]] = []
    if attention is not None and projected is not None:
        for block in choosing:
            weighed.append((block, attention.masses(projected, block.start)))
            tick()

    def measured(chosen: Sequence[Chosen]) -> Overlap | None:
        return overlap([(block, masses, each) for (block, masses), each in zip(weighed, chosen, strict=True)])

    measuring = [block for block, _ in weighed]
    for embedder, rows in embeddings.items():
        found.overlap[embedder][name] = measured(most_similar(rows, measuring, config))
    found.overlap["random"][name] = random_overlap(weighed, config.top_k)
    found.overlap["newest"][name] = measured([newest(block, config.top_k) for block in measuring])


def _recalls(found: Evaluation, edit: Edit, embeddings: dict[str, torch.Tensor]) -> None:
    config, counts = found.plan.config, found.plan.recall_at
    searching = searching_blocks(edit, config)
    for embedder, rows in embeddings.items():
        chosen = list(zip(searching, most_similar(rows, searching, config), strict=True))
        found.recall[embedder][edit.name] = {k: returning_scene.recall(edit, chosen, k) for k in counts}
    latest = [(block, newest(block, config.top_k)) for block in searching]
    found.recall["newest"][edit.name] = {k: returning_scene.recall(edit, latest, k) for k in counts}
    found.recall["random"][edit.name] = {k: returning_scene.random_recall(edit, searching, k) for k in counts}


def edit_similarity(found: Evaluation, embedder: str, edit: Edit) -> NDArray[np.float64]:
    """Cosine of every pair of an edit's frames: ``(frames, frames)``."""
    rows = found.embeddings[embedder]
    return cosines(edit.join(rows[edit.outer], rows[edit.inner]))
