"""Embeddings of latent frames, by which the history is searched.

An embedder is any callable ``(frames) -> embeddings``: finished latent frames ``(N, C, H, W)`` in, ``(N, E)`` floating
point out, on the same device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .average_pool import average_pool

Embedder = Callable[[torch.Tensor], torch.Tensor]
EMBEDDERS: dict[str, Embedder] = {"average_pool": average_pool}

__all__ = ["EMBEDDERS", "Embedder", "average_pool", "find_embedder"]


def find_embedder(embedder: str | Embedder) -> Embedder:
    """Returns an embedder by its name, or as it is.

    Raises:
        TypeError: neither a name nor callable. ValueError: no embedder of that name.
    """
    if isinstance(embedder, str):
        if embedder not in EMBEDDERS:
            raise ValueError(f"embedder must be a callable or one of {', '.join(EMBEDDERS)}; got {embedder!r}")
        return EMBEDDERS[embedder]
    if not callable(embedder):
        raise TypeError(f"embedder must be a callable (frames) -> (frames, E) or a name, got {type(embedder).__name__}")
    return embedder
