"""The mean of a layer's keys: an embedding that the backbone itself has computed."""

from __future__ import annotations

import torch

from ..config import check_int


class MeanKeys:
    """Mean over a frame's tokens of the keys of one layer, before rotation.

    Rotated keys would do less well: their phases differ from token to token and average out.

    Args:
        layer: of the backbone, whose keys a patch passes.
    """

    def __init__(self, layer: int) -> None:
        self.key_layer = check_int("layer", layer, 0)

    def __repr__(self) -> str:
        return f"MeanKeys({self.key_layer})"

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys ``(N, tokens_per_frame, kv_heads, head_dim)`` of N frames to ``(N, kv_heads * head_dim)``, float32 or
        wider.

        Raises:
            ValueError: another number of dimensions, or no floating point.
        """
        if keys.dim() != 4 or not keys.is_floating_point():
            raise ValueError(
                f"keys must be floating point (frames, tokens_per_frame, kv_heads, head_dim), got {keys.dtype} of "
                f"shape {tuple(keys.shape)}"
            )
        return keys.mean(1, dtype=torch.promote_types(keys.dtype, torch.float32)).flatten(1)
