"""Patched models of published checkouts against themselves, and against LongLive-RAG's own model with memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from peers import TOKENS, Video, key_caches, longlive2_model, wan_model
from torch import Tensor

from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig, patched

pytestmark = pytest.mark.backbones
MEMORY = {"window": 12, "sink": 1, "top_k": 6, "recent_exclude": 5}
CAUSVID = "causvid causvid.models causvid.models.wan causvid.models.wan.wan_base causvid.models.wan.wan_base.modules"


def rag_model(memory_size: int, local: int = 12) -> Any:
    return wan_model(
        "LongLive-RAG",
        "wan.modules.causal_model_latentmem",
        local_attn_size=local,
        sink_size=1,
        memory_size=memory_size,
    )


def rag_video(blocks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[list[int]]]:
    """LongLive-RAG's own model with memory: the video, and what its pipeline's rule retrieved for each block."""
    to = Tensor.to

    def copying(self: Tensor, *args: Any, **options: Any) -> Tensor:
        # On a CPU its pool of evicted frames would be views of the buffer that it rolls next.
        moved = to(self, *args, **options)
        return moved.clone() if args[:1] == ("cpu",) and options.get("non_blocking") else moved

    monkeypatch.setattr(Tensor, "to", copying)
    caches = key_caches(12, cpu_k_frames=list, cpu_v_frames=list)
    chosen: list[list[int]] = []

    def retrieve(start: int) -> dict[str, Any]:
        eligible = max(len(caches[0]["cpu_k_frames"]) - 5, 0)
        if eligible == 0:
            chosen.append([])
            return {}
        frames = torch.cat(video.blocks, 2)[0].mean((-2, -1)).T
        scores = torch.nn.functional.cosine_similarity(frames[1 : 1 + eligible], frames[-1:])
        best = scores.topk(min(6, eligible)).indices
        chosen.append((best + 1).tolist())
        return {"memory_indices": best[None]}

    video = Video(rag_model(6), caches, options=retrieve)
    return video.run(blocks), chosen


@pytest.mark.parametrize("repository", ["Self-Forcing", "Causal-Forcing"])
def test_with_memory_it_is_longlive_rag(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan_model(repository, "wan.modules.causal_model", local_attn_size=12, sink_size=1)
    expected, chosen = rag_video(11, monkeypatch)
    with patched(model, **MEMORY) as handle:
        video = Video(model, key_caches(12)).run(11)
        found = [entry["frames"][0] for entry in handle.retrieval_log]
        assert handle.clips[0].config.position_rule == "slot"
    assert found == chosen[1:] or found[:-1] == chosen[1:], "the last entry is for a block that was not generated"
    assert [len(frames) for frames in chosen] == [0] * 6 + [1, 4, 6, 6, 6]
    assert float((video - expected).abs().max()) < 5e-6


def test_its_own_class_patched_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, chosen = rag_video(10, monkeypatch)
    model = rag_model(6)
    with patched(model, **MEMORY) as handle:
        video = Video(model, key_caches(12, cpu_k_frames=list, cpu_v_frames=list)).run(10)
        assert [entry["frames"][0] for entry in handle.retrieval_log][:9] == chosen[1:]
    assert float((video - expected).abs().max()) < 5e-6


def _self_forcing(repository: str = "Self-Forcing", **extra: Any) -> tuple[Any, Callable[[], list[Any]], Any]:
    model = wan_model(repository, "wan.modules.causal_model", local_attn_size=6, sink_size=1)
    return model, lambda: key_caches(6, **extra), {}


def _deferred(repository: str, module: str, **sizes: Any) -> tuple[Any, Callable[[], list[Any]], Any]:
    model = wan_model(repository, f"wan.modules.{module}", local_attn_size=6, sink_size=1, **sizes)
    return model, lambda: key_caches(6, cpu_k_frames=list, cpu_v_frames=list), {}


def _causvid() -> tuple[Any, Callable[[], list[Any]], Any]:
    hollow = CAUSVID.split()
    model = wan_model("CausVid", "causvid.models.wan.causal_model", *hollow, base=hollow[-1])
    caches = lambda: [{name: cache[name] for name in "kv"} for cache in key_caches(21)]  # noqa: E731
    return model, caches, {"options": lambda start: {"current_end": (start + 3) * TOKENS}}


def _longlive2(relative: bool, t_scale: float = 1.0) -> tuple[Any, Callable[[], list[Any]], Any]:
    model = longlive2_model(local_attn_size=6, sink_size=1)
    model.use_relative_rope, model.t_scale = relative, t_scale
    pins = {"pinned_start": lambda: torch.tensor([-1]), "pinned_len": lambda: torch.tensor([0])}
    return model, lambda: key_caches(6, **pins), {}


BACKBONES: dict[str, Any] = {
    "Self-Forcing": _self_forcing,
    "Causal-Forcing": lambda: _self_forcing("Causal-Forcing"),
    "Infinity-RoPE": lambda: _self_forcing("infinity-rope", scene_cut=lambda: False),
    "CausVid": _causvid,
    "LongLive-RAG": lambda: _deferred("LongLive-RAG", "causal_model"),
    "LongLive-RAG latentmem": lambda: _deferred("LongLive-RAG", "causal_model_latentmem", memory_size=0),
    "LongLive": lambda: _deferred("LongLive", "causal_model"),
    "LongLive infinity": lambda: _deferred("LongLive", "causal_model_infinity"),
    "LongLive 2.0": lambda: _longlive2(False),
    "LongLive 2.0 relative": lambda: _longlive2(True),
    "LongLive 2.0 scaled": lambda: _longlive2(False, 0.5),
}
SLOT = {"Infinity-RoPE", "LongLive-RAG latentmem", "LongLive infinity", "LongLive 2.0 relative"}


@pytest.mark.parametrize("name", BACKBONES)
def test_without_memory_each_is_itself(name: str) -> None:
    model, caches, options = BACKBONES[name]()
    expected = Video(model, caches(), **options).run(6)
    with patched(model, top_k=0) as handle:
        video = Video(model, caches(), **options)
        video.run(6)
        assert handle.clips[0].config.position_rule == ("slot" if name in SLOT else "absolute")
        assert all(cache[part].numel() == 0 for cache in video.caches for part in "kv")
    assert float((torch.cat(video.blocks, 2) - expected).abs().max()) < 1e-5
    assert all(cache[part].shape[1] in (6 * TOKENS, 21 * TOKENS) for cache in video.caches for part in "kv")
    assert torch.equal(Video(model, caches(), **options).run(6), expected), "unpatched"


@pytest.mark.parametrize("name", BACKBONES)
def test_with_memory_each_retrieves(name: str, tmp_path: Any) -> None:
    """Over a bank with little host memory it is the same video, bit for bit."""
    model, caches, options = BACKBONES[name]()
    sizes: dict[str, Any] = {"window": 7, "sink": 1, "top_k": 2, "recent_exclude": 1}
    plain = Video(model, caches(), **options).run(6)
    bank = BankConfig(host_bytes="1MiB", disk_bytes="8MiB", spill=tmp_path, slab_bytes=200_000)
    videos = []
    for store in (None, bank):
        with patched(model, bank=store, **sizes) as handle:
            videos.append(Video(model, caches(), **options).run(6))
            entries = [entry for entry in handle.retrieval_log if any(entry["frames"])]
            assert handle.clips[0].config.position_rule == "slot"
    assert [entry["block"] for entry in entries][:3] == [9, 12, 15]
    assert all(1 <= frame < entry["block"] - 7 for entry in entries for frame in entry["frames"][0])
    assert torch.equal(*videos) and videos[0].isfinite().all()
    assert float((videos[0] - plain).abs().max()) > 1e-3


def test_samples_of_a_batch_retrieve_on_their_own() -> None:
    model = wan_model("Self-Forcing", "wan.modules.causal_model", local_attn_size=12, sink_size=1)
    with patched(model, window=7, sink=1, top_k=2, recent_exclude=1) as handle:
        both = Video(model, key_caches(12, batch=2), batch=2).run(7)
        log = list(handle.retrieval_log)
    chosen = []
    for sample in range(2):
        one = _Sample(model, key_caches(12), sample)
        with patched(model, window=7, sink=1, top_k=2, recent_exclude=1) as handle:
            assert float((one.run(7) - both[sample : sample + 1]).abs().max()) < 1e-5
            chosen.append([entry["frames"][0] for entry in handle.retrieval_log])
    assert [entry["frames"] for entry in log] == [list(pair) for pair in zip(*chosen, strict=True)]
    assert any(pair[0] != pair[1] for pair in zip(*chosen, strict=True))


class _Sample(Video):
    """One sample of a batch of two, alone."""

    def __init__(self, model: Any, caches: list[Any], sample: int) -> None:
        super().__init__(model, caches)
        self.sample = sample

    def block(self) -> Tensor:
        whole = peers.noise
        try:
            peers.noise = lambda seed, batch, *shape: whole(seed, 2, *shape)[self.sample : self.sample + 1]
            return super().block()
        finally:
            peers.noise = whole


def test_guided_sampling_keeps_two_videos_apart() -> None:
    model = wan_model("Self-Forcing", "wan.modules.causal_model", local_attn_size=12, sink_size=1)
    sizes = {"window": 7, "sink": 1, "top_k": 2, "recent_exclude": 1}
    alone = []
    for prompt in (5, 6):
        with patched(model, **sizes):
            alone.append(Video(model, key_caches(12), prompt=prompt).run(7))
    with patched(model, **sizes) as handle:
        pair = [Video(model, key_caches(12), prompt=prompt) for prompt in (5, 6)]
        for _ in range(7):
            for video in pair:
                video.block()
        assert len(handle.clips) == 2 and handle.stats()["videos"] == 2
        for video, expected in zip(pair, alone, strict=True):
            assert torch.equal(torch.cat(video.blocks, 2), expected)
        # The next video ends both.
        again = Video(model, key_caches(12), prompt=5).run(7)
        assert torch.equal(again, alone[0]) and len(handle.clips) == 1


def test_pages_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries, keys and values of a model through windows of both dtypes, and a model that is in bfloat16.

    Attention in bfloat16 alone loses 0.15 % RMS (benchmarks/results/2026-11-22-storage-error.json).
    """
    model = wan_model("Self-Forcing", "wan.modules.causal_model", local_attn_size=12, sink_size=1)
    calls: list[tuple[str, tuple[Any, ...], Any]] = []
    for name in ("attend", "retrieve", "finish"):
        original = getattr(MemoryWindow, name)

        def noted(self: Any, *args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            result = original(self, *args, **options)
            calls.append((name, args, result))
            return result

        monkeypatch.setattr(MemoryWindow, name, noted)
    with patched(model, **MEMORY):
        Video(model, key_caches(12)).run(10)
    monkeypatch.undo()
    config = WindowConfig(12, 1, 6, 5, 3)
    half = MemoryWindow(
        config, layers=2, batch=1, tokens_per_frame=TOKENS, kv_heads=4, head_dim=64, dtype=torch.bfloat16
    )
    errors = []
    for name, args, result in calls:
        if name == "attend":
            out = half.attend(args[0], *(x.bfloat16() for x in args[1:4]), *args[4:])
            errors.append(float((out.float() - result).square().mean().sqrt() / result.square().mean().sqrt()))
        else:
            getattr(half, name)(*args)
    assert len(errors) == 10 * 5 * 2 and half.selected[0]
    assert max(errors) < 3e-3, "twice what attention in bfloat16 loses"

    model.bfloat16()
    caches = [{**cache, "k": cache["k"].bfloat16(), "v": cache["v"].bfloat16()} for cache in key_caches(12)]
    with patched(model, **MEMORY) as handle:
        video = Video(model, caches, dtype=torch.bfloat16)
        video.cross = [{**cache, "k": cache["k"].bfloat16(), "v": cache["v"].bfloat16()} for cache in video.cross]
        assert video.run(8).isfinite().all()
        assert handle.clips[0].window is not None and handle.clips[0].window.pool.dtype == torch.bfloat16


def test_the_backbones_buffers_are_not_held_twice() -> None:
    model = wan_model("Self-Forcing", "wan.modules.causal_model", local_attn_size=6, sink_size=1)
    own = sum(cache[part].nbytes for cache in key_caches(6) for part in "kv")
    with patched(model, top_k=0) as handle:
        video = Video(model, key_caches(6))
        video.run(4)
        held = handle.stats()["clips"][0]["window"]["bytes"]
        assert sum(cache[part].nbytes for cache in video.caches for part in "kv") == 0
    # The window is as large as the buffer was; keys of the local part and a block more are held unrotated beside it,
    # and one slot of history, which without retrieval is never used.
    assert held["window"] == own
    assert held["staging"] == own // 2 // 6 * (5 + 3)
    assert held["history_reserved"] == own // 6


def test_a_cache_changed_from_outside_is_refused() -> None:
    """Infinity-RoPE's kv_flush and LongLive 2.0's pinned shot sink."""
    model, caches, _ = BACKBONES["Infinity-RoPE"]()
    with patched(model, top_k=0):
        video = Video(model, caches())
        video.run(3)
        video.caches[0]["local_end_index"] = torch.tensor([3 * TOKENS])
        with pytest.raises(RuntimeError, match=r"local_end_index.*kv_flush"):
            video.block()
    model, caches, _ = BACKBONES["LongLive 2.0"]()
    with patched(model, top_k=0):
        video = Video(model, caches())
        video.run(3)
        video.caches[0]["pinned_start"].fill_(TOKENS)
        with pytest.raises(RuntimeError, match=r"pinned_start.*pinned shot sink"):
            video.block()
