"""Sizes of the retrieval autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..config import check_int

LARGEST = 65536  # of any size: what is beyond is a damaged file's, and memory for it is not to be asked for
MOST_STAGES = 16  # which halve the largest height to 1


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes under the names of LongLive-RAG's released checkpoints; the defaults are the released model's (2.19 M
    parameters in the encoder, 28 M in the decoder).

    Attributes:
        in_channels: channels of a latent frame.
        spatial_h, spatial_w: its height and width.
        latent_dim: size of an embedding, E.
        hidden_dims: channels of the stages; each halves height and width.
    """

    in_channels: int = 16
    spatial_h: int = 60
    spatial_w: int = 104
    latent_dim: int = 1024
    hidden_dims: tuple[int, ...] = (64, 128, 256)

    def __post_init__(self) -> None:
        for name in ("in_channels", "spatial_h", "spatial_w", "latent_dim"):
            check_int(name, getattr(self, name), 1, LARGEST)
        dims = self.hidden_dims
        if not isinstance(dims, (tuple, list)) or not dims:
            raise ValueError(f"hidden_dims must be a sequence of at least one size, got {dims!r}")
        if len(dims) > MOST_STAGES:
            raise ValueError(f"hidden_dims must have at most {MOST_STAGES} sizes, got {len(dims)}")
        for dim in dims:
            check_int("hidden_dims", dim, 1, LARGEST)
        object.__setattr__(self, "hidden_dims", tuple(dims))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> AutoencoderConfig:
        """From a checkpoint's ``config``, whose other entries (of training) are not looked at.

        Raises:
            ValueError: an entry is missing or not allowed.
        """
        names = list(cls.__dataclass_fields__)
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"config must have {', '.join(names)}; {', '.join(missing)} missing")
        try:
            return cls(**{name: values[name] for name in names})
        except TypeError as error:
            raise ValueError(str(error)) from None

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` reads, of JSON's types."""
        return asdict(self) | {"hidden_dims": list(self.hidden_dims)}

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a latent frame."""
        return self.in_channels, self.spatial_h, self.spatial_w

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """``(C', H', W')`` behind the last stage, which the decoder starts from."""
        height, width = self.spatial_h, self.spatial_w
        for _ in self.hidden_dims:
            height, width = -(-height // 2), -(-width // 2)
        return self.hidden_dims[-1], height, width
