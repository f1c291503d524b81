"""The attention window gives the same numbers whatever PyTorch is set to, and through each of its entrances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from window_pair import Pair, error_of, one_thread, rejected  # noqa: F401 (a fixture)

from longlive_rag_ops import MemoryWindow, WindowConfig, dense
from longlive_rag_ops.rotary import rotary_table

SMALL: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 0, "frames_per_block": 2}
TENSORS: dict[str, Any] = {"layers": 2, "batch": 2, "grid": (2, 3), "heads": 4, "kv_heads": 2, "head_dim": 32}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Recorded:
    """Inputs of a video, and what the simulator says to them, made under the usual settings."""

    def __init__(self, blocks: int = 8, width: int = 16, **options: Any) -> None:
        self.pair = Pair(**SMALL, **TENSORS, width=width, **options)
        self.steps = []
        for _ in range(blocks):
            inputs = [self.pair.qkv() for _ in range(self.pair.layers)]
            outs = [self.pair.sim.attend(i, *qkv, self.pair.grid) for i, qkv in enumerate(inputs)]
            chosen = [self.pair.sim.selected(s) for s in range(self.pair.batch)]
            embeddings = self.pair.embeddings()
            self.steps.append((self.pair.start, inputs, outs, chosen, embeddings))
            self.pair.sim.finish(embeddings.shape[1], embeddings)

    def replay(self) -> None:
        window = self.pair.window
        for start, inputs, outs, chosen, embeddings in self.steps:
            for layer, (qkv, (expected, expected_lse)) in enumerate(zip(inputs, outs, strict=True)):
                for with_lse in (True, False):
                    out = window.attend(layer, *qkv, start, self.pair.grid, return_lse=with_lse)
                    if with_lse:
                        out, lse = out
                        assert lse.dtype == torch.float32 and torch.allclose(lse.double(), expected_lse, 2e-5, 2e-5)
                    assert out.dtype == torch.float32
                    assert error_of(out, expected) < 2e-5
                assert [list(s) for s in window.selected] == chosen
            window.finish(start, embeddings)


def test_with_and_without_log_sum_exp() -> None:
    Recorded().replay()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Under autocast PyTorch's own attention and matrix products round to a half type."""
    recorded = Recorded()
    with torch.autocast("cpu", dtype=dtype):
        recorded.replay()


def test_autocast_leaves_half_types_alone() -> None:
    pair = Pair(**SMALL, **TENSORS, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.float16):
        out = pair.window.attend(0, *pair.qkv(), 0, pair.grid)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_is_float32(precision: str) -> None:
    recorded = Recorded(width=256)
    with matmul_precision(precision):
        recorded.replay()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    with default_dtype(torch.float32):
        recorded = Recorded()
    with default_dtype(dtype):
        recorded.pair.window.reset()
        recorded.replay()
        again = Pair(**SMALL, **TENSORS)
        recorded.pair.window = again.window
        recorded.replay()


def test_the_default_device_does_not_matter() -> None:
    recorded = Recorded()
    with torch.device("meta"):
        recorded.replay()


@pytest.mark.parametrize("engine", ["auto", "dense", "reference"])
def test_engines(engine: str) -> None:
    Recorded(engine=engine).replay()


def test_calling_the_op_directly() -> None:
    recorded = Recorded()
    window = recorded.pair.window
    for start, inputs, outs, chosen, embeddings in recorded.steps:
        for layer, (qkv, (expected, expected_lse)) in enumerate(zip(inputs, outs, strict=True)):
            arguments = window.arguments(layer, start, recorded.pair.grid)
            out, lse = torch.ops.longlive.retrieve_attend(*qkv, **arguments, return_lse=True)
            assert error_of(out, expected) < 2e-5 and torch.allclose(lse.double(), expected_lse, 2e-5, 2e-5)
        assert [list(s) for s in window.selected] == chosen
        window.finish(start, embeddings)


def test_absolute_positions_beyond_the_first_table() -> None:
    pair = Pair(10, 0, 2, 1040, 8, position_rule="absolute", grid=(1, 1))
    for block in range(140):
        pair.block(check=block > 125)
    assert pair.start > 1100


def test_a_wide_grid_beyond_the_first_table() -> None:
    pair = Pair(3, 0, 1, 0, 1, grid=(1, 1300))
    for _ in range(4):
        pair.block()


def test_a_given_table() -> None:
    pair = Pair(**SMALL, rope=rotary_table(16, 6), dtype=torch.float64)
    for _ in range(8):
        pair.block()


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_given_table_that_is_too_short(blocks: int) -> None:
    # Positions 0 .. 5 are needed once the window is full; four rows serve two blocks.
    pair = Pair(**SMALL, rope=rotary_table(16, 2 * max(1, blocks)), grid=(1, 1))
    with rejected("rope", str(2 * max(1, blocks))):
        for _ in range(blocks + 2):
            pair.block()
    assert pair.start <= 2 * max(1, blocks)


