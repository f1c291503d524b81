"""A small frozen causal transformer with the outline of the published backbones, and two kinds of weights.

2 x 2 latents make a token (64 numbers), tokens are embedded in 256 channels; each of 4 layers is timestep-modulated
self-attention (4 heads of 64) and a modulated MLP. Keys and values of earlier frames live in the memory window, which
the caller passes in as ``attend``: the model itself keeps no state. Nothing is trained, and nothing it predicts is
used: its input is the true latents mixed with noise ("teacher forcing"), because a toy cannot generate video. What
it shows is memory at work, not pictures.

Weights:

``content``
    The token embedding E (256 x 64) has orthonormal columns, and in every layer queries and keys are the *same*
    random rotation P of the normalised residual stream, ``q = k = P rms_norm(x)``, cut into heads of 64. A head
    therefore scores a pair of tokens by how alike they are: before the rotary embedding, a token scores about
    ``64 / sqrt(64) = 8`` with its own copy and about 0 with an unrelated one. The factor is the one that unit-variance
    queries and keys always have; it was not tuned. The other matrices are Gaussian, and those that write to the
    residual stream are scaled down by 10, so that the stream stays readable as content in every layer.
``random``
    All matrices are Gaussian with variance 1 / inputs, queries and keys drawn apart: attention knows nothing of
    content, and its mass is what position and chance make it.

Both are drawn from one seed and are the same on every machine that draws the same normal numbers.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

from .codec import CHANNELS

__all__ = ["TIMESTEPS", "Attend", "ToyTransformer", "WeightKind", "mix_noise"]

WeightKind = Literal["content", "random"]
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``attend(layer, q, k, v) -> out``: all (1, tokens, heads, head_dim) float32, before rotation."""

SHIFT = 5.0


def warp(timestep: float, shift: float = SHIFT) -> float:
    """The published schedule's warp: share of noise ``s t / (1 + (s - 1) t)`` for t = timestep / 1000, in 0..1."""
    t = timestep / 1000
    return shift * t / (1 + (shift - 1) * t)


TIMESTEPS = tuple(1000 * warp(t) for t in (1000.0, 750.0, 500.0, 250.0))
"""Four denoising timesteps, warped with shift 5: 1000, 937.5, 833.3, 625."""


def mix_noise(latents: torch.Tensor, timestep: float, generator: torch.Generator) -> torch.Tensor:
    """Flow-matching noise: ``(1 - s) x + s e`` with ``s = timestep / 1000`` and e standard normal; same shape."""
    share = timestep / 1000
    noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
    return (1 - share) * latents + share * noise


def _normed(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:])


class ToyTransformer:
    """Frozen weights and one forward pass; see the module's text for what they are.

    Args:
        kind: ``"content"`` or ``"random"``.
        latent_size: (height, width) of a latent frame, both even.
        seed: of all weights.
    """

    patch = 2

    def __init__(
        self,
        kind: WeightKind,
        latent_size: tuple[int, int],
        *,
        seed: int = 0,
        layers: int = 4,
        heads: int = 4,
        head_dim: int = 64,
        channels: int = CHANNELS,
    ) -> None:
        if kind not in WEIGHT_KINDS:
            raise ValueError(f"kind: got {kind!r}; must be one of {', '.join(WEIGHT_KINDS)}")
        if any(side <= 0 or side % self.patch for side in latent_size):
            raise ValueError(f"latent_size: got {latent_size}; height and width must be positive and even")
        self.kind, self.layers, self.heads, self.head_dim, self.channels = kind, layers, heads, head_dim, channels
        self.grid = (latent_size[0] // self.patch, latent_size[1] // self.patch)
        self.width = heads * head_dim
        inputs = channels * self.patch**2
        if inputs > self.width:
            raise ValueError(f"channels: got {channels}; {inputs} numbers a token do not fit in {self.width} channels")
        generator = torch.Generator().manual_seed(seed)

        def gaussian(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

        def orthogonal(rows: int, columns: int) -> torch.Tensor:
            return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]

        content = kind == "content"
        written = 0.1 if content else 1.0
        width = self.width
        self.embedding = orthogonal(width, inputs) if content else gaussian(width, inputs)
        self.time_in, self.time_out = gaussian(width, width), gaussian(6 * width, width, 0.1)
        self.head = gaussian(inputs, width)
        self.blocks: list[dict[str, torch.Tensor]] = []
        for _ in range(layers):
            query = orthogonal(width, width) if content else gaussian(width, width)
            self.blocks.append(
                {
                    "q": query,
                    "k": query if content else gaussian(width, width),
                    "v": gaussian(width, width),
                    "out": gaussian(width, width, written),
                    "up": gaussian(2 * width, width),
                    "down": gaussian(width, 2 * width, written),
                }
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def _modulation(self, timestep: float) -> torch.Tensor:
        """Six vectors (6, width) from the timestep: scale, shift and gate of attention, then of the MLP."""
        half = self.width // 2
        angles = timestep * torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
        features = torch.cat([angles.cos(), angles.sin()])
        return (self.time_out @ nn.functional.silu(self.time_in @ features)).view(6, self.width)

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, C, h, w) -> (1, n * tokens, 4 C), frame-major, then row-major over the grid."""
        n, c, p = latents.shape[0], self.channels, self.patch
        rows, columns = self.grid
        cut = latents.view(n, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(1, n * rows * columns, c * p * p)

    @torch.no_grad()
    def forward(self, latents: torch.Tensor, timestep: float, attend: Attend) -> torch.Tensor:
        """One pass over a block.

        Args:
            latents: (n, C, h, w) float32.
            timestep: 0 (clean) to 1000 (noise only).
            attend: called once per layer, in order.

        Returns:
            The prediction, (n, C, h, w).
        """
        n, p = latents.shape[0], self.patch
        x = _normed(self.tokens(latents)) @ self.embedding.T
        # The embedding spreads 64 numbers over 256 channels; this makes the stream's own scale 1 again.
        x = _normed(x)
        scale1, shift1, gate1, scale2, shift2, gate2 = self._modulation(timestep)
        for layer, weights in enumerate(self.blocks):
            h = _normed(x) * (1 + scale1) + shift1
            q, k, v = ((h @ weights[name].T).unflatten(-1, (self.heads, self.head_dim)) for name in "qkv")
            x = x + (1 + gate1) * (attend(layer, q, k, v).flatten(-2) @ weights["out"].T)
            h = _normed(x) * (1 + scale2) + shift2
            x = x + (1 + gate2) * (nn.functional.gelu(h @ weights["up"].T) @ weights["down"].T)
        out = (_normed(x) @ self.head.T).view(n, *self.grid, self.channels, p, p)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)
