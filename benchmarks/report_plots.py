"""The report's pictures: time against history, shares of the device's own rates, and where a block's time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bar_plots import draw_block, draw_ceiling
from benchmarks.group_table import Records
from benchmarks.line_plots import draw_attention, draw_retrieval, draw_traffic
from benchmarks.record import is_dry
from benchmarks.result_set import ResultSet
from benchmarks.roofline_plot import draw_roofline
from longlive_rag_ops.extras import need

# name of the file, suite, title, what draws it (or returns None where the records have nothing for it)
PICTURES: tuple[tuple[str, str, str, Callable[[Records], Any | None]], ...] = (
    ("ceiling", "micro", "Share of the device's own rate that each op reaches", draw_ceiling),
    ("roofline", "micro", "Roofline: what the ops reach of what the device allows", draw_roofline),
    ("retrieval", "scaling", "Retrieval against the length of history", draw_retrieval),
    ("attention", "scaling", "Attention against the length of history", draw_attention),
    ("traffic", "scaling", "Bytes that the bank moves against the repeat rate of selections", draw_traffic),
    ("block", "block", "Where a block's time goes", draw_block),
)


@dataclass(frozen=True)
class Picture:
    """A file beside the report, and the suite that it belongs to."""

    name: str
    title: str
    suite: str


def draw_pictures(results: ResultSet, out: Path) -> list[Picture]:
    """Draws what the records of one device allow.

    Raises:
        RuntimeError: matplotlib is not there.
    """
    agg = need("matplotlib.backends.backend_agg", "drawing the plots", extra="bench")
    pictures = []
    for name, suite, title, draw in PICTURES:
        records = results.records.get(suite, [])
        drawn = draw(records)
        if drawn is None:
            continue
        device = results.device + (": A DRY RUN, these numbers measure nothing" if is_dry(records) else "")
        width, height = drawn.get_size_inches()
        drawn.text(0.2 / width, 1 - 0.18 / height, title, va="top", fontsize=13, fontweight="bold")
        drawn.text(0.2 / width, 1 - 0.47 / height, device, va="top", fontsize=9.5, color="#444444")
        picture = Picture(f"{results.slug}-{name}.png", title, suite)
        agg.FigureCanvasAgg(drawn)
        # Without the version of matplotlib, which would differ between machines.
        drawn.savefig(out / picture.name, format="png", dpi=110, metadata={"Software": None})
        pictures.append(picture)
    return pictures
