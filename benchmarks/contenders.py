"""Ways to do one self-attention layer's work for a block: rotation, cache, attention.

Each contender has ``run_block(start, forwards, embeddings)``, which takes the block's q, k, v for every forward, and
returns the last output. All get the same tensors; all attend to 12 frames once the window is full, by the same dense
attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional

from longlive_rag_ops import MemoryWindow, WindowConfig, dense_attention
from longlive_rag_ops.rotary import default_split, rotary_table

Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v, each (1, n * T, H, D)


class Shape:
    """Sizes of the benchmark: window, grid of tokens, heads; where its tensors are, and their dtype."""

    def __init__(
        self,
        grid: tuple[int, int] = (15, 26),
        heads: int = 12,
        head_dim: int = 128,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = WindowConfig()
        self.grid = grid
        self.tokens = grid[0] * grid[1]
        self.heads = heads
        self.head_dim = head_dim
        self.embedding = 1024
        self.device = torch.device(device)
        self.dtype = dtype

    def zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, device=self.device, dtype=self.dtype)

    def window(self, layers: int = 1, **options: Any) -> MemoryWindow:
        """A window over layers of this shape; ``options`` say where its history lies."""
        return MemoryWindow(
            self.config,
            layers=layers,
            batch=1,
            tokens_per_frame=self.tokens,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            **options,
        )

    def block(self, seed: int, forwards: int) -> tuple[list[Forward], torch.Tensor]:
        """Random q, k, v for each forward, and the block's embeddings ``(1, n, E)``."""
        rng = torch.Generator(self.device).manual_seed(seed)
        n = self.config.frames_per_block

        def normal(*size: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.randn(size, generator=rng, device=self.device, dtype=dtype)

        shape = (1, n * self.tokens, self.heads, self.head_dim)
        qkv = [(normal(*shape), normal(*shape), normal(*shape)) for _ in range(forwards)]
        return qkv, normal(1, n, self.embedding, dtype=torch.float32)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention over ``(B, S, H, D)``: the same for all contenders, the best that is installed on a GPU."""
    if q.is_cuda:
        return dense_attention.attend(q, k, v, None, False)[0]
    return functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(
        1, 2
    )


class Float64Rotation:
    """Rotation of keys and queries as the models' code does it, in float64 complex arithmetic: its table and products.

    The phases of the frames are put together for every call.
    """

    def __init__(self, shape: Shape) -> None:
        self.grid = shape.grid
        table = torch.view_as_complex(rotary_table(shape.head_dim, device=shape.device))
        self.time_phase, self.height_phase, self.width_phase = table.split(
            [channels // 2 for channels in default_split(shape.head_dim)], dim=1
        )

    def __call__(self, x: torch.Tensor, first: int, frames: int, still: bool = False) -> torch.Tensor:
        """``x (B, n * T, H, D)``, its first frame at the position ``first``; ``still``: all frames are at ``first``."""
        height, width = self.grid
        steps = self.time_phase[first : first + 1] if still else self.time_phase[first : first + frames]
        phase = torch.cat(
            [
                steps.view(-1, 1, 1, steps.shape[-1]).expand(frames, height, width, -1),
                self.height_phase[:height].view(1, height, 1, -1).expand(frames, height, width, -1),
                self.width_phase[:width].view(1, 1, width, -1).expand(frames, height, width, -1),
            ],
            dim=-1,
        ).reshape(frames * height * width, 1, -1)
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * phase).flatten(-2).type_as(x)


def roll(ring: torch.Tensor, shape: Shape, frames: int) -> None:
    """Drops a ring's ``frames`` oldest frames behind the sink; those that stay move to the front, by way of a copy."""
    config, tokens = shape.config, shape.tokens
    sink, keep = config.sink * tokens, (config.window - config.sink - frames) * tokens
    ring[:, sink : sink + keep] = ring[:, sink + frames * tokens :].clone()


class AsPublished:
    """The published steps, written anew from their description.

    The ring keeps un-rotated keys. Every forward clones it, rolls the clone when frames leave and writes the block into
    it; rotates the whole ring in float64 complex arithmetic; stacks the retrieved frames and rotates them; concatenates
    sink, retrieved and local frames, attends, and updates the ring. Evicted frames go into lists in host memory, and
    every forward brings each retrieved frame's keys and values back in a copy of its own. On a CPU the first is a copy
    and the second does not happen.

    Args:
        pageable: the history is pageable memory. Otherwise the published call, ``to("cpu", non_blocking=True)``,
            decides, for which torch takes page-locked memory.
    """

    name = "as published"

    def __init__(self, shape: Shape, pageable: bool = False) -> None:
        self.shape, config, self.pageable = shape, shape.config, pageable
        ring = (1, config.window * shape.tokens, shape.heads, shape.head_dim)
        self.ring_k, self.ring_v = shape.zeros(*ring), shape.zeros(*ring)
        self.history_k: list[torch.Tensor] = []
        self.history_v: list[torch.Tensor] = []
        self.embeddings: list[torch.Tensor] = []
        self.rotation = Float64Rotation(shape)

    def rotate(self, x: torch.Tensor, first: int, frames: int, still: bool = False) -> torch.Tensor:
        return self.rotation(x, first, frames, still)

    def choose(self) -> list[int]:
        config = self.shape.config
        eligible = len(self.history_k) - config.recent_exclude
        if eligible <= 0:
            return []
        pool = functional.normalize(torch.stack(self.embeddings[config.sink : config.sink + eligible]), dim=-1)
        query = functional.normalize(self.embeddings[-1], dim=-1)
        return torch.topk(pool @ query, min(config.top_k, eligible)).indices.tolist()

    def offload(self, frame: torch.Tensor) -> torch.Tensor:
        """An evicted frame's keys or values in host memory."""
        if not frame.is_cuda:
            return frame.clone()
        return frame.to("cpu", non_blocking=not self.pageable)

    def fetch(self, history: list[torch.Tensor], chosen: list[int]) -> torch.Tensor:
        """Retrieved frames in a row, ``(1, K * T, H, D)``, on the device."""
        frames = [history[i][0].to(self.shape.device, non_blocking=True) for i in chosen]
        return torch.stack(frames).flatten(0, 1)[None]

    def roll(self, ring: torch.Tensor, frames: int) -> None:
        roll(ring, self.shape, frames)

    def run_block(self, start: int, forwards: list[Forward], embeddings: torch.Tensor) -> torch.Tensor:
        config, tokens = self.shape.config, self.shape.tokens
        n, window = config.frames_per_block, config.window
        chosen = self.choose()
        # Positions: the ring's slots; retrieved frames all sit at 0.
        first, held = min(start, window - n), min(start + n, window)
        sink, local = config.sink * tokens, max(config.sink, held - config.local) * tokens
        block = slice(first * tokens, (first + n) * tokens)
        out = torch.empty(0)
        for number, (q, k, v) in enumerate(forwards):
            leaving = min(max(0, start + n - window), n) if number == 0 else 0
            ring_k, ring_v = self.ring_k.clone(), self.ring_v.clone()
            for ring, new, history in ((ring_k, k, self.history_k), (ring_v, v, self.history_v)):
                if leaving:
                    evicted = ring[:, sink : sink + leaving * tokens]
                    history.extend(self.offload(frame) for frame in evicted.split(tokens, dim=1))
                    self.roll(ring, leaving)
                ring[:, block] = new
            rotated = self.rotate(ring_k[:, : held * tokens], 0, held)
            keys, values = [rotated[:, :sink]], [ring_v[:, :sink]]
            if chosen:
                keys.append(self.rotate(self.fetch(self.history_k, chosen), 0, len(chosen), still=True))
                values.append(self.fetch(self.history_v, chosen))
            keys.append(rotated[:, local:])
            values.append(ring_v[:, local : held * tokens])
            out = attention(self.rotate(q, first, n), torch.cat(keys, dim=1), torch.cat(values, dim=1))
            for ring, new in ((self.ring_k, k), (self.ring_v, v)):  # the update that follows the last layer
                if leaving:
                    self.roll(ring, leaving)
                ring[:, block] = new
        self.embeddings.extend(embeddings[0])
        return out


class RollingWindow:
    """A plain sliding window of the newest 12 frames as users run it today (Self-Forcing, LongLive 1.0).

    A ring of rotated keys and one of values, in order of time. When a block begins that frames must leave for, those
    that stay are moved to the front. Every forward rotates the block's q and k in float64 complex arithmetic, at
    positions in the video, writes keys and values in place, and attends to what is held, a contiguous piece of the
    ring. LongLive 1.0 does the same on clones of the rings; Self-Forcing makes none, nor does this.
    """

    name = "native"

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        ring = (1, shape.config.window * shape.tokens, shape.heads, shape.head_dim)
        self.keys, self.values = shape.zeros(*ring), shape.zeros(*ring)
        self.rotation = Float64Rotation(shape)

    def run_block(self, start: int, forwards: list[Forward], embeddings: torch.Tensor) -> torch.Tensor:
        config, tokens = self.shape.config, self.shape.tokens
        n, window = config.frames_per_block, config.window
        leaving = min(max(0, start + n - window), n)
        first, held = min(start, window - n) * tokens, min(start + n, window) * tokens
        out = torch.empty(0)
        for number, (q, k, v) in enumerate(forwards):
            if leaving and number == 0:
                for ring in (self.keys, self.values):
                    roll(ring, self.shape, leaving)
            rotated = self.rotation(q, start, n)
            self.keys[:, first : first + n * tokens] = self.rotation(k, start, n)
            self.values[:, first : first + n * tokens] = v
            out = attention(rotated, self.keys[:, :held], self.values[:, :held])
        return out


def rotate_into(target: torch.Tensor, source: torch.Tensor, phase: torch.Tensor) -> None:
    """``source (T, H, D)`` times float32 phases; float32 results go straight to where they belong."""
    pairs = torch.view_as_complex(source.float().unflatten(-1, (-1, 2)))
    if target.dtype == torch.float32:
        torch.mul(pairs, phase, out=torch.view_as_complex(target.unflatten(-1, (-1, 2))))
    else:
        target.copy_(torch.view_as_real(pairs * phase).flatten(-2))


class SlidingWindow:
    """The same window as `RollingWindow`'s, at its best: a ring of slots.

    Only the block's keys are rotated, in float32, straight into their slots; nothing is rolled or copied.
    """

    name = "native, at its best"

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        size = (shape.config.window, shape.tokens, shape.heads, shape.head_dim)
        self.keys, self.values = shape.zeros(*size), shape.zeros(*size)
        table = torch.view_as_complex(rotary_table(shape.head_dim, dtype=torch.float32, device=shape.device))
        time, high, _ = (channels // 2 for channels in default_split(shape.head_dim))
        height, width = shape.grid
        self.time_phase = table[:, :time]
        self.space_phase = torch.cat(
            [
                table[:height, None, time : time + high].expand(-1, width, -1),
                table[None, :width, time + high :].expand(height, -1, -1),
            ],
            dim=-1,
        ).flatten(0, 1)

    def phase(self, frame: int) -> torch.Tensor:
        return torch.cat([self.time_phase[frame].expand(self.shape.tokens, -1), self.space_phase], dim=-1)[:, None]

    def run_block(self, start: int, forwards: list[Forward], embeddings: torch.Tensor) -> torch.Tensor:
        config, tokens = self.shape.config, self.shape.tokens
        out = torch.empty(0)
        for q, k, v in forwards:
            rotated = torch.empty_like(q)
            for i in range(config.frames_per_block):
                frame, part = start + i, slice(i * tokens, (i + 1) * tokens)
                slot = (
                    frame
                    if frame < config.sink
                    else config.sink + (frame - config.sink) % (config.window - config.sink)
                )
                phase = self.phase(frame)
                for source, target in ((q[0, part], rotated[0, part]), (k[0, part], self.keys[slot])):
                    rotate_into(target, source, phase)
                self.values[slot] = v[0, part]
            held = min(start + config.frames_per_block, config.window)
            out = attention(rotated, self.keys[:held].flatten(0, 1)[None], self.values[:held].flatten(0, 1)[None])
        return out


class Ours:
    """`MemoryWindow`: retrieval, placement, commit to history and the index included."""

    name = "ours"

    def __init__(self, shape: Shape, engine: str = "auto", history_slots: int = 160) -> None:
        self.shape = shape
        # A pool that need not grow while it is timed.
        self.window = shape.window(history_slots=history_slots, engine=engine)

    def run_block(self, start: int, forwards: list[Forward], embeddings: torch.Tensor) -> torch.Tensor:
        out = torch.empty(0)
        for q, k, v in forwards:
            out = self.window.attend(0, q, k, v, start, self.shape.grid)
        self.window.finish(start, embeddings)
        return out
