"""How much attention each old frame would get if a block could attend to its whole history.

It is the attention of a toy: the first layer of the demo's transformer with ``content`` weights, which nobody trained
and in which tokens attend to tokens like them. Its queries and keys depend on the clean latents alone, so the measure
knows nothing of any embedder. What a trained generator attends to is another question.

Positions are the demo's (`demo.probe`): the block, local and sink frames where the window has them, every other frame
at temporal position 0, where a retrieved frame sits.

Time grows with the square of a clip's frames and of the tokens of each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .. import reference
from ..config import WindowConfig, local_frames, temporal_position
from ..demo.model import ToyTransformer
from ..demo.settings import FRAMES_PER_BLOCK
from ..rotary import default_split, rotary_table

SCORES = 2**22  # scores held at a time; each is 4 bytes


class Projected(NamedTuple):
    """Frames as the layer sees them, each ``(frames, tokens, heads, head_dim)`` float32.

    Attributes:
        queries, keys: before rotation.
        placed: keys at temporal position 0.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    placed: torch.Tensor


class FullAttention:
    """Measures clips of one frame shape.

    Args:
        frame_shape: ``(C, h, w)`` of a latent frame.
        config: sizes of the window.
        seed: of the toy's weights.

    Raises:
        ValueError: the toy takes no such frames: an odd height or width, or more than 64 channels.
    """

    def __init__(self, frame_shape: tuple[int, int, int], config: WindowConfig, seed: int = 0) -> None:
        channels, height, width = frame_shape
        # The weights of the first layer are drawn before those of others: one layer is enough.
        self.model = ToyTransformer("content", (height, width), seed=seed, layers=1, channels=channels)
        self.config = config
        self._split = default_split(self.model.head_dim)
        self._rope = rotary_table(self.model.head_dim, max(config.window, *self.model.grid))

    @torch.no_grad()
    def project(self, latents: torch.Tensor) -> Projected:
        """Queries and keys of clean latents ``(frames, C, h, w)`` float32. A frame's do not depend on other frames."""
        queries, keys = [], []

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            queries.append(q[0])
            keys.append(k[0])
            return torch.zeros_like(v)  # what follows the queries and keys is of no interest

        for block in latents.split(FRAMES_PER_BLOCK):
            self.model.forward(block, 0.0, attend)
        tokens = self.model.tokens_per_frame
        q, k = (torch.cat(parts).unflatten(0, (-1, tokens)) for parts in (queries, keys))
        return Projected(q, k, self._rotated(k, [0] * len(k)))

    @torch.no_grad()
    def masses(self, frames: Projected, start: int) -> NDArray[np.float64]:
        """Share of the attention of the block at ``start`` that each frame so far gets, its own included.

        The share of a query is a softmax over the tokens of all frames, summed over those of each; queries and heads
        count alike.

        Returns:
            ``(start + 3,)``, sum 1.
        """
        sink, stop = self.config.sink, start + FRAMES_PER_BLOCK
        block, count = range(start, stop), start + FRAMES_PER_BLOCK
        keys = frames.placed[:stop].clone()
        for part in (range(min(sink, stop)), local_frames(start, FRAMES_PER_BLOCK, sink, self.config.local)):
            here = slice(part.start, part.stop)
            keys[here] = self._rotated(frames.keys[here], [self._position(frame, start) for frame in part])
        queries = self._rotated(frames.queries[start:stop], [self._position(frame, start) for frame in block])
        queries = queries.flatten(0, 1).mul_(self.model.head_dim**-0.5)
        total = torch.zeros(count, dtype=torch.float64)
        for q, k in zip(queries.unbind(1), keys.flatten(0, 1).unbind(1), strict=True):
            for rows in q.split(max(1, SCORES // len(k))):
                shares = (rows @ k.T).softmax(-1).unflatten(-1, (count, -1)).sum(-1)
                total += shares.sum(0, dtype=torch.float64)
        return (total / (queries.shape[0] * queries.shape[1])).numpy()

    def _position(self, frame: int, start: int) -> int:
        c = self.config
        return temporal_position(frame, start, FRAMES_PER_BLOCK, c.window, c.sink, c.top_k, c.position_rule)

    def _rotated(self, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """``(n, tokens, heads, head_dim)`` to the same, frame ``i`` at temporal position ``positions[i]``."""
        turned = reference.rotate(
            x.flatten(0, 1)[None], self._rope, self._split, self.model.grid, torch.tensor(positions)
        )
        return turned[0].view_as(x)
