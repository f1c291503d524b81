"""One vector a latent frame: what retrieval searches.

By default it is `grid_pool`, in which nothing is learnt. Because the codec subtracts its mean patch and whitens its
channels, such vectors of unrelated pictures are near orthogonal instead of all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..embedder import EMBEDDERS, FILES, AutoencoderConfig, AutoencoderEmbedder, average_pool, grid_pool
from ..embedder.pooling import CELLS
from .codec import CHANNELS, PIXELS_PER_LATENT
from .video import SIZE_STEP

__all__ = ["GRID_POOL", "TRAINED", "DemoEmbedder", "cosine", "find_demo_embedder", "shipped_embedder"]

TRAINED = "trained"
SHIPPED = Path(__file__).with_name("embedder.safetensors")


@dataclass(frozen=True)
class DemoEmbedder:
    """An embedder and what the report says of it.

    Attributes:
        name: its name, or its file's without the folder.
        what: what it computes.
        limits: what to bear in mind, a sentence.
        embed: latents ``(frames, 16, h, w)`` float32 to ``(frames, embedding_dim)`` float32.
        embedding_dim: numbers in a vector.
        config: sizes of the autoencoder; None where nothing is learnt, which takes latents of any height and width.
    """

    name: str
    what: str
    limits: str
    embed: Callable[[torch.Tensor], torch.Tensor]
    embedding_dim: int
    config: AutoencoderConfig | None = None

    def check(self, frame_shape: tuple[int, int, int]) -> None:
        """Raises ValueError where latent frames ``(C, h, w)`` are not what the embedder was made for."""
        if self.config is None or self.config.frame_shape == frame_shape:
            return
        channels, height, width = self.config.frame_shape
        height, width = PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width
        possible = channels == CHANNELS and height % SIZE_STEP == width % SIZE_STEP == 0
        hint = f", which --size {width}x{height} gives" if possible else ""
        raise ValueError(
            f"--embedder: {self.name} was made for latent frames of {self.config.frame_shape}{hint}; the demo's are "
            f"{frame_shape}, from --size {PIXELS_PER_LATENT * frame_shape[2]}x{PIXELS_PER_LATENT * frame_shape[1]}"
        )

    def describe(self) -> dict[str, Any]:
        """Name and sizes, for the report."""
        config = self.config
        return {
            "name": self.name,
            "embedding_dim": self.embedding_dim,
            "frame_shape": None if config is None else list(config.frame_shape),
            "hidden_dims": None if config is None else list(config.hidden_dims),
        }


GRID_POOL = DemoEmbedder(
    "grid_pool",
    f"mean of each of the {CHANNELS} latent channels over a {CELLS} x {CELLS} grid of cells "
    f"({CHANNELS * CELLS**2} numbers, not trained)",
    "The embedding keeps the layout of a picture and may miss the same place seen from another side.",
    grid_pool,
    CHANNELS * CELLS**2,
)
AVERAGE_POOL = DemoEmbedder(
    "average_pool",
    f"mean of each of the {CHANNELS} latent channels over the picture ({CHANNELS} numbers, not trained)",
    "The embedding knows nothing of the layout of a picture and may take different places of like colours for one.",
    average_pool,
    CHANNELS,
)
POOLS = {pool.name: pool for pool in (GRID_POOL, AVERAGE_POOL)}


def shipped_embedder() -> AutoencoderEmbedder:
    """The small autoencoder that was trained on latents of the demo's codec and is part of this package.

    Raises:
        RuntimeError: its file is missing. ValueError: it is damaged.
    """
    if not SHIPPED.is_file():
        raise RuntimeError(
            f"the demo's trained embedder, {SHIPPED.name}, is missing from this installation of longlive-rag-ops; "
            "install it anew, or name a file of your own"
        )
    return AutoencoderEmbedder.load(SHIPPED)


def find_demo_embedder(embedder: str) -> DemoEmbedder:
    """An embedder by its name, or from its file.

    Args:
        embedder: ``trained`` (see `shipped_embedder`), ``average_pool``, ``grid_pool``, or a checkpoint of a retrieval
            autoencoder.

    Raises:
        ValueError: no such name, or a file that is refused (see `load_autoencoder`). RuntimeError: see
            `shipped_embedder`.
    """
    if embedder in POOLS:
        return POOLS[embedder]
    if embedder == TRAINED:
        return _autoencoder(TRAINED, shipped_embedder())
    if Path(embedder).suffix not in FILES:
        raise ValueError(
            f"--embedder: got {embedder!r}; must be {TRAINED}, {', '.join(EMBEDDERS)}, or a checkpoint that ends in "
            f"{', '.join(FILES)}"
        )
    return _autoencoder(Path(embedder).name, AutoencoderEmbedder.load(embedder))


def _autoencoder(name: str, embedder: AutoencoderEmbedder) -> DemoEmbedder:
    config = embedder.config
    return DemoEmbedder(
        name,
        f"encoder of a retrieval autoencoder: stages of {', '.join(map(str, config.hidden_dims))} channels, mean over "
        f"the picture ({config.latent_dim} numbers of unit length)",
        "The embedder is as good as what it was trained on, and scenes that it has seen there are easier to find.",
        embedder,
        config.latent_dim,
        config,
    )


def cosine(embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of rows (frames, E): (frames, frames) float32; a zero row has cosine 0 with everything."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    return unit @ unit.T
