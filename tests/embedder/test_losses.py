"""Losses against loops over frames, their gradients, and the sequences that are too short for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longlive_rag_ops.embedder import (
    ReconstructionLoss,
    RetrievalLoss,
    TrajectorySmoothnessLoss,
    WindowTemporalDeltaLoss,
    reconstruction_loss,
    trajectory_smoothness_loss,
    window_temporal_delta_loss,
)


def vectors(*shape: int, seed: int = 0, spread: float = 0.3) -> Tensor:
    """Float64 embeddings whose neighbours are alike enough for a hinge at 0.5, and not all of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * spread + 0.4


def delta_by_loops(embeddings: Tensor, window: int, margin: float) -> float:
    """As the paper has it: the mean over offsets of the mean over frames."""
    clips = embeddings.reshape(-1, *embeddings.shape[-2:])
    frames = clips.shape[1]
    offsets = min(frames - 1, window)
    total = 0.0
    for offset in range(1, offsets + 1):
        hinges = [
            max(0.0, float(clip[t] @ clip[t - offset] / (clip[t].norm() * clip[t - offset].norm())) - margin)
            for clip in clips
            for t in range(offset, frames)
        ]
        total += sum(hinges) / len(hinges)
    return total / offsets


@pytest.mark.parametrize("shape", [(8, 6), (3, 8, 6), (2, 3, 5, 6), (1, 2, 6)])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_window_temporal_delta_is_the_formula(shape: tuple[int, ...], window: int) -> None:
    embeddings = vectors(*shape)
    expected = delta_by_loops(embeddings, window, 0.5)
    assert expected > 0
    assert math.isclose(float(window_temporal_delta_loss(embeddings, window, 0.5)), expected, rel_tol=1e-12)
    assert float(WindowTemporalDeltaLoss(window, 0.5, 2.5)(embeddings)) == pytest.approx(2.5 * expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 6), (3, 8, 6), (2, 3, 6)])
def test_smoothness_is_the_formula(shape: tuple[int, ...]) -> None:
    embeddings = vectors(*shape)
    clips = embeddings.reshape(-1, *embeddings.shape[-2:])
    squares = [
        float((clip[t] - 2 * clip[t - 1] + clip[t - 2]).square().sum()) for clip in clips for t in range(2, len(clip))
    ]
    paper, released = sum(squares) / len(squares), sum(math.sqrt(s + 1e-8) for s in squares) / len(squares)
    assert float(trajectory_smoothness_loss(embeddings, "squared_norm")) == pytest.approx(paper, rel=1e-12)
    assert float(trajectory_smoothness_loss(embeddings)) == pytest.approx(released, rel=1e-12)
    assert float(TrajectorySmoothnessLoss(3.0, "squared_norm")(embeddings)) == pytest.approx(3 * paper, rel=1e-12)
    assert abs(paper - released) > 1e-3


def test_reconstruction_is_a_mean() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.allclose(reconstruction_loss(a, b), ((a - b) ** 2).sum() / a.numel())
    assert torch.equal(ReconstructionLoss()(a, b), reconstruction_loss(a, b))
    with pytest.raises(ValueError, match=r"reconstruction must have the frames' shape \(2, 3, 4, 5\), got \(2, 3, 4\)"):
        reconstruction_loss(a[..., 0], b)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "delta": lambda v: window_temporal_delta_loss(v, 3, 0.5),
    "wide delta": lambda v: window_temporal_delta_loss(v, 30, -0.9),
    "smoothness": trajectory_smoothness_loss,
    "squared smoothness": lambda v: trajectory_smoothness_loss(v, "squared_norm"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7])
def test_gradients(name: str, frames: int) -> None:
    embeddings = vectors(2, frames, 5, seed=frames).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], (embeddings,))
    assert torch.autograd.gradgradcheck(LOSSES[name], (embeddings,))


