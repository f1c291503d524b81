"""The rules of the attention window, followed literally: an independent second opinion for the tests.

Nothing here uses `longlive_rag_ops`, and nothing is clever. Every frame's keys and values are kept for ever, without
any rotation, in float64; the window of a block is worked out afresh as plain lists of frame numbers; keys are rotated
when they are attended; attention is a plain softmax over their concatenation. Read it as documentation of what the
package must compute.

A block of `n` latent frames starts at frame `t`. Window `W`, sink `S`, top-k `K` and recency guard `R` count frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True)
class Rules:
    """`W`, `S`, `K` and `R`, all in latent frames, and the rule of temporal positions."""

    window: int
    sink: int
    top_k: int
    recent_exclude: int
    position_rule: str = "slot"

    @property
    def local(self) -> int:
        """Length of the local part, the block being generated included. It must hold a whole block."""
        return self.window - self.sink - self.top_k

    def evicted(self, start: int) -> int:
        """How many frames have left the window before the block that starts at `start`."""
        return max(0, start - self.window)

    def candidates(self, start: int) -> list[int]:
        """Frames that may be retrieved: evicted ones, oldest first, without the newest `R` of them."""
        return [self.sink + i for i in range(max(0, self.evicted(start) - self.recent_exclude))]

    def sink_frames(self, start: int, n: int) -> list[int]:
        """The first `S` frames, as far as they exist (the block's own included)."""
        return list(range(min(self.sink, start + n)))

    def local_frames(self, start: int, n: int) -> list[int]:
        """The newest `W - S - K` frames that are not sink, in order, the block's own included."""
        frames = list(range(self.sink, start + n))
        return frames[max(0, len(frames) - self.local) :]

    def position(self, frame: int, start: int, n: int) -> int:
        """Temporal position of a sink, local or own frame."""
        if self.position_rule == "absolute":
            return frame
        if self.position_rule == "before_window":
            return frame + self.moved(start, n) if frame < self.sink else frame
        if start + n <= self.window:
            return frame
        if frame < self.sink:
            return frame
        newest = start + n - 1
        return self.window - 1 - (newest - frame)

    def memory_position(self, frame: int, start: int, n: int) -> int:
        """Temporal position of a retrieved frame."""
        if self.position_rule == "absolute":
            return frame
        return self.moved(start, n)

    def moved(self, start: int, n: int) -> int:
        """Rule `before_window`: how far sink and memory are moved to end right before the local part; 0 in others.

        The local part keeps its global numbers, as in the backbones that have this rule. Memory sits where the first
        sink frame does, or just before the local part when there is no sink, which may be at -1. The package counts
        from there instead, so that its positions are smaller by this number; attention cannot tell.
        """
        local = self.local_frames(start, n)
        if self.position_rule != "before_window" or not local:
            return 0
        before = self.sink if self.sink or not self.top_k else 1
        return local[0] - before


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors, accumulated in float32; 0 where one of them is zero.

    Both are first scaled by a power of two, which changes neither the cosine nor any bit of the mantissas, so that no
    square overflows or vanishes.
    """

    def scaled(x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        _, exponent = torch.frexp(wide.abs().max())
        return torch.ldexp(wide, -exponent).to(torch.float32)

    if not a.any() or not b.any():
        return 0.0
    a, b = scaled(a), scaled(b)
    return float((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()))


def choose(query: Tensor, candidates: dict[int, Tensor], k: int) -> list[tuple[int, float]]:
    """(frame, score) of the `k` most similar candidates, most similar first; of equal scores the older frame first.

    A candidate with NaN or infinity in its embedding is never chosen; such a query chooses nothing.
    """
    if not torch.isfinite(query).all():
        return []
    scores = [(f, cosine(query, e)) for f, e in candidates.items() if torch.isfinite(e).all()]
    return sorted(scores, key=lambda pair: (-pair[1], pair[0]))[:k]


def rotary_split(head_dim: int) -> tuple[int, int, int]:
    """Real channels that rotate with time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@cache
def turns(head_dim: int, time: int, grid: tuple[int, int]) -> Tensor:
    """By what each channel pair of each token of a frame turns: `(h * w, 1, head_dim / 2)`, complex numbers of size 1.

    A part of `c` channels turns its pair `i` by the angle `position * THETA ** (-2i / c)`.
    """
    h, w = grid
    token = torch.arange(h * w)
    positions = (torch.full_like(token, time), token // w, token % w)
    angles = []
    for position, channels in zip(positions, rotary_split(head_dim), strict=True):
        frequency = THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(position[:, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle)[:, None, :]


def rotate(page: Tensor, time: int, grid: tuple[int, int]) -> Tensor:
    """3-D rotary embedding of one frame's tokens `(h * w, heads, head_dim)` at temporal position `time`.

    Channels `2i` and `2i + 1` are the real and the imaginary part of the complex number that turns.
    """
    pairs = torch.view_as_complex(page.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns(page.shape[-1], time, grid)).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of `q (s, heads, d)` over `k, v (l, kv_heads, d)`: output `(s, heads, d)`, log-sum-exp `(heads, s)`.

    Query head `i` reads key-value head `i // (heads / kv_heads)`.
    """
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        logits = q[:, head] @ k[:, head // group].T / math.sqrt(q.shape[-1])
        outs.append(logits.softmax(dim=-1) @ v[:, head // group])
        lses.append(logits.logsumexp(dim=-1))
    return torch.stack(outs, dim=1), torch.stack(lses, dim=0)


def place_memory(before: list[int], chosen: list[int]) -> list[int]:
    """Order of the memory part: who stays keeps its slot, newcomers by rank take the free slots in ascending order.

    When fewer are chosen than before, the last pages move into the holes.
    """
    slots: list[int | None] = [f if f in chosen else None for f in before]
    for frame in chosen:
        if frame not in slots:
            if None in slots:
                slots[slots.index(None)] = frame
            else:
                slots.append(frame)
    while None in slots:
        last = slots.pop()
        if last is not None:
            slots[slots.index(None)] = last
    return [f for f in slots if f is not None]


@dataclass
class Simulator:
    """Remembers everything; `attend` and `finish` take what the window of the package takes."""

    rules: Rules
    samples: int
    pages: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # (layer, sample, frame)
    embeddings: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (sample, frame)
    forgotten: set[int] = field(default_factory=set)  # frames that a bounded history has dropped: no candidates
    frames: int = 0  # finished frames: the start of the current block
    memory: list[list[int]] = field(default_factory=list)  # memory part of the last attended block, in slot order
    memory_start: int = -1
    decided: dict[tuple[int, int, int], list[tuple[int, float]]] = field(default_factory=dict)  # only to save time

    def choices(self, sample: int) -> list[tuple[int, float]]:
        """(frame, score) retrieved for the current block, most similar first; the query is the last finished frame."""
        if self.rules.top_k == 0 or self.frames == 0:
            return []
        key = sample, self.frames, len(self.forgotten)
        if key not in self.decided:
            allowed = [f for f in self.rules.candidates(self.frames) if f not in self.forgotten]
            query = self.embeddings[sample, self.frames - 1]
            self.decided[key] = choose(query, {f: self.embeddings[sample, f] for f in allowed}, self.rules.top_k)
        return self.decided[key]

    def selected(self, sample: int) -> list[int]:
        return [frame for frame, _ in self.choices(sample)]

    def parts(self, sample: int, n: int) -> tuple[list[int], list[int], list[int]]:
        """Frames of the sink, the local and the memory part for the current block of `n` frames."""
        t = self.frames
        return self.rules.sink_frames(t, n), self.rules.local_frames(t, n), self.selected(sample)

    def memory_slots(self, sample: int) -> list[int]:
        """The memory part in the order of its slots, which depends on the part of the block before."""
        if self.memory_start != self.frames:
            before = self.memory or [[] for _ in range(self.samples)]
            self.memory = [place_memory(before[s], self.selected(s)) for s in range(self.samples)]
            self.memory_start = self.frames
        return self.memory[sample]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One forward of one layer of the current block.

        q `(samples, n * h * w, heads, d)`, k and v `(samples, n * h * w, kv_heads, d)`, before any rotation. The
        block's pages are overwritten first. Returns the output, shaped as q, and the log-sum-exp
        `(samples, heads, n * h * w)`, both float64.
        """
        t, tokens = self.frames, grid[0] * grid[1]
        n = q.shape[1] // tokens
        outs, lses = [], []
        for sample in range(self.samples):
            self.memory_slots(sample)
            for i in range(n):
                rows = slice(i * tokens, (i + 1) * tokens)
                self.pages[layer, sample, t + i] = (k[sample, rows].double(), v[sample, rows].double())
            sink, local, memory = self.parts(sample, n)
            where = [(f, self.rules.position(f, t, n)) for f in sink + local]
            where += [(f, self.rules.memory_position(f, t, n)) for f in memory]
            keys = torch.cat([rotate(self.pages[layer, sample, f][0], position, grid) for f, position in where])
            values = torch.cat([self.pages[layer, sample, f][1] for f, _ in where])
            own = q[sample].double().split(tokens)
            queries = torch.cat([rotate(own[i], self.rules.position(t + i, t, n), grid) for i in range(n)])
            out, lse = softmax_attention(queries, keys, values)
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)

    def finish(self, n: int, embeddings: Tensor | None) -> None:
        """The current block of `n` frames is final; embeddings `(samples, n, e)`, None only without memory."""
        for sample in range(self.samples if embeddings is not None else 0):
            for i in range(n):
                self.embeddings[sample, self.frames + i] = embeddings[sample, i].clone()  # type: ignore[index]
        self.frames += n
