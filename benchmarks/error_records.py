"""Numerical errors as records: how far results are from exact ones, as a whole and in their worst vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.figures import Spread
from benchmarks.gpu_contenders import difference, first_line
from benchmarks.harness import Absent
from benchmarks.measured_engines import split_engines
from benchmarks.preset import Preset
from benchmarks.record import Record

SUITE = "quality"
WHOLE, WORST = "root mean square", "worst vector"
Pair = tuple[torch.Tensor, torch.Tensor]  # a result and the exact one, ``(..., D)``


class ErrorGroups:
    """Two groups with the same contenders: errors relative to the root mean square, of all and of the worst vector.

    Args:
        title: of both.
        shape: of all records.
        facts: the environment.
    """

    def __init__(self, title: str, shape: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self.title, self._shape, self._facts = title, dict(shape), dict(facts)
        self._found: dict[str, list[Record]] = {WHOLE: [], WORST: []}

    @property
    def records(self) -> list[Record]:
        """Of the one group, then of the other."""
        return [record for group in self._found.values() for record in group]

    def add(
        self, name: str, role: str, measure: Callable[[], Pair], shape: Mapping[str, Any] | None = None, **extra: Any
    ) -> None:
        """Measures a contender; one that fails or returns NaN is wrong.

        Args:
            measure: returns what it made, and what is exact. May raise `Absent`.
            shape: what differs from the others'.
        """
        known: dict[str, Any] = {"shape": {**self._shape, **(shape or {})}, "environment": self._facts}
        errors, trouble, wrong = (0.0, 0.0), "", True
        try:
            errors = difference(*measure())
        except Absent as absent:
            trouble, wrong = str(absent), False
        except Exception as error:  # one that fails must not stop the others
            trouble = f"FAILED, {first_line(error)}"
        if not all(error < float("inf") for error in errors):  # NaN, too
            trouble = "WRONG: NaN or infinity"
        for what, error in zip((WHOLE, WORST), errors, strict=True):
            title = f"{self.title}, {what}"
            if trouble:
                found = Record(SUITE, title, name, role, "1", absent=trouble, wrong=wrong, **known)
            else:
                found = single(title, name, role, error, extra=extra, **known)
            self._found[what].append(found)

    def present(self, engines: Sequence[str], preset: Preset) -> list[str]:
        """The engines that run here; of the others the groups have a record that says why not."""
        found, missing = split_engines(engines, preset.device, preset.name == "tiny")
        known: dict[str, Any] = {"shape": self._shape, "environment": self._facts}
        for engine, why in missing.items():
            for what, records in self._found.items():
                records.append(Record(SUITE, f"{self.title}, {what}", engine, "ours", "1", absent=why, **known))
        return found


def single(title: str, name: str, role: str, value: float, **known: Any) -> Record:
    """A record of a number that is the same each time."""
    return Record(SUITE, title, name, role, "1", median=value, low=value, high=value, runs=1, **known)


def spread_record(title: str, name: str, role: str, values: list[float], **known: Any) -> Record:
    """A record of numbers, one a block: median and quartiles."""
    spread = Spread.of(values)
    numbers = {"median": spread.median, "low": spread.low, "high": spread.high}
    return Record(SUITE, title, name, role, "1", runs=len(values), **numbers, **known)
