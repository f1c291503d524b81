"""Records of one group as a table: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import figures
from benchmarks.record import Record

Records = Sequence[Record]


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        words: Markdown aligns all columns to the left: they are no numbers. In a terminal the first is.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False

    def text(self) -> str:
        return figures.table(self.header, self.rows)

    def markdown(self) -> str:
        rule = ["---", *["---" if self.words else "---:"] * (len(self.header) - 1)]
        return "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in [self.header, rule, *self.rows])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by group, in their order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.group, []).append(record)
    return found


def reference(group: Records) -> Record | None:
    """Our contender that the others' times are given over: ``auto`` where it is among several, else the first."""
    ours = [record for record in group if record.role == "ours" and record.median is not None]
    return next((record for record in ours if "auto" in record.contender.split()), ours[0] if ours else None)


def point(contender: str) -> str:
    """Which of several points of a group a contender was timed at: what stands before the last ``: `` of its name."""
    return contender.rpartition(": ")[0]


def references(group: Records) -> dict[str, Record]:
    """`reference` at each point of the group."""
    found = {}
    for name in dict.fromkeys(point(record.contender) for record in group):
        mine = reference([record for record in group if point(record.contender) == name])
        if mine is not None:
            found[name] = mine
    return found


def measured_table(group: Records) -> Table:
    """What has a number, but for parts: median, quartiles, times over ours, rate, share of the ceiling's rate."""
    ours = references(group)
    timed = [record for record in group if record.median is not None and record.role != "part"]
    columns = {
        "median": [quantity(record.median, record.unit) for record in timed],
        "quartiles": [_quartiles(record) for record in timed],
        _over_title(list(ours.values())): [_over(record, ours.get(point(record.contender))) for record in timed],
        "rate": [rate(record) for record in timed],
        _ceiling_title(timed): ["-" if r.of_ceiling is None else f"{100 * r.of_ceiling:.1f} %" for r in timed],
        "peak memory": [_memory(record) for record in timed],
        "mode": [record.mode for record in timed],
    }
    kept = {title: cells for title, cells in columns.items() if title in ("median", "quartiles") or _tells(cells)}
    names = [record.contender for record in timed]
    return Table(["contender", *kept], [list(row) for row in zip(names, *kept.values(), strict=True)])


def _tells(cells: Sequence[str]) -> bool:
    """Whether a column is worth its place: something in it, and not that everything was launched as usual."""
    return not set(cells) <= {"-", "eager"}


def _ceiling_title(timed: Records) -> str:
    names = sorted({record.ceiling for record in timed if record.ceiling})
    return f"of {names[0]}" if len(names) == 1 else "of ceiling"


def _over_title(ours: Records) -> str:
    names = {record.contender.removeprefix(f"{point(record.contender)}: ") for record in ours}
    return f"over {names.pop()}" if len(names) == 1 else "over ours"


def _memory(record: Record) -> str:
    """``extra``'s peak_device_bytes and peak_host_bytes, where a suite has measured them."""
    known = {what: record.extra.get(f"peak_{what}_bytes") for what in ("device", "host")}
    return ", ".join(f"{quantity(value, 'B')} {what}" for what, value in known.items() if value) or "-"


def _quartiles(record: Record) -> str:
    if record.runs < 2 or record.low is None or record.high is None:
        return "-"
    return f"{quantity(record.low, record.unit)} - {quantity(record.high, record.unit)}"


def _over(record: Record, mine: Record | None) -> str:
    if mine is None or record.role == "ceiling" or record.unit != "s":
        return "-"
    value = time_over(record, mine)
    if value is None:
        return "-"
    took_turns = record is mine or mine.contender in record.over
    return f"{'' if took_turns else '~'}{value:.2f}"


def time_over(record: Record, other: Record) -> float | None:
    """Time of one over that of another: of their rounds where they took turns, else of their medians."""
    if record is other:
        return 1.0
    if record.median is None or not other.median or record.unit != other.unit:
        return None
    if other.contender in record.over and record.group == other.group:
        return record.over[other.contender]["median"]
    return record.median / other.median


def parts_table(group: Records) -> Table | None:
    """Each contender's parts beside each other, with their shares of it; None where the group has no parts."""
    parts = [record for record in group if record.role == "part" and record.median is not None]
    if not parts:
        return None
    whole = {record.contender: record for record in group if record.role != "part"}
    cells = {(part.extra.get("of", ""), part.extra.get("part", part.contender)): part for part in parts}
    owners, names = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    rows = []
    for owner in owners:
        row = [owner]
        for name in names:
            part = cells.get((owner, name))
            share = time_over(part, whole[owner]) if part is not None and owner in whole else None
            time = "-" if part is None else quantity(part.median, part.unit)
            row.append(time if share is None else f"{time} ({100 * share:.1f} %)")
        rows.append(row)
    return Table(["part of", *names], rows)


def not_measured(group: Records) -> list[str]:
    """What is absent or wrong, with the reason; those of one reason in one line."""
    reasons: dict[tuple[bool, str], list[str]] = {}
    for record in group:
        if record.median is None:
            reasons.setdefault((record.wrong, record.absent), []).append(record.contender)
    return [
        f"{'wrong' if wrong else 'absent'}: {', '.join(names)}: {reason.removeprefix('absent: ')}"
        for (wrong, reason), names in reasons.items()
    ]


def shape_text(group: Records) -> str:
    """What the shapes of all records of a group have in common."""
    shapes = [record.shape for record in group if record.role != "ceiling" and record.shape]
    common: Mapping[str, Any] = shapes[0] if shapes else {}
    return ", ".join(
        f"{name.replace('_', ' ')} {plain(value)}"
        for name, value in common.items()
        if all(shape.get(name) == value for shape in shapes)
    )


def plain(value: Any) -> str:
    """A value of a shape: floats short, lists as sizes."""
    if isinstance(value, (list, tuple)):
        return "x".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def group_text(group: Records) -> str:
    """For a terminal: title, tables, and what is not measured."""
    lines = [group[0].group]
    for table in (measured_table(group), parts_table(group)):
        if table is not None and table.rows:
            lines.append(table.text())
    return "\n".join([*lines, *(f"  {line}" for line in not_measured(group))])


def quantity(value: float | None, unit: str) -> str:
    """A number with a unit that suits its size."""
    if value is None:
        return "-"
    if unit == "s":
        for limit, factor, name in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
            if value < limit:
                return f"{_digits(value * factor)} {name}"
        return f"{_digits(value)} s"
    if unit == "B":
        for limit, name in ((1e3, "B"), (1e6, "kB"), (1e9, "MB")):
            if value < limit:
                return f"{_digits(value / limit * 1e3)} {name}" if name != "B" else f"{value:.0f} B"
        return f"{_digits(value / 1e9)} GB"
    return f"{value:.3g}"


def _digits(value: float) -> str:
    """Three digits that mean something, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(record: Record) -> str:
    """Operations or bytes a second."""
    if not record.median or record.unit != "s":
        return "-"
    if record.flops:
        return f"{_digits(record.flops / record.median / 1e9)} GFLOP/s"
    return f"{_digits(record.bytes / record.median / 1e9)} GB/s" if record.bytes else "-"
