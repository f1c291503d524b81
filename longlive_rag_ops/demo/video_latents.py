"""Latent files made of videos: which files, what is in them, in which order they are written.

The latents of one video are held in memory; see `latent_encoder` for what an encoder holds besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..embedder.latent_file import save_latents
from ..extras import need
from .clips import resolve
from .latent_encoder import LatentEncoder
from .out_folder import prepare_folder
from .video import Size, VideoFacts, probe_video, read_frames

__all__ = ["MadeLatents", "VideoLatents", "WrittenFile"]

ARGUMENT = "VIDEO"


@dataclass(frozen=True)
class WrittenFile:
    """A latent file: its path, the latent frame of the video it begins with, its tensor's shape (n, C, h, w)."""

    path: Path
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class MadeLatents:
    """What was made of a video.

    Attributes:
        video: its file's name.
        files: in order.
        dropped: video frames at the end that make no whole latent frame.
        left: files numbered beyond the last, from an earlier and longer cut, which stay.
    """

    video: str
    files: tuple[WrittenFile, ...]
    dropped: int
    left: tuple[Path, ...]


class VideoLatents:
    """Videos to be made into latent files; whatever can be refused before decoding is refused here.

    A video ``STEM.mp4`` becomes ``STEM.safetensors``, or with ``frames`` ``STEM_000.safetensors``,
    ``STEM_001.safetensors``, ...; it is encoded as a whole and cut then.

    Args:
        videos: files, or ``sample:NAME``.
        out: folder of the files, made where there is none.
        frames: most latent frames in a file, None for all. A video's files differ by a frame at most, so that no file
            is too short to train with for being what was left over.
        dtype: that is stored.
        overwrite: replace files that are there.

    Raises:
        ValueError: a video that cannot be opened, two of one stem, files that are there already. RuntimeError: no
            PyAV, or a sample clip that cannot be fetched.
    """

    def __init__(
        self,
        videos: Sequence[str],
        out: str | Path,
        *,
        frames: int | None = None,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
    ) -> None:
        if frames is not None and frames < 1:
            raise ValueError(f"--frames: got {frames}; must be at least 1")
        self.out, self.frames, self.dtype = Path(out), frames, dtype
        self.videos: list[tuple[Path, VideoFacts]] = []
        stems: dict[str, str] = {}
        for video in videos:
            path = resolve(video)
            self.videos.append((path, probe_video(path, argument=ARGUMENT)))
            if path.stem in stems:
                raise ValueError(
                    f"{ARGUMENT}: got {stems[path.stem]!r} and {video!r}, whose latents would both be written to "
                    f"{self._path(path.stem, 0).name}; every video must have a stem of its own"
                )
            stems[path.stem] = video
        there = [found for stem in stems for found in self._found(stem)]
        if there and not overwrite:
            raise ValueError(
                f"--out: got {str(self.out)!r}, which holds {there[0].name} already"
                f"{f' and {len(there) - 1} more' if there[1:] else ''}; --overwrite replaces what is there"
            )

    def write(self, encoder: LatentEncoder, size: Size, *, progress: bool = True) -> Iterator[MadeLatents]:
        """Decodes, encodes and writes one video after the other, each whole before its first file is written.

        Args:
            encoder: makes the latents.
            size: width and height of the video frames it gets.
            progress: show a bar on standard error.

        Yields:
            What was made of each video, once its files are written.

        Raises:
            ValueError: a folder that cannot be written, a damaged video (see `read_frames`), one too short, latents
                that are not finite. Files of the videos before it stay, there are none of its own.
            OSError: a file cannot be written; those before it stay.
        """
        prepare_folder(self.out)
        for path, facts in self.videos:
            with _ticks(path.name, encoder.latent_frames(facts.declared_frames), progress) as tick:
                latents, dropped = encoder.encode(read_frames(path, size, argument=ARGUMENT), tick)
            if not latents.numel():
                raise ValueError(f"{ARGUMENT}: got {str(path)!r}, which is too short for one latent frame")
            stored = latents.to(self.dtype)
            if not stored.isfinite().all():
                raise ValueError(
                    f"{ARGUMENT}: got {str(path)!r}, whose latents have NaN or infinity; a wider --dtype or "
                    "--vae-dtype may hold them"
                )
            files = self._write_one(path, stored, self._metadata(encoder, facts, size))
            later = self._found(path.stem)[len(files) :] if self.frames else []
            yield MadeLatents(path.name, tuple(files), dropped, tuple(later))

    def _write_one(self, video: Path, latents: torch.Tensor, metadata: dict[str, str]) -> list[WrittenFile]:
        files, first = [], 0
        pieces = math.ceil(len(latents) / self.frames) if self.frames else 1
        for number, part in enumerate(latents.tensor_split(pieces)):
            path = self._path(video.stem, number)
            save_latents(path, part, {**metadata, "first_frame": str(first)})
            files.append(WrittenFile(path, first, tuple(part.shape)))
            first += len(part)
        return files

    def _metadata(self, encoder: LatentEncoder, facts: VideoFacts, size: Size) -> dict[str, str]:
        # 0 where the container does not say.
        return {**encoder.metadata, "video": facts.name, "size": f"{size[0]}x{size[1]}", "fps": f"{facts.fps:.6g}"}

    def _path(self, stem: str, number: int) -> Path:
        return self.out / (f"{stem}_{number:03d}.safetensors" if self.frames else f"{stem}.safetensors")

    def _found(self, stem: str) -> list[Path]:
        """Files that are there under a video's names, in order."""
        if not self.out.is_dir():
            return []
        if not self.frames:
            return [path for path in [self._path(stem, 0)] if path.exists()]
        name = re.compile(re.escape(stem) + r"_(\d{3}|[1-9]\d{3,})\.safetensors")
        found = {int(match[1]): path for path in self.out.iterdir() if (match := name.fullmatch(path.name))}
        return [found[number] for number in sorted(found)]


@contextmanager
def _ticks(name: str, frames: int, progress: bool) -> Iterator[Callable[[], None]]:
    if not progress:
        yield lambda: None
        return
    bar = need("tqdm", "showing progress").tqdm
    with bar(total=frames or None, desc=name, unit=" latent frames", leave=False) as line:
        yield line.update
