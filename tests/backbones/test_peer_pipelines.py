"""Through the published pipeline classes, their code unchanged."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peer_pipelines import generate, longlive, longlive_rag, self_forcing
from torch import Tensor

from longlive_rag_ops import patched

pytestmark = pytest.mark.backbones
MEMORY = {"window": 12, "sink": 1, "top_k": 6, "recent_exclude": 5}


@pytest.fixture
def copied_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """LongLive-RAG's pool of evicted frames as it is on a GPU; on a CPU it would be views of a buffer that it rolls."""
    to = Tensor.to

    def copying(self: Tensor, *args: Any, **options: Any) -> Tensor:
        moved = to(self, *args, **options)
        return moved.clone() if args[:1] == ("cpu",) and options.get("non_blocking") else moved

    monkeypatch.setattr(Tensor, "to", copying)


def test_longlive_rag_with_memory(copied_pool: None) -> None:
    """Its own class, its native class and Self-Forcing's pipeline, patched, generate what its own pipeline does."""
    pipeline = longlive_rag("latentmem")
    expected = generate(pipeline, 10)
    chosen = [entry["selected_global_frames"] for entry in pipeline.memory_indices_log]
    assert [len(frames[0]) for frames in chosen] == [1, 4, 6, 6]
    for patchee in (pipeline, longlive_rag("native"), self_forcing(), self_forcing("Causal-Forcing")):
        with patched(patchee, **MEMORY) as handle:
            video = generate(patchee, 10)
            found = [entry["frames"] for entry in handle.retrieval_log if entry["frames"][0]]
            assert found[:4] == chosen
        assert float((video - expected).abs().max()) < 5e-6
    assert torch.equal(generate(pipeline, 10), expected), "unpatched"


def test_two_videos_of_a_pipeline_that_keeps_its_cache() -> None:
    pipeline = self_forcing()
    expected = generate(pipeline, 6)
    with patched(pipeline, top_k=0) as handle:
        for _ in range(2):
            assert float((generate(pipeline, 6) - expected).abs().max()) < 1e-5
        assert handle.stats()["videos"] == 2 and len(handle.clips) == 1
    assert torch.equal(generate(pipeline, 6), expected)


@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize("kind", ["native", "infinity"])
def test_prompt_switches_without_memory(kind: str, global_sink: bool) -> None:
    pipeline = longlive(kind, global_sink)
    for switch in (3, 6, 15):
        expected = generate(pipeline, 8, switch)
        with patched(pipeline, top_k=0) as handle:
            assert float((generate(pipeline, 8, switch) - expected).abs().max()) < 1e-5
            # A re-cache of the first block alone is no more than another forward of it.
            assert handle.stats()["prompt_switches"] == (switch > 3)
    assert torch.equal(generate(pipeline, 8, 15), expected)


@pytest.mark.parametrize("global_sink", [True, False])
def test_prompt_switches_with_memory(caplog: pytest.LogCaptureFixture, global_sink: bool) -> None:
    pipeline = longlive("native", global_sink)
    videos = {}
    for policy in ("keep", "drop", "recache"):
        caplog.clear()
        with (
            patched(pipeline, sink=1, top_k=4, recent_exclude=1, on_prompt_switch=policy) as handle,
            caplog.at_level(logging.INFO, "longlive_rag_ops"),
        ):
            videos[policy] = generate(pipeline, 12, 21)
            (switch,) = (entry for entry in handle.retrieval_log if entry["event"] == "prompt switch")
            retrieved = {
                entry["block"]: entry["frames"][0] for entry in handle.retrieval_log if entry["event"] == "retrieval"
            }
            counted = handle.stats()["clips"][0]["window"]["recached_frames"]
        assert (switch["at"], switch["recached"], switch["policy"]) == (21, [9, 21], policy)
        assert "prompt switch at frame 21" in caplog.text
        assert videos[policy].isfinite().all()
        old = {frame for block, frames in retrieved.items() if block > 21 for frame in frames if frame < 9}
        if policy == "drop":
            assert switch["dropped"] == 8 and not old
        else:
            assert old, "frames from before the switch are retrieved after it"
        assert counted == (12 + 8 if policy == "recache" else 12)
    for a, b in (("keep", "drop"), ("keep", "recache"), ("drop", "recache")):
        assert torch.equal(videos[a][:, :21], videos[b][:, :21])
        assert not torch.allclose(videos[a][:, 24:], videos[b][:, 24:], atol=1e-4), (a, b)


def test_lora_layers_are_no_second_model() -> None:
    """LongLive's own inference puts them into the model, and calls its forward past them."""
    peft = pytest.importorskip("peft")
    pipeline = longlive("native", True)
    model = pipeline.generator.model
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    pipeline.generator.model = peft.get_peft_model(model, lora)
    expected = generate(pipeline, 7, 15)
    with patched(pipeline, top_k=0) as handle:
        assert handle.model is model
        assert float((generate(pipeline, 7, 15) - expected).abs().max()) < 1e-5
        assert handle.stats()["prompt_switches"] == 1
    assert torch.equal(generate(pipeline, 7, 15), expected)
