"""A forward of a patched model that is under way: what an adapter attends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..window import MemoryWindow
from .adapter import Call

if TYPE_CHECKING:
    from .clip import Clip


@dataclass
class Forward:
    """One forward of the model that is under way.

    Attributes:
        clip: the video.
        call: what the forward is.
        recache: it encodes finished frames again.
        clean: the block is final after it.
    """

    clip: Clip
    call: Call
    recache: bool = False
    clean: bool = False

    @property
    def window(self) -> MemoryWindow:
        """The video's window, for adapters whose attention is not one call of `attend`. Made by `prepare`."""
        window = self.clip.window
        if window is None:
            raise RuntimeError("prepare must come first: the window's shapes are not known yet")
        return window

    def prepare(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> MemoryWindow:
        """The window, made on the first call. To be called in each layer: an embedder may be over its keys.

        Args:
            layer: of the backbone.
            k, v: ``(B, n*T, Hkv, D)``, the forward's own; k before rotation.
        """
        self.clip.prepare(self, layer, k, v)
        return self.window

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Attention over sink, retrieved memory and local part: ``torch.ops.longlive.retrieve_attend``.

        Args:
            layer: of the backbone.
            q: ``(B, n*T, Hq, D)``, k and v ``(B, n*T, Hkv, D)``: before rotation, in one dtype, tokens frame-major.

        Returns:
            ``(B, n*T, Hq, D)``, before the output projection.
        """
        call, window = self.call, self.prepare(layer, k, v)
        if self.recache:
            return window.recache(layer, q, k, v, call.start_frame, call.grid, renew_sink=call.renew_sink, scale=scale)
        return window.attend(layer, q, k, v, call.start_frame, call.grid, scale=scale)
