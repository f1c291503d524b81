"""diffusers' AnyFlow-FAR and SANA-WM refiner, driven by their own pipelines, with tiny random models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from simulator import Rules, choose
from window_pair import one_thread  # noqa: F401 (a fixture)

pytest.importorskip("diffusers")

from diffusers import AnyFlowFARPipeline, FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers import transformer_anyflow_far as far
from diffusers.models.transformers import transformer_sana_wm_refiner as wm
from diffusers.pipelines.sana_wm import refiner

from longlive_rag_ops.embedder import MeanKeys
from longlive_rag_ops.patch import Handle, patch

pytestmark = [
    pytest.mark.backbones,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

PARTITION = (1, 3, 3, 3, 3, 2)
LONG = (1, 3, 3, 3, 3, 3, 3, 2)
Chosen = dict[int, list[list[int]]]  # by the block's first frame, for each sample


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def chosen_frames(handle: Handle, clip: int) -> Chosen:
    return {entry["block"]: entry["frames"] for entry in handle.retrieval_log if entry["clip"] == clip}


def check_chosen(chosen: Chosen, handle: Handle) -> None:
    """Some frames were retrieved, and none that had not left the window by more than the recency guard."""
    config = handle.clips[-1].config
    assert any(frame for samples in chosen.values() for frame in samples)
    for start, samples in chosen.items():
        eligible = range(config.sink, config.sink + start - config.window - config.recent_exclude)
        for frames in samples:
            assert len(frames) == min(config.top_k, len(eligible)) == len(set(frames))
            assert set(frames) <= set(eligible)


def check_chosen_by_keys(handle: Handle, normed: list[torch.Tensor], blocks: list[tuple[int, int]]) -> None:
    """Choices are by the means of a layer's keys, as its norm has returned them.

    Args:
        normed: outputs of the norm ``(1, tokens, channels)``, the last ones those of the block's frames, for each block
            that of its clean forward.
        blocks: frames of each block, and tokens of a frame.
    """
    config, means, ends = handle.clips[-1].config, torch.empty(0), []
    for keys, (frames, tokens) in zip(normed, blocks, strict=True):
        means = torch.cat([means, keys[0, -frames * tokens :].unflatten(0, (frames, tokens)).mean(1)])
        ends.append(len(means))
    rules = Rules(config.window, config.sink, config.top_k, config.recent_exclude)
    expected = {
        end: [
            [frame for frame, _ in choose(means[end - 1], {f: means[f] for f in rules.candidates(end)}, config.top_k)]
        ]
        for end in ends
    }
    assert chosen_frames(handle, 1) == expected and any(any(frames) for frames in expected.values())


# AnyFlow


@pytest.fixture(scope="module")
def anyflow() -> AnyFlowFARPipeline:
    torch.manual_seed(0)
    model = far.AnyFlowFARTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        chunk_partition=PARTITION,
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    pipeline = AnyFlowFARPipeline(
        tokenizer=None, text_encoder=None, transformer=model, vae=None, scheduler=FlowMapEulerDiscreteScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_anyflow_video(
    pipeline: AnyFlowFARPipeline,
    chunks: tuple[int, ...] = PARTITION,
    seed: int = 0,
    batch: int = 1,
    guidance: float = 1.0,
    context: int = 0,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, batch, 5, 16, generator=generator)
    return pipeline(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1] if guidance > 1 else None,
        guidance_scale=guidance,
        height=32,
        width=64,
        num_frames=4 * sum(chunks) - 3,
        num_inference_steps=2,
        chunk_partition=list(chunks),
        generator=generator,
        video_latents=torch.randn(batch, context, 4, 4, 8, generator=generator) if context else None,
        output_type="latent",
    ).frames


class AnyFlowReference:
    """AnyFlow's attention with retrieved frames, all keys side by side."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.own = far.AnyFlowCausalAttnProcessor()
        self.kept: dict[int, torch.Tensor] = {}  # frame -> (2, B, H, T, D), as it was cached last
        self.frames = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        rotary_emb: dict[str, torch.Tensor],
        kv_cache: dict[str, torch.Tensor],
        kv_cache_flag: dict[str, Any],
        attention_mask: Any = None,
    ) -> torch.Tensor:
        if kv_cache_flag["is_cache_step"]:
            out = self.own(attn, hidden_states, None, attention_mask, rotary_emb, kv_cache, kv_cache_flag)
            pages = kv_cache["full_cache"][..., : kv_cache_flag["num_full_tokens"], :].split(8, dim=3)
            self.frames = kv_cache_flag["num_compressed_tokens"] // 2 + len(pages)
            self.kept |= {self.frames - len(pages) + i: page.clone() for i, page in enumerate(pages)}
            return out
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (2, -1)).transpose(1, 2)
        own = torch.stack([attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)])
        own = own.unflatten(3, (2, -1)).transpose(2, 3)
        near = kv_cache["full_cache"][..., : kv_cache_flag["num_cached_full_tokens"], :]
        distant = kv_cache["compressed_cache"][..., : kv_cache_flag["num_cached_compressed_tokens"], :]
        keys, values = torch.cat([distant, near, own], 3)
        keys = far.apply_rotary_emb(keys, rotary_emb["key"])
        out = []
        for sample, frames in enumerate(self.chosen.get(self.frames, [[]] * len(q))):
            memory = [self.kept[frame][:, sample] for frame in frames]
            turned = [
                far.apply_rotary_emb(page[None, 0], self.angles(f))[0] for f, page in zip(frames, memory, strict=True)
            ]
            nothing = torch.zeros(2, 128 - q.shape[2], 24)
            k = torch.cat([*turned, keys[sample], nothing], 1)
            v = torch.cat([*(page[1] for page in memory), values[sample], nothing], 1)
            logits = far.apply_rotary_emb(q, rotary_emb["query"])[sample] @ k.mT * 24**-0.5
            out.append(logits.softmax(-1) @ v)
        return attn.to_out[0](torch.stack(out).transpose(1, 2).flatten(2))

    def angles(self, frame: int) -> torch.Tensor:
        rope = far.AnyFlowCausalRotaryPosEmbed(24, (1, 2, 2), (1, 4, 4), 1024)
        return rope._forward_full_frame(frame + 1, 2, 4, torch.device("cpu"))[frame].reshape(1, 1, 8, 12)


