"""A group of the block suite: contenders' blocks split into parts, then timed in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.block_choice import PlannedChoice
from benchmarks.block_clock import PARTS, marks_for
from benchmarks.block_memory import MemoryPeak
from benchmarks.block_roster import (
    EXACT,
    QUANTISED,
    ROUNDED,
    Participant,
    attention_facts,
    too_little_memory,
)
from benchmarks.block_stream import FORWARDS, BlockStream, Scene
from benchmarks.figures import Row, Section, Spread
from benchmarks.gpu_contenders import difference, first_line
from benchmarks.harness import Absent, Bench, Entrant
from benchmarks.record import Record, section_records
from benchmarks.turns import order
from longlive_rag_ops import WindowConfig

MATMUL = "matmul"


@dataclass(eq=False)
class Ready:
    """A participant's video after its warm blocks, or why there is none."""

    one: Participant
    stream: BlockStream | None = None
    seen: torch.Tensor | None = None  # its attention in the last warm block
    peak: int | None = None
    absent: str = ""
    trouble: str = ""


@dataclass(frozen=True)
class Group:
    """What is measured together.

    Attributes:
        title: of the records.
        rate: of repeats in the selection.
        warm: blocks before anything is measured.
        split: blocks whose parts are timed.
        rounds: blocks that are timed, about: it says how long a history is made room for.
        matmul: size of the ceiling's square product.
        shape, facts: of the records.
    """

    title: str
    rate: float
    warm: int
    split: int
    rounds: int
    matmul: int
    shape: Mapping[str, Any]
    facts: Mapping[str, Any]


def measure(
    bench: Bench, scene: Scene, group: Group, everyone: Sequence[Participant], troubles: Mapping[str, str]
) -> list[Record]:
    """All participants' blocks in turns, after each has been split into parts.

    Args:
        troubles: by name, what is wrong with a participant on a small model.
    """
    count = group.warm + blocks_needed(bench.device, group.split, group.rounds)
    plan = PlannedChoice(count, group.rate, device=bench.device)
    absent = too_little_memory(everyone, scene.size, bench.device, bench.dtype, scene.size.frames * count)
    ready = [Ready(one, absent=absent[one.name], trouble=troubles[one.name]) for one in everyone]
    for found in ready:
        if not (found.trouble or found.absent):
            warm_up(bench, scene, found, plan, group.warm, count)
    parts = split(bench, ready, group.split)
    begun = {found.one.name: found.stream.blocks if found.stream else 0 for found in ready}
    before = {found.one.name: bank_counts(found) for found in ready}
    section = timed(bench, scene, group, ready)
    rows = {row.name: row for row in section.rows}
    for found in ready:
        row = rows[found.one.name]
        row.shape = attention_facts(bench.device, bench.dtype, scene.size, WindowConfig().window, found.one.engine)
        finish_row(row, found, plan, begun[found.one.name], group.warm, before[found.one.name])
        if kin(found, ready) == [found]:
            row.extra["unchecked_at_size"] = True  # only on the small model
        if found.stream is not None:
            found.stream.contender.close()
    shape = {**group.shape, "repeat_rate": group.rate}
    roles = {found.one.name: found.one.role for found in ready} | {MATMUL: "ceiling"}
    records = section_records(section, "block", roles, shape, group.facts)
    for name, seconds in parts.items():
        if rows[name].seconds:
            records += part_records(bench, group.title, name, seconds, shape | rows[name].shape, group.facts)
    return records


def blocks_needed(device: str, split: int, rounds: int) -> int:
    """That a video has after its warm ones; on a GPU no more than are used, as their pages take all memory there is."""
    if device == "cuda":
        return (1 + split) + (1 + 2 * rounds)  # see `split`, and `SteadyTimer`
    return split + rounds + 3  # a timer makes a call or two before it times


def timed(bench: Bench, scene: Scene, group: Group, ready: Sequence[Ready]) -> Section:
    """The whole blocks, and the device's own matrix product."""
    one, other = (torch.randn(group.matmul, group.matmul, device=bench.device, dtype=bench.dtype) for _ in range(2))
    entrants = [Entrant(MATMUL, [lambda: one @ other], flops=2 * group.matmul**3)]
    flops = FORWARDS * scene.size.flops(WindowConfig().window)
    for found in ready:
        calls = [found.stream] if found.stream is not None else []
        check = lambda found=found: checked(found, ready)  # noqa: E731
        entrants.append(Entrant(found.one.name, calls, check, flops=flops, launched=True))
    section = Section(group.title, yardstick=MATMUL)
    bench.run(section, entrants)
    return section


