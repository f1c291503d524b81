"""An embedder under evaluation: its name, what it is, and its embeddings of a clip, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..demo.settings import FRAMES_PER_BLOCK
from ..embedder import EMBEDDERS, FILES, AutoencoderConfig, AutoencoderEmbedder, Embedder, find_embedder
from .clip import Clip
from .names import name_of, split_name

ARGUMENT = "--embedder"
DEFAULT = tuple(EMBEDDERS)
RULES = {
    "random": "as many eligible frames drawn at random without replacement: the exact expectation, no draw",
    "newest": "the newest eligible frames",
}
WHAT = {
    "average_pool": "mean of each latent channel over the picture, not trained",
    "grid_pool": "mean of each latent channel over a grid of 4 x 4 cells, not trained",
}


@dataclass(frozen=True)
class NamedEmbedder:
    """A row of the tables.

    Attributes:
        name: of the row.
        what: it computes.
        embed: latent frames ``(n, C, h, w)`` float32 to ``(n, E)`` floating point.
        config: sizes of an autoencoder, None for an embedder that takes frames of any size.
        given: the file or name that it came from, for errors.
    """

    name: str
    what: str
    embed: Embedder
    config: AutoencoderConfig | None = None
    given: str = ""

    def check(self, clip: Clip) -> None:
        """Raises ValueError where the embedder was made for latent frames of another size, or wants keys."""
        if getattr(self.embed, "key_layer", None) is not None:
            raise ValueError(f"{ARGUMENT} {self.name} embeds keys of a generator's layer; here there are latents alone")
        if self.config is not None and self.config.frame_shape != clip.frame_shape:
            raise ValueError(
                f"{ARGUMENT}: {self.given or self.name} was made for latent frames of {self.config.frame_shape}, those "
                f"of {clip.name} are {clip.frame_shape}"
            )

    def embeddings(self, clip: Clip) -> torch.Tensor:
        """Embeddings of a clip, block by block, as a window asks for them.

        Returns:
            ``(frames, E)`` floating point, finite.

        Raises:
            ValueError: the embedder returned something else; the message names it.
        """
        self.check(clip)
        parts: list[torch.Tensor] = []
        for number, block in enumerate(clip.latents.split(FRAMES_PER_BLOCK)):
            found = self.embed(block)
            where = f"{ARGUMENT} {self.name}, frames from {number * FRAMES_PER_BLOCK} of {clip.name}"
            width = found.shape[-1] if isinstance(found, torch.Tensor) and found.dim() == 2 else 0
            expected = parts[0].shape[1] if parts else width
            if not width or tuple(found.shape) != (len(block), expected) or not found.is_floating_point():
                got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found)
                raise ValueError(
                    f"{where}: must return floating point of shape ({len(block)}, {expected or 'E'}), got {got}"
                )
            if not found.isfinite().all():
                raise ValueError(f"{where}: embeddings must be finite, got NaN or infinity")
            parts.append(found.detach())
        return torch.cat(parts)


def load_embedder(text: str) -> NamedEmbedder:
    """An embedder by its name or its file.

    Args:
        text: ``trained`` for the package's own autoencoder, or what `find_embedder` takes; ``NAME=`` before it says
            what to call the row, otherwise it is the name, or the file's stem.

    Raises:
        ValueError: no embedder of that name, or a file that is refused. RuntimeError: the package's own is missing.
    """
    name, place = split_name(text, ARGUMENT)
    from ..demo.embedding import TRAINED, shipped_embedder

    if place != TRAINED and place not in EMBEDDERS and Path(place).suffix not in FILES:
        raise ValueError(
            f"{ARGUMENT}: got {place!r}; must be {', '.join(EMBEDDERS)}, {TRAINED}, or a checkpoint that ends in "
            f"{', '.join(FILES)}"
        )
    found = shipped_embedder() if place == TRAINED else find_embedder(place)
    if isinstance(found, AutoencoderEmbedder):
        dims = ", ".join(map(str, found.config.hidden_dims))
        what = f"encoder of a retrieval autoencoder: stages of {dims} channels, mean over the picture"
        own = TRAINED if place == TRAINED else name_of(place)
        return NamedEmbedder(name or own, what, found, found.config, place)
    return NamedEmbedder(name or place, WHAT[place], found, None, place)
