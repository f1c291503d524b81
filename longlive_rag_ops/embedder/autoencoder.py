"""The retrieval autoencoder of LongLive-RAG (arXiv 2606.02553, section "latent encoder").

Names and shapes of the state dict are those of the released checkpoints, which the numbers in ``conv_stack`` and
``upsample_stack`` come from. The encoder ends in an average over the picture, so an embedding says what is in a frame
and little of where.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .autoencoder_config import AutoencoderConfig

GROUPS = (32, 16, 8, 4)  # of a group norm: the first that divides the channels, else one


def group_norm(channels: int) -> nn.GroupNorm:
    """A group norm with as many groups as the released model has at this width."""
    return nn.GroupNorm(next((groups for groups in GROUPS if channels % groups == 0), 1), channels)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3, padded by one."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input. New ones change nothing: the last convolution is zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(group_norm(channels), nn.SiLU(), convolution(channels, channels)),
            *(group_norm(channels), nn.SiLU(), convolution(channels, channels)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, C, H, W)`` to the same."""
        return x + self.block(x)


class LatentEncoder(nn.Module):
    """Latent frames to embeddings: a stage of stride 2 for each of ``hidden_dims``, spatial mean, linear."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        inputs = config.in_channels
        for outputs in config.hidden_dims:
            stages += [convolution(inputs, outputs, stride=2), group_norm(outputs), nn.SiLU(), ResidualBlock(outputs)]
            inputs = outputs
        self.conv_stack = nn.Sequential(*stages)
        self.final_norm = nn.Sequential(group_norm(inputs), nn.SiLU())
        self.fc = nn.Linear(inputs, config.latent_dim)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """``(N, C, H, W)`` to ``(N, E)``."""
        return self.fc(self.final_norm(self.conv_stack(frames)).mean((2, 3)))


class LatentDecoder(nn.Module):
    """Embeddings back to latent frames, for training alone: linear, then doubled stage by stage and cropped."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, height, width = self.feature_shape = config.feature_shape
        self.size = config.spatial_h, config.spatial_w
        self.fc = nn.Sequential(nn.Linear(config.latent_dim, channels * height * width), nn.SiLU())
        stages: list[nn.Module] = []
        inputs = channels
        for outputs in config.hidden_dims[-2::-1]:
            stages += [nn.Upsample(scale_factor=2), convolution(inputs, outputs)]
            stages += [group_norm(outputs), nn.SiLU(), ResidualBlock(outputs)]
            inputs = outputs
        self.upsample_stack = nn.Sequential(*stages)
        # Latents have no bounds: nothing follows the last convolution.
        self.final = nn.Sequential(nn.Upsample(scale_factor=2), convolution(inputs, config.in_channels))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """``(N, E)`` to ``(N, C, H, W)``."""
        features = self.fc(embeddings).unflatten(1, self.feature_shape)
        return self.final(self.upsample_stack(features))[..., : self.size[0], : self.size[1]]


class LatentAutoencoder(nn.Module):
    """Encoder and decoder.

    Args:
        config: sizes.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: AutoencoderConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = AutoencoderConfig() if config is None else config
        self.encoder = LatentEncoder(self.config)
        self.decoder = LatentDecoder(self.config)
        self.reset_parameters()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.to(**{name: value for name, value in options.items() if value is not None})

    def reset_parameters(self) -> None:
        """He's normal initialisation of convolutions, Glorot's of linear layers, zero biases, identity residuals."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                else:
                    nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                last = module.block[-1]
                nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent frames ``(N, C, H, W)`` to (reconstruction, of the same shape; embeddings ``(N, E)``)."""
        embeddings = self.encoder(frames)
        return self.decoder(embeddings), embeddings

    def encode(self, frames: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
        """Latent frames ``(N, C, H, W)`` to embeddings ``(N, E)``, of unit length unless ``normalize`` is False."""
        embeddings: torch.Tensor = self.encoder(frames)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings
