"""A patched model: the same without memory, retrieving with it, and as before when it is unpatched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from simulator import Rules, choose
from torch import Tensor, nn
from toy_wan import CHANNELS, HEIGHT, TOKENS, WIDTH, Pipeline, ToyWan
from window_pair import one_thread

import longlive_rag_ops
from longlive_rag_ops import BankConfig, MemoryBank, patched
from longlive_rag_ops.bank.page_format import PageFormat
from longlive_rag_ops.embedder import average_pool
from longlive_rag_ops.patch import Adapter, Handle, UnknownBackbone, patch, register_adapter

__all__ = ["one_thread"]
MEMORY: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1}


def expected_choices(video: Tensor, blocks: int) -> list[list[int]]:
    """By the rules, from the finished latents alone."""
    rules, embeddings = Rules(6, 1, 2, 1), average_pool(video[0].transpose(0, 1))
    return [
        [frame for frame, _ in choose(embeddings[t - 1], {f: embeddings[f] for f in rules.candidates(t)}, 2)]
        for t in range(2, 2 * blocks + 1, 2)
    ]


def test_without_memory_it_is_the_model_itself() -> None:
    model = ToyWan()
    expected = Pipeline(model).run(8)
    with patched(model, top_k=0) as handle:
        pipeline = Pipeline(model)
        assert float((pipeline.run(8) - expected).abs().max()) < 1e-5
        assert all(cache[name].numel() == 0 for cache in pipeline.cache for name in "kv")
        assert [int(cache["global_end_index"]) for cache in pipeline.cache] == [16 * TOKENS] * 2
        assert [int(cache["local_end_index"]) for cache in pipeline.cache] == [6 * TOKENS] * 2
        (clip,) = handle.stats()["clips"]
        assert (clip["frames"], clip["window"]["blocks"], clip["config"].position_rule) == (14, 7, "absolute")
        # The window in place of the buffer; what is beside it is known.
        window = 2 * 2 * 6 * TOKENS * 32 * 4
        assert clip["window"]["bytes"] == {
            "window": window,
            "staging": window // 2 // 6 * (5 + 2),
            "history": 0,
            "history_reserved": window // 6,
            "index": 0,
        }
    assert pipeline.cache[0]["k"].shape[1] == 6 * TOKENS
    assert torch.equal(Pipeline(model).run(8), expected)


def test_with_memory_it_retrieves_what_the_rules_say(tmp_path: Path) -> None:
    model = ToyWan()
    with patched(model, **MEMORY) as handle:
        video = Pipeline(model).run(12)
        entries = list(handle.retrieval_log)
        assert [entry["block"] for entry in entries] == list(range(2, 25, 2))
        assert [entry["frames"][0] for entry in entries] == expected_choices(video, 12)
        handle.plot(tmp_path / "retrieved.png")
        json.dumps(entries)
    picture = (tmp_path / "retrieved.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    bank = BankConfig(host_bytes="2MiB", disk_bytes="8MiB", spill=tmp_path, slab_bytes=20_000)
    with patched(model, bank=bank, **MEMORY) as handle:
        assert torch.equal(Pipeline(model).run(12), video)
        (clip,) = handle.stats()["clips"]
        assert clip["bank"]["frames"] == 24 and clip["bank"]["searches"] == 12
        assert handle.clips[0].window is not None and handle.clips[0].window.bank is not None
        kept = handle.clips[0].window.bank
    assert kept.closed


def test_the_search_is_over_before_the_clean_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second block on the clean forward is known when it begins, by its number and its timestep."""
    model, events = ToyWan(), []
    with patched(model, **MEMORY) as handle:
        pipeline = Pipeline(model)
        pipeline.block()
        window = handle.clips[0].window
        assert window is not None
        for name in ("retrieve", "finish", "attend"):
            original = getattr(window, name)
            monkeypatch.setattr(
                window, name, lambda *args, o=original, n=name, **options: (events.append(n), o(*args, **options))[1]
            )
        pipeline.run(2)
    attends = ["attend"] * 2
    block = [*attends, *attends, "retrieve", *attends, "finish"]
    assert events == ["finish", *block, *block]


@pytest.mark.parametrize(
    "steps",
    [
        [(1000.0, 500.0)] * 3 + [(1000.0, 900.0, 500.0)] * 3 + [(500.0,)] * 6,
        [(0.0,)] * 2 + [(1000.0, 500.0)] * 10,
        [()] * 12,
    ],
    ids=["changing", "given frames first", "one forward"],
)
def test_any_number_of_forwards(steps: list[tuple[float, ...]]) -> None:
    model = ToyWan()
    with patched(model, **MEMORY) as handle:
        pipeline = Pipeline(model)
        for block in steps:
            pipeline.block(steps=block)
        video = torch.cat(pipeline.blocks, 2)
        found = [entry["frames"][0] for entry in handle.retrieval_log]
    assert found in (expected_choices(video, 12), expected_choices(video, 11))


