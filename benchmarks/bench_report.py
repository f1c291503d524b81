"""The report: targets, a table for each group, and plots, out of results files.

The same files make the same report. ``longlive-rag bench-report`` is its command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.group_table import Table, grouped, measured_table, not_measured, parts_table, shape_text
from benchmarks.record import Record, is_dry
from benchmarks.report_plots import Picture, draw_pictures
from benchmarks.result_set import ResultSet, facts_text, folders_in, read_result_sets, result_folders
from benchmarks.targets import RULES, got_text, limit_text, verdict

__all__ = ["report_text", "result_folders", "write_report"]

SUITE_TITLES = {
    "micro": "Ops (micro)",
    "scaling": "Against history (scaling)",
    "block": "A whole block (block)",
    "quality": "Numerical error and coverage (quality)",
}
_HEAD = """# Benchmark results

Made from the results files by `longlive-rag bench-report`; how each is measured stands in benchmarks/README.md.

Times are medians, with quartiles. Contenders of one table took turns, round by round in one process, and a ratio of
two is the median of the rounds' ratios. Where they ran one after another the title says so, and a ratio, marked ~, is
one of medians. A share is of the device's own rate for a copy, a sum or a matrix product, timed in the same rounds, or
of what the column names.
"""


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Writes report.md and plots.

    Args:
        folders: of results, one a device; or folders of such folders.
        out: folder to write to; made where it is not there.

    Returns:
        What was written, the report first.

    Raises:
        ValueError: a folder or file that is not one of results.
        RuntimeError: matplotlib is not there.
    """
    sets = read_result_sets([one for folder in folders for one in folders_in(folder)])
    out.mkdir(parents=True, exist_ok=True)
    pictures = {one.slug: draw_pictures(one, out) for one in sets}
    path = out / "report.md"
    path.write_text(report_text(sets, pictures), encoding="utf-8")
    return [path, *(out / picture.name for own in pictures.values() for picture in own)]


def report_text(sets: Sequence[ResultSet], pictures: dict[str, list[Picture]]) -> str:
    """The report as Markdown, with links to pictures beside it."""
    parts = [_HEAD, "## What it must show\n", targets_table(sets).markdown() + "\n"]
    for one in sets:
        parts.append(f"## {one.device}\n")
        for suite, records in one.records.items():
            parts += [f"### {SUITE_TITLES.get(suite, suite)}\n", f"{facts_text(records)}.\n"]
            if is_dry(records):
                parts.append("**A dry run: these numbers measure nothing.**\n")
            own = [picture for picture in pictures[one.slug] if picture.suite == suite]
            parts += [f"![{picture.title}]({picture.name})\n" for picture in own]
            parts += [_group(group) for group in grouped(records).values()]
    return "\n".join(parts)


def targets_table(sets: Sequence[ResultSet]) -> Table:
    """Each target for each device of its kind; a line for a target that no device has met or missed."""
    rows = []
    for rule in RULES:
        own = [one for one in sets if one.kind == rule.kind]
        for one in own:
            target = rule.judge(one.all)
            rows.append([rule.what, one.device, limit_text(target), got_text(target), verdict(target), target.note])
        if not own:
            target = rule.judge([])
            device = "a CUDA device" if rule.kind == "cuda" else "a CPU"
            rows.append([rule.what, device, limit_text(target), got_text(target), verdict(target), ""])
    return Table(("target", "device", "set", "got", "met", "of"), rows, words=True)


def _group(group: Sequence[Record]) -> str:
    lines = [f"#### {group[0].group}\n"]
    shape = shape_text(group)
    if shape:
        lines.append(f"{shape}.\n")
    for table in (measured_table(group), parts_table(group)):
        if table is not None and table.rows:
            lines.append(table.markdown() + "\n")
    absent = not_measured(group)
    if absent:
        lines.append("\n".join(f"- {line}" for line in absent) + "\n")
    return "\n".join(lines)
