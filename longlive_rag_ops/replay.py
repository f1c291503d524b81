"""Replay of a recorded trace through the public ops: the same frames chosen, the same outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .bank.config import BankConfig
from .config import WindowConfig
from .rotary import rotary_table
from .traces import Trace
from .window import MemoryWindow

if TYPE_CHECKING:
    from .distributed import MemoryMesh

TOLERANCE = 2e-5  # largest float32 error of an output, relative to the recorded output's root mean square


@dataclass(frozen=True)
class BlockResult:
    """One block of a replay.

    Attributes:
        block, start_frame: which block.
        chosen, recorded: for each sample, frames retrieved, most similar first.
        error: largest absolute error of any forward's output, over that output's root mean square.
    """

    block: int
    start_frame: int
    chosen: list[list[int]]
    recorded: list[list[int]]
    error: float

    @property
    def same_choice(self) -> bool:
        """Whether the frames chosen equal the recorded ones, in order."""
        return self.chosen == self.recorded

    @property
    def passed(self) -> bool:
        """Whether choice and outputs agree; NaN never does."""
        return self.same_choice and self.error <= TOLERANCE


def trace_window(
    trace: Trace,
    engine: str = "auto",
    device: str = "cpu",
    bank: BankConfig | None = None,
    mesh: MemoryMesh | None = None,
    transfer: str = "auto",
) -> MemoryWindow:
    """A window with the sizes of the trace's config, for its one layer."""
    sizes = trace.config
    config = WindowConfig(
        window=sizes["window_frames"],
        sink=sizes["sink_frames"],
        top_k=sizes["top_k"],
        recent_exclude=sizes["recent_exclude"],
        frames_per_block=sizes["frames_per_block"],
    )
    rope: dict[str, Any] = sizes["rope"]
    split = rope.get("split")
    table = rotary_table(
        sizes["head_dim"],
        rope.get("max_positions", 1024),
        rope.get("theta", 10000.0),
        split,
        torch.float32,
        device,
    )
    return MemoryWindow(
        config,
        layers=1,
        batch=sizes["batch"],
        tokens_per_frame=sizes["tokens_per_frame"],
        kv_heads=sizes["heads"],
        head_dim=sizes["head_dim"],
        device=device,
        rope=table,
        rope_split=split,
        engine=engine,
        bank=bank,
        mesh=mesh,
        transfer=transfer,
    )


def replay(
    trace: Trace,
    engine: str = "auto",
    device: str = "cpu",
    bank: BankConfig | None = None,
    mesh: MemoryMesh | None = None,
    transfer: str = "auto",
) -> Iterator[BlockResult]:
    """Runs the trace block by block through `MemoryWindow`, which calls ``torch.ops.longlive``.

    With a mesh, whose ranks share frames and not heads, all of them run it.
    """
    window = trace_window(trace, engine, device, bank, mesh, transfer)
    for block, entry in enumerate(trace.log):
        start, error = entry["start_frame"], 0.0
        for forward in range(trace.config["forwards_per_block"]):
            q, k, v = (trace.block(block, forward, name).to(device) for name in "qkv")
            out = window.attend(0, q, k, v, start, trace.config["grid"]).double().cpu()
            recorded = trace.block(block, forward, "out").double()
            worst = (out - recorded).abs().max() / recorded.square().mean().sqrt()
            error = max(error, float(worst)) if not worst.isnan() else float("nan")
            if error != error:
                break
        chosen = window.selected
        expected = entry["memory_frames"] or [[] for _ in range(trace.config["batch"])]
        yield BlockResult(block, start, chosen, expected, error)
        window.finish(start, trace.embedding(block).to(device))
