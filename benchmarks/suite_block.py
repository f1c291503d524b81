"""Suite block: a whole block of a causal video transformer, four noisy forwards and a clean one over three frames.

As published, native, and ours with its memory in several places, at stated repeat rates of the selection; where the
time goes; a video of minutes, and one of 30 seconds. The model runs eagerly, without compilation, for all alike. Who
has a memory pays for its embedder too.

On a CPU the model is small, of a shape in which self-attention has the share of operations that it has in Wan's: tokens
of a frame over width, and the text's and the network's sizes over that, are about as there. What costs the same at any
size weighs more than in the real model. Titles and shapes of records say the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import block_groups, block_runs
from benchmarks.block_clock import SteadyTimer, marks_for
from benchmarks.block_embedder import embedder_facts
from benchmarks.block_groups import Group
from benchmarks.block_memory import give_back
from benchmarks.block_model import ModelSize
from benchmarks.block_roster import BEST, Participant, attention_facts, by_engine, disagreements, participants
from benchmarks.block_stream import FORWARDS, Scene
from benchmarks.harness import Bench
from benchmarks.micro_cases import dtype_name
from benchmarks.preset import Done, Preset
from benchmarks.record import Record
from longlive_rag_ops import WindowConfig

RATES = (0.0, 0.5, 0.95)
CHECKED = ModelSize(layers=2, heads=2, head_dim=32, grid=(2, 3), ffn=96, text=5, channels=16)  # outputs are compared


@dataclass(frozen=True)
class Sizes:
    """What a preset measures.

    Attributes:
        model: of blocks and of the video of 30 seconds.
        endless: of the model of the video of minutes.
        warm: blocks before anything is timed; the window is full from block 8 on, and from block 12 on as many frames
            can be chosen as a repeat rate of 0 needs.
        rounds: at most, whatever the preset says: each makes every history longer.
        split: blocks whose parts are timed; an odd number has one in the middle.
        video, minutes: blocks of the two videos.
        ends: blocks at the beginning, after the warm ones, and at the end of the longer video that are compared.
        kept: frames that the longer video's history has room for.
        engines: of ours that are timed beside each other; on a CPU auto is dense, so there is nothing to compare.
        matmul: size of the ceiling's square product.
    """

    model: ModelSize
    endless: ModelSize
    warm: int = 14
    rounds: int = 20
    split: int = 3
    video: int = 40
    minutes: int = 640
    ends: int = 40
    kept: int = 120
    engines: tuple[str, ...] = ()
    matmul: int = 1024


TINY = ModelSize(layers=2, heads=2, head_dim=16, grid=(2, 3), ffn=64, text=5, channels=16)
SIZES = {
    "cpu": Sizes(
        model=ModelSize(layers=2, heads=2, head_dim=128, grid=(16, 16), ffn=1493, text=85),
        endless=ModelSize(layers=2, heads=2, head_dim=32, grid=(4, 6), ffn=384, text=16),
    ),
    "gpu": Sizes(
        model=ModelSize(),
        endless=ModelSize(layers=6),  # that time stays the same shows in fewer layers too, and 640 blocks are many
        rounds=5,
        split=5,  # two targets are shares of a part
        engines=("auto", "triton", "dense"),
        matmul=8192,
    ),
    "tiny": Sizes(
        model=TINY,
        endless=TINY,
        split=1,
        video=18,
        minutes=50,
        ends=8,
        kept=72,
        engines=("auto", "reference"),
        matmul=16,
    ),
}


def run(bench: Bench, preset: Preset, done: Done) -> list[Record]:
    """All groups: blocks at each repeat rate, by engine, the two videos."""
    sizes, everyone = SIZES[preset.name], participants(preset.device)
    rounds = min(preset.rounds, sizes.rounds)
    if preset.device == "cuda":
        bench = replace(bench, timer=SteadyTimer(rounds, marks_for(preset.device)))
    troubles = disagreements([*everyone, *by_engine(sizes.engines)], CHECKED, preset.device, preset.dtype)
    scene = Scene(sizes.model, preset.device, preset.dtype)
    shape, text = facts_of(sizes.model, preset), text_of(sizes.model, preset)
    records: list[Record] = []

    def blocks(beginning: str, rate: float, contenders: Sequence[Participant]) -> None:
        title = f"{beginning}, repeat rate {100 * rate:g} %, {text}"
        group = Group(title, rate, sizes.warm, sizes.split, rounds, sizes.matmul, shape, preset.facts)
        records.extend(block_groups.measure(bench, scene, group, contenders, troubles))
        give_back(preset.device)
        done(records)

    for rate in RATES:
        blocks("block", rate, everyone)
    if sizes.engines:
        blocks("block by engine", block_runs.RATE, by_engine(sizes.engines))
    records += endless(bench, preset, sizes)  # before the longest group: a target depends on it
    give_back(preset.device)
    done(records)
    one_native = [one for one in everyone if one.name != BEST]

    def so_far(found: list[Record]) -> None:
        done([*records, *found])

    return records + block_runs.thirty_seconds(
        bench, scene, one_native, troubles, sizes.video, text, shape, preset.facts, so_far
    )


def group_count(preset: Preset) -> int:
    """How often `run` calls ``done``: after the blocks at a rate or by engine, the video of minutes, every other."""
    videos = len(participants(preset.device)) - 1  # native is in one way there
    return len(RATES) + bool(SIZES[preset.name].engines) + 1 + videos


def endless(bench: Bench, preset: Preset, sizes: Sizes) -> list[Record]:
    """The video of minutes, of a model of its own."""
    size, first = sizes.endless, sizes.warm + 1
    shape, text = facts_of(size, preset), text_of(size, preset)
    scene = Scene(size, preset.device, preset.dtype)
    return block_runs.endless(bench, scene, sizes.minutes, first, sizes.ends, sizes.kept, text, shape, preset.facts)


def facts_of(size: ModelSize, preset: Preset) -> dict[str, Any]:
    """Of a record's shape."""
    return (
        {
            "layers": size.layers,
            "heads": size.heads,
            "head_dim": size.head_dim,
            "tokens_per_frame": size.tokens,
            "frames_per_block": size.frames,
            "forwards": FORWARDS,
            "window": WindowConfig().window,
            "ffn": size.ffn,
            "text_tokens": size.text,
            "batch": 1,
            "dtype": dtype_name(preset.dtype),
        }
        | embedder_facts(size)
        | attention_facts(preset.device, preset.dtype, size, WindowConfig().window)
    )


def text_of(size: ModelSize, preset: Preset) -> str:
    return (
        f"{size.layers} layers, {size.heads} heads x {size.head_dim}, {size.tokens} tokens a frame, "
        f"{FORWARDS} forwards over {size.frames} frames, {dtype_name(preset.dtype)}"
    )
