"""The video autoencoder of Wan, as diffusers has it: latents as its pipelines' transformers see them.

The video is held whole: 3 bytes a pixel until it is decoded, then 3 numbers a pixel in the VAE's dtype on its device
(832 x 480: 1.2 MB, then 4.8 MB a frame in float32). The VAE encodes four frames at a time.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .codec import FRAMES_PER_LATENT
from .latent_encoder import Encoded
from .video import Size

__all__ = ["WanEncoder"]

CLASS = "AutoencoderKLWan"


class WanEncoder:
    """diffusers' ``AutoencoderKLWan`` from a folder; nothing is downloaded.

    Latents are ``(mode of the posterior - latents_mean) / latents_std``, the two from the VAE's configuration.

    Args:
        folder: with ``config.json`` and weights in safetensors, as ``save_pretrained`` writes it.
        device: where it computes.
        dtype: it computes in this.

    Raises:
        ValueError: no such folder, another model in it, weights that are damaged or not all there.
        RuntimeError: diffusers cannot be imported.
    """

    size: Size = (832, 480)

    def __init__(
        self, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        path = Path(folder)
        self.vae = _load(path, dtype).to(device).eval()
        self.device, self.dtype = torch.device(device), dtype
        self.mean, self.std = (_per_channel(path, self.vae, name) for name in ("latents_mean", "latents_std"))
        self.metadata = {"codec": CLASS, "codec_folder": path.resolve().name}

    def latent_frames(self, frames: int) -> int:
        """One for the first frame, then one for each whole four."""
        return 1 + (frames - 1) // FRAMES_PER_LATENT if frames else 0

    @torch.no_grad()
    def encode(self, frames: Iterable[NDArray[np.uint8]], tick: Callable[[], None]) -> Encoded:
        """See `LatentEncoder`; frames beyond 1 + 4n are dropped."""
        held = list(frames)
        if not held:
            return Encoded(torch.empty(0), 0)
        count = 1 + FRAMES_PER_LATENT * (self.latent_frames(len(held)) - 1)
        dropped = len(held) - count
        height, width, _ = held[0].shape
        pixels = torch.empty(1, 3, count, height, width, device=self.device, dtype=self.dtype)
        for i, frame in enumerate(held[:count]):
            pixels[0, :, i] = torch.from_numpy(frame).to(self.device).permute(2, 0, 1).float().mul_(2 / 255).sub_(1)
        held.clear()
        # The VAE calls its encoder once a latent frame; there is no other way to see how far it is.
        hook = self.vae.encoder.register_forward_hook(lambda *_: tick())
        try:
            mode = self.vae.encode(pixels).latent_dist.mode()
        finally:
            hook.remove()
        latents = (mode[0].transpose(0, 1).float().cpu() - self.mean) / self.std
        return Encoded(latents.contiguous(), dropped)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--vae: got {str(folder)!r}, whose config.json cannot be read ({error}); it must be a folder that holds "
            f"diffusers' {CLASS}"
        ) from None
    if found != CLASS:
        raise ValueError(f"--vae: got {str(folder)!r}, which holds {found}; it must hold diffusers' {CLASS}")
    try:
        model = getattr(importlib.import_module("diffusers"), CLASS)
    except (ImportError, AttributeError, RuntimeError) as error:  # the last: a module that diffusers loads late
        raise RuntimeError(
            f"--vae needs diffusers with its {CLASS}, which could not be imported ({error}); it is no dependency of "
            "longlive-rag-ops: pip install diffusers"
        ) from error
    try:
        # Without low_cpu_mem_usage, which needs another package and leaves missing tensors without memory.
        options = {"torch_dtype": dtype, "low_cpu_mem_usage": False, "use_safetensors": True}
        vae, report = model.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"--vae: got {str(folder)!r}, which cannot be loaded: {error}") from error
    # diffusers itself only warns, and encodes with random numbers in their place.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"--vae: got {str(folder)!r}, which lacks tensors ({len(missing)}), such as {missing[0]}")
    return vae


def _per_channel(folder: Path, vae: Any, name: str) -> torch.Tensor:
    """``latents_mean`` or ``latents_std`` as (C, 1, 1) float32."""
    values: Any = getattr(vae.config, name, None)
    channels = vae.config.z_dim
    good = isinstance(values, (list, tuple)) and len(values) == channels
    good = good and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    if not good or (name == "latents_std" and min(values) <= 0):
        raise ValueError(
            f"--vae: got {str(folder)!r}, whose {name} is {values!r}; it must be {channels} finite numbers"
            f"{' above 0' if name == 'latents_std' else ''}"
        )
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
