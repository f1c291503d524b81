"""What makes latents of a video's frames; the demo's linear codec is one, `WanEncoder` another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .codec import FRAMES_PER_LATENT, Codec, encode_stream
from .video import Size

__all__ = ["Encoded", "LatentEncoder", "LinearEncoder"]


class Encoded(NamedTuple):
    """``latents`` (n, C, h, w) float32, empty where n is 0; ``dropped`` video frames at the end made none."""

    latents: torch.Tensor
    dropped: int


class LatentEncoder(Protocol):
    """An encoder.

    Attributes:
        size: width and height of video frames, where no other is asked for.
        metadata: texts that say in a latent file what made it.
    """

    size: Size
    metadata: dict[str, str]

    def latent_frames(self, frames: int) -> int:
        """Latent frames that so many video frames give."""

    def encode(self, frames: Iterable[NDArray[np.uint8]], tick: Callable[[], None]) -> Encoded:
        """Encodes a whole video, (height, width, 3) RGB frames; ``tick`` is called once a latent frame."""


class LinearEncoder:
    """The demo's codec; four frames are held at a time."""

    size: Size = (320, 176)

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        made = hashlib.sha256(json.dumps(codec.provenance, sort_keys=True).encode()).hexdigest()
        self.metadata = {"codec": "linear", "codec_provenance_sha256": made}

    def latent_frames(self, frames: int) -> int:
        """One for each whole four."""
        return frames // FRAMES_PER_LATENT

    def encode(self, frames: Iterable[NDArray[np.uint8]], tick: Callable[[], None]) -> Encoded:
        """See `LatentEncoder`."""
        count = 0

        def counted() -> Iterator[NDArray[np.uint8]]:
            nonlocal count
            for frame in frames:
                count += 1
                yield frame

        latents = []
        for latent, _ in encode_stream(self.codec, counted()):
            latents.append(latent)
            tick()
        return Encoded(torch.stack(latents) if latents else torch.empty(0), count % FRAMES_PER_LATENT)
