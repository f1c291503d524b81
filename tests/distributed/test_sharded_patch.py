"""A patched model on a mesh: the video and the choices of one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_processes import device_type, run_ranks
from shard_cases import make_mesh
from torch import Tensor, nn

from longlive_rag_ops import BankConfig, patch, patched
from longlive_rag_ops.distributed import MemoryMesh
from longlive_rag_ops.embedder import MeanKeys

sys.path.append(str(Path(__file__).parents[1]))  # where other processes find the toy model

from toy_wan import Pipeline, ToyWan

MEMORY: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1}
BANK = BankConfig(host_bytes="8MiB", slab_bytes=2**16)


def plain_norms(model: ToyWan) -> ToyWan:
    """Norms over the heads of all ranks are the model's own business; without them heads are independent."""
    for block in model.blocks:
        block.self_attn.norm_q = block.self_attn.norm_k = nn.Identity()
    return model


def split_heads(model: ToyWan, mesh: MemoryMesh) -> ToyWan:
    """Tensor parallelism by hand: each rank projects its own heads, and outputs are summed."""

    def summed(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        out = out.clone()
        dist.all_reduce(out, group=mesh.head_group)
        return out

    for block in model.blocks:
        attention = block.self_attn
        attention.num_heads //= mesh.head_ranks
        for name in "qkv":
            linear = getattr(attention, name)
            linear.weight = nn.Parameter(linear.weight.chunk(mesh.head_ranks, 0)[mesh.head_rank].clone())
            linear.bias = nn.Parameter(linear.bias.chunk(mesh.head_ranks, 0)[mesh.head_rank].clone())
        attention.o.weight = nn.Parameter(attention.o.weight.chunk(mesh.head_ranks, 1)[mesh.head_rank].clone())
        attention.o.bias = nn.Parameter(attention.o.bias / mesh.head_ranks)
        attention.o.register_forward_hook(summed)
    return model


def over_keys(rank: int) -> None:
    mesh = make_mesh([2], ["heads"])
    model = ToyWan().to(device_type())
    with pytest.raises(
        ValueError, match=r"embedder must be one of latents on a mesh with 2 ranks along its heads.*MeanKe"
    ):
        patch(model, **MEMORY, bank=BANK, mesh=mesh, embedder=MeanKeys(0))
    patch(model, **MEMORY, bank=BANK, mesh=mesh).unpatch()  # it was left as it was


def test_keys_of_some_heads_are_no_embedding(device: str) -> None:
    run_ranks(2, over_keys, device=device)


def by_frame(rank: int) -> None:
    model = ToyWan().to(device_type())
    with patched(model, **MEMORY) as handle:
        want = Pipeline(model).run(12)
        log = [entry["frames"] for entry in handle.retrieval_log]
    mesh = make_mesh([2], ["frames"])
    for given, transfer in ((mesh, "pages"), (mesh, "merge"), (mesh.mesh, "auto")):
        with patched(model, mesh=given, transfer=transfer, bank=BANK, **MEMORY) as handle:
            video = Pipeline(model).run(12)
            assert float((video - want).abs().max()) < 1e-5
            assert [entry["frames"] for entry in handle.retrieval_log] == log
            assert len(handle.clips[0].window.bank.frames()) == 12
    for options, message in (
        ({}, "bank must be given where 2 ranks share the frames"),
        ({"bank": BANK, "transfer": "all"}, "transfer must be one of auto, pages, merge; got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            patched(model, mesh=mesh, **options, **MEMORY)
    with pytest.raises(TypeError, match="DeviceMesh or a MemoryMesh, got str"):
        patched(model, mesh="frames", **MEMORY)


def test_by_frame(device: str) -> None:
    run_ranks(2, by_frame, device=device)


def by_head(rank: int) -> None:
    model = plain_norms(ToyWan().to(device_type()))
    with patched(model, **MEMORY):
        want = Pipeline(model).run(12)
    mesh = make_mesh([2], ["heads"])
    model = split_heads(model, mesh)
    with patched(model, mesh=mesh, **MEMORY) as handle:
        video = Pipeline(model).run(12)
        assert float((video - want).abs().max()) < 1e-5
        assert handle.clips[0].window.pool.shape[5] == 1


def test_by_head(device: str) -> None:
    run_ranks(2, by_head, device=device)
