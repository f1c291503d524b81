"""One vector a latent frame: what retrieval searches.

The latent is averaged over a grid of 4 x 4 cells: 16 cells x 16 channels = 256 numbers. Nothing is learnt. Because
the codec subtracts its mean patch and whitens its channels, such vectors of unrelated pictures are near orthogonal
instead of all alike. They keep the layout of a picture, so the same place seen from another side may not be
recognised.
A trained embedder can take this one's place: anything that maps ``(frames, C, h, w)`` to ``(frames, E)``.
"""

import torch

__all__ = ["CELLS", "DESCRIPTION", "cosine", "embed"]

CELLS = 4
DESCRIPTION = (
    f"mean of each of the 16 latent channels over a {CELLS} x {CELLS} grid of cells (256 numbers, not trained)"
)


def embed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (frames, C, h, w) float32 -> embeddings (frames, 16 * C) float32, not normalised.

    Raises:
        ValueError: not four dimensions.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents: got shape {tuple(latents.shape)}; must be (frames, channels, height, width)")
    return torch.nn.functional.adaptive_avg_pool2d(latents, CELLS).flatten(1)


def cosine(embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of rows (frames, E): (frames, frames) float32; a zero row has cosine 0 with everything."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    return unit @ unit.T
