"""Videos generated block after block: 30 seconds by each contender alone, and minutes by ours in bounded memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.block_choice import PlannedChoice
from benchmarks.block_clock import marks_for
from benchmarks.block_contenders import BlockAttention, Ours
from benchmarks.block_memory import MemoryPeak, give_back
from benchmarks.block_roster import Participant, attention_facts, too_little_memory
from benchmarks.block_stream import BlockStream, Scene
from benchmarks.figures import Row, Section
from benchmarks.gpu_contenders import first_line
from benchmarks.harness import Bench
from benchmarks.preset import Done
from benchmarks.record import Record, section_records
from longlive_rag_ops import WindowConfig

RATE = 0.5  # of repeats in the selection
SET_UP = "set-up, before these blocks"
HELD = {"device": "held on the device", "host": "held in host memory"}
Make = Callable[[int], BlockAttention]  # from the frames of the video


@dataclass(frozen=True)
class Run:
    """A video that was generated.

    Attributes:
        seconds: of each block, from the end of the one before.
        held: bytes after a block, by what they are: held on the device, held in host memory, resident set.
        peak: bytes, by what they are.
        set_up: seconds before the first block, in which ours take all their memory.
        trouble: why there is nothing, or what is wrong with it.
        wrong: it failed, or chose other frames than planned.
    """

    seconds: list[float]
    held: dict[int, dict[str, int]]
    peak: dict[str, int]
    set_up: float = 0.0
    trouble: str = ""
    wrong: bool = False


def generate(scene: Scene, make: Make, plan: PlannedChoice, blocks: int, look: Sequence[int], remembers: bool) -> Run:
    """Generates a video of so many blocks, and looks at the memory after some of them.

    Args:
        look: numbers of blocks, from 1.
        remembers: whether its choices are held against the plan.
    """
    marks, peak, held = marks_for(scene.device), MemoryPeak(scene.device), {}
    contender = None
    try:
        marks.settle()
        began = time.perf_counter()
        contender = make(scene.size.frames * blocks)
        marks.settle()
        set_up = time.perf_counter() - began
        stream = BlockStream(scene, contender, plan)
        passed = [marks.mark()]
        for block in range(1, blocks + 1):
            stream()
            passed.append(marks.mark())
            if block in look:
                known = {HELD[where]: size for where, size in contender.held().items()}
                held[block] = known | _known("resident set", peak.resident())
        marks.settle()
        peaks = _known("peak resident set", peak.host()) | _known("peak device memory", peak.device())
        wrong = plan.trouble(stream.choices, plan.steady) if remembers else ""
    except Exception as error:  # one that fails must not take the others with it
        return Run([], {}, {}, trouble=f"FAILED, {first_line(error)}", wrong=True)
    finally:
        if contender is not None:
            contender.close()
    if wrong:
        return Run([], {}, {}, trouble=wrong, wrong=True)
    return Run([marks.between(*pair) for pair in itertools.pairwise(passed)], held, peaks, set_up)


def _known(name: str, size: int | None) -> dict[str, int]:
    return {} if size is None else {name: size}


def thirty_seconds(
    bench: Bench,
    scene: Scene,
    everyone: Sequence[Participant],
    troubles: Mapping[str, str],
    blocks: int,
    sizes: str,
    shape: Mapping[str, Any],
    facts: Mapping[str, Any],
    done: Done,
) -> list[Record]:
    """Each contender's video from its first block on, one after another: seconds in all, of a block, memory.

    Args:
        done: is given the records of those that have run, after each.
    """
    plan, frames = PlannedChoice(blocks, RATE, device=bench.device), scene.size.frames * blocks
    runs, records = dict[str, Run](), list[Record]()
    for one in everyone:
        trouble = troubles[one.name]
        if trouble:
            runs[one.name] = Run([], {}, {}, trouble=trouble, wrong=True)
        elif absent := too_little_memory([one], scene.size, bench.device, bench.dtype, frames)[one.name]:
            runs[one.name] = Run([], {}, {}, trouble=absent)
        else:

            def make(frames: int, one: Participant = one) -> BlockAttention:
                return one.make(scene.size, bench.device, bench.dtype, frames)

            runs[one.name] = generate(scene, make, plan, blocks, [blocks], one.role != "native")
        give_back(bench.device)
        ran = [one for one in everyone if one.name in runs]
        records = video_records(bench, scene, ran, runs, blocks, sizes, shape, facts)
        done(records)
    return records


def video_records(
    bench: Bench,
    scene: Scene,
    everyone: Sequence[Participant],
    runs: Mapping[str, Run],
    blocks: int,
    sizes: str,
    shape: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[Record]:
    """Records of `thirty_seconds`; beside all blocks, as a part that is not in them, what came before the first."""
    known = {**shape, "repeat_rate": RATE, "blocks": blocks}
    roles = {one.name: one.role for one in everyone}
    window = WindowConfig().window
    own = {one.name: attention_facts(bench.device, bench.dtype, scene.size, window, one.engine) for one in everyone}
    title = f"long run, {blocks} blocks in a row from the first one on, one contender after another"
    records = []
    for what, whole in ((f"a block, {sizes}", False), (f"all {blocks} blocks, {sizes}", True)):
        section = Section(f"{title}: {what}")
        for name, run in runs.items():
            seconds = [sum(run.seconds)] if whole and run.seconds else run.seconds
            row = Row(name, list(seconds), _mode(bench), trouble=run.trouble, wrong=run.wrong, shape=own[name])
            section.rows.append(row)
        for record in section_records(section, "block", roles, known, facts):
            run, extra = runs[record.contender], record.extra
            if run.seconds:
                extra = extra | {"seconds_in_all": sum(run.seconds), "set_up_seconds": run.set_up}
            records.append(replace(record, over={}, extra=extra))  # they did not take turns
    records += [
        Record(
            "block",
            section.title,
            f"{name}: {SET_UP}",
            "part",
            shape={**known, **own[name]},
            median=run.set_up,
            low=run.set_up,
            high=run.set_up,
            runs=1,
            mode=_mode(bench),
            extra={"of": name, "part": SET_UP},
            environment=dict(facts),
        )
        for name, run in runs.items()
        if run.seconds
    ]
    sizes_of = {name: run.held.get(blocks, {}) | run.peak for name, run in runs.items()}
    return records + [
        _bytes(f"memory, {blocks} blocks in a row: {sizes}", f"{what}: {name}", roles[name], size, known, facts)
        for what in _names(sizes_of.values())
        for name, found in sizes_of.items()
        if (size := found.get(what)) is not None
    ]


def endless(
    bench: Bench,
    scene: Scene,
    blocks: int,
    first: int,
    window: int,
    kept: int,
    sizes: str,
    shape: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[Record]:
    """Ours over many blocks, memory in host memory that holds ``kept`` frames and forgets the oldest.

    Args:
        first: number, from 1, of the first of the ``window`` blocks that the last ``window`` are held against.
    """
    config = WindowConfig()
    span = kept - config.window - config.recent_exclude - 2 * config.frames_per_block
    plan = PlannedChoice(blocks, RATE, span=span, device=bench.device)
    ends = (first + window - 1, blocks)

    def make(_: int) -> BlockAttention:
        return Ours(scene.size, bench.device, bench.dtype, kept, "plain", policy="oldest")

    run = generate(scene, make, plan, blocks, ends, remembers=True)
    title = f"long run, {blocks} blocks, memory in host memory of {kept} frames, the oldest forgotten: {sizes}"
    section, known = Section(title), {**shape, "repeat_rate": RATE, "history_frames": kept}
    own = attention_facts(bench.device, bench.dtype, scene.size, config.window, "auto")
    for end in ends:
        span_shape = {"first_block": end - window + 1, "last_block": end}
        row = Row(f"ours, blocks {end - window + 1}-{end}", run.seconds[end - window : end], _mode(bench))
        row.trouble, row.wrong, row.shape = run.trouble, run.wrong, span_shape | own
        row.extra = {name.replace(" ", "_") + "_bytes": size for name, size in run.held.get(end, {}).items()}
        section.rows.append(row)
    records = section_records(section, "block", {row.name: "ours" for row in section.rows}, known, facts)
    group = f"memory, {blocks} blocks, memory in host memory of {kept} frames: {sizes}"
    return records + [
        _bytes(group, f"{what}: ours, after block {end}", "ours", found[what], known | {"after_block": end}, facts)
        for what in _names(run.held.values())
        for end, found in run.held.items()
        if what in found
    ]


def _mode(bench: Bench) -> str:
    return "dry" if bench.dry else "eager"


def _names(found: Any) -> list[str]:
    return list(dict.fromkeys(name for one in found for name in one))


def _bytes(group: str, name: str, role: str, size: int, shape: Mapping[str, Any], facts: Mapping[str, Any]) -> Record:
    return Record("block", group, name, role, "B", dict(shape), size, size, size, runs=1, environment=dict(facts))
