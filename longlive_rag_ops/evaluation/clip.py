"""A clip to evaluate embedders on, from a latent file or a video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..demo.clips import PREFIX, resolve
from ..demo.codec import FRAMES_PER_LATENT, Codec
from ..demo.footage import encode_video
from ..demo.video import Size, probe_video
from ..embedder.latent_file import SUFFIXES, LatentFile, open_latents
from .names import check_names, name_of, split_name

ARGUMENT = "CLIP"


@dataclass(frozen=True)
class Clip:
    """Latent frames of one shot.

    Attributes:
        name: in tables and pictures.
        latents: ``(frames, C, h, w)`` float32, finite.
        source: ``latents`` of a file, or a ``video`` that the demo's linear codec encoded.
    """

    name: str
    latents: torch.Tensor
    source: str = "latents"

    @property
    def frames(self) -> int:
        """How many latent frames there are."""
        return self.latents.shape[0]

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of each."""
        return self.latents.shape[1], self.latents.shape[2], self.latents.shape[3]


@dataclass(frozen=True)
class ClipFile:
    """A file that a clip can be read from, as far as its header tells.

    Attributes:
        name: of the clip.
        path: of the file.
        latents: None for a video.
    """

    name: str
    path: Path
    latents: LatentFile | None

    def read(self, size: Size, tick: Callable[[], None] = lambda: None) -> Clip:
        """The whole clip.

        Args:
            size: width and height in pixels that a video is scaled and cropped to.
            tick: called once for each latent frame encoded.

        Raises:
            ValueError: a video that does not decode or has fewer frames than a latent frame takes, or latents with NaN
                or infinity; the message names the file.
        """
        if self.latents is not None:
            return Clip(self.name, self.latents.read())
        encoded, _ = encode_video(self.path, Codec.shipped(), size, ARGUMENT, None, tick)
        if not encoded.numel():
            raise ValueError(
                f"{ARGUMENT}: got {str(self.path)!r}, which has fewer frames than the {FRAMES_PER_LATENT} of a latent "
                "frame"
            )
        return Clip(self.name, encoded, "video")


def find_clip(text: str) -> ClipFile:
    """Looks at a file's header.

    Args:
        text: a latent file, a video file or ``sample:NAME``; ``NAME=`` before it says what to call the clip, otherwise
            its stem is the name.

    Raises:
        ValueError: no such file, or one that holds neither latents nor a video. RuntimeError: PyAV is missing, or a
            sample clip cannot be fetched.
    """
    name, place = split_name(text, ARGUMENT)
    if Path(place).suffix in SUFFIXES:
        return ClipFile(name or name_of(place), Path(place), open_latents(place))
    path = resolve(place)
    probe_video(path, argument=ARGUMENT)
    return ClipFile(name or name_of(place.removeprefix(PREFIX)), path, None)


def check_clips(clips: Sequence[Clip]) -> None:
    """Raises ValueError where there are none, two of one name, latents that are none, or frames of different shapes."""
    if not clips:
        raise ValueError(f"{ARGUMENT}: at least one clip is needed, got none")
    check_names((clip.name for clip in clips), ARGUMENT)
    for clip in clips:
        latents = clip.latents
        if latents.dim() != 4 or latents.dtype != torch.float32 or not latents.numel():
            raise ValueError(
                f"{ARGUMENT} {clip.name}: latents must be float32 of shape (frames, C, h, w), got {latents.dtype} of "
                f"shape {tuple(latents.shape)}"
            )
        if not latents.isfinite().all():
            raise ValueError(f"{ARGUMENT} {clip.name}: latents must be finite, got NaN or infinity")
        if clip.frame_shape != clips[0].frame_shape:
            raise ValueError(
                f"{ARGUMENT}: {clip.name} has latent frames of {clip.frame_shape}, {clips[0].name} of "
                f"{clips[0].frame_shape}; all must be of one shape (--size says what videos become)"
            )
