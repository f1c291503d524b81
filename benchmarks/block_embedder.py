"""The embedder that a memory needs, over a block's clean latents: the released encoder's sizes, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.block_model import ModelSize
from benchmarks.embedder_contenders import as_published, random_autoencoder
from longlive_rag_ops.embedder import AutoencoderConfig, AutoencoderEmbedder

Embed = Callable[[Tensor], Tensor]
"""A block's latents as the model has them, ``(1, n*T, channels)``, to embeddings ``(n, E)``."""

LEAST = 8  # tokens of a grid's side that the released sizes are for: their three stages leave 2 x 2 of its latents


def embedder_config(size: ModelSize) -> AutoencoderConfig:
    """Sizes of the encoder for a model's latents: the released ones, or smaller ones for the tiniest frames."""
    channels, height, width = size.channels // 4, 2 * size.grid[0], 2 * size.grid[1]
    if min(size.grid) >= LEAST:
        return AutoencoderConfig(channels, height, width)
    return AutoencoderConfig(channels, height, width, latent_dim=64, hidden_dims=(16, 32))


def embedder_facts(size: ModelSize) -> dict[str, Any]:
    """Of a record's shape."""
    config = embedder_config(size)
    return {"embedder_channels": list(config.hidden_dims), "embedding": config.latent_dim}


def latent_frames(x: Tensor, size: ModelSize) -> Tensor:
    """Patches of 2 x 2 back to latent frames ``(n, channels / 4, 2 h, 2 w)``.

    A pipeline has them like this at hand; what making them costs is nothing beside the encoder.
    """
    height, width = size.grid
    patches = x.view(size.frames, height, width, size.channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(size.frames, -1, 2 * height, 2 * width)


def package_embedder(size: ModelSize) -> Embed:
    """The package's: all frames in one call, in float32 whatever the latents are in."""
    embed = AutoencoderEmbedder(random_autoencoder(embedder_config(size)))
    return lambda x: embed(latent_frames(x, size))


def published_embedder(size: ModelSize, device: str, dtype: torch.dtype) -> Embed:
    """The published one: a call a frame, in the model's dtype."""
    embed = as_published(random_autoencoder(embedder_config(size)).to(device, dtype))
    return lambda x: embed(latent_frames(x, size))
