"""What a user asks of a patch, checked before a model is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import WindowConfig, check_choice, check_int, check_position_rule
from ..embedder import Embedder
from ..engines import check_engine
from ..mesh_options import TRANSFERS, missing_bank

if TYPE_CHECKING:
    from ..bank import BankConfig
    from ..distributed import MemoryMesh

SWITCHES = ("keep", "drop", "recache")


@dataclass(frozen=True)
class Settings:
    """Arguments of `patch`, see there. None is what the backbone has itself."""

    window: int | None
    sink: int | None
    top_k: int
    recent_exclude: int
    embedder: Embedder
    position_rule: str | None
    frames_per_block: int | None
    min_score: float | None
    diversity: float
    bank: BankConfig | None
    history_slots: int | None
    engine: str
    on_prompt_switch: str
    max_clips: int | None
    mesh: MemoryMesh | None = None
    transfer: str = "auto"

    def __post_init__(self) -> None:
        for name, value, low in (
            ("window", self.window, 1),
            ("sink", self.sink, 0),
            ("frames_per_block", self.frames_per_block, 1),
            ("history_slots", self.history_slots, 1),
            ("max_clips", self.max_clips, 1),
        ):
            if value is not None:
                check_int(name, value, low)
        check_int("top_k", self.top_k, 0)
        check_int("recent_exclude", self.recent_exclude, 0)
        if self.position_rule is not None:
            check_position_rule(self.position_rule)
        check_choice(self.min_score, self.diversity)
        check_engine(self.engine)
        if self.on_prompt_switch not in SWITCHES:
            raise ValueError(f"on_prompt_switch must be one of {', '.join(SWITCHES)}; got {self.on_prompt_switch!r}")
        if self.bank is not None:
            self._check_bank(self.bank)
        if self.transfer not in TRANSFERS:
            raise ValueError(f"transfer must be one of {', '.join(TRANSFERS)}; got {self.transfer!r}")
        if self.mesh is not None and self.mesh.frame_ranks > 1 and self.top_k > 0 and self.bank is None:
            raise missing_bank(self.mesh.frame_ranks)

    def _check_bank(self, bank: Any) -> None:
        from ..bank import BankConfig, MemoryBank

        if isinstance(bank, MemoryBank):
            raise TypeError(
                f"bank must be a BankConfig, from which each video gets a bank on the model's device; got a MemoryBank "
                f"on {bank.slots.device}"
            )
        if not isinstance(bank, BankConfig):
            raise TypeError(f"bank must be a BankConfig or None, got {type(bank).__name__}")
        if self.top_k == 0:
            raise ValueError("bank keeps frames to retrieve: top_k must be at least 1 with one, got 0")

    def config(self, window: int, sink: int, rule: str, frames_per_block: int) -> WindowConfig:
        """Sizes of the window, from what the backbone has where nothing was asked.

        Raises:
            ValueError: the local part cannot hold a block, or as `WindowConfig`.
        """
        return WindowConfig(
            window=window if self.window is None else self.window,
            sink=sink if self.sink is None else self.sink,
            top_k=self.top_k,
            recent_exclude=self.recent_exclude,
            frames_per_block=frames_per_block if self.frames_per_block is None else self.frames_per_block,
            position_rule=rule,
            min_score=self.min_score,
            diversity=self.diversity,
        )
