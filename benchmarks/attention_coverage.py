"""Share of full-history attention that a window of twelve frames holds, by which old frames are in it.

The attention is that of the evaluation's toy (`longlive_rag_ops.evaluation.full_attention`): nobody trained it, and in
it tokens attend to tokens like them. A sliding window is measured with its frames where it has them in time; in all
other windows old frames sit at position 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.error_records import SUITE, spread_record
from benchmarks.figures import ratio
from benchmarks.preset import Preset
from benchmarks.record import Record
from benchmarks.sample_latents import Sample
from longlive_rag_ops.config import WindowConfig
from longlive_rag_ops.demo.measures import Choice, WindowRule, coverage
from longlive_rag_ops.evaluation.choice import choosing_blocks, most_similar
from longlive_rag_ops.evaluation.full_attention import FullAttention
from longlive_rag_ops.evaluation.named_embedder import NamedEmbedder
from longlive_rag_ops.evaluation.returning_scene import searching_blocks

NAME, BEST = "coverage of full-history attention", "best choice"
# What `coverage` calls them, but for the sliding window, whose frames are elsewhere.
PEERS = {
    "newest_eligible": "newest old frames",
    "random": "random old frames",
    "fixed": "sink and local frames alone",
}
SLIDING = "sliding window"


def coverages(preset: Preset, sample: Sample, embedders: Sequence[NamedEmbedder], config: WindowConfig) -> list[Record]:
    """A group: every embedder's choice beside other rules for the same number of frames, over a clip's blocks.

    Of a scene that returns there is a second group: the blocks that search while nothing of its second stretch can be
    found.
    """
    clip = sample.clip
    choosing = choosing_blocks(clip.frames, config)
    rule = WindowRule(config.window, config.sink, config.top_k)
    sliding = WindowConfig(window=config.window, sink=config.sink, top_k=0, recent_exclude=0)
    placed, slid = (FullAttention(clip.frame_shape, sizes) for sizes in (config, sliding))
    frames = placed.project(clip.latents)
    chosen = {e.name: most_similar(e.embeddings(clip), choosing, config) for e in embedders}
    shares: dict[str, list[float]] = {}
    for number, block in enumerate(choosing):
        masses, elsewhere = (attention.masses(frames, block.start) for attention in (placed, slid))
        found: dict[str, float] = {}
        for name, choices in chosen.items():
            found = coverage(masses, Choice(block.start, block.eligible, choices[number]), rule)
            shares.setdefault(f"ours, {name}", []).append(found["retrieved"])
        choice = Choice(block.start, block.eligible, next(iter(chosen.values()))[number])
        shares.setdefault(SLIDING, []).append(coverage(elsewhere, choice, rule)["sliding"])
        for name, text in (*PEERS.items(), ("best", BEST)):
            shares.setdefault(text, []).append(found[name])
    shape = {"clip": clip.name, "frames": clip.frames, "tokens": placed.model.tokens_per_frame}
    shape |= {name: getattr(config, name) for name in ("window", "sink", "top_k", "recent_exclude")}
    text = f"{NAME}, {clip.name}, {clip.frames} latent frames of {clip.source}, "
    records = _group(f"{text}{len(choosing)} blocks", shares, shape, preset)
    if sample.edit is not None:
        searching = searching_blocks(sample.edit, config)
        some = {name: [values[choosing.index(block)] for block in searching] for name, values in shares.items()}
        records += _group(f"{text}{len(searching)} blocks of the scene that returns", some, shape, preset)
    return records


def _group(title: str, shares: dict[str, list[float]], shape: dict[str, Any], preset: Preset) -> list[Record]:
    records = []
    for name, values in shares.items():
        known: dict[str, Any] = {"shape": shape, "environment": dict(preset.facts)}
        known["extra"] = {"mean": sum(values) / len(values)}
        if name != BEST:
            known |= {"of_ceiling": ratio(values, shares[BEST]).median, "ceiling": BEST}
        role = "ours" if name.startswith("ours") else "ceiling" if name == BEST else "peer"
        records.append(spread_record(title, name, role, values, **known))
    return records


def no_coverage(preset: Preset, names: Sequence[str], why: str) -> list[Record]:
    """The groups' contenders where there are no clips."""
    return [
        Record(SUITE, f"{NAME}, {name}", "ours", "ours", "1", absent=why, environment=dict(preset.facts))
        for name in names
    ]