@pytest.mark.parametrize(
    "options",
    [{}, {"batch": 2, "guidance": 2.5}, {"context": 4}, {"chunks": (2, 4, 4, 1, 4, 4)}, {"chunks": (1, 1, 1, 1, 1)}],
    ids=["default", "guided", "context", "other chunks", "single frames"],
)
def test_anyflow_without_memory_is_the_model(anyflow: AnyFlowFARPipeline, options: dict[str, Any]) -> None:
    expected = make_anyflow_video(anyflow, **options)
    handle = patch(anyflow, top_k=0)
    try:
        found = make_anyflow_video(anyflow, **options)
    finally:
        handle.unpatch()
    assert_close(found, expected)
    assert torch.equal(make_anyflow_video(anyflow, **options), expected)


@pytest.mark.parametrize(
    "options", [{}, {"batch": 2, "guidance": 2.5}, {"context": 7}], ids=["one", "guided", "context"]
)
def test_anyflow_attends_to_retrieved_frames(anyflow: AnyFlowFARPipeline, options: dict[str, Any]) -> None:
    options = {"chunks": LONG, **options}
    plain = make_anyflow_video(anyflow, **options)
    handle = patch(anyflow, top_k=2, recent_exclude=1)
    try:
        found = make_anyflow_video(anyflow, **options)
        chosen = chosen_frames(handle, 1)
        check_chosen(chosen, handle)
        assert handle.clips[0].config.window == 9 + 2
    finally:
        handle.unpatch()
    assert torch.isfinite(found).all()
    assert (found - plain).abs().max() > 1e-3
    processors = [AnyFlowReference(chosen) for _ in range(2)]
    try:
        for block, processor in zip(anyflow.transformer.blocks, processors, strict=True):
            block.attn1.processor = processor
        expected = make_anyflow_video(anyflow, **options)
    finally:
        for block in anyflow.transformer.blocks:
            block.attn1.processor = far.AnyFlowCausalAttnProcessor()
    assert_close(found, expected)


def test_anyflow_videos_do_not_see_each_other(anyflow: AnyFlowFARPipeline) -> None:
    videos = []
    for seeds in ([3], [4, 3]):
        handle = patch(anyflow, top_k=1, recent_exclude=0)
        try:
            for seed in seeds:
                video = make_anyflow_video(anyflow, LONG, seed)
            assert len(handle.clips) == 1
            assert handle.stats()["videos"] == len(seeds)
        finally:
            handle.unpatch()
        videos.append(video)
    assert torch.equal(videos[0], videos[1])


