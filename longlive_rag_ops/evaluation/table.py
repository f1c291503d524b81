"""The tables, made from the report alone: one a measure, as text for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 118  # characters of a printed line


@dataclass(frozen=True)
class Table:
    """Rows of words under a header.

    Attributes:
        title: of the measure.
        about: how to read it.
        header: names of the columns, the first one's that of the rows.
        rows: each as long as the header.
    """

    title: str
    about: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """Aligned columns; those that do not fit go below, under the rows' names again."""
        lines = [self.title, f"  {self.about}"]
        widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]
        first = 1
        while first < len(widths):
            last, used = first, 2 + widths[0]
            while last < len(widths) and (last == first or used + 3 + widths[last] <= WIDTH):
                used += 3 + widths[last]
                last += 1
            columns = range(first, last)
            shown = [
                "   ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in columns)]).rstrip()
                for row in (self.header, *self.rows)
            ]
            lines += [f"  {line}" for line in (shown[0], "-" * len(shown[0]), *shown[1:])]
            first = last
        return "\n".join(lines) + "\n"

    def markdown(self) -> str:
        """A heading, what it is, and a table."""
        rows = [self.header, ("---", *("---:" for _ in self.header[1:])), *self.rows]
        lines = [f"### {self.title[0].upper()}{self.title[1:]}", "", f"{self.about[0].upper()}{self.about[1:]}.", ""]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def tables(report: dict[str, Any]) -> list[Table]:
    """All that there are numbers for."""
    clips, edits = ([entry["name"] for entry in report[key]] for key in ("clips", "edits"))
    found = [_neighbours(report, clips), _spread(report, clips)]
    if any(row["mean_of_clips"] or row["mean_of_edits"] for row in report["overlap"].values()):
        k = report["settings"]["top_k"]
        found.append(
            _overlap(
                report,
                clips,
                edits,
                "frames",
                f"overlap of the {k} chosen frames with the {k} that attention weighs most",
                "share of the chosen frames; attention is a toy's, over the whole history",
            )
        )
        found.append(
            _overlap(
                report,
                clips,
                edits,
                "mass",
                f"attention mass of the {k} chosen frames, relative to the largest possible",
                "of the same toy's attention over the whole history",
            )
        )
    return found + [_recall(report, edits, k) for k in report["settings"]["recall_at"] if edits]


def summary_text(report: dict[str, Any]) -> str:
    """What the command prints."""
    device, settings = report["device"], report["settings"]
    lines = [f"{c['name']}: {c['frames']} latent frames {_shape(c)}, from {_source(c)}" for c in report["clips"]]
    lines += [f"{e['name']}: {e['what']} ({e['embedding_dim']} numbers)" for e in report["embedders"]]
    lines += [f"{name}: {what}" for name, what in report["rules"].items()]
    if report["edits"]:
        lines.append("A+B: the beginning of A, then B, then the end of A: the scene A returns")
    lines += [f"note: {note}" for note in report["notes"]]
    blocks = [table.text() for table in tables(report)]
    ending = (
        f"window {settings['window']}, sink {settings['sink']}, top-k {settings['top_k']}, recent-exclude "
        f"{settings['recent_exclude']}; {device['cpu']}, threads: {device['threads']}, torch {device['torch']}"
    )
    return "\n".join(["\n".join(lines) + "\n", *blocks, ending])


def summary_markdown(report: dict[str, Any]) -> str:
    """The same as Markdown, pictures included."""
    device, settings = report["device"], report["settings"]
    lines = ["# Evaluation of embedders", "", report["what"], ""]
    lines += [f"- {caveat}" for caveat in report["caveats"]]
    lines += ["", "## Clips and embedders", ""]
    lines += [f"- `{c['name']}`: {c['frames']} latent frames {_shape(c)}, from {_source(c)}" for c in report["clips"]]
    lines += [f"- `{e['name']}`: {e['what']} ({e['embedding_dim']} numbers)" for e in report["embedders"]]
    lines += [f"- `{name}`: {what}" for name, what in report["rules"].items()]
    lines += [f"- `{e['name']}`: {_scenes(e)}" for e in report["edits"]]
    lines += [f"- Note: {note}." for note in report["notes"]]
    lines += ["", "## Results", ""]
    ending = [
        f"Window of {settings['window']} latent frames, sink {settings['sink']}, top-k {settings['top_k']}, recency "
        f"guard {settings['recent_exclude']}, blocks of {settings['frames_per_block']}. {device['cpu']}, threads: "
        f"{device['threads']}, torch {device['torch']}, longlive-rag-ops {device['longlive_rag_ops']}.",
        "",
    ]
    pictures = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in report["pictures"]]
    return "\n".join([*lines, *(table.markdown() for table in tables(report)), *ending, *pictures])