def test_a_backbone_without_a_clean_forward() -> None:
    """A block is final when the next one begins; its latents are its last forward's."""
    model = ToyWan()
    with patched(model, **MEMORY) as handle:
        pipeline = Pipeline(model)
        inputs = []
        hook = model.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
        for _ in range(12):
            pipeline.block(clean=False)
        hook.remove()
        found = [entry["frames"][0] for entry in handle.retrieval_log]
    assert found[:11] == expected_choices(torch.cat(inputs[1::2], 2), 11)


def test_two_models_and_two_caches() -> None:
    model, other = ToyWan(), ToyWan(local=4, sink=0)
    alone = []
    for one, seed in ((model, 0), (model, 1), (other, 0)):
        with patched(one, **MEMORY):
            alone.append(Pipeline(one, seed=seed).run(9))
    with patched(model, **MEMORY) as handle, patched(other, **MEMORY) as second:
        pipelines = [Pipeline(model, seed=0), Pipeline(model, seed=1), Pipeline(other, seed=0)]
        for _ in range(9):
            for pipeline in pipelines:
                pipeline.block()
        videos = [torch.cat(pipeline.blocks, 2) for pipeline in pipelines]
        assert len(handle.clips) == 2 and len(second.clips) == 1
    assert all(torch.equal(a, b) for a, b in zip(videos, alone, strict=True))


def test_videos_that_do_not_begin_together() -> None:
    model = ToyWan()
    with patched(model, **MEMORY):
        first = Pipeline(model).run(9)
    with patched(model, max_clips=2, **MEMORY) as handle:
        late, early = Pipeline(model), Pipeline(model)
        early.run(3)
        late.run(3)
        early.run(6)
        late.run(6)
        assert torch.equal(torch.cat(early.blocks, 2), first) and torch.equal(torch.cat(late.blocks, 2), first)
        Pipeline(model).run(1)
        with pytest.raises(RuntimeError, match="max_clips"):
            early.block()
        assert len(handle.clips) == 2
    with patched(model, **MEMORY) as handle:
        early, late = Pipeline(model), Pipeline(model)
        early.run(3)
        late.run(3)
        with pytest.raises(RuntimeError, match=r"begin at frame 0, got frame 6"):
            early.block()


def test_a_cache_that_is_used_again() -> None:
    model = ToyWan()
    with patched(model, **MEMORY) as handle:
        pipeline = Pipeline(model)
        first = pipeline.run(7)
        pool = handle.clips[0].window.pool.data_ptr()  # type: ignore[union-attr]
        for cache in pipeline.cache:
            cache["global_end_index"], cache["local_end_index"] = torch.zeros(1).long(), torch.zeros(1).long()
        pipeline.blocks, pipeline.random = [], torch.Generator().manual_seed(0)
        assert torch.equal(pipeline.run(7), first)
        assert handle.clips[0].window.pool.data_ptr() == pool  # type: ignore[union-attr]
        assert handle.stats()["videos"] == 2
        assert {entry["clip"] for entry in handle.retrieval_log} == {1, 2}


def test_a_forward_that_fails_can_be_made_again() -> None:
    model = ToyWan()
    with patched(model, **MEMORY):
        expected = Pipeline(model).run(9)
    with patched(model, **MEMORY):
        pipeline = Pipeline(model)
        pipeline.run(4)
        forward, calls = model.blocks[1].mlp.forward, []

        def failing(x: Tensor) -> Tensor:
            calls.append(x)
            if len(calls) in (2, 3):
                raise RuntimeError("out of memory")
            return forward(x)

        model.blocks[1].mlp.forward = failing
        original = pipeline.forward

        def insisting(x: Tensor, timestep: float) -> Tensor:
            while True:
                try:
                    return original(x, timestep)
                except RuntimeError as error:
                    assert str(error) == "out of memory"

        pipeline.forward = insisting  # type: ignore[method-assign, assignment]
        assert torch.equal(pipeline.run(5), expected)
        assert len(calls) == 5 * 3 + 2


