"""A `MemoryWindow` and the simulator, fed the same random blocks and compared after every forward."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from simulator import Rules, Simulator, rotate
from torch import Tensor

from longlive_rag_ops import MemoryWindow, WindowConfig

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest error of an output, as a fraction of the output's root mean square."""
MISUSE = (ValueError, TypeError, RuntimeError)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For test modules to import: with tensors this small, waking other threads takes nearly all of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the root mean square of what was expected."""
    expected = expected.double()
    return float((actual.double() - expected).abs().max() / expected.square().mean().sqrt().clamp_min(1e-30))


@contextmanager
def rejected(*named: str) -> Iterator[None]:
    """The call must raise, with each of `named` in the message as a word: the argument and what was got."""
    with pytest.raises(MISUSE) as caught:
        yield
    message = str(caught.value)
    missing = [word for word in named if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message)]
    assert not missing, f"message does not name {missing}: {caught.value}"


def palette(generator: torch.Generator, count: int, width: int, gap: float = 1e-4) -> list[Tensor]:
    """Embeddings of which no two are about equally similar to a third: which is the more similar is beyond rounding."""
    while True:
        vectors = torch.randn(count, width, generator=generator)
        unit = torch.nn.functional.normalize(torch.cat([vectors, torch.zeros(1, width)]).double(), dim=-1)
        scores = (unit @ unit.T)[:-1].sort(dim=-1).values
        if (scores.diff(dim=-1) > gap).all():
            return list(vectors)


class Pair:
    """Feeds one stream of blocks to both sides.

    `finish` and `forward` take the frames of a block from random numbers unless they are given; `forward` runs all
    layers and compares outputs, log-sum-exp, choices, the frames of the window and the pages in its slots.
    """

    def __init__(
        self,
        window: int = 12,
        sink: int = 1,
        top_k: int = 6,
        recent_exclude: int = 5,
        frames_per_block: int = 3,
        *,
        position_rule: str = "slot",
        layers: int = 1,
        batch: int = 1,
        grid: tuple[int, int] = (1, 2),
        heads: int = 1,
        kv_heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        width: int = 4,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.config = WindowConfig(window, sink, top_k, recent_exclude, frames_per_block, position_rule)
        self.rules = Rules(window, sink, top_k, recent_exclude, position_rule)
        self.layers, self.batch, self.grid, self.dtype, self.width = layers, batch, grid, dtype, width
        self.tokens = grid[0] * grid[1]
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.generator = torch.Generator().manual_seed(seed)
        self.window = MemoryWindow(
            self.config,
            layers=layers,
            batch=batch,
            tokens_per_frame=self.tokens,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device="cpu",
            **options,
        )
        self.sim = Simulator(self.rules, batch)
        self.ever_forgotten: set[int] = set()
        self.worst = 0.0

    @property
    def start(self) -> int:
        return self.sim.frames

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def qkv(self, n: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        rows = (self.config.frames_per_block if n is None else n) * self.tokens
        kv = (self.batch, rows, self.kv_heads, self.head_dim)
        return self.random(self.batch, rows, self.heads, self.head_dim), self.random(*kv), self.random(*kv)

    def embeddings(self, n: int | None = None) -> Tensor:
        n = self.config.frames_per_block if n is None else n
        return torch.randn(self.batch, n, self.width, generator=self.generator)

    def forward(self, n: int | None = None, *, check: bool = True) -> list[Tensor]:
        """One forward of all layers; returns the outputs."""
        return [self.layer(layer, *self.qkv(n), check=check) for layer in range(self.layers)]

    def layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, check: bool = True) -> Tensor:
        kept = [x.clone() for x in (q, k, v)]
        out, lse = self.window.attend(layer, q, k, v, self.start, self.grid, return_lse=True)
        expected, expected_lse = self.sim.attend(layer, q, k, v, self.grid)
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True)), "attend wrote to its inputs"
        if check:
            n = q.shape[1] // self.tokens
            self.compare_choices(n)
            assert out.shape == q.shape and out.dtype == q.dtype
            assert lse.shape == (self.batch, q.shape[2], q.shape[1])
            assert lse.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
            self.worst = max(self.worst, error_of(out, expected))
            assert error_of(out, expected) <= TOLERANCE[self.dtype]
            tolerance = TOLERANCE[self.dtype]
            assert torch.allclose(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
            self.compare_pages(layer, n)
        return out

    def compare_choices(self, n: int) -> None:
        """Choices, scores and the frames of the window while the current block is attended."""
        for sample in range(self.batch):
            choices = self.sim.choices(sample)
            assert list(self.window.selected[sample]) == [f for f, _ in choices], f"block {self.start}, sample {sample}"
            assert list(self.window.selected_scores[sample]) == pytest.approx([s for _, s in choices], abs=2e-6)
            sink, local, memory = self.sim.parts(sample, n)
            frames = list(self.window.window_frames[sample])
            a, b = len(sink), len(sink) + len(local)
            assert (sorted(frames[:a]), sorted(frames[a:b])) == (sink, local)
            assert sorted(frames[b:]) == sorted(memory)
            assert frames[b:] == self.sim.memory_slots(sample)

    def compare_pages(self, layer: int, n: int) -> None:
        """The window slots of a layer: keys rotated to where the frame sits, values as given."""
        pool = self.window.pool
        for sample in range(self.batch):
            _, _, memory = self.sim.parts(sample, n)
            for slot, frame in enumerate(self.window.window_frames[sample]):
                rules = self.rules
                at = (rules.memory_position if frame in memory else rules.position)(frame, self.start, n)
                at -= rules.moved(self.start, n)  # where the package counts from
                k, v = self.sim.pages[layer, sample, frame]
                assert error_of(pool[layer, 0, sample, slot], rotate(k, at, self.grid)) <= TOLERANCE[self.dtype]
                assert torch.equal(pool[layer, 1, sample, slot].double(), v)

    def compare_history(self) -> None:
        """Every finished frame that has a canonical page has the right one; returns nothing about the others."""
        for frame in range(self.start):
            slot = self.window.history_slot(frame)
            if slot < 0:
                continue
            assert slot >= self.config.window, "a history page lies among the window slots"
            for layer in range(self.layers):
                for sample in range(self.batch):
                    k, v = self.sim.pages[layer, sample, frame]
                    pages = self.window.pool[layer, :, sample, slot]
                    assert error_of(pages[0], rotate(k, 0, self.grid)) <= TOLERANCE[self.dtype]
                    assert torch.equal(pages[1].double(), v)

    def finish(self, embeddings: Tensor | None = None, n: int | None = None) -> None:
        """Finishes the block on both sides, with random embeddings unless they are given."""
        if embeddings is None:
            embeddings = self.embeddings(n)
        self.window.finish(self.start, embeddings)
        self.sim.finish(embeddings.shape[1], embeddings)

    def block(
        self, embeddings: Tensor | None = None, n: int | None = None, *, forwards: int = 1, check: bool = True
    ) -> list[list[Tensor]]:
        """A whole block; returns the outputs of each forward and layer."""
        n = embeddings.shape[1] if embeddings is not None else n
        outs = [self.forward(n, check=check) for _ in range(forwards)]
        self.finish(embeddings, n)
        return outs

    def run(self, embeddings: Sequence[Tensor], *, forwards: int = 1) -> list[list[list[Tensor]]]:
        """A block for each of `embeddings (batch, n, width)`."""
        return [self.block(e, forwards=forwards) for e in embeddings]
