"""The toy transformer and the embedding: shapes, determinism, and that content weights mean something."""

from __future__ import annotations

import pytest
import torch

from longlive_rag_ops.demo.embedding import GRID_POOL, cosine
from longlive_rag_ops.demo.model import TIMESTEPS, ToyTransformer, WeightKind, mix_noise, warp

KINDS: tuple[WeightKind, ...] = ("content", "random")


def latents(seed: int = 0, frames: int = 3) -> torch.Tensor:
    return torch.randn(frames, 16, 6, 8, generator=torch.Generator().manual_seed(seed))


def own_values(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v


def test_timesteps_are_the_published_ones() -> None:
    assert pytest.approx([1000, 937.5, 2500 / 3, 625]) == TIMESTEPS
    assert warp(0.0) == 0 and warp(1000.0) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_calls(kind: WeightKind) -> None:
    model = ToyTransformer(kind, (6, 8))
    assert model.grid == (3, 4) and model.tokens_per_frame == 12
    seen: list[tuple[int, tuple[int, ...]]] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == k.shape == v.shape
        seen.append((layer, tuple(q.shape)))
        return v

    out = model.forward(latents(), 625.0, attend)
    assert out.shape == (3, 16, 6, 8) and out.isfinite().all()
    assert seen == [(layer, (1, 36, 4, 64)) for layer in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_everything(kind: WeightKind) -> None:
    first, second = (ToyTransformer(kind, (6, 8), seed=3).forward(latents(), 0.0, own_values) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, ToyTransformer(kind, (6, 8), seed=4).forward(latents(), 0.0, own_values))


@pytest.mark.parametrize("kind", KINDS)
def test_the_timestep_matters(kind: WeightKind) -> None:
    model = ToyTransformer(kind, (6, 8))
    assert not torch.equal(model.forward(latents(), 0.0, own_values), model.forward(latents(), 625.0, own_values))


def test_tokens_are_frame_major_then_row_major() -> None:
    model = ToyTransformer("content", (6, 8))
    x = latents()
    tokens = model.tokens(x).view(3, 3, 4, 16, 2, 2)
    assert torch.equal(tokens[2, 1, 3], x[2, :, 2:4, 6:8])


def logits(kind: WeightKind, layer: int) -> torch.Tensor:
    """(tokens, tokens) scores before rotation, mean over heads, of two frames: the second repeats the first."""
    model, kept = ToyTransformer(kind, (6, 8)), {}

    def attend(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept[number] = torch.einsum("shd,thd->hst", q[0], k[0]) / 8
        return v

    x = latents(frames=1)
    model.forward(torch.cat([x, x]), 0.0, attend)
    return kept[layer].mean(0)


@pytest.mark.parametrize("layer", range(4))
def test_content_weights_score_alike_tokens_high(layer: int) -> None:
    scores = logits("content", layer)
    same = scores.diagonal(12)  # a token of the first frame against its copy in the second
    other = scores[:12, 12:][~torch.eye(12, dtype=torch.bool)]
    assert same.min() > 6 and same.max() < 11
    assert other.abs().mean() < 2 and other.max() < same.min()


def test_random_weights_do_not() -> None:
    scores = logits("random", 0)
    assert scores.diagonal(12).mean().abs() < 1


def test_noise() -> None:
    x, seed = latents(), torch.Generator
    assert torch.equal(mix_noise(x, 0.0, seed().manual_seed(1)), x)
    pure = mix_noise(x, 1000.0, seed().manual_seed(1))
    half = mix_noise(x, 500.0, seed().manual_seed(1))
    torch.testing.assert_close(half, (x + pure) / 2)
    assert abs(float(pure.std()) - 1) < 0.1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kind: got 'best'"):
        ToyTransformer("best", (6, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive and even"):
        ToyTransformer("content", (5, 8))
    with pytest.raises(ValueError, match="do not fit"):
        ToyTransformer("content", (6, 8), heads=1, head_dim=32)


def test_embedding_is_the_mean_over_cells() -> None:
    x = latents(frames=2).repeat_interleave(2, 2)[:, :, :8]  # 8 x 8: cells of 2 x 2
    vectors = GRID_POOL.embed(x)
    assert vectors.shape == (2, GRID_POOL.embedding_dim) == (2, 256)
    expected = x.view(2, 16, 4, 2, 4, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(vectors, expected)
    with pytest.raises(ValueError, match="frames must be"):
        GRID_POOL.embed(x[0])


def test_cosine_of_alike_opposite_and_nothing() -> None:
    table = cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(table[0], torch.tensor([1.0, 1.0, -1.0, 0.0]))