def _shape(clip: dict[str, Any]) -> str:
    return "x".join(map(str, clip["frame_shape"]))


def _source(clip: dict[str, Any]) -> str:
    return "a latent file" if clip["source"] == "latents" else "a video by the demo's linear codec"


def _scenes(edit: dict[str, Any]) -> str:
    spans = ", ".join(
        f"{name} {start}-{stop - 1}" for name, (start, stop) in zip(("A1", "B", "A2"), edit["scenes"], strict=True)
    )
    return (
        f"frames {spans}; A is {edit['outer']}, of which {edit['left_out']} frames are left out, B is {edit['inner']}"
    )


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _by_clip(
    report: dict[str, Any], clips: Sequence[str], entries: dict[str, Any], cells: Callable[[Any], tuple[str, ...]]
) -> tuple[tuple[str, ...], ...]:
    """A row for each embedder on each clip, and one for its mean over several clips."""
    rows = []
    for embedder in (entry["name"] for entry in report["embedders"]):
        rows += [(f"{embedder}, {clip}", *cells(entries[embedder]["clips"][clip])) for clip in clips]
        if len(clips) > 1:
            rows.append((f"{embedder}, mean", *cells(entries[embedder]["mean"])))
    return tuple(rows)


def _neighbours(report: dict[str, Any], clips: Sequence[str]) -> Table:
    neighbours = report["neighbours"]
    return Table(
        "similarity to neighbours",
        "mean cosine of two frames so many latent frames apart",
        ("embedder, clip", *map(str, neighbours["offsets"])),
        _by_clip(report, clips, neighbours["cosine"], lambda values: tuple(map(_cosine, values))),
    )


def _spread(report: dict[str, Any], clips: Sequence[str]) -> Table:
    keys = ("deviation", "low", "median", "high")

    def cells(entry: dict[str, float] | None) -> tuple[str, ...]:
        return tuple(_cosine(None if entry is None else entry[key]) for key in keys)

    return Table(
        "spread of the cosines of all pairs of a clip's frames",
        "standard deviation and percentiles; the wider, the more there is to choose by",
        ("embedder, clip", "deviation", "5 %", "50 %", "95 %"),
        _by_clip(report, clips, report["spread"], cells),
    )


def _overlap(
    report: dict[str, Any], clips: Sequence[str], edits: Sequence[str], key: str, title: str, about: str
) -> Table:
    header = ["", *clips, *(["mean of clips"] if len(clips) > 1 else [])]
    header += [*edits, *(["mean of edits"] if len(edits) > 1 else [])]
    rows = []
    for name, row in report["overlap"].items():
        entries = [row["clips"][clip] for clip in clips] + ([row["mean_of_clips"]] if len(clips) > 1 else [])
        entries += [row["edits"][edit] for edit in edits] + ([row["mean_of_edits"]] if len(edits) > 1 else [])
        rows.append((name, *(_percent(None if entry is None else entry[key]) for entry in entries)))
    return Table(title, about, tuple(header), tuple(rows))


def _recall(report: dict[str, Any], edits: Sequence[str], k: int) -> Table:
    rows = []
    for name, row in report["recall"].items():
        values = [row["edits"][edit][str(k)] for edit in edits]
        rows.append((name, *map(_percent, [*values, *([row["mean"][str(k)]] if len(edits) > 1 else [])])))
    mean = ["mean"] if len(edits) > 1 else []
    share = (
        "share of blocks whose first chosen frame is" if k == 1 else f"share of the first {k} chosen frames that are"
    )
    return Table(
        f"recall of a returning scene at {k}",
        f"{share} of the first A; blocks of the second A, after its first",
        ("", *edits, *mean),
        tuple(rows),
    )
