"""Latent frames to measure on: the demo's sample clips through the demo's codec, or synthetic scenes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longlive_rag_ops.config import WindowConfig
from longlive_rag_ops.evaluation.clip import Clip, find_clip
from longlive_rag_ops.evaluation.returning_scene import Edit, make_edit

SIZE = (320, 176)  # pixels that clips are scaled to: what the shipped embedder was trained for
FRAME = (16, 22, 40)  # their latent frames
NOISE, DRIFT = 0.3, 0.02  # of synthetic scenes, whose latents have about unit variance


@functools.cache
def sample_clip(name: str) -> Clip:
    """A sample clip of the demo.

    Raises:
        RuntimeError: PyAV is missing, or the clip cannot be fetched.
    """
    return find_clip(f"sample:{name}").read(SIZE)


def synthetic_clip(name: str, frames: int, seed: int) -> Clip:
    """One scene of smooth patterns that drift, with noise; no video."""
    rng = torch.Generator().manual_seed(seed)
    channels, height, width = FRAME
    coarse = torch.randn(2, channels, height // 4, width // 4, generator=rng)
    scene, change = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    time = torch.arange(frames)[:, None, None, None]
    return Clip(
        name, scene + DRIFT * time * change + NOISE * torch.randn(frames, *FRAME, generator=rng), "synthetic scenes"
    )


@dataclass(frozen=True)
class Sample:
    """A clip, and what is known of it.

    Attributes:
        edit: of which it was made, where a scene returns.
    """

    clip: Clip
    edit: Edit | None = None


def returning(outer: Clip, inner: Clip, config: WindowConfig) -> Sample:
    """A scene that returns: the beginning of one clip, another, the end of the first.

    Raises:
        ValueError: a clip is too short.
    """
    edit = make_edit(outer, inner, config)
    if not isinstance(edit, Edit):
        raise ValueError(edit)
    return Sample(Clip(edit.name, edit.join(outer.latents, inner.latents), outer.source), edit)


def samples(names: Sequence[str], config: WindowConfig, synthetic: Sequence[int] | None = None) -> list[Sample]:
    """Clips by name; ``A+B`` is `returning` of two.

    Args:
        synthetic: frames of an outer and of an inner synthetic scene, which the names then stand for.

    Raises:
        RuntimeError, ValueError: see `sample_clip`, `returning`.
    """

    def clip(name: str, inner: bool = False) -> Clip:
        if synthetic is None:
            return sample_clip(name)
        return synthetic_clip(name, synthetic[inner], seed=len(name))

    found = []
    for name in names:
        outer, _, inner = name.partition("+")
        found.append(returning(clip(outer), clip(inner, True), config) if inner else Sample(clip(outer)))
    return found
