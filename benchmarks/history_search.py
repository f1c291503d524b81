"""Retrieval timed over one length of history: our engines, what one would use instead, and reading as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import figures, peers
from benchmarks.block_memory import available_bytes
from benchmarks.ceilings import COPY, READ
from benchmarks.figures import Section
from benchmarks.gpu_contenders import Tensors, clone, poisoned
from benchmarks.gpu_sections import op
from benchmarks.gpu_timer import Call
from benchmarks.harness import Absent, Bench, Entrant
from benchmarks.measured_engines import engine_obstacle
from benchmarks.micro_cases import dtype_name
from benchmarks.planted_index import ExactChoice, PlantedIndex
from benchmarks.preset import Preset
from benchmarks.record import Record, section_records
from longlive_rag_ops.engines import engine_name

SUITE, PUBLISHED, NAME = "scaling", "as published", "retrieval against history"
COPIED = 256 << 20  # bytes that the copy takes at most of a long index; far more than any cache holds
ALONE = 16  # a tensor of so many caches is cold without others to take turns with
SPARE = 1.25  # of memory beyond what the largest tensors take


def retrieval(
    bench: Bench,
    preset: Preset,
    history: int,
    *,
    embedding: int,
    k: int,
    engines: Sequence[str],
    forms: Sequence[torch.dtype],
    published: bool,
) -> list[Record]:
    """A group of one length of history.

    Args:
        history: frames, each with a row of the index.
        embedding: numbers in a row.
        k: frames to choose.
        engines: of ours; all for rows in the preset's dtype, the first of them for other forms of the index.
        forms: dtypes of the index beside the preset's.
        published: time what is published, which has a tensor for each frame.
    """
    title = f"{NAME}, {history} frames, {k} of them by rows of {embedding}, {dtype_name(preset.dtype)}"
    shape = {"history": history, "embedding": embedding, "k": k, "batch": 1}
    needed = SPARE * _most_bytes(history, embedding, preset.dtype, forms)
    there = _free_bytes(bench.device)
    if there is not None and needed > there:
        why = f"needs {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are free"
        known: dict[str, Any] = {"shape": shape, "environment": dict(preset.facts)}
        return [Record(SUITE, title, f"ours, {engines[0]}", "ours", absent=why, **known)]
    planted = PlantedIndex(history, embedding, k, bench.device)
    section = Section(title, yardstick=READ)
    entrants: list[Entrant] = []
    stored: dict[str, str] = {}
    for dtype in (preset.dtype, *forms):
        own = dtype == preset.dtype
        case = planted.case(dtype)
        cases = cold_copies(bench, case)
        moved = figures.index_bytes(history, embedding, dtype.itemsize) + (4 * history if dtype == torch.int8 else 0)
        exact, label = ExactChoice(case), "" if own else f"{dtype_name(dtype)} index, "
        made = _ours(bench, cases, exact, moved, engines if own else engines[:1], label)
        if own:
            made = [_reading(cases), _copying(cases), *made, *_peers(cases, exact, moved, published)]
        stored |= {entrant.name: dtype_name(dtype) for entrant in made}
        entrants += made
    bench.run(section, entrants)
    for row in section.rows:
        row.shape["index"] = stored[row.name]
        if row.name.endswith("auto"):
            row.extra["engine"] = engine_name("auto", bench.device)
    roles = {row.name: _role(row.name) for row in section.rows}
    return section_records(section, SUITE, roles, shape, preset.facts)


def _role(name: str) -> str:
    if name.startswith("ours"):
        return "ours"
    return {READ: "ceiling", COPY: "ceiling", PUBLISHED: "published"}.get(name, "peer")


def _most_bytes(history: int, embedding: int, dtype: torch.dtype, forms: Sequence[torch.dtype]) -> int:
    """Float32 rows, which all forms are made of, the forms, and a copy; int8 rows pass through float32 on a CPU."""
    other = [form for form in (dtype, *forms) if form != torch.float32]
    wide = 2 * 4 if torch.int8 in forms else 0
    copied = min(COPIED, history * embedding * dtype.itemsize)
    return history * embedding * (4 + wide + sum(form.itemsize for form in other)) + copied


def _free_bytes(device: str) -> int | None:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()


def cold_copies(bench: Bench, case: Tensors) -> list[Tensors]:
    """As many cases with the same numbers as keep the cache cold."""
    each = case["index"].nbytes
    if not bench.dry and each >= ALONE * bench.timer.cache_bytes:
        return [case]
    return bench.copies(lambda number: clone(case) if number else case, each)


def _reading(cases: Sequence[Tensors]) -> Entrant:
    """The ceiling of reading: a sum over the index's bytes, which are finite numbers when taken for float32."""
    rows = [case["index"].view(torch.float32) for case in cases]
    return Entrant(READ, [x.sum for x in rows], bytes=rows[0].nbytes)


def _copying(cases: Sequence[Tensors]) -> Entrant:
    """The ceiling of moving: a copy of the index's bytes, of a long index its first ones."""
    rows = [case["index"].flatten().view(torch.uint8)[:COPIED] for case in cases]
    targets = [torch.empty_like(source) for source in rows]
    calls = [functools.partial(target.copy_, source) for target, source in zip(targets, rows, strict=True)]
    return Entrant(COPY, calls, bytes=2 * rows[0].nbytes)


def _ours(
    bench: Bench, cases: Sequence[Tensors], exact: ExactChoice, moved: int, engines: Sequence[str], label: str
) -> list[Entrant]:
    def check(engine: str) -> str:
        obstacle = engine_obstacle(engine, bench.device, bench.dry)
        if obstacle:
            raise Absent(obstacle)
        with poisoned():
            return exact.wrong(*op("topk_retrieve", cases[0], engine)())

    return [
        Entrant(
            f"ours, {label}{engine}",
            [op("topk_retrieve", case, engine) for case in cases],
            functools.partial(check, engine),
            bytes=moved,
        )
        for engine in engines
    ]


def _peers(cases: Sequence[Tensors], exact: ExactChoice, moved: int, published: bool) -> list[Entrant]:
    def right(out: tuple[torch.Tensor, torch.Tensor]) -> str:
        return exact.wrong_rows(out[0])

    made = [
        peers.peer("torch.topk(unit rows @ query)", cases, peers.matmul_topk, right, bytes=moved),
        peers.peer("faiss, IndexFlatIP", cases, peers.faiss_search, right, bytes=moved),
    ]
    if published:
        made.append(peers.peer(PUBLISHED, cases, published_choice, right, bytes=moved))
    return made


def published_choice(case: Tensors) -> Call:
    """The published steps: embeddings in a list, stacked and normalised for every choice; a product, `torch.topk`."""
    part = peers.eligible(case)
    frames, query = list(case["index"][0]), case["query"]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        pool = torch.nn.functional.normalize(torch.stack(frames[part])[None], dim=-1)
        unit = torch.nn.functional.normalize(query, dim=-1)
        scores, rows = torch.topk(torch.bmm(pool, unit[..., None])[..., 0], case["k"], dim=-1)
        return rows + part.start, scores

    return call
