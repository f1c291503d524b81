"""The published self-attention of all layers of a block, written anew from its description."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.block_clock import NoClock
from benchmarks.block_embedder import published_embedder
from benchmarks.block_model import ModelSize
from benchmarks.contenders import Float64Rotation, Shape, attention, roll
from longlive_rag_ops import WindowConfig


class AsPublished:
    """The published steps in every layer, written anew from their description, with one choice a block for all layers.

    See `contenders.AsPublished`. The rings take their new frames after the last layer of a forward. Phases are slices
    of a table in complex128, as published: no list of positions travels to the device.

    Args:
        pageable: the history is pageable memory; else the published call decides, for which torch takes page-locked
            memory. On a CPU both are a copy, and bringing a frame back is none.
    """

    def __init__(self, size: ModelSize, device: str, dtype: torch.dtype, pageable: bool = False) -> None:
        self.size, self.config, self.pageable = size, WindowConfig(), pageable
        self.device = torch.device(device)
        rings = (size.layers, 2, 1, self.config.window * size.tokens, size.heads, size.head_dim)
        self.rings = torch.zeros(rings, device=device, dtype=dtype)
        self.history: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(size.layers)]
        self.embeddings: list[Tensor] = []
        self.chosen: list[int] = []
        self._leaving = 0  # frames that the forward pushes out
        self._new: list[tuple[Tensor, Tensor]] = []  # k, v of each layer, until the forward's end
        self._shape = Shape(size.grid, size.heads, size.head_dim, device, dtype)
        self._rotate = Float64Rotation(self._shape)
        self._embed = published_embedder(size, device, dtype)

    def begin(self, start: int, clock: NoClock) -> None:
        config = self.config
        self._leaving = min(max(0, start + config.frames_per_block - config.window), config.frames_per_block)
        self.chosen = self._choose()
        clock.lap("retrieval")

    def _choose(self) -> list[int]:
        """Evicted frames most similar to the newest one; of the history, so counted from the sink's end."""
        config = self.config
        eligible = len(self.history[0][0]) - config.recent_exclude
        if eligible <= 0:
            return []
        pool = functional.normalize(torch.stack(self.embeddings[config.sink : config.sink + eligible]), dim=-1)
        scores = pool @ functional.normalize(self.embeddings[-1], dim=-1)
        best = torch.topk(scores, min(config.top_k, eligible)).indices.tolist()
        return [config.sink + number for number in best]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int, clock: NoClock) -> Tensor:
        config, tokens = self.config, self.size.tokens
        first, held = self._places(start)
        sink, local = config.sink * tokens, max(config.sink, held - config.local) * tokens
        rings = [ring.clone() for ring in self.rings[layer]]
        for ring, new, history in zip(rings, (k, v), self.history[layer], strict=True):
            if self._leaving:
                evicted = ring[:, sink : sink + self._leaving * tokens]
                history.extend(self._offload(frame) for frame in evicted.split(tokens, dim=1))
            self._update(ring, new, first)
        rotated = self._rotate(rings[0][:, : held * tokens], 0, held)
        keys, values = [rotated[:, :sink]], [rings[1][:, :sink]]
        clock.lap("rotation + write")
        if self.chosen:
            fetched = [self._fetch(history) for history in self.history[layer]]
            clock.lap("fetch stall")
            keys.append(self._rotate(fetched[0], 0, len(self.chosen), still=True))
            values.append(fetched[1])
        keys.append(rotated[:, local:])
        values.append(rings[1][:, local : held * tokens])
        every, whole = torch.cat(keys, dim=1), torch.cat(values, dim=1)
        turned = self._rotate(q, first, config.frames_per_block)
        clock.lap("rotation + write")
        out = attention(turned, every, whole)
        clock.lap("attention")
        self._new.append((k, v))
        return out

    def end_forward(self, start: int, clock: NoClock) -> None:
        first, _ = self._places(start)
        for rings, new in zip(self.rings, self._new, strict=True):
            for ring, part in zip(rings, new, strict=True):
                self._update(ring, part, first)
        self._new, self._leaving = [], 0
        clock.lap("rotation + write")

    def before_clean(self, start: int, x: Tensor, embeddings: Tensor, clock: NoClock) -> None:
        self._embed(x)  # for its time alone, as ours
        clock.lap("embedding")

    def finish(self, start: int, embeddings: Tensor, clock: NoClock) -> None:
        self.embeddings.extend(embeddings[0])
        clock.lap("retrieval")

    def held(self) -> dict[str, int]:
        pages = sum(page.nbytes for layer in self.history for pages in layer for page in pages)
        return {"device": self.rings.nbytes, "host": pages}

    def close(self) -> None:
        pass

    def _places(self, start: int) -> tuple[int, int]:
        """The block's first slot in the ring, and the slots that are filled: with the published rule, positions."""
        frames, window = self.config.frames_per_block, self.config.window
        return min(start, window - frames), min(start + frames, window)

    def _update(self, ring: Tensor, new: Tensor, first: int) -> None:
        """Drops the oldest frames behind the sink, then writes the block."""
        if self._leaving:
            roll(ring, self._shape, self._leaving)
        begin = first * self.size.tokens
        ring[:, begin : begin + new.shape[1]] = new

    def _offload(self, frame: Tensor) -> Tensor:
        return frame.to("cpu", non_blocking=not self.pageable) if frame.is_cuda else frame.clone()

    def _fetch(self, history: list[Tensor]) -> Tensor:
        """The chosen frames in a row, ``(1, K*T, H, D)``, on the device."""
        frames = [history[frame - self.config.sink][0].to(self.device, non_blocking=True) for frame in self.chosen]
        return torch.stack(frames).flatten(0, 1)[None]
