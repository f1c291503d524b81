"""A window over a mesh and one without, fed the same blocks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rank_processes import device_type
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig
from longlive_rag_ops.distributed import MemoryMesh

GRID = (2, 2)
LAYERS, HEADS, HEAD_DIM, TOKENS, WIDTH = 2, 2, 8, 4, 6
CONFIG = {"window": 9, "sink": 1, "top_k": 4, "recent_exclude": 1, "frames_per_block": 2}
DEALS: dict[str, Callable[[int], int] | None] = {
    "in turn": None,
    "all on one": lambda frame: 1,
    "one frame apart": lambda frame: int(frame == 5),
    "uneven": lambda frame: int(frame % 5 == 3),
}


def make_mesh(
    sizes: Sequence[int], names: Sequence[str], deal: str = "in turn", timeout: float = 60.0, **options: Any
) -> MemoryMesh:
    mesh = init_device_mesh(device_type(), tuple(sizes), mesh_dim_names=tuple(names))
    return MemoryMesh(mesh, timeout=timeout, deal=DEALS[deal], **options)


def make_window(mesh: MemoryMesh | None, batch: int = 1, layers: int = LAYERS, **changed: Any) -> MemoryWindow:
    config = WindowConfig(**CONFIG | {name: changed.pop(name) for name in list(changed) if name in WINDOW_NAMES})
    bank = {"host_bytes": 2**22, "slab_bytes": 2**16} | changed.pop("bank_options", {})
    options = {"bank": BankConfig(**bank), "kv_heads": HEADS, "device": device_type()} | changed
    return MemoryWindow(
        config, layers=layers, batch=batch, tokens_per_frame=TOKENS, head_dim=HEAD_DIM, mesh=mesh, **options
    )


WINDOW_NAMES = {*CONFIG, "min_score", "diversity", "position_rule"}


class Blocks:
    """Random blocks, the same on every rank and device: drawn on the CPU.

    Args:
        kind: of embeddings: ``random``, ``repeated`` (three of them: scores tie), ``nan`` (some are not finite).
    """

    def __init__(
        self,
        batch: int = 1,
        kind: str = "random",
        seed: int = 0,
        frames: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch, self.kind, self.frames = batch, kind, frames
        self.dtype, self.device = dtype, device_type()
        self.generator = torch.Generator().manual_seed(seed)
        self.palette = torch.randn(3, WIDTH, generator=self.generator)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def qkv(self, heads: int = HEADS) -> tuple[torch.Tensor, ...]:
        kv = self.batch, self.frames * TOKENS, heads, HEAD_DIM
        return tuple(self.random(*kv).to(self.device, self.dtype) for _ in range(3))

    def embeddings(self) -> torch.Tensor:
        shape = self.batch, self.frames, WIDTH
        found = self.random(*shape)
        if self.kind == "repeated":
            found = self.palette[torch.randint(3, shape[:2], generator=self.generator)]
        if self.kind == "nan":
            found[torch.rand(shape[:2], generator=self.generator) < 0.25] = torch.nan
        return found.to(self.device)


def tolerance() -> float:
    """Of float32: a GPU sums other numbers of heads and keys in other orders."""
    return 1e-5 if device_type() == "cuda" else 1e-6


def own_heads(mesh: MemoryMesh | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The heads of this rank."""
    if mesh is None:
        return list(tensors)
    return [tensor.chunk(mesh.head_ranks, 2)[mesh.head_rank].contiguous() for tensor in tensors]


def compare(
    mesh: MemoryMesh,
    *,
    blocks: int = 12,
    batch: int = 1,
    kind: str = "random",
    forwards: int = 1,
    early: bool = False,
    exact: bool = False,
    seed: int = 0,
    jitter: float = 0.0,
    **options: Any,
) -> MemoryWindow:
    """Runs both windows and compares selections, scores, window frames and outputs of every block.

    Args:
        early: calls `retrieve` before the last forward.
        exact: outputs must have the same bits.
        jitter: seconds at most that a rank sleeps before it attends, other ranks for other times.
    """
    single = {name: value for name, value in options.items() if name not in ("transfer", "agreement")}
    shared, alone = make_window(mesh, batch, **options), make_window(None, batch, **single)
    stream = Blocks(batch, kind, seed, dtype=options.get("dtype", torch.float32))
    late = random.Random(mesh.rank)
    for block in range(blocks):
        start = block * stream.frames
        embeddings = stream.embeddings()
        for forward in range(forwards + early):
            if early and forward == forwards:
                for window in (shared, alone):
                    window.retrieve(start, embeddings)
            for layer in range(LAYERS):
                q, k, v = stream.qkv()
                want, want_lse = alone.attend(layer, q, k, v, start, GRID, return_lse=True)
                time.sleep(jitter * late.random())
                out, lse = shared.attend(layer, *own_heads(mesh, q, k, v), start, GRID, return_lse=True)
                want, want_lse = own_heads(mesh, want)[0], own_heads(mesh, want_lse.transpose(1, 2))[0].transpose(1, 2)
                if exact:
                    assert torch.equal(out, want), f"block {block}, layer {layer}"
                else:
                    allowed = tolerance() * max(1.0, float(want_lse.abs().max()))
                    for name, got, wanted in (("out", out, want), ("lse", lse, want_lse)):
                        error = float((got - wanted).abs().max())
                        assert error <= allowed, f"block {block}: {name} is off by {error}"
            assert shared.selected == alone.selected, f"block {block}"
            if device_type() == "cuda" and shared.config.diversity > 0:  # one window's kernel sums in another order
                for scores, wanted in zip(shared.selected_scores, alone.selected_scores, strict=True):
                    assert scores == pytest.approx(wanted, abs=1e-5), f"block {block}"
            else:
                assert shared.selected_scores == alone.selected_scores, f"block {block}"
            if shared.transfer != "merge":
                assert shared.window_frames == alone.window_frames, f"block {block}"
        for window in (shared, alone):
            window.finish(start, None if early else embeddings)
    assert alone.config.top_k == 0 or alone.stats()["selected_frames"] > 0
    return shared