def test_arguments_place_until_a_call_went_through() -> None:
    """A call of the op that fails after `arguments` must not leave the retrieved pages behind."""
    outs = []
    for fail in (False, True):
        window = MemoryWindow(
            WindowConfig(4, 1, 1, 0, 1), layers=1, batch=1, tokens_per_frame=2, kv_heads=1, head_dim=16
        )
        generator = torch.Generator().manual_seed(1)
        for start in range(8):
            q, k, v = (torch.randn(1, 2, 1, 16, generator=generator) for _ in range(3))
            if fail:
                with pytest.raises(TypeError):
                    torch.ops.longlive.retrieve_attend(q.double(), k, v, **window.arguments(0, start, (1, 2), 1))
            out, _ = torch.ops.longlive.retrieve_attend(q, k, v, **window.arguments(0, start, (1, 2), 1))
            window.finish(start, torch.randn(1, 1, 4, generator=generator))
        outs.append(out)
    assert torch.equal(*outs)


def test_a_search_that_fails_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`finish` goes on where it stopped: nothing is stored twice, and no block attends to an old choice."""
    results = []
    for fail in (False, True):
        window = MemoryWindow(
            WindowConfig(4, 1, 1, 0, 1), layers=1, batch=1, tokens_per_frame=2, kv_heads=1, head_dim=16
        )
        generator = torch.Generator().manual_seed(1)
        for start in range(8):
            q, k, v = (torch.randn(1, 2, 1, 16, generator=generator) for _ in range(3))
            out = window.attend(0, q, k, v, start, (1, 2))
            embedding = torch.randn(1, 1, 4, generator=generator)
            if fail:
                with monkeypatch.context() as patched:

                    def broken(*args: Any) -> None:
                        raise RuntimeError("out of memory")

                    patched.setattr(dense, "topk_retrieve", broken)
                    with pytest.raises(RuntimeError, match="out of memory"):
                        window.finish(start, embedding)
                with pytest.raises(RuntimeError, match="failed half-way: call it again"):
                    window.attend(0, q, k, v, start, (1, 2))
            window.finish(start, embedding)
        stats = window.stats()
        results.append((out.tolist(), window.selected, stats["history_frames"], stats["frames"]))
    assert results[0] == results[1]


def test_normalising_in_the_window_equals_normalising_before() -> None:
    config = WindowConfig(4, 1, 1, 0, 1)
    sizes: dict[str, Any] = {"layers": 1, "batch": 1, "tokens_per_frame": 2, "kv_heads": 2, "head_dim": 16}
    inside, before = MemoryWindow(config, **sizes), MemoryWindow(config, **sizes)
    weight = torch.rand(32) + 0.5
    for start in range(7):
        q, k, v = (3 * torch.randn(1, 2, 2, 16) for _ in range(3))
        normed = [torch.nn.functional.rms_norm(x.flatten(2), (32,), weight, 1e-3).view_as(x) for x in (q, k)]
        out = inside.attend(0, q, k, v, start, (1, 2), q_weight=weight, k_weight=weight, eps=1e-3)
        torch.testing.assert_close(out, before.attend(0, *normed, v, start, (1, 2)), rtol=1e-5, atol=1e-5)
        embedding = torch.randn(1, 1, 4)
        inside.finish(start, embedding)
        before.finish(start, embedding)


def test_scale_is_that_of_the_logits() -> None:
    config = WindowConfig(4, 1, 1, 0, 1)
    sizes: dict[str, Any] = {"layers": 1, "batch": 1, "tokens_per_frame": 2, "kv_heads": 1, "head_dim": 16}
    scaled, plain = MemoryWindow(config, **sizes), MemoryWindow(config, **sizes)
    for start in range(3):
        q, k, v = (torch.randn(1, 2, 1, 16) for _ in range(3))
        out = scaled.attend(0, q, k, v, start, (1, 2), scale=0.5)  # 16 ** -0.5 is 0.25
        torch.testing.assert_close(out, plain.attend(0, 2 * q, k, v, start, (1, 2)), rtol=1e-5, atol=1e-5)
        scaled.finish(start, torch.ones(1, 1, 4))
        plain.finish(start, torch.ones(1, 1, 4))


def test_layers_compile_with_arguments_taken_outside() -> None:
    """Two layers that share one pool in one graph, block after block: as in eager mode."""
    torch._dynamo.reset()
    sizes: dict[str, Any] = {"layers": 2, "batch": 1, "tokens_per_frame": 2, "kv_heads": 1, "head_dim": 16}
    eager, compiled = (MemoryWindow(WindowConfig(6, 1, 2, 0, 2), **sizes, history_slots=40) for _ in range(2))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: list[dict[str, Any]]) -> torch.Tensor:
        for layer in arguments:
            q = q + torch.ops.longlive.retrieve_attend(q, k, v, **layer)[0]
        return q

    fast = torch.compile(step, backend="aot_eager", fullgraph=True)
    for start in range(0, 24, 2):
        qkv = [torch.randn(1, 4, 1, 16) for _ in range(3)]
        want, got = (
            function(*qkv, [window.arguments(layer, start, (1, 2), place=True) for layer in range(2)])
            for function, window in ((step, eager), (fast, compiled))
        )
        torch.testing.assert_close(got, want)
        embedding = torch.randn(1, 2, 4)
        eager.finish(start, embedding)
        compiled.finish(start, embedding)
    assert torch.equal(eager.pool, compiled.pool)
