"""Native self-attention of all layers of a block: no memory, a window of the newest 12 frames, two ways to keep it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.block_clock import NoClock
from benchmarks.block_model import ModelSize
from benchmarks.contenders import Float64Rotation, Shape, SlidingWindow, attention, roll, rotate_into


class Memoryless:
    """What a contender does about a memory that has none."""

    def __init__(self) -> None:
        self.chosen: list[int] = []

    def end_forward(self, start: int, clock: NoClock) -> None:
        pass

    def before_clean(self, start: int, x: Tensor, embeddings: Tensor, clock: NoClock) -> None:
        pass

    def finish(self, start: int, embeddings: Tensor, clock: NoClock) -> None:
        pass

    def close(self) -> None:
        pass


class Native(Memoryless):
    """The window as users run it today (Self-Forcing, LongLive 1.0), see `contenders.RollingWindow`.

    Every layer moves the kept frames of its rings of rotated keys and of values to the front in the first forward of a
    block that frames leave for. Every forward rotates the block's q and k in float64 complex arithmetic.
    """

    def __init__(self, size: ModelSize, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.shape = size, Shape(size.grid, size.heads, size.head_dim, device, dtype)
        self.config = self.shape.config
        rings = (size.layers, 2, 1, self.config.window * size.tokens, size.heads, size.head_dim)
        self.rings = self.shape.zeros(*rings)
        self._rotation = Float64Rotation(self.shape)
        self._leaving = 0  # frames that the forward pushes out

    def begin(self, start: int, clock: NoClock) -> None:
        config = self.config
        self._leaving = min(max(0, start + config.frames_per_block - config.window), config.frames_per_block)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int, clock: NoClock) -> Tensor:
        keys, values = self.rings[layer]
        frames, window, tokens = self.config.frames_per_block, self.config.window, self.size.tokens
        first, held = min(start, window - frames) * tokens, min(start + frames, window) * tokens
        turned, turned_k = self._rotation(q, start, frames), self._rotation(k, start, frames)
        if self._leaving:
            for ring in (keys, values):
                roll(ring, self.shape, self._leaving)
        keys[:, first : first + k.shape[1]] = turned_k
        values[:, first : first + v.shape[1]] = v
        clock.lap("rotation + write")
        out = attention(turned, keys[:, :held], values[:, :held])
        clock.lap("attention")
        return out

    def end_forward(self, start: int, clock: NoClock) -> None:
        self._leaving = 0

    def held(self) -> dict[str, int]:
        return {"device": self.rings.nbytes, "host": 0}


class NativeAtBest(Memoryless):
    """The same window at its best, a ring of slots: see `contenders.SlidingWindow`.

    Phases are made once a block for all layers, and frames with slots side by side are turned in one product.
    """

    def __init__(self, size: ModelSize, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        shape = Shape(size.grid, size.heads, size.head_dim, device, dtype)
        self.size, self.config = size, shape.config
        self.windows = [SlidingWindow(shape) for _ in range(size.layers)]
        self._phase = torch.empty(0)
        self._runs: list[tuple[slice, slice]] = []  # tokens of the block, and the slots they go to

    def begin(self, start: int, clock: NoClock) -> None:
        config, tokens = self.config, self.size.tokens
        frames = range(start, start + config.frames_per_block)
        self._phase = torch.cat([self.windows[0].phase(frame) for frame in frames])  # (n*T, 1, D/2)
        ring = config.window - config.sink
        slots = [f if f < config.sink else config.sink + (f - config.sink) % ring for f in frames]
        breaks = [0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)]
        self._runs = [
            (slice(low * tokens, high * tokens), slice(slots[low], slots[low] + high - low))
            for low, high in itertools.pairwise(breaks)
        ]
        clock.lap("rotation + write")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int, clock: NoClock) -> Tensor:
        window = self.windows[layer]
        for part, slots in self._runs:
            rotate_into(window.keys[slots].flatten(0, 1), k[0, part], self._phase[part])
            window.values[slots].flatten(0, 1).copy_(v[0, part])
        turned = torch.empty_like(q)
        rotate_into(turned[0], q[0], self._phase)
        clock.lap("rotation + write")
        held = min(start + self.config.frames_per_block, self.config.window)
        out = attention(turned, window.keys[:held].flatten(0, 1)[None], window.values[:held].flatten(0, 1)[None])
        clock.lap("attention")
        return out

    def held(self) -> dict[str, int]:
        return {"device": sum(window.keys.nbytes + window.values.nbytes for window in self.windows), "host": 0}
