"""Suite quality: numerical errors by engine and page dtype, and attention covered by what is retrieved.

Errors are held against float64: of attention on random tensors, of a window that streams latents, of retrieval. The
share of full-history attention is measured on real clips, by the demo's linear codec. Nothing is timed.

Preset tiny has synthetic latents instead of clips, which are fetched once where they are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.arithmetic_error import attention_errors, retrieval_attention_errors
from benchmarks.attention_coverage import coverages, no_coverage
from benchmarks.choice_error import choice_errors
from benchmarks.figures import Shape
from benchmarks.harness import Bench
from benchmarks.one_thread import one_thread
from benchmarks.preset import Done, Preset
from benchmarks.record import Record
from benchmarks.sample_latents import Sample, samples
from benchmarks.streamed_error import streamed_errors
from longlive_rag_ops.config import WindowConfig
from longlive_rag_ops.evaluation.named_embedder import load_embedder

EMBEDDERS = ("average_pool", "grid_pool", "trained")


@dataclass(frozen=True)
class Sizes:
    """What a preset measures.

    Attributes:
        layer: of random tensors.
        engines: of ours, on random tensors.
        streaming: engines of windows that stream latents, whose frames are too large for Triton's interpreter.
        clips: the demo's sample clips; ``A+B`` is A that returns after B. The first is streamed and searched, too.
        synthetic: frames of outer and inner scenes that stand for the clips; None for clips.
        blocks: streamed at most.
        side: of the upper left corner of latents that is streamed; None for all of them.
        rows, embedding, queries: of retrieval by random embeddings.
    """

    layer: Shape
    engines: tuple[str, ...]
    streaming: tuple[str, ...]
    clips: tuple[str, ...] = ("speaker", "bikes", "speaker+bunny")
    synthetic: tuple[int, int] | None = None
    blocks: int = 16
    side: int | None = None
    rows: int = 1000
    embedding: int = 1024
    queries: int = 100


SIZES = {
    "cpu": Sizes(Shape(grid=(8, 12)), ("auto", "triton", "reference"), ("auto", "reference")),
    # The oracle has all heads' scores at once, which at this size would take tens of GiB.
    "gpu": Sizes(Shape(), ("auto", "triton", "dense"), ("auto", "triton", "dense")),
    "tiny": Sizes(
        Shape(grid=(2, 3), block=2, window=8, heads=2, head_dim=32, new_pages=3, embedding=64),
        ("auto", "triton", "reference"),
        ("auto", "reference"),
        clips=("scene", "scene+other"),
        synthetic=(30, 18),
        blocks=9,
        side=4,
        rows=60,
        embedding=64,
        queries=10,
    ),
}

ERRORS = 5  # groups before those of clips


def groups(preset: Preset) -> list[Callable[[], list[Record]]]:
    """What measures each group, in order."""
    sizes, config = SIZES[preset.name], WindowConfig()
    embedders = [load_embedder(name) for name in EMBEDDERS]
    try:
        found, missing = samples(sizes.clips, config, sizes.synthetic), ""
    except (RuntimeError, ValueError) as error:  # no PyAV, or no way to fetch clips
        found, missing = [], str(error)
    # Arithmetic does not mind what is on the pictures.
    clip = found[0].clip if found else samples(("synthetic scene",), config, (60, 0))[0].clip
    streamed = replace(clip, latents=clip.latents[:, :, : sizes.side, : sizes.side])

    def random() -> list[Record]:
        rng = torch.Generator(preset.device).manual_seed(0)
        rows = torch.randn(sizes.rows, sizes.embedding, generator=rng, device=preset.device)
        return choice_errors(preset, "random embeddings", rows, config.top_k, sizes.queries)

    def searched() -> list[Record]:
        records = []
        for embedder in embedders:
            rows = embedder.embeddings(clip).to(preset.device)
            queries = len(rows) - config.window - config.recent_exclude - config.top_k
            text = f"{clip.name} by {embedder.name}"
            records += choice_errors(preset, text, rows, config.top_k, queries)
        return records

    def covered(sample: Sample) -> list[Record]:
        return coverages(preset, sample, embedders, config)

    made: list[Callable[[], list[Record]]] = [
        lambda: attention_errors(preset, sizes.layer, sizes.engines),
        lambda: retrieval_attention_errors(preset, sizes.layer, sizes.engines),
        lambda: streamed_errors(preset, streamed, config, sizes.blocks, sizes.streaming),
        random,
        searched,
    ]
    if missing:
        made.append(lambda: no_coverage(preset, sizes.clips, missing))
    return made + [lambda sample=sample: covered(sample) for sample in found]  # type: ignore[misc]


def group_count(preset: Preset) -> int:
    """How often `run` calls ``done``, where clips are found; `groups` would decode them to say so."""
    return ERRORS + len(SIZES[preset.name].clips)


def run(bench: Bench, preset: Preset, done: Done) -> list[Record]:
    """All groups: errors of attention, of a streamed window and of retrieval, and attention covered."""
    records: list[Record] = []
    with one_thread():
        for measure in groups(preset):
            records += measure()
            done(records)
    return records
