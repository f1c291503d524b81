"""A recorded run of a retrieval autoencoder, in the safetensors format, to hold this implementation against.

The metadata's ``config`` (JSON) has the entries of `AutoencoderConfig` and ``delta_margin``, ``delta_weight``,
``delta_window``, ``smooth_weight``. Tensors: ``state.*``, the state dict; ``input`` ``(clips, T, C, H, W)``; what came
out: ``embedding`` and ``embedding_normalised`` ``(clips * T, E)``, ``reconstruction`` ``(clips * T, C, H, W)``, and the
scalars ``loss.reconstruction``, ``loss.window_temporal_delta``, ``loss.smoothness``, ``loss.total``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..config import check_int
from ..safetensors_file import read_safetensors
from .autoencoder import LatentAutoencoder
from .checkpoint import autoencoder_from, json_object
from .losses import RetrievalLoss

TOLERANCE = 1e-5  # largest error relative to the root mean square of what was recorded
STATE = "state."
OUTPUTS = ("embedding", "embedding_normalised", "reconstruction")
LOSSES = ("reconstruction", "window_temporal_delta", "smoothness", "total")


@dataclass(frozen=True)
class Recording:
    """A recorded run: the model, its loss, and the tensors by name."""

    path: Path
    model: LatentAutoencoder
    loss: RetrievalLoss
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """One recorded tensor against the one computed.

    Attributes:
        name: of the tensor.
        error: largest absolute difference over the root mean square of the recorded (over 1 where that is 0).
    """

    name: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether they agree; NaN never does."""
        return self.error <= TOLERANCE


def is_recording(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a safetensors file means to be a recorded autoencoder, and not another trace."""
    return any(name.startswith(STATE) for name in tensors) and "log" not in metadata


def load_recording(path: str | Path) -> Recording:
    """Reads and checks a recording.

    Raises:
        ValueError: the file cannot be read, is truncated, or is no recording; the message says what is wrong.
    """
    path = Path(path)
    name = f"recording {path}"
    metadata, tensors = read_safetensors(path, "recording")
    config = json_object(metadata, "config", name)
    state = {key.removeprefix(STATE): value for key, value in tensors.items() if key.startswith(STATE)}
    model = autoencoder_from(config, state, name)
    frames = tensors.get("input")
    if frames is None or frames.dim() != 5 or tuple(frames.shape[2:]) != model.config.frame_shape or not frames.numel():
        size = None if frames is None else tuple(frames.shape)
        raise ValueError(f"{name}: tensor input must be (clips, T, {model.config.frame_shape}), got {size}")
    count = frames.shape[0] * frames.shape[1]
    expected = {
        "input": tuple(frames.shape),
        "embedding": (count, model.config.latent_dim),
        "embedding_normalised": (count, model.config.latent_dim),
        "reconstruction": (count, *model.config.frame_shape),
        **{f"loss.{term}": () for term in LOSSES},
    }
    for key, shape in expected.items():
        value = tensors.get(key)
        if value is None or tuple(value.shape) != shape or not value.is_floating_point():
            got = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: tensor {key} must be floating point of shape {shape}, got {got}")
    return Recording(path, model, _loss(config, name), tensors)


def _loss(config: Mapping[str, Any], name: str) -> RetrievalLoss:
    try:
        numbers = {key: float(config[key]) for key in ("delta_margin", "delta_weight", "smooth_weight")}
        window = check_int("delta_window", config["delta_window"], 1)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: config must have numbers delta_margin, delta_weight, smooth_weight and an int delta_window, at "
            f"least 1; got {error!r}"
        ) from None
    return RetrievalLoss(
        window=window,
        margin=numbers["delta_margin"],
        delta_weight=numbers["delta_weight"],
        smooth_weight=numbers["smooth_weight"],
    )


@torch.no_grad()
def compare(recording: Recording, device: torch.device | str = "cpu") -> Iterator[Comparison]:
    """Runs the model in float64 on a device, and compares everything that was recorded.

    In float32 the order in which a library sums a convolution moves the reconstruction by up to 3e-5 of its root mean
    square, more than is allowed here; in float64 what remains is the recording's own rounding.
    """
    model = recording.model.to(device, torch.float64)
    clips = recording.tensors["input"].to(device, torch.float64)
    reconstruction, embedding = model(clips.flatten(0, 1))
    terms = recording.loss(reconstruction.unflatten(0, clips.shape[:2]), clips, embedding.unflatten(0, clips.shape[:2]))
    outputs = embedding, F.normalize(embedding, dim=-1), reconstruction
    computed = dict(zip(OUTPUTS, outputs, strict=True)) | {f"loss.{name}": getattr(terms, name) for name in LOSSES}
    for name, value in computed.items():
        recorded = recording.tensors[name].double()
        size = float(recorded.square().mean().sqrt())
        yield Comparison(name, float((value.double().cpu() - recorded).abs().max()) / (size or 1.0))