@pytest.mark.parametrize("layer", [0, 1])
def test_anyflow_searches_by_keys(anyflow: AnyFlowFARPipeline, layer: int) -> None:
    """Of the cache step, whose newest tokens are the chunk's."""
    outputs: list[torch.Tensor] = []
    norm = anyflow.transformer.blocks[layer].attn1.norm_k
    hook = norm.register_forward_hook(lambda module, args, out: outputs.append(out))
    handle = patch(anyflow, embedder=MeanKeys(layer), top_k=2, recent_exclude=1)
    try:
        make_anyflow_video(anyflow, LONG)
        clean = outputs[2::3]  # two denoising steps, one cache step
        check_chosen_by_keys(handle, clean, [(frames, 8) for frames in LONG][: len(clean)])
    finally:
        handle.unpatch()
        hook.remove()


def anyflow_caches(tokens: int = 8) -> dict[int, dict[str, torch.Tensor]]:
    shape = (2, 1, 2, 9 * tokens, 24)
    return {layer: {"full_cache": torch.zeros(shape), "compressed_cache": torch.zeros(shape)} for layer in range(2)}


def anyflow_forward(
    pipeline: AnyFlowFARPipeline,
    caches: dict[int, dict[str, torch.Tensor]],
    chunks: list[int],
    clean: bool,
    wide: int = 8,
) -> Any:
    frames = sum(chunks) if clean else chunks[-1]
    timestep = torch.full((1, frames), 0.0 if clean else 500.0)
    return pipeline.transformer(
        torch.randn(1, frames, 4, 4, wide),
        timestep,
        timestep,
        torch.randn(1, 5, 16),
        chunks,
        kv_cache=caches,
        kv_cache_flag={"num_cached_chunks": len(chunks) - 1, "is_cache_step": clean},
        return_dict=False,
    )


def test_anyflow_frees_its_cache(anyflow: AnyFlowFARPipeline) -> None:
    caches = anyflow_caches()
    with patch(anyflow, top_k=0) as handle:
        anyflow_forward(anyflow, caches, [1], clean=False)
        anyflow_forward(anyflow, caches, [1], clean=True)
        assert handle.clips[0].finished_frames == 1
        anyflow_forward(anyflow, caches, [1], clean=False)  # no chunk is cached: another video, in the same cache
        assert handle.stats()["videos"] == 2
        assert handle.clips[0].finished_frames == 0
        assert all(cache["full_cache"].nbytes == 0 for cache in caches.values())
    assert all(cache["full_cache"].shape == (2, 1, 2, 72, 24) for cache in caches.values())
    assert all(cache["full_cache"].count_nonzero() == 0 for cache in caches.values())


def test_anyflow_refuses(anyflow: AnyFlowFARPipeline) -> None:
    caches = anyflow_caches()
    with patch(anyflow, top_k=1):
        anyflow_forward(anyflow, caches, [1], clean=True)
        with pytest.raises(ValueError, match=r"grid must stay \(2, 4\)"):
            anyflow_forward(anyflow, caches, [1, 3], clean=False, wide=16)
        anyflow_forward(anyflow, caches, [1, 3], clean=True)
        with pytest.raises(RuntimeError, match="chunk_partition must end with a new chunk"):
            anyflow_forward(anyflow, caches, [1, 3], clean=False)


# SANA-WM


class SanaPipeline(refiner.SanaWMLTX2Refiner):
    """With random embeddings in place of a text encoder."""

    def _encode_prompt(self, prompt: str, *, device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(len(prompt)))
        return embeds.to(dtype), torch.ones(1, 5)


