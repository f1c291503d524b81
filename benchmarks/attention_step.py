"""The attention step of one layer, rotation, cache and attention: as published, native, ours; a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.contenders import AsPublished, Ours, RollingWindow, Shape, SlidingWindow
from benchmarks.figures import Row, Section, attention_flops
from benchmarks.gpu_contenders import difference
from benchmarks.harness import Bench, Entrant, compared
from benchmarks.history_stream import TwoChoices
from benchmarks.micro_cases import dtype_name
from longlive_rag_ops import WindowConfig

FORWARDS = 5  # of a block: 4 noisy ones and a clean one
FIRST = 30  # frame; the first block for which two sets of six frames may be retrieved in turn
WARM_BLOCKS = 12  # the last two of them have retrieved the one set and the other: from here on no frame is repeated
FULL_BLOCKS = 4  # after which a window without memory is full, and each block is like the next
SPARE = 16  # blocks that there is room for beside the rounds: timers run a few before
EXACT = 2e-6  # relative root mean square of what float32 may differ by
PUBLISHED, NATIVE, BEST, OURS = AsPublished.name, RollingWindow.name, SlidingWindow.name, Ours.name
PAGEABLE = f"{PUBLISHED}, pageable history"
ROLES = {PUBLISHED: "published", PAGEABLE: "published", NATIVE: "native", BEST: "native", OURS: "ours"}
ROLES |= {ceilings.MATMUL: "ceiling"}


class Stream:
    """A contender's video, whose every call is its next block.

    All blocks have the same q, k, v. Embeddings are such that from ``FIRST`` on two sets of frames are retrieved in
    turn: each block's six frames are none that the window holds.
    """

    def __init__(self, contender: Any, shape: Shape, forwards: int, seed: int = 0, blocks: int = 64) -> None:
        self.contender, self.blocks, self.frames = contender, 0, shape.config.frames_per_block
        self.forwards, _ = shape.block(seed, forwards)
        self.choices = TwoChoices(FIRST, shape.config, shape.embedding, shape.device)
        # Beforehand: making and uploading them is nobody's work.
        self._embeddings = [self.choices.embeddings(self.frames * block) for block in range(blocks)]

    def __call__(self) -> torch.Tensor:
        """Runs the next block; the last forward's output."""
        return self._run(self.forwards)

    def warm(self, blocks: int = WARM_BLOCKS) -> torch.Tensor:
        """Runs blocks of one forward each; the last one's output."""
        out = torch.empty(0)
        while self.blocks < blocks:
            out = self._run(self.forwards[:1])
        return out

    def wrong(self) -> str:
        """What is wrong with the frames that the next block will retrieve: empty when nothing is, or none are."""
        if isinstance(self.contender, AsPublished):
            found = [row + self.contender.shape.config.sink for row in self.contender.choose()]
        elif isinstance(self.contender, Ours):
            found = self.contender.window.selected[0]
        else:
            return ""
        want = self.choices.wanted(self.frames * self.blocks)
        return "" if found == want else f"WRONG frames {found}, planned {want}"

    def _run(self, forwards: Any) -> torch.Tensor:
        number, start = self.blocks, self.frames * self.blocks
        self.blocks += 1
        known = number < len(self._embeddings)
        embeddings = self._embeddings[number] if known else self.choices.embeddings(start)
        return self.contender.run_block(start, forwards, embeddings)


def disagreement(make: Callable[[Shape], Any], device: str, dtype: torch.dtype) -> str:
    """What is wrong with a contender's outputs over twelve blocks on a small grid, held against the oracle's.

    Native windows are held against the oracle without retrieval, at global positions.
    """
    shape = Shape(grid=(2, 3), heads=2, head_dim=32, device=device, dtype=dtype)
    contender = make(shape)
    if isinstance(contender, (RollingWindow, SlidingWindow)):
        shape.config = WindowConfig(window=12, sink=1, top_k=0, recent_exclude=0, position_rule="absolute")
    oracle = Ours(shape, engine="reference")
    for number in range(12):
        forwards, embeddings = shape.block(number, 2)
        start = shape.config.frames_per_block * number
        got, want = (x.run_block(start, forwards, embeddings) for x in (contender, oracle))
        wrong = _compared(got, want)
        if wrong:
            return f"{wrong}, block {number}"
    return ""


