"""What the patch asks of a backbone: the protocol of an adapter, and how adapters are found.

The core (`clip`, `handle`) owns storage, eviction, retrieval, positions and attention. An adapter says where a
backbone's self-attention modules are, what a call of the model means, how queries, keys and values come about before
rotation, and what a module returns. docs/patching.md has a template.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..config import check_int

if TYPE_CHECKING:
    from .clip import Clip
    from .forward import Forward
    from .settings import Settings

Forwarder = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One forward of a backbone over consecutive latent frames, as its arguments say it.

    Attributes:
        start_frame, frames: the frames.
        grid: ``(h, w)`` tokens of a frame.
        batch: samples.
        cache: the backbone's own cache of the video, whatever it is. Calls with the same object belong to one video;
            the positive and the negative cache of guided sampling are two.
        latents: gives the forward's input as ``(B, F, C, H, W)``, the finished latents when the forward is clean.
        timestep: of the forward, any shape; None where the backbone has none. The forward that finishes a block is
            expected to be the one with the last block's last timestep.
        clean: True when the arguments say that the block is final after this forward, False when they say that it is
            not; None when they say neither: then the number of forwards and the timestep of the block before do, and
            in any case the beginning of the next block.
        fresh: whether the cache is that of a video that has not begun. Asked for forwards over frame 0 alone.
        renew_sink: of a prompt re-cache: the first frames that it encodes become the sink.
    """

    start_frame: int
    frames: int
    grid: tuple[int, int]
    batch: int
    cache: Any
    latents: Callable[[], torch.Tensor]
    timestep: torch.Tensor | None = None
    clean: bool | None = None
    fresh: Callable[[], bool] = lambda: True
    renew_sink: bool = False

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def end_frame(self) -> int:
        """One past the last frame."""
        return self.start_frame + self.frames


@dataclass(frozen=True)
class OwnWindow:
    """The window that a backbone would attend to by itself, in frames, and its rule of temporal positions.

    The rule is None where that cannot be told; without memory the user must then name it.
    """

    window: int
    sink: int
    position_rule: str | None


class Adapter(ABC):
    """A family of backbones. One instance serves one patched model; what belongs to a video is kept in its `Clip`.

    Attributes:
        name: of the family, for errors and logs.
        memory_rule: rule of temporal positions when frames are retrieved; None: the backbone's own.
        in_pieces: it attends by `MemoryWindow.attend_written`, which sees the pages of one rank alone.
    """

    name: ClassVar[str]
    memory_rule: ClassVar[str | None] = "slot"
    in_pieces: ClassVar[bool] = False

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @cached_property
    def modules(self) -> list[Any]:
        """The self-attention modules, looked up once."""
        return list(self.layers())

    @classmethod
    @abstractmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        """What the model lacks to be of this family; empty when it is. Asks what it has, never what it is called."""

    @abstractmethod
    def layers(self) -> Sequence[torch.nn.Module]:
        """The self-attention modules in order. The patch replaces the ``forward`` of each instance."""

    @abstractmethod
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """What a call of the model means; None for one that is not autoregressive generation, and is left alone.

        Raises:
            ValueError, RuntimeError: the call asks for something that this patch cannot do.
        """

    @abstractmethod
    def own_window(self, call: Call) -> OwnWindow:
        """The backbone's own window, read from the model and the cache before `take_over`."""

    @abstractmethod
    def attend(self, forward: Forward, layer: int, original: Forwarder, args: tuple[Any, ...], kwargs: Any) -> Any:
        """What a self-attention module's ``forward`` does instead, and returns in the backbone's own convention.

        Args:
            forward: the call under way; ``forward.attend(layer, q, k, v)`` is the attention. An attention that is
                not one call uses ``forward.prepare(layer, k, v)`` in each layer, which gives the window.
            layer: number of the module.
            original: its own forward.
        """

    def settings(self, settings: Settings) -> Settings:
        """What was asked for, as this family understands it.

        Raises:
            ValueError: it asks for something that this family cannot do. The model is not touched then.
        """
        return settings

    def rotary(self, head_dim: int) -> tuple[torch.Tensor, list[int]] | None:
        """The model's rotary table ``(P, head_dim // 2, 2)`` and its split over time, height, width; None: Wan's."""
        return None

    def frames_per_block(self) -> int | None:
        """Most frames that are generated together; None: as many as the first forward has."""
        frames = getattr(self.model, "num_frame_per_block", None)
        return frames if isinstance(frames, int) and frames > 0 else None

    def take_over(self, call: Call) -> Callable[[], None] | None:
        """Frees the backbone's own buffers of keys and values, which are not used any more.

        Returns:
            What gives them back, empty; None when there is nothing to give back.
        """
        return None

    def install(self) -> list[Callable[[], None]]:
        """Further changes of the instance; returns what takes them back. Called once, when the model is patched."""
        return []

    def check(  # noqa: B027 (optional)
        self, call: Call, clip: Clip
    ) -> None:
        """Raises RuntimeError when somebody else has changed the cache since the last forward in a way that counts."""

    def advanced(  # noqa: B027 (optional)
        self, call: Call, clip: Clip
    ) -> None:
        """Keeps the backbone's own counters up to date after a forward."""

    def failed(  # noqa: B027 (optional)
        self, call: Call, clip: Clip
    ) -> None:
        """A forward has raised; it may be made again."""

    def with_latents(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: torch.Tensor, start_frame: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the same call over other finished frames, ``latents`` ``(B, F, C, H, W)``.

        For the policy ``recache``, which encodes the history again after a change of prompt; `patch` refuses it for
        families that leave this method as it is.
        """
        raise NotImplementedError


def lacking(owner: object, names: Sequence[str], what: str = "model") -> list[str]:
    """The names that an object has no attribute for, written as ``what.name``."""
    return [f"{what}.{name}" for name in names if not hasattr(owner, name)]


def whole_frames(tokens: int, tokens_per_frame: int, name: str) -> int:
    """``tokens`` as frames.

    Raises:
        ValueError: not a whole number of frames.
    """
    check_int(name, tokens, 0)
    if tokens % tokens_per_frame:
        raise ValueError(
            f"{name} must be a whole number of frames of {tokens_per_frame} tokens, got {tokens} (is the pipeline's "
            "frame_seq_length that of another resolution?)"
        )
    return tokens // tokens_per_frame
