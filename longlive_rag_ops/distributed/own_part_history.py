"""A history whose frames are spread over ranks, of which each places those that it keeps itself: nothing travels."""

from __future__ import annotations

import torch

from ..bank import BankConfig
from ..history import without
from .page_exchange import PageExchange
from .sharded_history import ShardedHistory


class OwnPartHistory(ShardedHistory):
    """As `ShardedHistory`, for attention that joins the ranks' parts: see `merged_attention`.

    Attributes:
        chosen, scores: the part of the choice that this rank keeps; the whole is in ``selected, selected_scores``.
    """

    sets_of_slots = 2  # pages are placed from them

    def _releases_at_once(self, bank: BankConfig) -> bool:
        return False

    def _new_exchange(self) -> PageExchange | None:
        return None

    def clear(self) -> None:
        super().clear()
        self._whole, self._whole_scores = self.chosen.clone(), self.scores.clone()

    @property
    def selected(self) -> torch.Tensor:
        return self._whole

    @property
    def selected_scores(self) -> torch.Tensor:
        return self._whole_scores

    def slot(self, frame: int) -> int:
        return self.bank.slot(frame)

    def stored_pages(self, layer: int) -> dict[str, torch.Tensor]:
        pages = self.bank.slots[layer]
        return self.format.views(pages) if self.format.quantised else {"k_pages": pages[0], "v_pages": pages[1]}

    def _take(self, chosen: torch.Tensor, scores: torch.Tensor) -> None:
        self._whole, self._whole_scores = chosen.clone(), scores.clone()
        others = {frame for row in chosen.tolist() for frame in row if frame >= 0 and not self.keeps(frame)}
        self.chosen, self.scores = without(chosen, scores, others)

    def _leave_out(self, frames: set[int]) -> None:
        super()._leave_out(frames)
        self._whole, self._whole_scores = without(self._whole, self._whole_scores, frames)

    def _send(self) -> None:
        self._sent = True  # they are placed where the bank has them
