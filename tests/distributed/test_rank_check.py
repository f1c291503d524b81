"""The torchrun demo's comparison of ranks with one process sees what is wrong on one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")

from rank_processes import run_ranks

from longlive_rag_ops import BankConfig
from longlive_rag_ops.demo import rank_check
from longlive_rag_ops.demo.footage import Footage
from longlive_rag_ops.demo.settings import DemoSettings
from longlive_rag_ops.distributed import MemoryMesh


def spoiled(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = MemoryMesh(init_device_mesh("cpu", (2,), mesh_dim_names=("frames",)), timeout=60)
    latents = torch.randn(18, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    footage = Footage("made", "noise", latents, np.zeros((18, 32, 48, 3), np.uint8), (), (), {})
    settings = DemoSettings(mesh=mesh, bank=BankConfig(host_bytes="64MiB"))
    original = rank_check.attend_on_ranks
    for spoil, passes in ((None, True), (torch.nan, False), (1e-3, False)):
        calls = []

        def attend(*args, spoil=spoil, calls=calls, **options):  # type: ignore[no-untyped-def]
            out = original(*args, **options)
            calls.append(None)
            return out + spoil if spoil is not None and rank == 1 and len(calls) == 5 else out

        rank_check.attend_on_ranks = attend
        found = rank_check.check_ranks(footage, settings)
        assert found.passed is passes and found.same_selections == found.blocks == 6, (spoil, found)


def test_one_wrong_output_of_one_rank() -> None:
    run_ranks(2, spoiled)
