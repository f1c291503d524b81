"""What a bank fetches a block, by the share of the selection that the block before had too.

Bytes are counted, not timed. What the published code moves, and what fetching each selection once would, follow from
the sizes alone; their records say so (``extra["computed"]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.block_choice import PlannedChoice
from benchmarks.contenders import Forward, Shape
from benchmarks.figures import Spread
from benchmarks.gpu_contenders import difference
from benchmarks.micro_cases import dtype_name
from benchmarks.one_thread import one_thread
from benchmarks.preset import Preset
from benchmarks.record import Record
from longlive_rag_ops import BankConfig, MemoryWindow
from longlive_rag_ops.bank import PageFormat

SUITE, NAME = "scaling", "bank traffic against repeat rate"
PUBLISHED, ONCE = "as published, every frame on every forward", "every selection once a block"
WARM = 14  # blocks after which any repeat rate is possible
ROUND = 10  # blocks that a number is a mean of: of 60 frames all rates in steps of 5 % are whole numbers
ROUNDED = 0.05  # relative root mean square of what quantised pages may change an output by


@dataclass
class Traffic:
    """What was seen of a video's blocks.

    Attributes:
        choices: frames retrieved for each block.
        fetched: bytes fetched for each block, after it was chosen for and before it was finished.
        hits: frames, likewise, that were still on the device and did not have to be fetched.
        stalled: seconds for which the host waited, likewise.
        error: of the worst block's output, against the same window without a bank.
        late: layers that were not there when they were asked for.
    """

    choices: list[list[int]] = field(default_factory=list)
    fetched: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    stalled: list[float] = field(default_factory=list)
    error: float = 0.0
    late: int = 0


class BankVideo:
    """Two windows that are given the same blocks: one over a bank in host memory, one with its history on the device.

    Blocks have one forward, since a bank moves nothing on later ones.
    """

    def __init__(self, shape: Shape, layers: int, plan: PlannedChoice, blocks: int, storage: str) -> None:
        self.shape, self.layers, self.plan, self.blocks = shape, layers, plan, blocks
        frames = blocks * plan.config.frames_per_block
        self.form = page_format(shape, layers, storage)
        room = self.form.record_bytes * frames
        bank = BankConfig(host_bytes=room, storage=storage, slab_bytes=min(256 << 20, room))
        self.window = shape.window(layers, bank=bank)
        self.resident = shape.window(layers, history_slots=frames)
        self.forwards, _ = shape.block(0, 5)

    def run(self) -> Traffic:
        """All blocks; the bank is closed then."""
        bank = self.window.bank
        assert bank is not None
        seen, before = Traffic(), bank.stats()
        try:
            for block in range(self.blocks):
                start = block * self.plan.config.frames_per_block
                seen.choices.append(self.window.selected[0])
                forward = self.forwards[block % len(self.forwards)]
                out, want = (self._attend(window, forward, start) for window in (self.window, self.resident))
                seen.error = max(seen.error, difference(out, want)[0])
                now = bank.stats()
                seen.fetched.append(now["fetched_bytes"] - before["fetched_bytes"])
                seen.hits.append(now["hits_device"] - before["hits_device"])
                seen.stalled.append((now["stall_us"] - before["stall_us"]) / 1e6)
                before = now
                for window in (self.window, self.resident):
                    window.finish(start, self.plan.embeddings[block])
            seen.late = before["late_layers"]
        finally:
            bank.close()
        return seen

    def _attend(self, window: MemoryWindow, forward: Forward, start: int) -> torch.Tensor:
        out = torch.empty(0)
        for layer in range(self.layers):
            out = window.attend(layer, *forward, start, self.shape.grid)
        return out


def page_format(shape: Shape, layers: int, storage: str) -> PageFormat:
    return PageFormat(storage, layers, 1, shape.tokens, shape.heads, shape.head_dim, shape.dtype)


def frame_bytes(form: PageFormat) -> int:
    """Bytes that fetching a frame moves, in all layers: of plain pages without the padding of stored ones."""
    return form.layers * form.samples * sum(size for _, size in form.segments)


def trouble(seen: Traffic, plan: PlannedChoice, form: PageFormat) -> str:
    """What is wrong with what was seen: empty when nothing is."""
    wrong = plan.trouble(seen.choices, WARM)
    if wrong:
        return wrong
    allowed = ROUNDED if form.quantised else 0.0  # plain pages come back bit for bit
    if not seen.error <= allowed:
        return f"WRONG outputs by {seen.error:.1e}, allowed {allowed:g}"
    for block in range(WARM, len(seen.choices)):
        new = len(set(seen.choices[block]) - set(seen.choices[block - 1]))
        needed = new - seen.hits[block]
        if seen.fetched[block] != needed * frame_bytes(form):
            return (
                f"WRONG: {seen.fetched[block]} bytes fetched for block {block}, which has {new} new frames, "
                f"{seen.hits[block]} of them on the device"
            )
    return ""


def traffic(
    preset: Preset, shape: Shape, rate: float, *, layers: int, rounds: int, storages: Sequence[str], forwards: int
) -> list[Record]:
    """A group of one repeat rate.

    Args:
        rate: share of the chosen frames that the block before had too.
        layers: of the windows.
        rounds: of ten blocks.
        storages: of the bank.
        forwards: of a block, in what is computed.
    """
    blocks = WARM + ROUND * rounds
    plan = PlannedChoice(blocks, rate, shape.config, device=str(shape.device))
    title = (
        f"{NAME}, {100 * rate:g} % repeated, {layers} layers, {shape.tokens} tokens a frame, "
        f"{shape.heads} heads x {shape.head_dim}, {dtype_name(shape.dtype)}"
    )
    facts: dict[str, Any] = {"repeat_rate": rate, "layers": layers, "tokens": shape.tokens, "heads": shape.heads}
    facts |= {"head_dim": shape.head_dim, "top_k": shape.config.top_k, "dtype": dtype_name(shape.dtype)}
    common: dict[str, Any] = {"shape": facts, "environment": dict(preset.facts)}
    if preset.name == "tiny":
        common["mode"] = "dry"
    records = []
    for storage in storages:
        video, name = BankVideo(shape, layers, plan, blocks, storage), f"ours, {storage} pages"
        with one_thread():
            seen = video.run()
        wrong = trouble(seen, plan, video.form)
        if wrong:
            records.append(Record(SUITE, title, name, "ours", "B", absent=wrong, wrong=True, **common))
            continue
        extra = {
            "measured_rate": plan.measured_rate(seen.choices, WARM),
            "frame_bytes": frame_bytes(video.form),
            "error": seen.error,
            "late_layers": seen.late,
            "device_hits": sum(seen.hits[WARM:]),
            "blocks": ROUND * rounds,
        }
        fetched, stalled = (_rounds(x[WARM:]) for x in (seen.fetched, seen.stalled))
        records.append(_record(title, name, "ours", "B", fetched, common, extra))
        part = {"of": name, "part": "the host waits"}
        records.append(_record(title, f"{name}, the host waits", "part", "s", stalled, common, part))
    once = shape.config.top_k * frame_bytes(page_format(shape, layers, "plain"))
    computed = {"computed": True, "forwards": forwards}
    records.append(_record(title, ONCE, "peer", "B", [once], common, computed))
    records.append(_record(title, PUBLISHED, "published", "B", [forwards * once], common, computed))
    return records


def _rounds(values: Sequence[float]) -> list[float]:
    """Means of ten blocks each."""
    return [sum(values[first : first + ROUND]) / ROUND for first in range(0, len(values), ROUND)]


def _record(
    title: str, name: str, role: str, unit: str, values: list[float], common: dict[str, Any], extra: dict[str, Any]
) -> Record:
    spread = Spread.of(values)
    numbers = {"median": float(spread.median), "low": float(spread.low), "high": float(spread.high)}
    runs = 0 if "computed" in extra else len(values)
    return Record(SUITE, title, name, role, unit, runs=runs, extra=extra, **numbers, **common)
