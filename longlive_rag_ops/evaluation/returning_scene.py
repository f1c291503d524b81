"""A scene that returns, made of two clips: the beginning of A, then B, then the end of A.

While the second stretch of A is on, the first one should be found. The two never share a frame: a part of A between
them is left out. All cuts are between blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..config import WindowConfig
from .choice import Block, Chosen, blocks
from .clip import Clip


@dataclass(frozen=True)
class Edit:
    """Latent frames ``0 .. frames - 1``: A1, B, A2.

    Attributes:
        outer, inner: names of the clips A and B.
        first: frames of A1, which are frames ``0 .. first - 1`` of A.
        between: frames of B, its first ones.
        last: frames of A2.
        resume: the frame of A that A2 begins with.
    """

    outer: str
    inner: str
    first: int
    between: int
    last: int
    resume: int

    @property
    def name(self) -> str:
        """``A+B``."""
        return f"{self.outer}+{self.inner}"

    @property
    def frames(self) -> int:
        """Latent frames in all."""
        return self.first + self.between + self.last

    @property
    def returned(self) -> int:
        """The first frame of A2."""
        return self.first + self.between

    def join(self, outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Rows of the edit's frames, from those of the clips' frames."""
        return torch.cat([outer[: self.first], inner[: self.between], outer[self.resume : self.resume + self.last]])


def least_between(config: WindowConfig) -> int:
    """Frames of B, in whole blocks, after which all of A1 has left the window and the recency guard."""
    size = config.frames_per_block
    return -(-(config.window + config.recent_exclude) // size) * size


def least_outer(config: WindowConfig) -> int:
    """Frames of A: two stretches of at least two blocks, more than the sink, and a block between them."""
    return (2 * _least_stretch(config) + 1) * config.frames_per_block


def _least_stretch(config: WindowConfig) -> int:
    return max(2, config.sink // config.frames_per_block + 1)  # blocks


def make_edit(outer: Clip, inner: Clip, config: WindowConfig) -> Edit | str:
    """An edit of two clips, or why there is none.

    A1 and A2 are about 40 % of A each; B is cut to twice what it needs (`least_between`).
    """
    size, least = config.frames_per_block, least_between(config)
    for clip, need, part in ((outer, least_outer(config), "outer"), (inner, least, "inner")):
        if clip.frames < need:
            return f"{clip.name} has {clip.frames} latent frames, the {part} scene needs {need}"
    whole = outer.frames // size
    stretch = max(_least_stretch(config), 2 * whole // 5) * size
    between = min(inner.frames // size * size, 2 * least)
    return Edit(outer.name, inner.name, stretch, between, stretch, whole * size - stretch)


def searching_blocks(edit: Edit, config: WindowConfig) -> list[Block]:
    """Blocks of A2 that search with a frame of A2 while none of A2 can be found: all but the first, a few.

    The first one's query is the last frame of B.
    """
    return [
        block
        for block in blocks(edit.frames, config)
        if block.start > edit.returned and block.eligible.stop <= edit.returned
    ]


def recall(edit: Edit, found: Sequence[tuple[Block, Chosen]], count: int) -> float | None:
    """Recall of A1 at ``count``: the share of as many frames, or of all of A1 that is eligible, that were found.

    Args:
        edit: the scenes.
        found: blocks and what they chose, most wanted first, at least ``count`` frames or all there are.
        count: of the chosen frames that are looked at.

    Returns:
        The mean over blocks, None without any.
    """
    shares = [
        sum(frame < edit.first for frame in chosen[:count]) / most
        for (_, chosen), most in zip(found, _findable(edit, [block for block, _ in found], count), strict=True)
    ]
    return sum(shares) / len(shares) if shares else None


def random_recall(edit: Edit, searching: Sequence[Block], count: int) -> float | None:
    """The expectation of `recall` when frames are drawn from those eligible without replacement."""
    shares = []
    for block, most in zip(searching, _findable(edit, searching, count), strict=True):
        drawn = min(count, len(block.eligible))
        wanted = sum(frame < edit.first for frame in block.eligible)
        shares.append(drawn * wanted / len(block.eligible) / most)
    return sum(shares) / len(shares) if shares else None


def _findable(edit: Edit, searching: Sequence[Block], count: int) -> Iterator[int]:
    """The most frames of A1 that a block can find among ``count``, at least 1: A1 is longer than the sink."""
    for block in searching:
        yield min(count, sum(frame < edit.first for frame in block.eligible))
