"""What lies around a patched model: wrappers, caches that come back, other modes, what a model says of itself."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_wan import TOKENS, Pipeline, SelfAttention, ToyWan, caches, causal_rope_apply
from window_pair import one_thread

from longlive_rag_ops import patched
from longlive_rag_ops.patch import patch
from longlive_rag_ops.rotary import rotary_table

__all__ = ["one_thread"]
MEMORY: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1}


class LoRA(nn.Module):
    """Passes on what it is asked for, and calls the model's forward past its hooks, as peft does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def test_wrapped_models() -> None:
    model = ToyWan()
    with patched(model, **MEMORY):
        expected = Pipeline(model).run(8)
    compiled = torch.compile(model, backend="eager")
    for wrapper in (LoRA(model), LoRA(LoRA(model)), compiled):
        with patched(wrapper, **MEMORY) as handle:
            assert handle.model is model
            assert float((Pipeline(wrapper).run(8) - expected).abs().max()) < 1e-6  # type: ignore[arg-type]


def reset(pipeline: Pipeline) -> None:
    for cache in pipeline.cache:
        cache["global_end_index"], cache["local_end_index"] = torch.zeros(1).long(), torch.zeros(1).long()
    pipeline.blocks, pipeline.random = [], torch.Generator().manual_seed(0)


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_cache_is_used_again_after_a_short_or_broken_video(top_k: int) -> None:
    model = ToyWan()
    with patched(model, **{**MEMORY, "top_k": top_k}):
        expected = Pipeline(model).run(6)
    with patched(model, **{**MEMORY, "top_k": top_k}) as handle:
        pipeline = Pipeline(model)
        pipeline.run(1)
        reset(pipeline)
        pipeline.forward(torch.randn(1, 4, 2, 4, 6), 1000.0)  # interrupted
        reset(pipeline)
        assert torch.equal(pipeline.run(6), expected)
        assert handle.stats()["videos"] == 3


def test_caches_of_several_pipelines_come_back() -> None:
    model = ToyWan()
    expected = Pipeline(model).run(5)
    with patched(model, top_k=0) as handle:
        pipelines = [Pipeline(model) for _ in range(3)]
        for pipeline in pipelines:
            pipeline.run(5)
        reset(pipelines[0])  # of the first one's own window nothing tells any more
        assert float((pipelines[0].run(5) - expected).abs().max()) < 1e-5
        assert len(handle.clips) == 1
    for pipeline in pipelines:
        reset(pipeline)
        assert torch.equal(pipeline.run(5), expected)


def test_short_videos_leave_no_windows() -> None:
    model = ToyWan()
    with patched(model, **MEMORY) as handle:
        for seed in range(4):
            Pipeline(model, seed=seed).run(1)
            assert len(handle.clips) <= 2
        for seed in range(2):
            Pipeline(model, seed=seed).run(4)
        assert len(handle.clips) == 1


def test_another_shape_in_the_same_cache() -> None:
    model = ToyWan()
    expected = Pipeline(model).run(5)
    with patched(model, top_k=0):
        pipeline = Pipeline(model)
        pipeline.run(5)
        model.num_frame_per_block = 3
        reset(pipeline)
        assert float((pipeline.run(5) - expected).abs().max()) < 1e-5
    model.num_frame_per_block = 2
    reset(pipeline)
    assert torch.equal(pipeline.run(5), expected)


