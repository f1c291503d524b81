"""A fixed linear codec: four video frames become one latent frame of 16 channels at an eighth of the size.

It stands in for a trained video autoencoder, with the same shapes. A patch of 4 frames x 8 x 8 pixels x 3 colours
(768 numbers in [-1, 1]) is projected on the 16 leading principal components of such patches, and every channel is
divided by its standard deviation on the fitting video ("whitening"). Encoding and decoding are one matrix each; a patch
knows nothing of its neighbours or of other times.

``codec.npz`` beside this file was made by the command that its ``provenance`` records (``longlive-rag fit-codec``).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["CHANNELS", "FRAMES_PER_LATENT", "PIXELS_PER_LATENT", "Codec", "encode_stream", "fit_codec"]

CHANNELS = 16
FRAMES_PER_LATENT = 4
PIXELS_PER_LATENT = 8
PATCH = FRAMES_PER_LATENT * PIXELS_PER_LATENT * PIXELS_PER_LATENT * 3
SHIPPED = Path(__file__).with_name("codec.npz")


def to_patches(frames: NDArray[np.uint8]) -> torch.Tensor:
    """(4n, 8h, 8w, 3) uint8 -> (n, h, w, 768) float32 in [-1, 1]; the order in a patch is (frame, y, x, colour)."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames: got {frames.dtype} of shape {frames.shape}; must be uint8 (frames, height, width, 3)"
        )
    count, height, width, _ = frames.shape
    if count == 0 or count % FRAMES_PER_LATENT or height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
        raise ValueError(
            f"frames: got shape {frames.shape}; the number of frames must be a positive multiple of "
            f"{FRAMES_PER_LATENT}, height and width multiples of {PIXELS_PER_LATENT}"
        )
    n, h, w = count // FRAMES_PER_LATENT, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    pixels = torch.from_numpy(frames).to(torch.float32).mul_(2 / 255).sub_(1)
    pixels = pixels.view(n, FRAMES_PER_LATENT, h, PIXELS_PER_LATENT, w, PIXELS_PER_LATENT, 3)
    return pixels.permute(0, 2, 4, 1, 3, 5, 6).reshape(n, h, w, PATCH)


def from_patches(patches: torch.Tensor) -> NDArray[np.uint8]:
    """The inverse of ``to_patches``, clamped to what uint8 can hold."""
    n, h, w, _ = patches.shape
    side = PIXELS_PER_LATENT
    pixels = patches.view(n, h, w, FRAMES_PER_LATENT, side, side, 3).permute(0, 3, 1, 4, 2, 5, 6)
    pixels = pixels.reshape(n * FRAMES_PER_LATENT, h * side, w * side, 3)
    array: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return array


@dataclass(frozen=True)
class Codec:
    """The two matrices of the codec.

    ``basis`` (16, 768) has orthonormal rows, ``mean`` (768,) is the mean patch, ``scale`` (16,) the standard deviation
    of each channel on the fitting video; all float32. ``provenance`` says where they come from.
    """

    basis: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    provenance: dict[str, Any]

    @classmethod
    def shipped(cls) -> "Codec":
        """The codec that is part of this package."""
        return cls.load(SHIPPED)

    @classmethod
    def load(cls, path: str | Path) -> "Codec":
        """Reads a file that ``save`` wrote; ValueError where it is no such file."""
        try:
            with np.load(Path(path), allow_pickle=False) as data:
                arrays = {name: torch.from_numpy(data[name].copy()) for name in ("basis", "mean", "scale")}
                provenance = json.loads(str(data["provenance"]))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"codec: {str(path)!r} is not a codec made by longlive-rag fit-codec ({error})") from error
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        if shapes != {"basis": (CHANNELS, PATCH), "mean": (PATCH,), "scale": (CHANNELS,)}:
            raise ValueError(
                f"codec: {str(path)!r} holds shapes {shapes}; must be basis ({CHANNELS}, {PATCH}), "
                f"mean ({PATCH},), scale ({CHANNELS},)"
            )
        return cls(arrays["basis"], arrays["mean"], arrays["scale"], provenance)

    def save(self, path: str | Path) -> None:
        """Writes an .npz; the same codec gives the same bytes."""
        provenance = np.array(json.dumps(self.provenance, sort_keys=True))
        with Path(path).open("wb") as file:
            np.savez(
                file,
                basis=self.basis.numpy(),
                mean=self.mean.numpy(),
                scale=self.scale.numpy(),
                provenance=provenance,
            )

    def encode(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """(4n, 8h, 8w, 3) uint8 -> latents (n, 16, h, w) float32."""
        channels = (to_patches(frames) - self.mean) @ self.basis.T / self.scale
        return channels.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Latents (n, 16, h, w) float32 -> frames (4n, 8h, 8w, 3) uint8."""
        if latents.ndim != 4 or latents.shape[1] != CHANNELS:
            raise ValueError(f"latents: got shape {tuple(latents.shape)}; must be (frames, {CHANNELS}, height, width)")
        patches = (latents.permute(0, 2, 3, 1) * self.scale) @ self.basis + self.mean
        return from_patches(patches)


def encode_stream(
    codec: Codec, frames: Iterable[NDArray[np.uint8]]
) -> Iterator[tuple[torch.Tensor, NDArray[np.uint8]]]:
    """Encodes four frames at a time, so a long video is never held whole.

    Yields:
        (latent (16, h, w) float32, the second of its four frames: (height, width, 3) uint8). One to three frames left
        over at the end are dropped.
    """
    group: list[NDArray[np.uint8]] = []
    for frame in frames:
        group.append(frame)
        if len(group) == FRAMES_PER_LATENT:
            yield codec.encode(np.stack(group))[0], group[1]
            group = []


def fit_codec(frames: Iterable[NDArray[np.uint8]], provenance: dict[str, Any]) -> Codec:
    """Principal components of all patches of a video; no chance is involved.

    Args:
        frames: (8h, 8w, 3) uint8 arrays; groups of four consecutive ones make the patches.
        provenance: kept with the codec, joined by ``patches`` and ``explained_variance`` (share of the patches'
            variance that the 16 channels keep).

    Raises:
        ValueError: fewer patches than numbers in a patch, or a video too flat to have 16 components.
    """
    total = torch.zeros(PATCH, dtype=torch.float64)
    square = torch.zeros(PATCH, PATCH, dtype=torch.float64)
    count = 0
    group: list[NDArray[np.uint8]] = []
    for frame in frames:
        group.append(frame)
        if len(group) == FRAMES_PER_LATENT:
            patches = to_patches(np.stack(group)).view(-1, PATCH).to(torch.float64)
            total += patches.sum(0)
            square += patches.T @ patches
            count += patches.shape[0]
            group = []
    if count < PATCH:
        raise ValueError(f"frames: got {count} patches of 4 frames x 8 x 8 pixels; at least {PATCH} are needed")
    mean = total / count
    variance, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    leading, basis = variance.flip(0)[:CHANNELS], vectors.T.flip(0)[:CHANNELS]
    if float(leading[-1]) < 1e-8:
        raise ValueError(f"frames: component {CHANNELS} has variance {float(leading[-1]):.3g}; the video is too flat")
    # An eigenvector's sign is arbitrary: the largest entry is made positive, so that a second fit gives the same codec.
    sign = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    facts = {"patches": count, "explained_variance": round(float(leading.sum() / variance.sum()), 6)}
    return Codec((basis * sign).float().contiguous(), mean.float(), leading.sqrt().float(), {**provenance, **facts})
