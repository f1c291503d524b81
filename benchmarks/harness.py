"""The frame of a benchmark: what is wrong is not timed, what is right is timed in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import figures
from benchmarks.figures import Row, Section, Shape
from benchmarks.gpu_contenders import difference, first_line
from benchmarks.gpu_timer import Call, Contender

# Root mean square of the error, relative: of a whole result, and of its worst vector of one token and head. Rounding a
# result to bfloat16 alone makes 0.0017; a tile left out or counted twice makes far more in its rows.
RMS, WORST = 0.005, 0.05


class Absent(Exception):
    """What a check raises when there is nothing to check: a library or device that is not here."""


@dataclass
class Entrant:
    """To check and time: ``check`` returns what is wrong, or an empty string; ``launched`` as in `Contender`."""

    name: str
    calls: Sequence[Call]
    check: Callable[[], str] | None = None
    flops: int = 0
    bytes: int = 0
    launched: bool = False


@dataclass
class Bench:
    """What the sections need."""

    shape: Shape
    dtype: torch.dtype
    device: str
    timer: Any  # GpuTimer, DryTimer, or a test's
    dry: bool = False

    def many(self, large: int, small: int) -> int:
        """A size, and what it is in a dry run."""
        return small if self.dry else large

    def copies(self, make: Callable[[int], Any], bytes_each: int) -> list[Any]:
        """As many sets of tensors as keep the cache cold, from ``make(seed)``."""
        count = 2 if self.dry else figures.copies_for_cold_cache(bytes_each, self.timer.cache_bytes)
        return [make(seed) for seed in range(count)]

    def run(self, section: Section, entrants: Sequence[Entrant]) -> None:
        """Checks the entrants, times those that are right, and adds a row for each."""
        rows = {entrant.name: Row(entrant.name, flops=entrant.flops, bytes=entrant.bytes) for entrant in entrants}
        ready = []
        for entrant in entrants:
            row = rows[entrant.name]
            try:
                row.trouble = entrant.check() if entrant.check else ""
                row.wrong = bool(row.trouble)
            except Absent as absent:
                row.trouble = str(absent)
            except Exception as error:  # one that fails must not stop the others
                row.trouble, row.wrong = f"FAILED, {first_line(error)}", True
            if not row.trouble:
                ready.append(Contender(entrant.name, entrant.calls, entrant.launched))
        for name, timing in self.timer.measure(ready).items():
            row = rows[name]
            row.seconds, row.mode = timing.seconds, timing.mode
            if timing.error is not None:
                row.trouble, row.wrong = f"FAILED while it was timed, {first_line(timing.error)}", True
        section.rows += rows.values()


def compared(*pairs: tuple[torch.Tensor, torch.Tensor]) -> str:
    """What is wrong with results held against exact ones: empty when nothing is."""
    for got, exact in pairs:
        whole, worst = difference(got, exact)
        if not (whole < RMS and worst < WORST):  # NaN is wrong too
            return f"WRONG by {whole:.1e}, {worst:.1e} at worst; allowed {RMS:g}, {WORST:g}"
    return ""
