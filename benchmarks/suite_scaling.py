"""Suite scaling: retrieval and attention against the length of history, a bank's traffic against the repeat rate.

Retrieval is linear in the length of history, and is held against reading as many bytes; a copy is timed beside it. A
block's attention must not depend on it. What a bank fetches must fall as selections repeat.

On a CPU a frame has 96 tokens instead of 1560, and 48 over a bank: histories of thousands of frames must fit in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bank_traffic import traffic
from benchmarks.contenders import Shape
from benchmarks.harness import Bench
from benchmarks.history_attention import attention
from benchmarks.history_search import retrieval
from benchmarks.history_stream import FORWARDS
from benchmarks.preset import Done, Preset
from benchmarks.record import Record

RATES = (0.0, 0.5, 0.95)
STORAGES = ("plain", "int8")


@dataclass(frozen=True)
class Sizes:
    """What a preset measures.

    Attributes:
        searched: lengths of history for retrieval, frames.
        embedding, top_k: of retrieval.
        engines: of ours, by which retrieval is timed; the first of them for all lengths and forms of the index.
        engines_up_to: longest history for the others: on a CPU the oracle has temporary tensors larger than the index.
        forms: dtypes of the index beside the preset's.
        forms_up_to: longest history for these: on a CPU int8 rows pass through float32.
        published_up_to: longest history for what is published, which stacks a tensor a frame.
        attended: lengths of history for attention, multiples of three frames.
        attended_embedding: of these; the choice is timed there, too.
        attended_as_published, attended_whole: longest histories for what is published, and for attention to all of it.
        grid, heads, head_dim: of the layer that attends.
        matmul: size of the square product that attention is held against.
        layers, grid_of_bank: of the windows over a bank.
        rounds_of_bank: of ten blocks each.
    """

    searched: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    embedding: int = 1024
    top_k: int = 6
    engines: tuple[str, ...] = ("auto", "reference")
    engines_up_to: int = 10_000
    forms: tuple[torch.dtype, ...] = (torch.int8,)
    forms_up_to: int = 100_000
    published_up_to: int = 10_000
    attended: tuple[int, ...] = (42, 162, 642, 2562)
    attended_embedding: int = 1024
    attended_as_published: int = 2562
    attended_whole: int = 162
    grid: tuple[int, int] = (8, 12)
    heads: int = 4
    head_dim: int = 64
    matmul: int = 1024
    layers: int = 4
    grid_of_bank: tuple[int, int] = (6, 8)
    rounds_of_bank: int = 4


SIZES = {
    "cpu": Sizes(),
    # As published, a history of 2562 frames would take 25 GB of host memory for one layer.
    "gpu": Sizes(
        engines=("auto", "triton", "dense"),
        engines_up_to=1_000_000,
        forms=(torch.float32, torch.int8),  # a MemoryWindow keeps float32 rows
        forms_up_to=1_000_000,
        attended_as_published=642,
        attended_whole=642,
        grid=(30, 52),
        heads=12,
        head_dim=128,
        matmul=8192,
        layers=8,
        grid_of_bank=(30, 52),
    ),
    "tiny": Sizes(
        searched=(40, 100),
        embedding=64,
        engines=("auto", "dense", "triton", "reference"),
        engines_up_to=40,
        forms_up_to=40,
        published_up_to=40,
        attended=(42, 54),
        attended_embedding=128,
        attended_as_published=42,
        attended_whole=42,
        grid=(2, 3),
        heads=2,
        head_dim=32,
        matmul=16,
        layers=2,
        grid_of_bank=(2, 3),
        rounds_of_bank=1,
    ),
}


def groups(bench: Bench, preset: Preset) -> list[Callable[[], list[Record]]]:
    """What measures each group, in order."""
    sizes = SIZES[preset.name]

    def search(history: int) -> list[Record]:
        every = history <= sizes.engines_up_to
        return retrieval(
            bench,
            preset,
            history,
            embedding=sizes.embedding,
            k=sizes.top_k,
            engines=sizes.engines if every else sizes.engines[:1],
            forms=sizes.forms if history <= sizes.forms_up_to else (),
            published=history <= sizes.published_up_to,
        )

    def layer(grid: tuple[int, int]) -> Shape:
        return Shape(grid, sizes.heads, sizes.head_dim, preset.device, preset.dtype)

    def attend() -> list[Record]:
        return attention(
            bench,
            preset,
            sizes.attended,
            shape=layer(sizes.grid),
            embedding=sizes.attended_embedding,
            published_up_to=sizes.attended_as_published,
            all_up_to=sizes.attended_whole,
            matmul=sizes.matmul,
        )

    def fetch(rate: float) -> list[Record]:
        known: dict[str, Any] = {"layers": sizes.layers, "rounds": sizes.rounds_of_bank, "forwards": FORWARDS}
        return traffic(preset, layer(sizes.grid_of_bank), rate, storages=STORAGES, **known)

    found: list[Callable[[], list[Record]]] = [lambda history=history: search(history) for history in sizes.searched]  # type: ignore[misc]
    found.append(attend)
    return found + [lambda rate=rate: fetch(rate) for rate in RATES]  # type: ignore[misc]


def group_count(preset: Preset) -> int:
    """How often `run` calls ``done``."""
    return len(SIZES[preset.name].searched) + 1 + len(RATES)


def run(bench: Bench, preset: Preset, done: Done) -> list[Record]:
    """All groups: retrieval by length of history, attention, the bank's traffic by repeat rate."""
    records: list[Record] = []
    for measure in groups(bench, preset):
        records += measure()
        done(records)
        gc.collect()  # what held the last group's histories
        if preset.device == "cuda":
            torch.cuda.empty_cache()
    return records
