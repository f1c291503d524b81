"""What the demo can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bank.config import BankConfig
from ..config import WindowConfig
from .codec import CHANNELS, PIXELS_PER_LATENT
from .embedding import GRID_POOL, DemoEmbedder
from .video import Size, check_size

if TYPE_CHECKING:
    from ..distributed import MemoryMesh

__all__ = ["AMPLE", "FRAMES_PER_BLOCK", "DemoSettings", "parse_size"]

FRAMES_PER_BLOCK = 3
AMPLE = 2**40  # bytes: host memory is taken as it is needed, so that a generous limit costs nothing


def parse_size(text: str) -> Size:
    """Reads ``"320x176"``; ValueError for anything that is not two multiples of 16."""
    width, separator, height = text.lower().partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size: got {text!r}; must be WIDTHxHEIGHT in pixels, such as 320x176")
    try:
        return check_size((int(width), int(height)))
    except ValueError as error:
        raise ValueError(f"--{error}") from None


@dataclass(frozen=True)
class DemoSettings:
    """Options of a run; window sizes are in latent frames and default to those of the published method.

    ``blocks`` limits how much is streamed (0: all of a sample clip, at most ``OWN_VIDEO_BLOCKS`` of an own video).
    ``threads`` 0 leaves torch's own choice. The default is one: matrices are small here, and on a machine that is busy
    with something else, threads that wait for each other make the demo several times slower. With ``bank`` the history
    lives in a memory bank of these limits instead of the window's pool. ``embedder`` makes the vectors that retrieval
    searches. With ``mesh`` the history is spread over its ranks, ``transfer`` as `MemoryWindow` takes it; without a
    ``bank``, each rank keeps its share in memory without a limit.
    """

    window: int = 12
    sink: int = 1
    top_k: int = 6
    recent_exclude: int = 5
    size: Size = (320, 176)
    blocks: int = 0
    seed: int = 0
    threads: int = 1
    bank: BankConfig | None = None
    embedder: DemoEmbedder = GRID_POOL
    mesh: MemoryMesh | None = None
    transfer: str = "auto"

    def __post_init__(self) -> None:
        check_size(self.size)
        self.embedder.check(self.frame_shape)
        if self.blocks < 0:
            raise ValueError(f"--blocks: got {self.blocks}; must be 0 (no limit asked for) or positive")
        if self.threads < 0:
            raise ValueError(f"--threads: got {self.threads}; must be 0 (torch's choice) or positive")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed: got {self.seed}; must be in 0..2147483647")
        if self.top_k < 1:
            raise ValueError(f"--top-k: got {self.top_k}; must be positive (the demo shows what is retrieved)")
        self.window_config()
        if self.blocks and self.blocks * FRAMES_PER_BLOCK < self.shortest:
            raise ValueError(
                f"--blocks: got {self.blocks}; with --window {self.window} and --recent-exclude {self.recent_exclude} "
                f"at least {self.shortest // FRAMES_PER_BLOCK} are needed before anything can be retrieved"
            )

    def window_config(self) -> WindowConfig:
        """The window of a run; ValueError where the sizes do not fit together."""
        return WindowConfig(
            window=self.window,
            sink=self.sink,
            top_k=self.top_k,
            recent_exclude=self.recent_exclude,
            frames_per_block=FRAMES_PER_BLOCK,
        )

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent frame."""
        width, height = self.size
        return CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT

    @property
    def shortest(self) -> int:
        """Latent frames before which no block can retrieve anything, that block included (whole blocks)."""
        # A block starting at frame t has t - window - recent_exclude candidates.
        first = -(-(self.window + self.recent_exclude + 1) // FRAMES_PER_BLOCK) * FRAMES_PER_BLOCK
        return first + FRAMES_PER_BLOCK


OWN_VIDEO_BLOCKS = 60
