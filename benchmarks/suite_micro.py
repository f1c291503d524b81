"""Suite micro: every op at the paper's shape and around it, one parameter at a time, and the attention step.

On a CPU a frame has 390 tokens instead of the paper's 1560, and 96 where parameters other than the tokens are varied:
attention at 1560 takes seconds a call. Titles of groups say the sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.attention_step import ROLES as STEP_ROLES
from benchmarks.attention_step import attention_step
from benchmarks.ceilings import COPY, MATMUL, READ
from benchmarks.figures import Section, Shape
from benchmarks.harness import Bench, Entrant
from benchmarks.intensity import intensity
from benchmarks.micro_cases import Point, dtype_name
from benchmarks.micro_ops import OPS
from benchmarks.preset import Done, Preset
from benchmarks.record import Record, section_records
from longlive_rag_ops.engines import engine_name

GRIDS = {
    6: (2, 3),
    12: (3, 4),
    96: (8, 12),
    220: (11, 20),
    390: (15, 26),
    880: (22, 40),
    1560: (30, 52),
    3600: (45, 80),
}
SUITE = "micro"
ENGINES = ("auto", "dense", "triton", "reference")
STORED = (torch.int8, torch.float8_e4m3fn)  # of pages, as a bank keeps them
ATTENTION = ("window_attend", "retrieve_attend")


@dataclass(frozen=True)
class Sizes:
    """What a preset measures.

    Attributes:
        paper, around: tokens a frame at the paper's shape, and where other parameters are varied.
        layer: all other sizes at the paper's shape.
        windows, tokens, head_dims, batches, dtypes, ks, parts: what is varied; the width, heads x head_dim, stays.
        attention_tokens: tokens where these are varied for attention: on a CPU the groups of the paper's shape have the
            most.
        engines: at the paper's shape; elsewhere the first of them.
        oracle: whether the engines dense and reference are timed where the tokens are varied, at the fewest, too. The
            oracle's retrieve_attend is the sum of its other ops.
        matmul: size of the ceiling's square product.
        no_product: dtypes whose product is no ceiling: attention in them has none.
        moved: bytes that the ceiling's copy reads and its sum reads.
    """

    paper: int
    around: int
    windows: tuple[int, ...]
    tokens: tuple[int, ...]
    attention_tokens: tuple[int, ...]
    head_dims: tuple[int, ...]
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ks: tuple[int, ...]
    parts: tuple[int, ...]
    engines: tuple[str, ...]
    oracle: bool
    matmul: int
    moved: int
    layer: Shape = field(default_factory=Shape)
    rows: int = 480  # of the index: two minutes of video
    k: int = 6
    no_product: tuple[torch.dtype, ...] = ()


HALVES_FIRST = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {
    "cpu": Sizes(
        paper=390,
        around=96,
        windows=(6, 9, 12, 18, 24, 30),
        tokens=(96, 220, 390),
        attention_tokens=(96, 220),
        head_dims=(64, 128),
        batches=(1, 2, 4),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        ks=(1, 2, 4, 6, 8, 16, 32),
        parts=(2, 4, 8),
        engines=("auto", "triton"),  # auto is dense on a CPU
        oracle=True,
        matmul=1024,
        no_product=(
            torch.float16,
        ),  # a plain loop where a CPU has no instructions for it; attention is 8 times as fast
        moved=128 << 20,
    ),
    "gpu": Sizes(
        paper=1560,
        around=1560,
        windows=(6, 9, 12, 18, 24, 30),
        tokens=(390, 880, 1560, 3600),
        attention_tokens=(390, 880, 1560, 3600),
        head_dims=(64, 128),
        batches=(1, 2, 4),
        dtypes=HALVES_FIRST,
        ks=(1, 2, 4, 6, 8, 16, 32),
        parts=(2, 4, 8),
        engines=("auto", "dense", "triton"),
        oracle=False,
        matmul=8192,
        moved=1 << 30,
    ),
    "tiny": Sizes(
        paper=12,
        around=6,
        windows=(6, 12),
        tokens=(6, 12),
        attention_tokens=(6, 12),
        head_dims=(16, 32),
        batches=(1, 2),
        dtypes=(torch.float32, torch.bfloat16),
        ks=(1, 6),
        parts=(2, 3),
        engines=("auto", "dense", "triton"),
        oracle=True,
        matmul=16,
        moved=1 << 10,
        layer=Shape(heads=2, head_dim=32, embedding=32),
        rows=60,
    ),
}


@dataclass(frozen=True)
class Sweep:
    """A group of points of some ops, that differ in one parameter.

    Attributes:
        ops: that the parameter matters to.
        points: by label.
    """

    ops: Sequence[str]
    points: Mapping[str, Point]


def paper_point(sizes: Sizes, preset: Preset, tokens: int) -> Point:
    layer = replace(sizes.layer, grid=GRIDS[tokens])
    return Point(layer, preset.dtype, k=sizes.k, rows=sizes.rows)


def sweeps(sizes: Sizes, preset: Preset) -> list[Sweep]:
    """All parameters, one at a time."""
    base = paper_point(sizes, preset, sizes.around)
    shape, layer = base.shape, list(OPS)[1:]
    width = shape.heads * shape.head_dim

    def at(tokens: Sequence[int]) -> dict[str, Point]:
        return {f"{n} tokens": paper_point(sizes, preset, n) for n in tokens}

    # Where no room is left for them beside the sink and the block, fewer frames are retrieved.
    room = {window: min(shape.new_pages, window - 1 - shape.block) for window in sizes.windows}
    windows = {f"{n} frames": base.with_shape(window=n, new_pages=pages) for n, pages in room.items()}
    heads = {f"{width // d} heads x {d}": base.with_shape(head_dim=d, heads=width // d) for d in sizes.head_dims}
    dtypes = {dtype_name(dtype): replace(base, dtype=dtype) for dtype in sizes.dtypes}
    stored = {
        f"{dtype_name(dtype)} pages, {dtype_name(preset.dtype)} queries": replace(base, stored=dtype)
        for dtype in STORED
    }
    return [
        Sweep(ATTENTION, windows),
        Sweep([op for op in layer if op not in ATTENTION], at(sizes.tokens)),
        Sweep(ATTENTION, at(sizes.attention_tokens)),
        Sweep(layer, heads),
        Sweep(list(OPS), {f"batch {n}": replace(base, batch=n) for n in sizes.batches}),
        Sweep(("window_attend", "place_frames"), dtypes | stored),
        Sweep(("topk_retrieve", "write_frames", "retrieve_attend", "merge_attention"), dtypes),
        Sweep(("topk_retrieve",), {f"k {k}": replace(base, k=k) for k in sizes.ks}),
        Sweep(("merge_attention",), {f"{n} parts": replace(base, parts=n) for n in sizes.parts}),
    ]


def ceiling(bench: Bench, sizes: Sizes, op: str, dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, Entrant]:
    """What the device does at best, in each dtype: a product for attention, a sum for a search, a copy for all else.

    Bytes have no dtype: dtypes share a sum, or a copy. A dtype may have no product.
    """
    if op in ATTENTION:
        return ceilings.products(
            bench.device, {dtype: sizes.matmul for dtype in dtypes if dtype not in sizes.no_product}
        )
    bytes_ = ceilings.reading if op == "topk_retrieve" else ceilings.copying
    return dict.fromkeys(dtypes, bytes_(bench.device, sizes.moved))


@dataclass(frozen=True)
class Part:
    """Entrants of a group at one point; ``every`` as in `micro_ops`."""

    point: Point
    engines: Sequence[str]
    prefix: str = ""
    every: bool = False


def group(bench: Bench, preset: Preset, sizes: Sizes, title: str, op: str, parts: Sequence[Part]) -> list[Record]:
    """Times a group and its ceiling in turns."""
    best = ceiling(bench, sizes, op, list(dict.fromkeys(part.point.dtype for part in parts)))
    entrants = list({entrant.name: entrant for entrant in best.values()}.values())
    several = len(entrants) > 1 or any(part.point.dtype not in best for part in parts)
    shapes: dict[str, dict[str, Any]] = {}
    work: dict[str, float] = {}  # operations a byte
    held: dict[str, str] = {}  # the ceiling that each is held against
    for part in parts:
        made = OPS[op](replace(bench, shape=part.point.shape), part.point, part.engines, part.prefix, part.every)
        entrants += made
        shapes |= {entrant.name: part.point.facts() for entrant in made}
        work |= {entrant.name: intensity(op, part.point) for entrant in made}
        if part.point.dtype in best:
            held |= {entrant.name: best[part.point.dtype].name for entrant in made}
    section = Section(title, yardstick="" if several else entrants[0].name)
    bench.run(section, entrants)
    for row in section.rows:
        row.shape = shapes.get(row.name, {})
        row.extra["intensity"] = work.get(row.name, 0.0)
        if row.name.endswith("auto"):
            row.extra["engine"] = engine_name("auto", bench.device)
    roles = {row.name: role(row.name) for row in section.rows}
    records = section_records(section, SUITE, roles, {}, preset.facts)
    return [with_share(section, record, held.get(record.contender, "")) for record in records] if several else records


def with_share(section: Section, record: Record, own: str) -> Record:
    """The record with its share of a ceiling's rate; as it is where it has none."""
    share = section.fraction(record.contender, of=own) if own else None
    return record if share is None else replace(record, of_ceiling=share, ceiling=own)