def warm_up(bench: Bench, scene: Scene, found: Ready, plan: PlannedChoice, warm: int, count: int) -> None:
    """Fills a participant's window. What fails here is not timed."""
    one, peak = found.one, MemoryPeak(bench.device)
    try:
        contender = one.make(scene.size, bench.device, bench.dtype, scene.size.frames * count)
        stream = BlockStream(scene, contender, plan)
        stream.warm(warm)
        found.seen, found.stream = stream.seen, stream
        found.peak = peak.device()
    except torch.OutOfMemoryError:
        found.absent = "absent: the device has too little memory beside the others"
    except Exception as error:  # one that fails must not stop the others
        found.trouble = f"FAILED, {first_line(error)}"


def kin(found: Ready, ready: Sequence[Ready]) -> list[Ready]:
    """Those that ran and compute the same, itself included: with a memory, or without."""
    native = found.one.role == "native"
    return [one for one in ready if one.seen is not None and (one.one.role == "native") == native]


def checked(found: Ready, ready: Sequence[Ready]) -> str:
    """What is wrong: with what was checked on a small model, and at the timed size against the first of its like.

    That is one as published, or ours with plain pages where there is none; of the native ones, the one as it is run.
    The first itself is held against nothing: where it is wrong, all others disagree.
    """
    if found.absent:
        raise Absent(found.absent)
    if found.trouble or found.seen is None:
        return found.trouble
    plain = [one for one in kin(found, ready) if one.one.storage != "int8"]
    first = min(plain, key=lambda one: one.one.role == "ours", default=found)
    if first is found or first.seen is None:
        return ""
    error = difference(found.seen, first.seen)[0]
    limit = 5 * EXACT if found.seen.dtype == torch.float32 else ROUNDED
    limit = max(limit, QUANTISED) if found.one.storage == "int8" else limit
    allowed = f"allowed {limit:g}"
    return "" if error < limit else f"WRONG by {error:.1e} at the timed size against {first.one.name}; {allowed}"


def split(bench: Bench, ready: Sequence[Ready], count: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of the parts of blocks that are not timed otherwise: splitting costs, on a GPU little.

    On a CPU in turns. On a GPU a contender's blocks follow each other without a stop, after one that is not split: its
    fetch is under way when the next begins, and nobody else's.
    """
    marks, found = marks_for(bench.device), dict[str, list[dict[str, float]]]()
    at_once = count if bench.device == "cuda" else 1
    for number in range(count // at_once):
        for which in order(len(ready), number):
            one = ready[which]
            if one.stream is None or one.trouble:
                continue
            try:
                marks.settle()
                if bench.device == "cuda":
                    one.stream()
                found.setdefault(one.one.name, []).extend(one.stream.split(marks, at_once))
            except Exception as error:
                one.trouble = f"FAILED, {first_line(error)}"
    return found


def part_records(
    bench: Bench,
    group: str,
    name: str,
    seconds: Sequence[Mapping[str, float]],
    shape: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[Record]:
    """Parts of the block in the middle of those that were split, which add up to it; quartiles are over all of them.

    What a part takes over its contender's time is its share of the block that was split.
    """
    whole = [sum(parts.values()) for parts in seconds]
    middle = sorted(range(len(whole)), key=whole.__getitem__)[(len(whole) - 1) // 2]
    records = []
    for part in PARTS:
        spread = Spread.of([parts[part] for parts in seconds])
        shares = Spread.of([parts[part] / total for parts, total in zip(seconds, whole, strict=True)])
        over = asdict(shares) | {"median": seconds[middle][part] / whole[middle]}
        extra = {"of": name, "part": part, "profiled_block": whole[middle]}
        records.append(
            Record(
                "block",
                group,
                f"{name}: {part}",
                "part",
                shape=dict(shape),
                median=seconds[middle][part],
                low=spread.low,
                high=spread.high,
                runs=len(seconds),
                mode="dry" if bench.dry else "eager",
                over={name: over},
                extra=extra,
                environment=dict(facts),
            )
        )
    return records


def finish_row(row: Row, found: Ready, plan: PlannedChoice, begun: int, warm: int, before: Mapping[str, int]) -> None:
    """Holds the choices of all blocks against the plan, and notes what else is known."""
    if found.stream is None or not row.seconds:
        return
    stream = found.stream
    if found.one.role != "native":
        wrong = plan.trouble(stream.choices, warm)
        if wrong:
            row.seconds, row.trouble, row.wrong = [], wrong, True
            return
        row.extra["measured_repeat_rate"] = plan.measured_rate(stream.choices, begun)
    row.extra |= {"blocks": stream.blocks, "held_bytes": stream.contender.held()}
    row.extra |= {f"bank_{name}": value - before[name] for name, value in bank_counts(found).items()}
    if found.peak is not None:
        row.extra["peak_device_bytes"] = found.peak


def bank_counts(found: Ready) -> dict[str, int]:
    """What a bank has counted so far."""
    bank = getattr(getattr(found.stream and found.stream.contender, "window", None), "bank", None)
    names = ("hits_device", "hits_host", "fetched_bytes", "stored_bytes", "stall_us", "late_layers")
    return {} if bank is None else {name: bank.stats()[name] for name in names}