def test_caches_made_in_inference_mode() -> None:
    model = ToyWan()
    expected = Pipeline(model).run(5)
    with torch.inference_mode():
        pipeline = Pipeline(model)
    handle = patch(model, top_k=0)
    with torch.inference_mode():
        assert float((pipeline.run(5) - expected).abs().max()) < 1e-5
        pipeline.cache[0]["local_end_index"].fill_(3)
        with pytest.raises(RuntimeError, match=r"kv_cache\[0\]\['local_end_index'\] was changed to 3 tokens"):
            pipeline.block()
    handle.unpatch()
    assert not handle.clips and pipeline.cache[0]["k"].shape[1] == 6 * TOKENS


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_counters_that_somebody_else_changes(change: str) -> None:
    model = ToyWan()
    with patched(model, **MEMORY):
        pipeline = Pipeline(model)
        pipeline.run(3)
        cache = pipeline.cache[0]
        if change == "written":
            cache["local_end_index"].fill_(2 * TOKENS)
        elif change == "replaced":
            cache["local_end_index"] = torch.tensor([2 * TOKENS])
        else:
            del cache["local_end_index"]
        now = "removed" if change == "removed" else "changed to 12 tokens"
        with pytest.raises(RuntimeError, match=rf"'local_end_index'\] was {now} between forwards"):
            pipeline.block()


def test_a_model_that_fails_after_its_layers() -> None:
    """Families that write their cache after the layers have set their counters by then."""
    model = ToyWan()
    with patched(model, **MEMORY):
        expected = Pipeline(model).run(5)
    with patched(model, **MEMORY):
        pipeline = Pipeline(model)
        pipeline.run(2)

        def failing(x: Tensor) -> Tensor:
            del model.head.forward
            for cache in pipeline.cache:
                cache["global_end_index"].fill_(6 * TOKENS)
            raise RuntimeError("out of memory")

        model.head.forward = failing
        state = pipeline.random.get_state()
        with pytest.raises(RuntimeError, match="out of memory"):
            pipeline.block()
        pipeline.random.set_state(state)
        assert torch.equal(pipeline.run(3), expected)


def test_pipelines_may_use_their_buffers_again() -> None:
    model = ToyWan()
    with patched(model, **MEMORY) as handle:
        expected = Pipeline(model)
        expected.run(10)
        log = list(handle.retrieval_log)
    buffer, timestep = torch.empty(1, 4, 2, 4, 6), torch.empty(1, 2)

    class Reusing(Pipeline):
        @torch.no_grad()
        def forward(self, x: Tensor, value: float, start: int | None = None) -> Tensor:
            buffer.copy_(x)
            timestep.fill_(value)
            frames = sum(block.shape[2] for block in self.blocks)
            return self.generator(buffer, timestep, kv_cache=self.cache, current_start=frames * TOKENS)

    with patched(model, **MEMORY) as handle:
        assert torch.equal(Reusing(model).run(10), torch.cat(expected.blocks, 2))
        assert list(handle.retrieval_log) == log


def test_a_model_that_nobody_unpatches_can_go() -> None:
    model = ToyWan()
    handle = patch(model, **MEMORY)
    Pipeline(model).run(2)
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


def test_what_cannot_be_undone_does_not_keep_the_rest() -> None:
    model = ToyWan()
    expected = Pipeline(model).run(2)
    handle = patch(model, **MEMORY)
    Pipeline(model).run(1)
    del model.blocks[1].self_attn.forward
    handle.unpatch()
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(Pipeline(model).run(2), expected)
    with patched(model, **MEMORY):
        pass


def test_the_models_own_rotary_table() -> None:
    model = ToyWan()
    model.freqs = torch.view_as_complex(rotary_table(16, 64, theta=100.0).contiguous())
    expected = Pipeline(model).run(6)
    with patched(model, top_k=0):
        assert float((Pipeline(model).run(6) - expected).abs().max()) < 1e-5


def test_wans_table_goes_on_past_its_end() -> None:
    model = ToyWan()
    model.freqs = model.freqs[:14]
    with pytest.raises(RuntimeError):
        Pipeline(model).run(8)
    with patched(model, top_k=0):
        short = Pipeline(model).run(8)
    whole = ToyWan()
    with patched(whole, top_k=0):
        assert torch.equal(Pipeline(whole).run(8), short)