def test_a_gap_in_mid_block_leaves_the_block_open() -> None:
    model = ToyWan()
    with patched(model, **MEMORY):
        expected = Pipeline(model).run(5)
    with patched(model, **MEMORY):
        pipeline = Pipeline(model)
        original, forwards = pipeline.forward, []

        def jumping(x: Tensor, timestep: float) -> Tensor:
            forwards.append(x)
            if len(forwards) == 11:  # between a block's forwards
                with pytest.raises(RuntimeError, match=r"frames must be 6 .. 7 again.*got frames 10 .. 11"):
                    original(x, timestep, 10)
            return original(x, timestep)

        pipeline.forward = jumping  # type: ignore[method-assign, assignment]
        assert torch.equal(pipeline.run(5), expected)


def test_what_is_not_generation_is_left_alone() -> None:
    model = ToyWan()
    x, t = torch.randn(1, CHANNELS, 4, HEIGHT, WIDTH), torch.zeros(1, 4)
    expected = model(x, t)
    with patched(model, **MEMORY):
        assert torch.equal(model(x, t), expected) and model(x, t).requires_grad
        pipeline = Pipeline(model)
        pipeline.run(2)
        assert torch.equal(model(x, t), expected)
        pipeline.run(2)


def test_compiled() -> None:
    model = ToyWan()
    with patched(model, **MEMORY):
        expected = Pipeline(model).run(7)
        compiled = torch.compile(model, backend="eager")
        assert float((Pipeline(compiled).run(7) - expected).abs().max()) < 1e-6  # type: ignore[arg-type]


def test_a_pipeline_holds_the_model(tmp_path: Path) -> None:
    model = ToyWan()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.vae = model, nn.Linear(2, 2)

    class Plain:
        def __init__(self) -> None:
            self.transformer, self.name = Wrapper(), "pipeline"

    for holder in (model, Wrapper(), Plain()):
        with longlive_rag_ops.patch(holder, **MEMORY) as handle:
            assert handle.model is model and handle.patched
        assert not handle.patched
    with pytest.raises(ValueError, match=r"one backbone, got 2 \(model.0, model.1\)"):
        patch(nn.Sequential(ToyWan(), ToyWan()), **MEMORY)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    modules = [sorted(vars(module)) for module in model.modules()]
    return modules, len(model._forward_hooks), len(model._forward_pre_hooks)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": 4}, ValueError, r"window - sink - top_k must be at least frames_per_block"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"sink": -1}, ValueError, "sink must be at least 0, got -1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        (
            {"embedder": "autoencoder"},
            ValueError,
            "embedder must be a callable, one of average_pool, grid_pool, or a checkpoint",
        ),
        ({"embedder": 3}, TypeError, "embedder must be a callable"),
        ({"position_rule": "middle"}, ValueError, "position_rule must be one of slot, absolute, before_window"),
        ({"on_prompt_switch": "forget"}, ValueError, "on_prompt_switch must be one of keep, drop, recache"),
        ({"bank": 3}, TypeError, "bank must be a BankConfig or None"),
        ({"bank": BankConfig(host_bytes=1), "top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"max_clips": 0}, ValueError, "max_clips must be at least 1"),
        ({"engine": "fast"}, ValueError, "engine"),
    ],
)
def test_a_refused_patch_leaves_the_model_as_it_was(options: dict[str, Any], error: type, words: str) -> None:
    model = ToyWan()
    before = state_of(model)
    with pytest.raises(error, match=words):
        patch(model, **{**MEMORY, **options})
    assert state_of(model) == before
    with patched(model, **MEMORY):
        pass
    assert state_of(model) == before


def test_a_bank_of_another_device_is_refused() -> None:
    form = PageFormat("plain", 2, 1, TOKENS, 2, 16, torch.float32)
    words = r"bank must be a BankConfig.*model's device; got a MemoryBank on cpu"
    bank = MemoryBank(form, BankConfig(host_bytes="1MiB"), device_slots=2, most_fetched=2)
    with bank, pytest.raises(TypeError, match=words):
        patch(ToyWan(), bank=bank, **MEMORY)


def test_unknown_and_patched_twice() -> None:
    with pytest.raises(UnknownBackbone) as caught:
        patch(nn.Sequential(nn.Linear(2, 2)))
    text = str(caught.value)
    assert all(
        name in text for name in ("Self-Forcing", "LongLive-RAG", "FastVideo", "AnyFlow", "SANA", "LongLive 2.0")
    )
    assert "lacks model.blocks" in text and "docs/patching.md" in text
    with pytest.raises(UnknownBackbone, match="model must be a torch module, or hold one; got int"):
        patch(3)
    almost = ToyWan()
    del almost.freqs
    with pytest.raises(UnknownBackbone, match=r"written in place.*: model lacks model.freqs\n"):
        patch(almost)
    model = ToyWan()
    with patched(model, **MEMORY) as handle:
        with pytest.raises(RuntimeError, match=r"patched already: call unpatch\(\)"):
            patch(model, **MEMORY)
        assert handle.patched
        handle.unpatch()
        handle.unpatch()


