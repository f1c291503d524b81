"""A patched model on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_wan import STEPS, Pipeline, ToyWan

from longlive_rag_ops import BankConfig, patched

pytestmark = pytest.mark.gpu
MEMORY: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1}


@pytest.mark.parametrize("bank", [None, BankConfig(host_bytes="4MiB")], ids=["resident", "bank"])
def test_it_is_what_a_cpu_gives(bank: BankConfig | None) -> None:
    with patched(ToyWan(), **MEMORY) as handle:
        expected = Pipeline(handle.model).run(10)  # type: ignore[arg-type]
        log = [entry["frames"] for entry in handle.retrieval_log]
    with patched(ToyWan().cuda(), bank=bank, **MEMORY) as handle:
        video = Pipeline(handle.model).run(10)  # type: ignore[arg-type]
        assert [entry["frames"] for entry in handle.retrieval_log] == log
    # Values pass through ten blocks; cuDNN's convolutions are not those of a CPU.
    assert torch.allclose(video.cpu(), expected, atol=1e-2)


def test_without_memory_it_is_the_model_itself() -> None:
    model = ToyWan().cuda()
    expected = Pipeline(model).run(8)
    with patched(model, top_k=0):
        assert torch.allclose(Pipeline(model).run(8), expected, atol=1e-3)
    assert torch.equal(Pipeline(model).run(8), expected)


def test_a_blocks_forwards_do_not_wait_for_the_device() -> None:
    """All but the clean one, whose timestep is read."""
    model = ToyWan().cuda()
    model.freqs = model.freqs.cuda()
    with patched(model, **MEMORY):
        pipeline = Pipeline(model)
        pipeline.run(6)
        x = torch.randn(1, 4, 2, 4, 6, device="cuda")
        timesteps = [torch.full((1, 2), step, device="cuda") for step in STEPS]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                for t in timesteps:
                    model(x, t, kv_cache=pipeline.cache, current_start=12 * 6)
        finally:
            torch.cuda.set_sync_debug_mode("default")