def test_a_buffer_larger_than_the_window() -> None:
    """Self-Forcing then attends to the newest frames of its buffer, among which the sink is not."""
    model = ToyWan()
    expected = Pipeline(model, frames=8).run(8)
    with patched(model, top_k=0) as handle:
        assert float((Pipeline(model, frames=8).run(8) - expected).abs().max()) < 1e-5
        assert (handle.clips[0].config.window, handle.clips[0].config.sink) == (6, 0)


def test_a_model_without_a_window_keeps_what_its_cache_holds() -> None:
    model = ToyWan(local=-1, sink=1)
    model.blocks[0].self_attn.max_attention_size = model.blocks[1].self_attn.max_attention_size = 21 * TOKENS
    expected = Pipeline(model, frames=21).run(10)
    with patched(model, top_k=0) as handle:
        assert float((Pipeline(model, frames=21).run(10) - expected).abs().max()) < 1e-5
        assert (handle.clips[0].config.window, handle.clips[0].config.sink) == (21, 0)


def test_latents_as_a_list() -> None:
    model = ToyWan()

    class Listing(Pipeline):
        @torch.no_grad()
        def forward(self, x: Tensor, timestep: float, start: int | None = None) -> Tensor:
            frames, t = sum(block.shape[2] for block in self.blocks), torch.full((1, x.shape[2]), timestep)
            return self.generator(list(x), t, kv_cache=self.cache, current_start=frames * TOKENS)

    with patched(model, **MEMORY) as handle:
        expected, log = Pipeline(model).run(8), list(handle.retrieval_log)
    with patched(model, **MEMORY) as handle:
        assert torch.equal(Listing(model).run(8), expected) and list(handle.retrieval_log) == log


def test_a_first_block_of_one_frame() -> None:
    model = ToyWan()
    expected = Pipeline(model)
    expected.block(frames=1)
    expected.run(5)
    with patched(model, top_k=0):
        pipeline = Pipeline(model)
        pipeline.block(frames=1)
        assert float((pipeline.run(5) - torch.cat(expected.blocks, 2)).abs().max()) < 1e-5
    del model.num_frame_per_block
    with patched(model, **MEMORY):
        pipeline = Pipeline(model)
        pipeline.block(frames=1)
        with pytest.raises(ValueError, match="frames_per_block must be at least 2 for this forward, got 1"):
            pipeline.block()
    with patched(model, frames_per_block=2, **MEMORY):
        pipeline = Pipeline(model)
        pipeline.block(frames=1)
        pipeline.run(5)


class Renamed(SelfAttention):
    """Whose code calls a rotation of another name."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.turned_and_attended(x, *args)

    def turned_and_attended(self, x: Tensor, *args: Any) -> Tensor:
        return super().forward(x, *args)


def test_a_rule_of_positions_that_is_not_known() -> None:
    model = ToyWan()
    for block in model.blocks:
        block.self_attn.__class__ = Renamed
    expected = Pipeline(model).run(6)
    with patched(model, top_k=0), pytest.raises(ValueError, match="position_rule must be given for ToyWan"):
        Pipeline(model).run(1)
    with patched(model, top_k=0, position_rule="absolute"):
        assert float((Pipeline(model).run(6) - expected).abs().max()) < 1e-5
    with patched(model, **MEMORY) as handle:
        Pipeline(model).run(1)
        assert handle.clips[0].config.position_rule == "slot"
    for block in model.blocks:  # Reward-Forcing rotates anew, and averages its sink
        block.self_attn.compression_alpha = 0.999
    with patched(model, top_k=0) as handle:
        Pipeline(model).run(1)
        assert handle.clips[0].config.position_rule == "slot"


def test_the_toy_is_what_it_says() -> None:
    assert causal_rope_apply(torch.ones(1, 6, 1, 16), ToyWan().freqs, 3, (1, 2, 3)).shape == (1, 6, 1, 16)
    assert caches(ToyWan(), 2)[0]["k"].shape == (1, 12, 2, 16)