@pytest.fixture(scope="module", params=["interleaved", "split"])
def sana(request: pytest.FixtureRequest) -> SanaPipeline:
    torch.manual_seed(0)
    model = wm.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,  # not divisible by 6: some angles are padding
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
        rope_type=request.param,
        gated_attn=request.param == "split",
    ).eval()
    for name, parameter in model.named_parameters():
        if "attn1" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    pipeline = SanaPipeline(
        transformer=model,
        connectors=None,
        tokenizer=None,
        text_encoder=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sana_video(
    pipeline: SanaPipeline,
    seed: int = 0,
    sink: int = 1,
    kept: int = 11,
    frames: int = 33,
    block: int = 3,
    wide: int = 3,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        torch.randn(1, 4, frames, 2, wide, generator=generator),
        "prompt",
        fps=16.0,
        sink_size=sink,
        generator=generator,
        block_size=block,
        kv_max_frames=kept,
        output_type="latent",
    )


class SanaReference:
    """SANA-WM's attention with retrieved frames, all keys side by side, each turned to its place."""

    def __init__(self, model: Any, chosen: Chosen, sink: int, history: int, local: int) -> None:
        self.model, self.chosen, self.sink, self.history, self.local = model, chosen, sink, history, local
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # before rotation

    def rotated(self, x: torch.Tensor, kind: str, frames: list[int]) -> torch.Tensor:
        angles = type(self.model).build_rotary_emb_for_absolute_positions(self.model, 1, frames, 2, 3, x.device, 16.0)
        turn = wm.apply_interleaved_rotary_emb if kind == "interleaved" else wm.apply_split_rotary_emb
        return turn(x, angles)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any,
        attention_mask: Any,
        query_rotary_emb: Any,
        key_rotary_emb: Any,
        sink_rotary_emb: Any,
        kv_cache: Any,
        kv_cache_mode: str,
    ) -> torch.Tensor:
        x = hidden_states
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        start = len(self.kept)
        new = {start + i: pair for i, pair in enumerate(zip(k.split(6, 1), v.split(6, 1), strict=True))}
        end = start + len(new)
        near = [frame for frame in range(end) if frame >= max(self.sink, start - self.history, end - self.local)]
        place = (near[0] if near else end) - self.sink
        memory = self.chosen.get(start, [[]])[0]
        frames = [(frame, place) for frame in memory]
        frames += [(frame, place + frame) for frame in range(self.sink)]
        frames += [(frame, frame) for frame in near]
        held = self.kept | new
        keys = torch.cat([self.rotated(held[frame][0], attn.rope_type, [at]) for frame, at in frames], 1)
        values = torch.cat([held[frame][1] for frame, _ in frames], 1)
        query = self.rotated(q, attn.rope_type, list(range(start, end)))
        query, keys, values = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in (query, keys, values))
        out = ((query @ keys.mT * 16**-0.5).softmax(-1) @ values).transpose(1, 2)
        if attn.to_gate_logits is not None:
            out = out * (2 * attn.to_gate_logits(x).sigmoid())[..., None]
        if kv_cache_mode != "inject":
            self.kept = held
            nothing = k[:, :0]
            kv_cache.store_captured_pre_rope(nothing, nothing)
            kv_cache.store_captured_post_rope(nothing, nothing)
        return attn.to_out[0](out.flatten(2))


SANA_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "few kept": ({"kept": 5}, {}),
    "sink of 2": ({"sink": 2, "kept": 7, "frames": 31}, {}),
    "sink longer than a block": ({"sink": 4, "frames": 33}, {}),
    "short blocks": ({"block": 2, "kept": 6}, {}),
    "long blocks": ({"block": 5, "kept": 12, "frames": 36}, {"window": 17, "frames_per_block": 5}),
}


@pytest.mark.parametrize("case", SANA_CASES)
def test_sana_without_memory_is_the_model(sana: SanaPipeline, case: str) -> None:
    video, options = SANA_CASES[case]
    expected = make_sana_video(sana, **video)
    handle = patch(sana, top_k=0, **options)
    try:
        found = make_sana_video(sana, **video)
    finally:
        handle.unpatch()
    assert_close(found, expected)
    assert torch.equal(make_sana_video(sana, **video), expected)