def _compared(got: torch.Tensor, want: torch.Tensor) -> str:
    wrong = compared((got, want))
    if not wrong and got.dtype == torch.float32:
        error = difference(got, want)[0]
        wrong = "" if error < EXACT else f"WRONG by {error:.1e}; allowed {EXACT:g} in float32"
    return wrong


def attention_step(bench: Bench, matmul: int = ceilings.SQUARE) -> tuple[Section, dict[str, Any]]:
    """Blocks of five forwards, timed once all windows are full; the section, and its records' shape.

    No block repeats a frame that the one before has retrieved. What is published and ours must agree at the timed size
    too, on the last block before.

    Args:
        matmul: size of the ceiling's product.
    """
    layer = replace(bench.shape, window=WindowConfig().window, block=WindowConfig().frames_per_block)
    shape = Shape(layer.grid, layer.heads, layer.head_dim, bench.device, bench.dtype)
    section = Section(
        f"attention step, one layer, a block of {FORWARDS} forwards, 0 % of what it retrieves repeated: {layer.window} "
        f"frames of {layer.tokens} tokens, {layer.heads} heads x {layer.head_dim}, {dtype_name(bench.dtype)}",
        yardstick=ceilings.MATMUL,
    )
    blocks = WARM_BLOCKS + bench.timer.rounds + SPARE
    makers: dict[str, Callable[[Shape], Any]] = {PUBLISHED: AsPublished}
    if bench.device == "cuda":
        makers[PAGEABLE] = lambda shape: AsPublished(shape, pageable=True)
    makers |= {NATIVE: RollingWindow, BEST: SlidingWindow}
    makers[OURS] = lambda shape: Ours(shape, history_slots=layer.block * blocks)
    streams = {name: Stream(make(shape), shape, FORWARDS, blocks=blocks) for name, make in makers.items()}
    full = dict.fromkeys((NATIVE, BEST), FULL_BLOCKS)
    outs = {name: stream.warm(full.get(name, WARM_BLOCKS)) for name, stream in streams.items()}
    before = streams[OURS].contender.window.stats()

    def check(name: str) -> str:
        if name not in (NATIVE, BEST) and (wrong := _compared(outs[name], outs[PUBLISHED])):
            return f"{wrong}, at the timed size, against {PUBLISHED}"
        return streams[name].wrong() or disagreement(makers[name], bench.device, bench.dtype)

    flops = FORWARDS * attention_flops(layer.queries, layer.window * layer.tokens, layer.heads, layer.head_dim)
    # Each block changes the state that the next one starts from, so that no graph can hold it.
    entrants = [ceilings.product(bench.device, bench.dtype, matmul)] + [
        Entrant(name, [stream], lambda name=name: check(name), flops=flops, launched=True)  # type: ignore[misc]
        for name, stream in streams.items()
    ]
    bench.run(section, entrants)
    for row in section.rows:
        stream = streams.get(row.name)
        if stream is None:
            continue
        row.extra["blocks"] = stream.blocks
        if row.seconds and (wrong := stream.wrong()):  # what was timed is not what the title says
            row.seconds, row.trouble, row.wrong = [], f"{wrong}, after the rounds", True
        if row.name in (PUBLISHED, PAGEABLE):
            row.extra["page_locked_history"] = stream.contender.history_k[0].is_pinned()
        if row.name == OURS:
            _count(row, before, stream.contender.window.stats())
    facts = {
        "window": layer.window,
        "tokens": layer.tokens,
        "heads": layer.heads,
        "head_dim": layer.head_dim,
        "forwards": FORWARDS,
        "layers": 1,
        "batch": 1,
        "repeat_rate": 0.0,
        "dtype": dtype_name(bench.dtype),
    }
    return section, facts


def _count(row: Row, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Notes the frames retrieved for timed blocks; a repeated one makes the row wrong."""
    counts = {name: after[name] - before[name] for name in ("selected_frames", "repeated_frames")}
    row.extra |= counts
    if row.seconds and counts["repeated_frames"]:
        row.seconds, row.wrong = [], True
        row.trouble = f"WRONG: {counts['repeated_frames']} of {counts['selected_frames']} frames repeated"
