"""Files of latent frames, one clip each: what the autoencoder is trained and judged on.

========================= ============================================================================================
``.safetensors``          a tensor ``latents``, or the only one there is
``.pt``, ``.pth``         ``torch.save`` of a tensor, or of a mapping with ``latents``
``.npy``                  an array
========================= ============================================================================================

All are floating point ``(frames, C, H, W)``; a batch of one before that is taken off. Only the frames that are asked
for are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..safetensors_file import map_safetensors, write_safetensors
from .checkpoint import read_pickle, unusable

WHAT = "latent file"
SUFFIXES = (".safetensors", ".pt", ".pth", ".npy")
NAME = "latents"


@dataclass(frozen=True)
class LatentFile:
    """A clip on disk, found to be one by `open_latents`.

    Attributes:
        path: the file.
        frames: latent frames in it.
        frame_shape: ``(C, H, W)`` of each.
    """

    path: Path
    frames: int
    frame_shape: tuple[int, int, int]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Frames ``start .. stop - 1``, all by default: ``(n, C, H, W)`` float32.

        Raises:
            ValueError: a frame has NaN or infinity, the range is not within the clip, or the file has changed; the
                message names the file.
        """
        stop = self.frames if stop is None else stop
        if not 0 <= start <= stop <= self.frames:
            raise ValueError(f"frames of {self.path} must be within 0 .. {self.frames}, got {start} .. {stop}")
        found = _tensor(self.path)
        if tuple(found.shape) != (self.frames, *self.frame_shape):
            raise ValueError(
                f"{WHAT} {self.path} has changed: it was {(self.frames, *self.frame_shape)}, it is {tuple(found.shape)}"
            )
        part = found[start:stop].to(torch.float32, copy=True)
        good = part.isfinite().flatten(1).all(1)
        if not good.all():
            frame = start + int(good.logical_not().nonzero()[0])
            raise ValueError(f"{WHAT} {self.path}: latents must be finite, frame {frame} has NaN or infinity")
        return part


def open_latents(path: str | os.PathLike[str]) -> LatentFile:
    """Looks at a file's header.

    Raises:
        ValueError: the file cannot be read, is damaged, or holds no clip of latent frames; the message names it.
    """
    path = Path(path)
    found = _tensor(path)
    return LatentFile(path, found.shape[0], (found.shape[1], found.shape[2], found.shape[3]))


def latent_files(folder: str | os.PathLike[str]) -> list[LatentFile]:
    """All clips in a folder, in the order of their names; all of one frame shape.

    Raises:
        ValueError: no folder, nothing in it, a file that is no clip, or frames of different shapes; the message names
            the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data must be a folder of latent files ({', '.join(SUFFIXES)}), got {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))
    if not paths:
        raise ValueError(f"data must be a folder with latent files ({', '.join(SUFFIXES)}); there is none in {folder}")
    return same_shape(open_latents(path) for path in paths)


def same_shape(clips: Iterable[LatentFile]) -> list[LatentFile]:
    """The clips, which must all have frames of one shape.

    Raises:
        ValueError: they have not; the message names the first that differs.
    """
    found = list(clips)
    for clip in found:
        if clip.frame_shape != found[0].frame_shape:
            raise ValueError(
                f"{WHAT} {clip.path} has frames of {clip.frame_shape}, {found[0].path} of {found[0].frame_shape}; all "
                "must have the same channels, height and width"
            )
    return found


def save_latents(
    path: str | os.PathLike[str], latents: torch.Tensor, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a clip as safetensors; the file is there whole or not at all.

    Args:
        path: ends in ``.safetensors``; a file that is there is replaced.
        latents: ``(frames, C, H, W)`` floating point.
        metadata: texts kept with it.

    Raises:
        ValueError: another ending or shape. OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    held = _check(path, latents.detach().cpu().contiguous())
    write_safetensors(path, {NAME: held}, dict(metadata or {}))


def _tensor(path: Path) -> torch.Tensor:
    """The file's tensor, mapped where the format allows it; to be copied from, not to be kept."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{WHAT} {path} must end in {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        found: Any = _named(path, map_safetensors(path, WHAT)[1])
    elif path.suffix == ".npy":
        found = _mapped_array(path)
    else:
        found = _named(path, _mapped_pickle(path))
    return _check(path, found)


def _mapped_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            archive = file.read(2) == b"PK"  # older files of torch.save cannot be mapped
    except OSError as error:
        raise ValueError(f"{WHAT} {path} cannot be read: {error.strerror or error}") from None
    return read_pickle(path, WHAT, mmap=archive)


def _mapped_array(path: Path) -> torch.Tensor:
    try:
        with np.errstate(all="ignore"):  # a header may declare any shape
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        return torch.from_numpy(array)
    except OSError as error:
        raise ValueError(f"{WHAT} {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError, SyntaxError, ArithmeticError) as error:
        raise ValueError(f"{WHAT} {path} is damaged or no array of numbers: {error}") from None


def _named(path: Path, found: Any) -> Any:
    if isinstance(found, Mapping):
        if NAME not in found and len(found) != 1:
            raise ValueError(
                f"{WHAT} {path} must hold {NAME}, or one tensor alone; got {', '.join(map(str, found)) or 'nothing'}"
            )
        return found[NAME] if NAME in found else next(iter(found.values()))
    return found


def _check(path: Path, found: Any) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{WHAT} {path} must hold a tensor, got {type(found).__name__}")
    problem = unusable(found)
    if problem:
        raise ValueError(f"{WHAT} {path} must be floating point of shape (frames, C, H, W), got {problem}")
    found = found.detach()  # one that was saved with its history cannot be handed between processes
    if found.dim() == 5 and found.shape[0] == 1:
        found = found[0]
    if found.dim() != 4 or found.numel() == 0:
        raise ValueError(
            f"{WHAT} {path} must be floating point of shape (frames, C, H, W), got {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    return found
