"""Losses of the retrieval autoencoder, as functions and as modules.

LongLive-RAG (arXiv 2606.02553) trains with their sum: the reconstruction keeps an embedding telling, the Window
Temporal Delta Loss pushes neighbours in time apart until their cosine is at most a margin, the smoothness keeps the
trajectory of embeddings from jumping while they are pushed. Where the paper's text and its released code differ, both
are here.

Embeddings are ``(..., T, E)``: sequences of T consecutive frames. Half precision is summed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..config import check_int

FORMS = ("norm", "squared_norm")
SMALLEST_SQUARE = 1e-8  # under the released smoothness' root, whose slope at zero would be infinite


def _sequences(embeddings: torch.Tensor) -> torch.Tensor:
    if embeddings.dim() < 2:
        raise ValueError(f"embeddings must be (..., frames, E), got shape {tuple(embeddings.shape)}")
    half = embeddings.dtype in (torch.float16, torch.bfloat16)
    return embeddings.float() if half else embeddings


def _nothing(embeddings: torch.Tensor) -> torch.Tensor:
    """Zero, of which a gradient may be asked."""
    return embeddings[..., :0, :].sum()


def reconstruction_loss(reconstruction: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean squared error, over everything. (The paper writes the sum over a frame's numbers; its code takes the mean.)

    Args:
        reconstruction, frames: of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if reconstruction.shape != frames.shape:
        raise ValueError(
            f"reconstruction must have the frames' shape {tuple(frames.shape)}, got {tuple(reconstruction.shape)}"
        )
    wide = torch.promote_types(reconstruction.dtype, torch.float32)
    return F.mse_loss(reconstruction.to(wide), frames.to(wide))


def window_temporal_delta_loss(embeddings: torch.Tensor, window: int = 3, margin: float = 0.85) -> torch.Tensor:
    """Window Temporal Delta Loss: mean over offsets ``1 .. min(window, T - 1)`` of the mean over frames t of
    ``max(0, cos(v_t, v_{t - offset}) - margin)``.

    Args:
        embeddings: ``(..., T, E)``. A zero embedding has cosine 0 with everything.
        window: largest offset, at least 1.
        margin: cosine up to which nothing is lost.

    Returns:
        A scalar, 0 for a single frame.

    Raises:
        TypeError, ValueError: ``window`` is no positive int, or embeddings have fewer than two dimensions.
    """
    check_int("window", window, 1)
    sequences = _sequences(embeddings)
    offsets = range(1, min(window, sequences.shape[-2] - 1) + 1)
    if not offsets or sequences.numel() == 0:
        return _nothing(sequences)
    hinges = [
        F.relu(F.cosine_similarity(sequences[..., offset:, :], sequences[..., :-offset, :], dim=-1) - margin).mean()
        for offset in offsets
    ]
    return torch.stack(hinges).mean()


def trajectory_smoothness_loss(embeddings: torch.Tensor, form: str = "norm") -> torch.Tensor:
    """Mean over frames of the length of the second difference ``a_t = v_t - 2 v_{t-1} + v_{t-2}``.

    Args:
        embeddings: ``(..., T, E)``.
        form: ``"norm"`` is the released code's ``sqrt(|a_t|^2 + 1e-8)``, ``"squared_norm"`` the paper's ``|a_t|^2``.

    Returns:
        A scalar, 0 for fewer than three frames.

    Raises:
        ValueError: no such form, or embeddings have fewer than two dimensions.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    sequences = _sequences(embeddings)
    if sequences.shape[-2] < 3 or sequences.numel() == 0:
        return _nothing(sequences)
    bend = sequences[..., 2:, :] - 2 * sequences[..., 1:-1, :] + sequences[..., :-2, :]
    squares = bend.square().sum(-1)
    return (squares + SMALLEST_SQUARE).sqrt().mean() if form == "norm" else squares.mean()


class ReconstructionLoss(nn.Module):
    """`reconstruction_loss`."""

    def forward(self, reconstruction: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """A scalar."""
        return reconstruction_loss(reconstruction, frames)


class WindowTemporalDeltaLoss(nn.Module):
    """`window_temporal_delta_loss`, times ``weight``."""

    def __init__(self, window: int = 3, margin: float = 0.85, weight: float = 1.0) -> None:
        super().__init__()
        self.window, self.margin, self.weight = check_int("window", window, 1), margin, weight

    def extra_repr(self) -> str:
        return f"window={self.window}, margin={self.margin}, weight={self.weight}"

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings ``(..., T, E)`` to a scalar."""
        return self.weight * window_temporal_delta_loss(embeddings, self.window, self.margin)


class TrajectorySmoothnessLoss(nn.Module):
    """`trajectory_smoothness_loss`, times ``weight``."""

    def __init__(self, weight: float = 1.0, form: str = "norm") -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        self.weight, self.form = weight, form

    def extra_repr(self) -> str:
        return f"weight={self.weight}, form={self.form}"

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings ``(..., T, E)`` to a scalar."""
        return self.weight * trajectory_smoothness_loss(embeddings, self.form)


class RetrievalTerms(NamedTuple):
    """Terms of the retrieval loss, weighted, and their sum: scalars."""

    total: torch.Tensor
    reconstruction: torch.Tensor
    window_temporal_delta: torch.Tensor
    smoothness: torch.Tensor


class RetrievalLoss(nn.Module):
    """What the autoencoder is trained with: ``L_rec + L_SeqDelta + L_Smooth``; a term of weight 0 is left out.

    Args:
        window, margin, delta_weight: of the Window Temporal Delta Loss.
        smooth_weight, smooth_form: of the trajectory's smoothness.
    """

    def __init__(
        self,
        *,
        window: int = 3,
        margin: float = 0.85,
        delta_weight: float = 1.0,
        smooth_weight: float = 1.0,
        smooth_form: str = "norm",
    ) -> None:
        super().__init__()
        self.reconstruction = ReconstructionLoss()
        self.window_temporal_delta = WindowTemporalDeltaLoss(window, margin, delta_weight)
        self.smoothness = TrajectorySmoothnessLoss(smooth_weight, smooth_form)

    def forward(self, reconstruction: torch.Tensor, frames: torch.Tensor, embeddings: torch.Tensor) -> RetrievalTerms:
        """Terms for sequences of frames.

        Args:
            reconstruction, frames: ``(..., T, C, H, W)``.
            embeddings: ``(..., T, E)``.
        """
        found = self.reconstruction(reconstruction, frames)
        delta, smooth = (
            term(embeddings) if term.weight else _nothing(embeddings)
            for term in (self.window_temporal_delta, self.smoothness)
        )
        return RetrievalTerms(found + delta + smooth, found, delta, smooth)
