"""Toy latents for `causal_video_transformer.py`: clips of painted scenes with a moving square; one scene returns.

A clip is one block of an opening scene, then scene A, then scene B, and A again once it has left the attention window.
A scene's backdrop is 4 x 4 cells of two random colours, its square has a third; the square bounces from wall to wall.
Each block carries its scene's label, a number that is dealt anew in every clip: it says *which* scene to show, never
how it looks. Only the frames can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SIDE, CHANNELS, SCENES = 8, 3, 3  # pixels of a latent frame's side, of a pixel; scenes of a clip
CELL, SQUARE = 2, 2  # pixels of a backdrop cell's side, of the square's side
BLOCK = 2  # latent frames
OPENING = 1  # blocks of the first scene
LEAST_BETWEEN = 4  # blocks of scene B: after so many, A has left a window of 8 frames


def longest_first(blocks: int, last: int) -> int:
    """Most blocks of A when its return has ``last``; never more than 4."""
    return min(4, blocks - OPENING - LEAST_BETWEEN - last)


@dataclass(frozen=True)
class Clips:
    """A batch of clips.

    Attributes:
        latents: ``(B, F, C, H, W)`` float32, about -1 to 1.
        labels: ``(B, blocks)`` int64, the number dealt to the block's scene.
        backdrop: ``(B, C, H, W)``, that of scene A, without the square.
        returns: block with which A returns.
    """

    latents: torch.Tensor
    labels: torch.Tensor
    backdrop: torch.Tensor
    returns: int


def make_clips(batch: int, blocks: int, generator: torch.Generator, first: int = 0, last: int = 0) -> Clips:
    """Draws clips, cut at the same places in all of a batch.

    Args:
        batch: clips.
        blocks: of a clip, at least 8: opening, 2 of A, 4 of B, A again.
        first, last: blocks of A and of its return; drawn from what ``blocks`` allows where 0. B takes the rest.

    Raises:
        ValueError: too few blocks.
    """
    least = OPENING + (first or 2) + LEAST_BETWEEN + (last or 1)
    if blocks < least:
        raise ValueError(f"blocks must be at least {least}, got {blocks}")

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    last = last or number(1, blocks - OPENING - LEAST_BETWEEN - (first or 2))
    first = first or number(2, longest_first(blocks, last))
    between = blocks - OPENING - first - last
    scenes = torch.tensor([0] * OPENING + [1] * first + [2] * between + [1] * last)  # of each block

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    cells = SIDE // CELL
    which = (uniform(batch, SCENES, 1, cells, cells) > 0).float()
    pair = uniform(2, batch, SCENES, CHANNELS, 1, 1)
    backdrops = torch.lerp(pair[0], pair[1], which).repeat_interleave(CELL, -1).repeat_interleave(CELL, -2)
    colours = uniform(batch, SCENES, CHANNELS)
    of_frame = scenes.repeat_interleave(BLOCK)
    frames = len(of_frame)
    latents = backdrops[:, of_frame].clone()  # (B, F, C, H, W)
    # A square's path is one straight line, folded at the walls. It goes on behind the other scene's back.
    walls = SIDE - SQUARE
    begins = torch.rand(batch, 1, 2, generator=generator) * 2 * walls
    speeds = torch.where(uniform(batch, 1, 2) > 0, 1.0, -1.0)
    along = (begins + speeds * torch.arange(frames)[None, :, None]) % (2 * walls)
    corners = torch.where(along > walls, 2 * walls - along, along).round()  # (B, F, 2)
    offsets = torch.arange(SIDE) - corners[..., None]  # (B, F, 2, SIDE)
    inside = (offsets >= 0) & (offsets < SQUARE)
    square = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :])[:, :, None]  # (B, F, 1, H, W)
    latents = torch.where(square, colours[:, of_frame][..., None, None], latents)
    dealt = torch.stack([torch.randperm(SCENES, generator=generator) for _ in range(batch)])
    return Clips(latents, dealt[:, scenes], backdrops[:, 1], blocks - last)


def embed_frames(latents: torch.Tensor) -> torch.Tensor:
    """A frame's embedding for retrieval: its mean colours in a 2 x 2 grid. ``(B, F, C, H, W) -> (B, F, 4 C)``."""
    return torch.nn.functional.adaptive_avg_pool2d(latents.flatten(0, 1), 2).flatten(1).unflatten(0, latents.shape[:2])


def backdrop_error(latents: torch.Tensor, backdrop: torch.Tensor) -> torch.Tensor:
    """Root mean square of each frame's difference from a backdrop, ``(B, F)``.

    The eighth of the pixels that differs most is left out: it has room for the square twice. Nothing is left of the
    footage then, its error is 0.
    """
    of_pixel = (latents - backdrop[:, None]).square().mean(2).flatten(2)
    return of_pixel.sort(dim=-1).values[..., : SIDE * SIDE * 7 // 8].mean(-1).sqrt()
