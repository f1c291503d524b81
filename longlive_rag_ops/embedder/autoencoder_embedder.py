"""The trained encoder as an embedder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..dense_backends import ieee_products
from .autoencoder import LatentAutoencoder
from .autoencoder_config import AutoencoderConfig
from .checkpoint import load_autoencoder


class AutoencoderEmbedder(nn.Module):
    """Embeddings of latent frames by the encoder of a retrieval autoencoder; the decoder is let go.

    All frames of a block go through in one call, in channels-last memory. It follows the frames to their device on the
    first call. No gradient flows, the host never waits for the device, and a call can be captured in a CUDA graph
    after one that was not.

    Args:
        autoencoder: a trained model. Its encoder is copied.
        dtype: computes in this; float32 by default, because retrieval chooses between cosines that differ by less than
            the steps of bfloat16. The published code computes in bfloat16.
        compile: compile the encoder with ``torch.compile`` on the first call; a dict is its options, such as
            ``{"mode": "reduce-overhead"}``.

    Attributes:
        config: sizes of the model.
    """

    def __init__(
        self,
        autoencoder: LatentAutoencoder,
        *,
        dtype: torch.dtype = torch.float32,
        compile: bool | dict[str, Any] = False,
    ) -> None:
        super().__init__()
        if not isinstance(autoencoder, LatentAutoencoder):
            raise TypeError(f"autoencoder must be a LatentAutoencoder, got {type(autoencoder).__name__}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
        self.config: AutoencoderConfig = autoencoder.config
        encoder = type(autoencoder.encoder)(self.config)
        encoder.load_state_dict(autoencoder.encoder.state_dict())
        encoder.eval().requires_grad_(False)
        self.encoder = encoder.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile is not False:
            self.encoder.compile(fullgraph=True, **(compile if isinstance(compile, dict) else {}))

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.encoder.fc.weight.dtype

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> AutoencoderEmbedder:
        """From a checkpoint, see `load_autoencoder`; ``options`` are the constructor's."""
        return cls(load_autoencoder(path), **options)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Latent frames to embeddings.

        Args:
            frames: ``(N, C, H, W)`` floating point, of the model's ``config.frame_shape``.

        Returns:
            ``(N, E)`` of unit length, float32 (float64 for a float64 embedder). Frames with NaN or infinity give NaN,
            which the window never retrieves.

        Raises:
            TypeError, ValueError: no floating point tensor, or another shape.
        """
        if not isinstance(frames, torch.Tensor) or not frames.is_floating_point():
            got = frames.dtype if isinstance(frames, torch.Tensor) else type(frames).__name__
            raise TypeError(f"frames must be a floating point tensor, got {got}")
        shape = self.config.frame_shape
        if frames.dim() != 4 or tuple(frames.shape[1:]) != shape:
            raise ValueError(
                f"frames must be (N, {', '.join(map(str, shape))}), what this embedder was trained for; got "
                f"{tuple(frames.shape)}"
            )
        wide = torch.promote_types(self.dtype, torch.float32)
        if frames.shape[0] == 0:
            return frames.new_empty((0, self.config.latent_dim), dtype=wide)
        if self.encoder.fc.weight.device != frames.device:
            self.to(frames.device)
        # Not inference mode: what the caller does with the embeddings afterwards is not ours to restrict.
        # The caller's autocast is not asked either: it would compute in bfloat16 what is to be float32.
        with torch.no_grad(), torch.autocast(frames.device.type, enabled=False), ieee_convolutions(frames):
            found = self.encoder(frames.to(dtype=self.dtype, memory_format=torch.channels_last))
            return F.normalize(found.to(wide), dim=-1)


@contextmanager
def ieee_convolutions(frames: torch.Tensor) -> Iterator[None]:
    """Float32 convolutions and products on CUDA without TF32, which cuDNN otherwise takes for the former."""
    if not frames.is_cuda or torch.compiler.is_compiling():
        yield
        return
    cudnn: Any = torch.backends.cudnn
    chosen = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        old = cudnn.allow_tf32
    except RuntimeError:  # the new names differ from it already: it cannot be asked for, and is let be
        old = False
    # torch keeps one choice for both under an old name, and raises when somebody, its own compiler included, asks for
    # that while it differs from the new ones.
    if old:
        cudnn.allow_tf32 = False
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    try:
        with ieee_products():
            yield
    finally:
        if old:
            cudnn.allow_tf32 = True
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = chosen
