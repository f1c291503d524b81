"""What a block's frames are found by: an embedder over their latents, or over the keys of one layer."""

from __future__ import annotations

import torch

from ..config import check_int
from ..embedder import Embedder
from .adapter import Call
from .settings import Settings


def embedder_name(embedder: Embedder) -> str:
    """A function's name, or that of an object's class."""
    return getattr(embedder, "__name__", None) or type(embedder).__name__


def key_layer(embedder: Embedder, layers: int) -> int | None:
    """The layer whose keys an embedder is over, its attribute ``key_layer``; None for an embedder of latents.

    Raises:
        TypeError, ValueError: no int, or none of the model's ``layers``.
    """
    layer = getattr(embedder, "key_layer", None)
    if layer is None:
        return None
    name = f"key_layer of embedder {embedder_name(embedder)}, for a model of {layers} layers,"
    return check_int(name, layer, 0, layers - 1)


class BlockEmbedding:
    """Embeddings of a video's open block.

    Keys are embedded by every forward that passes them, because it may turn out only later that it was the block's
    last. What is kept is the result, of the latest of them.

    Args:
        settings: of the patch.
        layers: of the model.

    Attributes:
        layer: whose keys are embedded; None when latents are, or nothing is retrieved.
    """

    def __init__(self, settings: Settings, layers: int) -> None:
        self._embedder = settings.embedder
        self.layer = key_layer(settings.embedder, layers) if settings.top_k > 0 else None
        self._of_keys: torch.Tensor | None = None

    def begin_block(self) -> None:
        """Forgets the last block's."""
        self._of_keys = None

    def take_keys(self, call: Call, k: torch.Tensor) -> None:
        """Embeds keys ``(B, n*T, Hkv, D)`` of a forward over n frames, before rotation."""
        keys = k.detach().unflatten(1, (call.frames, -1)).flatten(0, 1)
        # Copied: a view would keep all the keys, and compiled embedders use their output's memory again.
        self._of_keys = self._embed(keys, call, "keys").clone()

    def of(self, call: Call) -> torch.Tensor:
        """Embeddings ``(B, n, E)`` of the frames of the open block, whose latest forward is ``call``.

        Raises:
            ValueError: the embedder returns something else. RuntimeError: there were no keys.
        """
        if self.layer is None:
            return self._embed(call.latents().flatten(0, 1), call, "frames")
        if self._of_keys is None:
            raise RuntimeError(
                f"layer {self.layer} has passed no keys of frames {call.start_frame} .. {call.end_frame - 1} to "
                f"embedder {embedder_name(self._embedder)}: no forward of the block has come as far, or the adapter "
                "does not call attend or prepare(layer, k, v) in each layer"
            )
        return self._of_keys

    @torch.no_grad()
    def _embed(self, given: torch.Tensor, call: Call, what: str) -> torch.Tensor:
        """``(B*n, ...)`` to ``(B, n, E)``."""
        with torch.autocast(given.device.type, enabled=False):  # which is the model's choice, not the embedder's
            found = self._embedder(given)
        if not isinstance(found, torch.Tensor) or found.dim() != 2 or found.shape[0] != given.shape[0]:
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"embedder must return ({given.shape[0]}, E) for {what} {tuple(given.shape)}, got {got}")
        return found.unflatten(0, (call.batch, call.frames))
