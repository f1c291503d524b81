"""A small model with the parts of a Wan descendant: what the patch looks for, and a rolling cache of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longlive_rag_ops.rotary import default_split, rotary_table

HEIGHT, WIDTH, CHANNELS = 4, 6, 4  # of a latent frame; 2 x 2 of them are a token
TOKENS = 6
STEPS = (1000.0, 500.0)


def causal_rope_apply(x: Tensor, freqs: Tensor, start: int, grid: tuple[int, int, int]) -> Tensor:
    """Turns ``(B, F*T, H, D)`` by a complex table; frame ``start`` is the first one's."""
    frames, height, width = grid
    split = [size // 2 for size in default_split(x.shape[3])]
    time, high, wide = freqs.split(split, dim=1)
    angles = torch.cat(
        [
            time[start : start + frames, None, None].expand(-1, height, width, -1),
            high[None, :height, None].expand(frames, -1, width, -1),
            wide[None, None, :width].expand(frames, height, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 2)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * angles).flatten(3).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, local: int, sink: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.local_attn_size, self.sink_size = local, sink
        self.max_attention_size = local * TOKENS
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(
        self, x: Tensor, grid: tuple[int, int, int], freqs: Tensor, kv_cache: Any = None, current_start: int = 0
    ) -> Tensor:
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = self.norm_q(self.q(x)).view(shape), self.norm_k(self.k(x)).view(shape), self.v(x).view(shape)
        start = current_start // (grid[1] * grid[2])
        q, k = (causal_rope_apply(part, freqs, start, grid) for part in (q, k))
        if kv_cache is not None:
            k, v = self._cached(kv_cache, k, v, current_start + x.shape[1], self.sink_size * grid[1] * grid[2])
            k, v = (part[:, -self.max_attention_size :] for part in (k, v))
        parts = (part.transpose(1, 2) for part in (q, k, v))
        return self.o(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    @staticmethod
    def _cached(cache: Any, k: Tensor, v: Tensor, end: int, sink: int) -> tuple[Tensor, Tensor]:
        grown = end - int(cache["global_end_index"])
        length = int(cache["local_end_index"]) + grown
        surplus = max(0, length - cache["k"].shape[1])
        for name, new in (("k", k), ("v", v)):
            buffer = cache[name]
            if surplus:
                kept = buffer[:, sink + surplus : length - grown].clone()
                buffer[:, sink : sink + kept.shape[1]] = kept
            buffer[:, length - surplus - new.shape[1] : length - surplus] = new
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(length - surplus)
        return cache["k"][:, : length - surplus], cache["v"][:, : length - surplus]


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, local: int, sink: int) -> None:
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(dim), SelfAttention(dim, heads, local, sink)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = x + self.self_attn(self.norm(x), *args)
        return x + self.mlp(x)


class ToyWan(nn.Module):
    """Latents ``(B, C, F, H, W)``, timesteps ``(B, F)`` in, latents out."""

    def __init__(self, local: int = 6, sink: int = 1, layers: int = 2, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.prompt = 0.0
        self.patch_size, self.num_frame_per_block = (1, 2, 2), 2
        self.patch_embedding = nn.Conv3d(CHANNELS, dim, self.patch_size, self.patch_size)
        self.blocks = nn.ModuleList([Block(dim, heads, local, sink) for _ in range(layers)])
        self.head = nn.ConvTranspose3d(dim, CHANNELS, self.patch_size, self.patch_size)
        self.freqs = torch.view_as_complex(rotary_table(dim // heads).contiguous())
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward_inference(*args, **kwargs)

    def _forward_inference(
        self,
        x: Any,
        t: Tensor,
        kv_cache: Any = None,
        current_start: int = 0,
        sink_recache_after_switch: bool = False,
    ) -> Tensor:
        x = self.patch_embedding(x if isinstance(x, Tensor) else torch.stack(x)) + self.prompt
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + t.repeat_interleave(grid[1] * grid[2], 1)[..., None] / 1000
        for layer, block in enumerate(self.blocks):
            x = block(x, grid, self.freqs.to(x.device), None if kv_cache is None else kv_cache[layer], current_start)
        return self.head(x.transpose(1, 2).unflatten(2, grid))


def caches(model: ToyWan, frames: int = 6, batch: int = 1) -> list[Any]:
    attention, like = model.blocks[0].self_attn, model.head.weight
    shape = (batch, frames * TOKENS, attention.num_heads, attention.head_dim)
    counters = ("global_end_index", "local_end_index")
    return [
        {name: torch.zeros(shape, dtype=like.dtype, device=like.device) for name in "kv"}
        | {name: torch.zeros(1, dtype=torch.int64, device=like.device) for name in counters}
        for _ in model.blocks
    ]


class Pipeline:
    """Generates blocks of two frames: denoising forwards, then a clean one."""

    def __init__(self, model: ToyWan, frames: int = 6, batch: int = 1, seed: int = 0) -> None:
        self.generator, self.batch, self.random = model, batch, torch.Generator().manual_seed(seed)
        self.cache = caches(model, frames, batch)
        self.blocks: list[Tensor] = []

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: float, start: int | None = None) -> Tensor:
        frames = sum(block.shape[2] for block in self.blocks) if start is None else start
        t = torch.full((x.shape[0], x.shape[2]), timestep, device=x.device)
        return self.generator(x, t, kv_cache=self.cache, current_start=frames * TOKENS)

    def block(self, frames: int = 2, steps: tuple[float, ...] = STEPS, clean: bool = True) -> Tensor:
        x = torch.randn(self.batch, CHANNELS, frames, HEIGHT, WIDTH, generator=self.random)
        x = x.to(self.cache[0]["k"])
        for step in steps:
            x = x - 0.5 * self.forward(x, step)
        if clean:
            self.forward(x, 0.0)
        self.blocks.append(x)
        return x

    @torch.no_grad()
    def switch(self, prompt: float, frames: int, renew_sink: bool = False) -> None:
        """Another prompt: the newest frames are encoded again."""
        self.generator.prompt = prompt
        video = torch.cat(self.blocks, 2)
        start = video.shape[2] - frames
        t = torch.zeros(self.batch, frames)
        self.generator(
            video[:, :, start:],
            t,
            kv_cache=self.cache,
            current_start=start * TOKENS,
            sink_recache_after_switch=renew_sink,
        )

    def run(self, blocks: int) -> Tensor:
        for _ in range(blocks):
            self.block()
        return torch.cat(self.blocks, 2)
