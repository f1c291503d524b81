"""Ways to do one self-attention layer's work for a block: rotation, cache, attention.

Each contender has ``run_block(start, forwards)``, which takes the block's q, k, v for every forward, and returns the
last output. All get the same tensors; all attend to 12 frames once the window is full.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from longlive_rag_ops import MemoryWindow, WindowConfig
from longlive_rag_ops.rotary import default_split, rotary_table

Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v, each (1, n * T, H, D)


class Shape:
    """Sizes of the benchmark: window, grid of tokens, heads."""

    def __init__(self, grid: tuple[int, int] = (15, 26), heads: int = 12, head_dim: int = 128) -> None:
        self.config = WindowConfig()
        self.grid = grid
        self.tokens = grid[0] * grid[1]
        self.heads = heads
        self.head_dim = head_dim
        self.embedding = 1024

    def block(self, seed: int, forwards: int) -> tuple[list[Forward], torch.Tensor]:
        """Random q, k, v for each forward, and the block's embeddings ``(1, n, E)``."""
        rng = torch.Generator().manual_seed(seed)
        n = self.config.frames_per_block
        shape = (1, n * self.tokens, self.heads, self.head_dim)
        qkv = [
            (
                torch.randn(shape, generator=rng),
                torch.randn(shape, generator=rng),
                torch.randn(shape, generator=rng),
            )
            for _ in range(forwards)
        ]
        return qkv, torch.randn(1, n, self.embedding, generator=rng)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention over ``(B, S, H, D)``, PyTorch's best on this device."""
    return functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(
        1, 2
    )


class AsPublished:
    """The published steps, written anew from their description.

    The ring keeps un-rotated keys. Every forward clones it, rolls the clone when frames leave and writes the block into
    it; rotates the whole ring in float64 complex arithmetic; stacks the retrieved frames and rotates them; concatenates
    sink, retrieved and local frames, attends, and updates the ring. Evicted frames are copied into lists. Moving
    retrieved frames between devices, which costs the published code most, does not happen on a CPU.
    """

    name = "as published"

    def __init__(self, shape: Shape) -> None:
        self.shape, config = shape, shape.config
        ring = (1, config.window * shape.tokens, shape.heads, shape.head_dim)
        self.ring_k, self.ring_v = torch.zeros(ring), torch.zeros(ring)
        self.history_k: list[torch.Tensor] = []
        self.history_v: list[torch.Tensor] = []
        self.embeddings: list[torch.Tensor] = []
        table = torch.view_as_complex(rotary_table(shape.head_dim))
        self.time_phase, self.height_phase, self.width_phase = table.split(
            [channels // 2 for channels in default_split(shape.head_dim)], dim=1
        )

    def rotate(self, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
        height, width = self.shape.grid
        frames = len(positions)
        phase = torch.cat(
            [
                self.time_phase[positions].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                self.height_phase[:height].view(1, height, 1, -1).expand(frames, height, width, -1),
                self.width_phase[:width].view(1, 1, width, -1).expand(frames, height, width, -1),
            ],
            dim=-1,
        ).reshape(frames * height * width, 1, -1)
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * phase).flatten(-2).type_as(x)

    def choose(self) -> list[int]:
        config = self.shape.config
        eligible = len(self.history_k) - config.recent_exclude
        if eligible <= 0:
            return []
        pool = functional.normalize(torch.stack(self.embeddings[config.sink : config.sink + eligible]), dim=-1)
        query = functional.normalize(self.embeddings[-1], dim=-1)
        return torch.topk(pool @ query, min(config.top_k, eligible)).indices.tolist()

    def roll(self, ring: torch.Tensor, frames: int) -> None:
        """Drops the oldest frames behind the sink."""
        config, tokens = self.shape.config, self.shape.tokens
        sink, keep = config.sink * tokens, (config.window - config.sink - frames) * tokens
        ring[:, sink : sink + keep] = ring[:, sink + frames * tokens :].clone()

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
                    history.extend(frame.clone() for frame in evicted.split(tokens, dim=1))
                    self.roll(ring, leaving)
                ring[:, block] = new
            rotated = self.rotate(ring_k[:, : held * tokens], [*range(held)])
            keys, values = [rotated[:, :sink]], [ring_v[:, :sink]]
            if chosen:
                memory_k, memory_v = (
                    torch.stack([history[i][0] for i in chosen]).flatten(0, 1)[None]
                    for history in (self.history_k, self.history_v)
                )
                keys.append(self.rotate(memory_k, [0] * len(chosen)))
                values.append(memory_v)
            keys.append(rotated[:, local:])
            values.append(ring_v[:, local : held * tokens])
            out = attention(
                self.rotate(q, [*range(first, first + n)]), torch.cat(keys, dim=1), torch.cat(values, dim=1)
            )
            for ring, new in ((self.ring_k, k), (self.ring_v, v)):  # the update that follows the last layer
                if leaving:
                    self.roll(ring, leaving)
                ring[:, block] = new
        self.embeddings.extend(embeddings[0])
        return out


class SlidingWindow:
    """A plain sliding window of the newest 12 frames that caches rotated keys, at its best: a ring of slots.

    Only the block's keys are rotated, in float32, straight into their slots; nothing is rolled or copied.
    """

    name = "sliding window"

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        size = (shape.config.window, shape.tokens, shape.heads, shape.head_dim)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)
        table = torch.view_as_complex(rotary_table(shape.head_dim, dtype=torch.float32))
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
                    pairs = [torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (source, target)]
                    torch.mul(pairs[0], phase, out=pairs[1])
                self.values[slot] = v[0, part]
            held = min(start + config.frames_per_block, config.window)
            out = attention(rotated, self.keys[:held].flatten(0, 1)[None], self.values[:held].flatten(0, 1)[None])
        return out


class Ours:
    """`MemoryWindow`: retrieval, placement, commit to history and the index included."""

    name = "longlive_rag_ops"

    def __init__(self, shape: Shape, engine: str = "auto") -> None:
        self.shape = shape
        self.window = MemoryWindow(
            shape.config,
            layers=1,
            batch=1,
            tokens_per_frame=shape.tokens,
            kv_heads=shape.heads,
            head_dim=shape.head_dim,
            history_slots=160,  # a pool that need not grow while it is timed
            engine=engine,
        )

    def run_block(self, start: int, forwards: list[Forward], embeddings: torch.Tensor) -> torch.Tensor:
        out = torch.empty(0)
        for q, k, v in forwards:
            out = self.window.attend(0, q, k, v, start, self.shape.grid)
        self.window.finish(start, embeddings)
        return out
