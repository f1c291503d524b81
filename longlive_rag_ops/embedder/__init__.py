"""Embeddings of latent frames, by which the history is searched.

An embedder is any callable ``(frames) -> embeddings``: finished latent frames ``(N, C, H, W)`` in, ``(N, E)`` floating
point out, on the same device. One with an int attribute ``key_layer`` gets that layer's un-rotated keys of the frames
instead, ``(N, tokens_per_frame, kv_heads, head_dim)``; `MeanKeys` is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from .autoencoder import LatentAutoencoder, LatentDecoder, LatentEncoder
from .autoencoder_config import AutoencoderConfig
from .autoencoder_embedder import AutoencoderEmbedder
from .checkpoint import load_autoencoder, save_autoencoder
from .losses import (
    ReconstructionLoss,
    RetrievalLoss,
    TrajectorySmoothnessLoss,
    WindowTemporalDeltaLoss,
    reconstruction_loss,
    trajectory_smoothness_loss,
    window_temporal_delta_loss,
)
from .mean_keys import MeanKeys
from .pooling import average_pool, grid_pool

Embedder = Callable[[torch.Tensor], torch.Tensor]
EMBEDDERS: dict[str, Embedder] = {"average_pool": average_pool, "grid_pool": grid_pool}
FILES = (".safetensors", ".pt", ".pth")

__all__ = [
    "EMBEDDERS",
    "AutoencoderConfig",
    "AutoencoderEmbedder",
    "Embedder",
    "LatentAutoencoder",
    "LatentDecoder",
    "LatentEncoder",
    "MeanKeys",
    "ReconstructionLoss",
    "RetrievalLoss",
    "TrajectorySmoothnessLoss",
    "WindowTemporalDeltaLoss",
    "average_pool",
    "find_embedder",
    "grid_pool",
    "load_autoencoder",
    "reconstruction_loss",
    "save_autoencoder",
    "trajectory_smoothness_loss",
    "window_temporal_delta_loss",
]


def find_embedder(embedder: str | os.PathLike[str] | Embedder) -> Embedder:
    """Returns an embedder by its name or its file, or as it is.

    Args:
        embedder: ``average_pool``, ``grid_pool``, a checkpoint of a retrieval autoencoder (``.safetensors``, ``.pt``),
            or a callable.

    Raises:
        TypeError: neither a name, a file nor callable. ValueError: no embedder of that name, or a file that is refused
            (see `load_autoencoder`).
    """
    if isinstance(embedder, (str, os.PathLike)):
        name = os.fspath(embedder)
        if name in EMBEDDERS:
            return EMBEDDERS[name]
        if Path(name).suffix in FILES:
            return AutoencoderEmbedder.load(name)
        raise ValueError(
            f"embedder must be a callable, one of {', '.join(EMBEDDERS)}, or a checkpoint that ends in "
            f"{', '.join(FILES)}; got {name!r}"
        )
    if not callable(embedder):
        raise TypeError(f"embedder must be a callable (frames) -> (frames, E) or a name, got {type(embedder).__name__}")
    return embedder