@pytest.mark.parametrize(
    ("sink", "window", "top_k", "frames"), [(1, None, 3, 33), (1, 16, 2, 36), (2, 16, 2, 36)], ids=str
)
def test_sana_attends_to_retrieved_frames(
    sana: SanaPipeline, sink: int, window: int | None, top_k: int, frames: int
) -> None:
    plain = make_sana_video(sana, sink=sink, frames=frames)
    handle = patch(sana, top_k=top_k, window=window, recent_exclude=2, position_rule="before_window")
    try:
        found = make_sana_video(sana, sink=sink, frames=frames)
        chosen = chosen_frames(handle, 1)
        check_chosen(chosen, handle)
        local = handle.clips[0].config.local
    finally:
        handle.unpatch()
    assert torch.isfinite(found).all()
    assert (found - plain).abs().max() > 1e-3
    model = sana.transformer
    try:
        for block in model.transformer_blocks:
            block.attn1.processor = SanaReference(model, chosen, sink, 11 - sink, local)
        expected = make_sana_video(sana, sink=sink, frames=frames)
    finally:
        for block in model.transformer_blocks:
            block.attn1.processor = wm.SanaWMLTX2RefinerAttnProcessor()
    assert_close(found, expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_sana_searches_by_keys(sana: SanaPipeline, layer: int) -> None:
    outputs: dict[int, torch.Tensor] = {}
    calls: list[int] = []
    model = sana.transformer
    norm = model.transformer_blocks[layer].attn1.norm_k
    hook = norm.register_forward_hook(lambda module, args, out: outputs.__setitem__(calls[-1], out))
    handle = patch(sana, embedder=MeanKeys(layer), top_k=3, recent_exclude=2)
    begin = model.register_forward_pre_hook(  # a block's last output is of the forward that captures it
        lambda module, args, kwargs: calls.append(handle.clips[0].finished_frames if handle.clips else 0),
        with_kwargs=True,
    )
    try:
        make_sana_video(sana, frames=33)
        starts = sorted(outputs)
        lengths = [end - start for start, end in zip(starts, [*starts[1:], 33], strict=True)]
        check_chosen_by_keys(handle, [outputs[start] for start in starts], [(frames, 6) for frames in lengths])
    finally:
        handle.unpatch()
        hook.remove()
        begin.remove()


def test_sana_videos_do_not_see_each_other(sana: SanaPipeline) -> None:
    videos = []
    for seeds in ([3], [4, 3]):
        handle = patch(sana, top_k=2, recent_exclude=0)
        try:
            for seed in seeds:
                video = make_sana_video(sana, seed)
            assert len(handle.clips) == 1
            assert handle.stats()["videos"] == len(seeds)
        finally:
            handle.unpatch()
        videos.append(video)
    assert torch.equal(videos[0], videos[1])


def test_sana_keeps_no_history_of_its_own(sana: SanaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Any] = []
    begin: Callable[[int], Any] = refiner.SanaWMRefinerKVCache

    def remembered(layers: int) -> Any:
        caches.append(begin(layers))
        return caches[-1]

    monkeypatch.setattr(refiner, "SanaWMRefinerKVCache", remembered)
    with patch(sana, top_k=2, recent_exclude=0):
        make_sana_video(sana, frames=10)
    (cache,) = caches
    for layer in cache.layer_caches:
        held = [value for value in vars(layer).values() if value is not None]
        assert len(held) == 4  # keys and values, of sink and history
        assert all(value.untyped_storage().nbytes() == 0 for value in held)


def test_sana_refuses(sana: SanaPipeline) -> None:
    model = sana.transformer
    with pytest.raises(ValueError, match="position_rule must be before_window, absolute or None"):
        patch(sana, position_rule="slot")
    with pytest.raises(ValueError, match=r"sink must be at least 1 when frames are retrieved \(top_k 2\)"):
        patch(sana, top_k=2, sink=0)
    assert "build_rotary_emb_for_absolute_positions" not in vars(model)
    for options, video, message in (
        ({"sink": 2}, {}, "sink must be 1, the pipeline's sink_size"),
        ({"top_k": 0}, {"kept": 15}, r"window must be given where .* is more than 14"),
        ({"top_k": 0}, {"block": 4, "kept": 10}, "frames_per_block must be at least 4"),
    ):
        with patch(sana, **options), pytest.raises(ValueError, match=message):
            make_sana_video(sana, **video)
    with patch(sana, top_k=2):
        cache = wm.SanaWMRefinerKVCache(2)

        def forward(mode: str, start: int, frames: int, wide: int = 3, mine: bool = False) -> None:
            size = {"batch_size": 1, "height": 2, "width": wide, "device": torch.device("cpu"), "fps": 16.0}
            angles = model.build_rotary_emb_for_absolute_positions(
                frame_positions=list(range(start, start + frames)), **size
            )
            cache.sink_pe = model.build_rotary_emb_for_absolute_positions(frame_positions=[0], **size)
            tokens = frames * 2 * wide
            model(
                torch.randn(1, tokens, 4),
                torch.randn(1, 5, 8),
                torch.zeros(1, tokens),
                tuple(part.clone() for part in angles) if mine else angles,
                kv_cache=cache,
                kv_cache_mode=mode,
            )

        forward("capture_pre_rope", 0, 1)
        with pytest.raises(ValueError, match=r"grid must stay \(2, 3\)"):
            forward("inject", 1, 3, wide=4)
        with pytest.raises(ValueError, match="video_rotary_emb must be what build_rotary_emb_for_absolute_positions"):
            forward("inject", 1, 3, mine=True)
        forward("inject_and_capture_post_rope", 1, 3)
        with pytest.raises(RuntimeError, match="frame_positions must be of a new block"):
            forward("inject", 1, 3)
