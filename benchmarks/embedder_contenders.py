"""Ways to embed a block's latent frames by the encoder of the retrieval autoencoder, and what they must give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from longlive_rag_ops.embedder import AutoencoderConfig, AutoencoderEmbedder, LatentAutoencoder
from longlive_rag_ops.embedder.autoencoder_embedder import ieee_convolutions

FRAMES = 3  # of a block
Embed = Callable[[torch.Tensor], torch.Tensor]


def random_autoencoder(config: AutoencoderConfig | None = None, seed: int = 0) -> LatentAutoencoder:
    """A model of the released sizes, when not given others, without its decoder. Time does not depend on weights."""
    with torch.device("meta"):
        model = LatentAutoencoder(config)
    del model.decoder  # most of the memory
    rng = torch.Generator().manual_seed(seed)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in model.parameters():
        # As new ones, but for the last convolutions of residual blocks: their zeros would hide what is wrong in these.
        spread = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * spread)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight += 1
    return model


def as_published(model: LatentAutoencoder) -> Embed:
    """A call and a normalisation for each frame, in the model's dtype and NCHW memory."""
    dtype = model.encoder.fc.weight.dtype

    def embed(frames: torch.Tensor) -> torch.Tensor:
        return torch.cat([functional.normalize(model.encoder(frame[None].to(dtype)), dim=-1) for frame in frames])

    return embed


def contiguous(model: LatentAutoencoder) -> Embed:
    """As `AutoencoderEmbedder`, in one call and without TF32, but in NCHW memory."""
    dtype = model.encoder.fc.weight.dtype

    def embed(frames: torch.Tensor) -> torch.Tensor:
        with ieee_convolutions(frames):
            return functional.normalize(model.encoder(frames.to(dtype)).float(), dim=-1)

    return embed


def exact(model: LatentAutoencoder, frames: torch.Tensor) -> torch.Tensor:
    """Embeddings in float64."""
    return AutoencoderEmbedder(model, dtype=torch.float64)(frames)