def test_calls_that_cannot_come() -> None:
    model = ToyWan()
    with patched(model, **MEMORY):
        pipeline = Pipeline(model)
        pipeline.run(5)
        x = torch.randn(1, CHANNELS, 2, HEIGHT, WIDTH)
        wrong: list[tuple[Any, tuple[Any, ...], str]] = [
            (ValueError, (x.expand(2, -1, -1, -1, -1), 0.0), r"batch must stay 1 within a video, got 2"),
            (ValueError, (x[..., :2], 0.0), r"grid must stay \(2, 3\) within a video, got \(2, 1\)"),
            (
                ValueError,
                (torch.randn(1, CHANNELS, 4, HEIGHT, WIDTH), 0.0),
                r"= 6 - 1 - 2 = 3 frames.*local part; got 4",
            ),
            (RuntimeError, (x, 0.0, 14), r"frames must be those from 10 on.*got frames 14 .. 15"),
            (RuntimeError, (x, 500.0, 8), r"the block of frames 8 .. 9 is final"),
            (RuntimeError, (x, 500.0, 6), r"by a forward at timestep 0.0; got another one at 500.0"),
            (
                ValueError,
                (torch.randn(1, CHANNELS, 8, HEIGHT, WIDTH), 0.0, 2),
                r"re-cache must hold at most window \(6\)",
            ),
        ]
        for error, call, words in wrong:
            with pytest.raises(error, match=words):
                pipeline.forward(*call)
        pipeline.run(4)
        video = torch.cat(pipeline.blocks, 2)
    with patched(model, **MEMORY):
        assert torch.equal(Pipeline(model).run(9), video), "what was refused left no trace"


@pytest.mark.parametrize(
    ("embedder", "words"),
    [
        (lambda frames: frames.mean(), r"embedder must return \(2, E\) for frames \(2, 4, 4, 6\), got \(\)"),
        (lambda frames: [1, 2], r"got list"),
        (lambda frames: average_pool(frames)[:1], r"got \(1, 4\)"),
        (lambda frames: average_pool(frames).long(), r"embeddings must have dtype"),
    ],
)
def test_embedders_that_return_something_else(embedder: Any, words: str) -> None:
    model = ToyWan()
    with patched(model, embedder=embedder, **MEMORY), pytest.raises((ValueError, TypeError), match=words):
        Pipeline(model).run(2)


def test_somebody_elses_patch_of_the_instance_comes_back() -> None:
    model = ToyWan()
    attention = model.blocks[0].self_attn
    original, calls = attention.forward, []
    attention.forward = lambda *args: (calls.append(1), original(*args))[1]
    theirs = attention.forward
    with patched(model, top_k=0):
        Pipeline(model).run(2)
        assert not calls
    assert attention.forward is theirs
    Pipeline(model).run(1)
    assert calls


def test_adapters_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point; it goes before the package's own families."""
    (tmp_path / "somebodys.py").write_text(
        "from longlive_rag_ops.patch.wan import InPlaceWan\n\n\n"
        "class Somebodys(InPlaceWan):\n    name = 'somebody elses'\n",
        encoding="utf-8",
    )
    info = tmp_path / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n", encoding="utf-8")
    points = "[longlive_rag_ops.adapters]\nsomebodys = somebodys:Somebodys\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with patched(ToyWan(), **MEMORY) as handle:
        assert handle.stats()["family"] == "somebody elses"
    (info / "entry_points.txt").write_text(points.replace("Somebodys\n", "InPlaceWan.missing\n"), encoding="utf-8")
    with pytest.raises(TypeError, match=r"entry point 'somebodys'.*must be a subclass of"):
        patch(ToyWan())
    (info / "entry_points.txt").write_text(points.replace("Somebodys\n", "Nobodys\n"), encoding="utf-8")
    with pytest.warns(UserWarning, match="entry point 'somebodys' .* cannot be loaded"), patched(ToyWan(), **MEMORY):
        pass
    sys.modules.pop("somebodys")
    with pytest.raises(TypeError, match="adapter must be a subclass"):
        register_adapter(int)  # type: ignore[arg-type]


def test_what_the_package_offers() -> None:
    assert longlive_rag_ops.patch.Adapter is Adapter
    assert issubclass(Handle, object) and callable(longlive_rag_ops.patch)
    assert {"patch", "patched", "register_adapter", "RetrievalAttention"} <= set(dir(longlive_rag_ops))
