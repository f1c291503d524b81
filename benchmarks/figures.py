"""The arithmetic of the benchmarks: operations and bytes, medians and ratios, targets and tables; no timing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A layer's sizes; the defaults are the paper's window for Wan 2.1 1.3B at 832x480."""

    grid: tuple[int, int] = (30, 52)
    block: int = 3  # frames generated together
    window: int = 12  # frames attended to
    heads: int = 12
    head_dim: int = 128
    new_pages: int = 6  # memory frames that a block places at most
    embedding: int = 1024

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def queries(self) -> int:
        return self.block * self.tokens

    @property
    def page(self) -> int:
        """Elements of one frame's keys, or values."""
        return self.tokens * self.heads * self.head_dim

    @property
    def page_scales(self) -> int:
        """Scales of one frame's quantised keys, or values: one for each token and head."""
        return self.tokens * self.heads


def attention_flops(queries: int, keys: int, heads: int, head_dim: int) -> int:
    """Multiplications and additions of the two matrix products; softmax is not counted, as is usual."""
    return 4 * queries * keys * heads * head_dim


def attention_bytes(shape: Shape, frames: int, itemsize: int) -> int:
    """q, k, v read once and the output written once: what no kernel can go below."""
    return (2 * shape.block + 2 * frames) * shape.page * itemsize


def write_bytes(shape: Shape, itemsize: int) -> int:
    """`write_frames`: q read and written; k read, written placed and canonical; v read and written."""
    return 7 * shape.block * shape.page * itemsize


def place_bytes(shape: Shape, pages: int, stored: int, itemsize: int, scaled: bool) -> int:
    """`place_frames`: keys and values read as ``stored`` bytes an element, written as ``itemsize``; float16 scales."""
    return pages * 2 * (shape.page * (stored + itemsize) + (2 * shape.page_scales if scaled else 0))


def index_bytes(rows: int, embedding: int, itemsize: int) -> int:
    """`topk_retrieve`: every row and its int64 id, read once."""
    return rows * (embedding * itemsize + 8)


def copies_for_cold_cache(bytes_each: int, cache_bytes: int, most: int = 256) -> int:
    """How many sets of tensors to take in turn so that four times the cache passes between two uses of one."""
    return min(most, 2 + math.ceil(4 * cache_bytes / max(1, bytes_each)))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Ratio of two things timed in the same rounds: of each round, then the median, so that slow rounds cancel."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def added(*parts: Sequence[float]) -> list[float]:
    """Round by round sum."""
    return [math.fsum(values) for values in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Target:
    """A number that was set before anything was measured.

    Attributes:
        got: what was measured; None when it could not be.
        least: whether ``limit`` is the least or the most allowed.
        lacking: how many of the numbers that should decide were not measured.
    """

    what: str
    got: float | None
    limit: float
    least: bool
    unit: str = ""
    note: str = ""
    lacking: int = 0

    @property
    def met(self) -> bool:
        """NaN and what was not measured, in whole or in part, are not met."""
        if self.got is None or not math.isfinite(self.got) or self.lacking:
            return False
        return self.got >= self.limit if self.least else self.got <= self.limit

    @property
    def verdict(self) -> str:
        return "yes" if self.met else "NOT MEASURED" if self.got is None else "NO"


@dataclass
class Row:
    """One thing timed: seconds a call, in every round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    mode: str = "graph"  # or "eager": launched call by call, the host's time included
    flops: int = 0
    bytes: int = 0
    trouble: str = ""  # why there are no seconds
    wrong: bool = False  # it failed or its output is wrong; not so when it is absent
    shape: dict[str, Any] = field(default_factory=dict)  # what differs from the other rows'
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Section:
    """A group of rows timed in the same rounds, and the targets that they decide.

    Attributes:
        yardstick: name of the row whose rate the others are held against.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    yardstick: str = ""

    def find(self, name: str) -> Row | None:
        """The row of that name, if it was timed."""
        return next((row for row in self.rows if row.name == name and row.seconds), None)

    def fraction(self, name: str, of: str = "") -> float | None:
        """Median share of the yardstick's rate that a row reaches."""
        own, full = (self.find(row) for row in (name, of or self.yardstick))
        if own is None or full is None or bool(own.flops) != bool(full.flops) or not (own.flops or own.bytes):
            return None  # operations and bytes do not compare
        done, all_done = (row.flops or row.bytes for row in (own, full))
        return done / all_done * ratio(full.seconds, own.seconds).median

    def over(self, name: str, other: str) -> float | None:
        """Median ratio of two rows' times."""
        one, two = self.find(name), self.find(other)
        return None if one is None or two is None else ratio(one.seconds, two.seconds).median


def fastest(section: Section, names: Sequence[str]) -> str | None:
    """Which of the named rows has the smallest median; None when none was timed."""
    timed = [name for name in names if section.find(name)]
    return min(timed, key=lambda name: statistics.median(section.find(name).seconds), default=None)  # type: ignore[union-attr]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left column left-aligned, others right-aligned; as wide as it needs to be."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  "
        + "   ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "  " + "-" * (sum(widths) + 3 * (len(widths) - 1)), *lines[1:]])


def section_text(section: Section) -> str:
    """The section's rows as a table: time with quartiles, rate, share of the yardstick's rate; below, what was not."""
    cells = []
    for row in [row for row in section.rows if row.seconds]:
        time = Spread.of(row.seconds)
        share = section.fraction(row.name) if section.yardstick and (row.flops or row.bytes) else None
        cells.append(
            [
                row.name,
                f"{1e6 * time.median:.1f}",
                f"{1e6 * time.low:.1f} - {1e6 * time.high:.1f}",
                _rate_text(row, time.median),
                "-" if share is None else f"{100 * share:.1f} %",
                row.mode,
            ]
        )
    header = ("what", "us, median", "quartiles", "rate", f"of {section.yardstick or 'rate'}", "timed")
    missing: dict[str, list[str]] = {}
    for row in [row for row in section.rows if not row.seconds]:
        missing.setdefault(row.trouble, []).append(row.name)
    absent = [f"  not timed: {', '.join(names)}: {trouble}" for trouble, names in missing.items()]
    return "\n".join([section.title, table(header, cells), *absent])


def _rate_text(row: Row, seconds: float) -> str:
    if row.flops:
        return f"{row.flops / seconds / 1e12:.1f} TFLOP/s"
    return f"{row.bytes / seconds / 1e9:.0f} GB/s" if row.bytes else "-"


def targets_text(sections: Sequence[Section]) -> str:
    """Every target beside what was measured."""
    rows = []
    for target in [t for section in sections for t in section.targets]:
        got = "-" if target.got is None else f"{target.got:.3f}{target.unit}"
        rows.append(
            [target.what, f"{'>=' if target.least else '<='} {target.limit:g}{target.unit}", got, target.verdict]
        )
    return table(("target", "set", "got", "met"), rows)


def as_data(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Everything, as plain data for JSON."""
    return [
        {
            "title": section.title,
            "yardstick": section.yardstick,
            "rows": [
                asdict(row)
                | ({"spread": asdict(Spread.of(row.seconds))} if row.seconds else {})
                | {"share_of_yardstick": section.fraction(row.name) if section.yardstick else None}
                for row in section.rows
            ],
            "targets": [asdict(target) | {"met": target.met} for target in section.targets],
        }
        for section in sections
    ]