def role(name: str) -> str:
    """Of a contender: names of ours end with an engine's."""
    if name.split(",")[0] in (MATMUL, COPY, READ):
        return "ceiling"
    return "ours" if name.split()[-1] in ENGINES else "peer"


def groups(bench: Bench, preset: Preset) -> list[Callable[[], list[Record]]]:
    """What measures each group, in order: the attention step, the paper's shape, all that lies around it."""
    sizes = SIZES[preset.name]
    paper = paper_point(sizes, preset, sizes.paper)
    timed = functools.partial(group, bench, preset, sizes)
    found: list[Callable[[], list[Record]]] = [functools.partial(step, bench, preset, paper, sizes)]
    for op in OPS:
        what = paper.text() + ("" if sizes.paper == 1560 else "; the paper's have 1560 tokens")
        if op == "topk_retrieve":
            what = f"{paper.k} of {paper.rows} rows of {paper.shape.embedding}"
        parts = [Part(paper, sizes.engines, every=True)]
        found.append(functools.partial(timed, f"{op}, the paper's shape: {what}", op, parts))
    for sweep in sweeps(sizes, preset):
        labels = list(sweep.points)
        span = f"{labels[0]} to {labels[-1]}" if len(labels) > 2 else " and ".join(labels)
        by_tokens = labels[0].endswith("tokens")
        for op in sweep.ops:
            size = "" if by_tokens or op == "topk_retrieve" else f", {sizes.around} tokens a frame"
            parts = [Part(point, sizes.engines[:1], f"{label}: ") for label, point in sweep.points.items()]
            if sizes.oracle and by_tokens and op != "retrieve_attend":
                parts[0] = replace(parts[0], engines=(*sizes.engines[:1], "dense", "reference"))
            found.append(functools.partial(timed, f"{op}, {span}{size}", op, parts))
    return found


def step(bench: Bench, preset: Preset, point: Point, sizes: Sizes) -> list[Record]:
    """The attention step's group."""
    section, shape = attention_step(replace(bench, shape=point.shape), sizes.matmul)
    return section_records(section, SUITE, STEP_ROLES, shape, preset.facts)


def group_count(preset: Preset) -> int:
    """How often `run` calls ``done``."""
    return 1 + len(OPS) + sum(len(sweep.ops) for sweep in sweeps(SIZES[preset.name], preset))


def run(bench: Bench, preset: Preset, done: Done) -> list[Record]:
    """All groups."""
    records: list[Record] = []
    for measure in groups(bench, preset):
        records += measure()
        done(records)
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return records
