"""A causal video transformer of Wan 2.1 1.3B's shape, with random weights; its self-attention is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from benchmarks.block_clock import NoClock
from benchmarks.figures import attention_flops

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, then q, k, v ``(1, n*T, H, D)``, normalised and not rotated; the output in their shape."""

TIME_CHANNELS = 256  # of a timestep's sinusoids
EPS = 1e-6


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the model; the defaults are Wan 2.1 1.3B's at 832x480.

    Attributes:
        grid: tokens of a latent frame.
        text: tokens of the text.
        frames: of a block, ``n``.
        channels: of a token's latents: 16 in a patch of 2 x 2.
    """

    layers: int = 30
    heads: int = 12
    head_dim: int = 128
    grid: tuple[int, int] = (30, 52)
    ffn: int = 8960
    text: int = 512
    frames: int = 3
    channels: int = 64

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        """Tokens of a block."""
        return self.frames * self.tokens

    def page_bytes(self, itemsize: int) -> int:
        """Keys and values of one frame in all layers."""
        return 2 * self.layers * self.tokens * self.width * itemsize

    def flops(self, window: int) -> int:
        """Of the matrix products of one forward that attends to ``window`` frames."""
        products = 2 * self.rows * self.width * (6 * self.width + 2 * self.ffn)
        attention = sum(
            attention_flops(self.rows, keys, self.heads, self.head_dim) for keys in (window * self.tokens, self.text)
        )
        return self.layers * (products + attention) + 4 * self.rows * self.width * self.channels


class Layer(nn.Module):
    """Self-attention, cross-attention to the text, and a feed-forward network, modulated by the timestep."""

    def __init__(self, size: ModelSize, **options: Any) -> None:
        super().__init__()
        width = size.width
        self.head_dim = size.head_dim
        self.modulation = nn.Parameter(torch.randn(6, width, **options) / width**0.5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, **options) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=EPS, **options) for _ in range(2))
        self.norm_text = nn.LayerNorm(width, eps=EPS, **options)
        self.text_q, self.text_k, self.text_v, self.text_o = (nn.Linear(width, width, **options) for _ in range(4))
        self.norm_text_q, self.norm_text_k = (nn.RMSNorm(width, eps=EPS, **options) for _ in range(2))
        self.expand, self.contract = nn.Linear(width, size.ffn, **options), nn.Linear(size.ffn, width, **options)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def text(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, ``(1, H, L, D)``; once a video."""
        keys = self.heads(self.norm_text_k(self.text_k(hidden)))
        return keys.transpose(1, 2), self.heads(self.text_v(hidden)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        clock: NoClock,
    ) -> Tensor:
        """Projections are the linear layers with the norms of q and k, and all of the cross-attention.

        Args:
            x: ``(1, n*T, width)``.
            modulation: ``(6, 1, n, 1, width)``: shift, scale and gate of the attention, then of the network.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation + self.modulation[:, None, None, None]
        y = modulated(x, shift, scale)
        clock.lap("rest")
        q, k, v = self.heads(self.norm_q(self.q(y))), self.heads(self.norm_k(self.k(y))), self.heads(self.v(y))
        clock.lap("projections")
        y = attend(q, k, v)  # has laps of its own
        y = self.o(y.flatten(2))
        clock.lap("projections")
        x = gated(x, y, gate)
        y = self.norm_text(x)
        clock.lap("rest")
        y = self.heads(self.norm_text_q(self.text_q(y))).transpose(1, 2)
        y = functional.scaled_dot_product_attention(y, *text)
        y = self.text_o(y.transpose(1, 2).flatten(2))
        clock.lap("projections")
        x = x + y
        y = modulated(x, ffn_shift, ffn_scale)
        clock.lap("rest")
        y = self.contract(functional.gelu(self.expand(y), approximate="tanh"))
        clock.lap("projections")
        x = gated(x, y, ffn_gate)
        clock.lap("rest")
        return x


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of ``(1, n*T, width)``, then a scale and a shift ``(1, n, 1, width)`` for each frame."""
    normed = functional.layer_norm(x, x.shape[-1:], eps=EPS).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, normed, 1 + scale).flatten(1, 2)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y``."""
    frames = gate.shape[1]
    return torch.addcmul(x.unflatten(1, (frames, -1)), y.unflatten(1, (frames, -1)), gate).flatten(1, 2)


class VideoTransformer(nn.Module):
    """Latents of a block to latents of a block.

    Args:
        seed: of the weights; torch's own generators are left as they were.
    """

    def __init__(self, size: ModelSize, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.size = size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        width = size.width
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
            torch.manual_seed(seed)
            self.patch = nn.Linear(size.channels, width, **options)
            self.time = nn.Sequential(
                nn.Linear(TIME_CHANNELS, width, **options), nn.SiLU(), nn.Linear(width, width, **options)
            )
            self.time_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width, **options))
            self.layers = nn.ModuleList([Layer(size, **options) for _ in range(size.layers)])
            self.head_modulation = nn.Parameter(torch.randn(2, width, **options) / width**0.5)
            self.head = nn.Linear(width, size.channels, **options)
        half = TIME_CHANNELS // 2
        self.frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
        self.requires_grad_(False)

    def text(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values of a text ``(1, L, width)``."""
        return [layer.text(hidden) for layer in self.layers]  # type: ignore[operator]

    def forward(
        self, x: Tensor, timestep: float, text: Sequence[tuple[Tensor, Tensor]], attend: Attend, clock: NoClock
    ) -> Tensor:
        """One forward of a block.

        Args:
            x: ``(1, n*T, channels)``, patches.
            timestep: 0 to 1000, of all frames.
        """
        angles = timestep * self.frequencies.expand(1, self.size.frames, -1)
        embedded = self.time(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))  # (1, n, width)
        modulation = self.time_modulation(embedded).unflatten(-1, (6, -1)).movedim(2, 0)[:, :, :, None]
        x = self.patch(x)
        for number, layer in enumerate(self.layers):
            x = layer(x, modulation, text[number], lambda q, k, v, number=number: attend(number, q, k, v), clock)
        shift, scale = self.head_modulation[:, None, None, None] + embedded[:, :, None]
        x = self.head(modulated(x, shift, scale))
        clock.lap("rest")
        return x