def test_gradient_of_the_reconstruction() -> None:
    a, b = vectors(2, 3, 4).requires_grad_(), vectors(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(reconstruction_loss, (a, b))


@pytest.mark.parametrize("name", LOSSES)
def test_sequences_without_pairs_lose_nothing(name: str) -> None:
    shortest = 1 if "delta" in name else 2
    for shape in ((1, 5), (3, shortest, 5), (0, 4, 5), (2, 0, 5)):
        embeddings = torch.full(shape, torch.inf).requires_grad_()  # and whatever is in them stays out
        loss = LOSSES[name](embeddings)
        assert float(loss.detach()) == 0.0
        loss.backward()
        assert embeddings.grad is not None and float(embeddings.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_zero_embeddings(name: str) -> None:
    """A zero embedding has cosine 0 with everything; no gradient becomes NaN."""
    embeddings = vectors(2, 5, 4)
    embeddings[:, 2] = 0
    embeddings[1] = 0
    embeddings.requires_grad_()
    loss = LOSSES[name](embeddings)
    loss.backward()
    assert loss.isfinite() and embeddings.grad is not None and embeddings.grad.isfinite().all()
    zeros = torch.zeros(2, 5, 4)
    expected = {"delta": 0.0, "wide delta": 0.9, "smoothness": 1e-4, "squared smoothness": 0.0}[name]
    assert float(LOSSES[name](zeros)) == pytest.approx(expected)


def test_equal_frames_lose_all_above_the_margin() -> None:
    still = torch.ones(2, 6, 4)
    assert float(window_temporal_delta_loss(still)) == pytest.approx(0.15, abs=1e-6)
    assert float(trajectory_smoothness_loss(still)) == pytest.approx(1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    embeddings = (vectors(2, 8, 256) * 40).to(dtype)
    for loss in LOSSES.values():
        found = loss(embeddings)
        assert found.dtype == torch.float32 and found.isfinite()
        assert torch.equal(found, loss(embeddings.float()))
    a, b = embeddings, embeddings.flip(0)
    assert torch.equal(reconstruction_loss(a, b), reconstruction_loss(a.float(), b.float()))


def test_the_sum_of_all() -> None:
    frames, reconstruction, embeddings = torch.randn(2, 5, 3, 4, 4), torch.randn(2, 5, 3, 4, 4), vectors(2, 5, 6)
    terms = RetrievalLoss(window=2, margin=0.5, delta_weight=0.3, smooth_weight=0.7, smooth_form="squared_norm")(
        reconstruction, frames, embeddings
    )
    assert torch.equal(terms.reconstruction, reconstruction_loss(reconstruction, frames))
    assert torch.equal(terms.window_temporal_delta, 0.3 * window_temporal_delta_loss(embeddings, 2, 0.5))
    assert torch.equal(terms.smoothness, 0.7 * trajectory_smoothness_loss(embeddings, "squared_norm"))
    assert torch.equal(terms.total, terms.reconstruction + terms.window_temporal_delta + terms.smoothness)
    plain = RetrievalLoss(delta_weight=0.0, smooth_weight=0.0)(reconstruction, frames, embeddings)
    assert float(plain.total) == float(plain.reconstruction)
    # A term that is left out is not computed: what it cannot take does no harm.
    assert (
        plain.total.isfinite()
        and RetrievalLoss(delta_weight=0.0, smooth_weight=0.0)(
            reconstruction, frames, embeddings * torch.inf
        ).total.isfinite()
    )


def test_arguments_that_are_refused() -> None:
    embeddings = torch.ones(4, 3)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        window_temporal_delta_loss(embeddings, 0)
    with pytest.raises(TypeError, match="window must be an int"):
        WindowTemporalDeltaLoss(window=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"form must be one of norm, squared_norm; got 'l2'"):
        trajectory_smoothness_loss(embeddings, "l2")
    with pytest.raises(ValueError, match="form must be one of"):
        TrajectorySmoothnessLoss(form="squared")
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=r"embeddings must be \(..., frames, E\), got shape \(3,\)"):
            loss(torch.ones(3))
