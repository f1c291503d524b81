"""The retrieval autoencoder's embeddings on a CUDA device: precision, graphs, compilation, no waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_wan import CHANNELS, HEIGHT, STEPS, TOKENS, WIDTH, Pipeline, ToyWan

from longlive_rag_ops import patched
from longlive_rag_ops.embedder import AutoencoderConfig, AutoencoderEmbedder, LatentAutoencoder, MeanKeys

pytestmark = pytest.mark.gpu
RELEASED = AutoencoderConfig()
SMALL = AutoencoderConfig(in_channels=4, spatial_h=7, spatial_w=10, latent_dim=12, hidden_dims=(8, 24))
CONFIGS = pytest.mark.parametrize("config", [RELEASED, SMALL], ids=["released", "small"])


def autoencoder(config: AutoencoderConfig) -> LatentAutoencoder:
    torch.manual_seed(0)
    model = LatentAutoencoder(config)
    with torch.no_grad():  # new residual blocks are the identity, which would hide a wrong one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def latents(config: AutoencoderConfig, seed: int = 1) -> Tensor:
    return torch.randn(3, *config.frame_shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    """Of the worst frame, relative to its length of 1."""
    return float((found.double().cpu() - expected.double().cpu()).norm(dim=1).max())


def precisions() -> tuple[Any, ...]:
    """The process's settings of float32 products and convolutions."""
    backends = torch.backends
    return (
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.rnn.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.fp32_precision,
    )


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@CONFIGS
@pytest.mark.parametrize("allowed", [False, True], ids=["ieee", "tf32 allowed"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_float32_is_what_a_cpu_gives(config: AutoencoderConfig, allowed: bool, compile: bool) -> None:
    """TF32, which cuDNN takes unless it is told not to, would be wrong by 1e-3. The process's settings stay."""
    expected = AutoencoderEmbedder(autoencoder(config))(latents(config))
    embedder = AutoencoderEmbedder(autoencoder(config), compile=compile)
    with tf32(allowed):
        before = precisions()
        found = embedder(latents(config).cuda())
        assert precisions() == before
        assert torch.backends.cudnn.allow_tf32 is allowed and torch.backends.cuda.matmul.allow_tf32 is allowed
    assert found.is_cuda and found.dtype == torch.float32 and error(found, expected) < 1e-4


def test_settings_stay_when_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, before = AutoencoderEmbedder(autoencoder(SMALL)), precisions()
    monkeypatch.setattr(embedder.encoder, "forward", lambda frames: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embedder(latents(SMALL).cuda())
    assert precisions() == before


@CONFIGS
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3), (torch.float64, 1e-6)], ids=str
)
def test_other_dtypes_are_close(config: AutoencoderConfig, dtype: torch.dtype, allowed: float) -> None:
    expected = AutoencoderEmbedder(autoencoder(config), dtype=torch.float64)(latents(config))
    found = AutoencoderEmbedder(autoencoder(config), dtype=dtype)(latents(config).cuda())
    assert error(found, expected) < allowed
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_it_follows_the_frames(compile: bool) -> None:
    embedder = AutoencoderEmbedder(autoencoder(SMALL), compile=compile)
    expected = embedder(latents(SMALL))
    assert not any(parameter.is_cuda for parameter in embedder.parameters())
    found = embedder(latents(SMALL).cuda())
    assert all(parameter.is_cuda for parameter in embedder.parameters()) and error(found, expected) < 1e-4
    back = embedder(latents(SMALL))
    assert not back.is_cuda and error(back, expected) < 1e-6


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_cuda_graph(config: AutoencoderConfig, dtype: torch.dtype, compile: bool) -> None:
    embedder = AutoencoderEmbedder(autoencoder(config), dtype=dtype, compile=compile)
    frames = latents(config).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        embedder(frames)  # moves, chooses algorithms, compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = embedder(frames)
    for seed in (2, 3):
        frames.copy_(latents(config, seed))
        graph.replay()
        allowed = 1e-5 if dtype == torch.float32 else 3e-2
        assert error(found, embedder(latents(config, seed).cuda())) < allowed


@CONFIGS
def test_compiled_by_somebody_else(config: AutoencoderConfig) -> None:
    """Within a region that another compiles, the process's precision holds: here without TF32."""
    embedder = AutoencoderEmbedder(autoencoder(config)).cuda()
    frames = latents(config).cuda()
    expected = embedder(frames)
    with tf32(False):
        assert error(torch.compile(embedder, fullgraph=True)(frames), expected) < 1e-4


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_does_not_wait(config: AutoencoderConfig, dtype: torch.dtype) -> None:
    embedder = AutoencoderEmbedder(autoencoder(config), dtype=dtype)
    frames = latents(config).cuda()
    expected = embedder(frames)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = embedder(frames)
        keys = MeanKeys(0)(torch.ones(3, 6, 2, 4, dtype=dtype, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(found, expected) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert torch.equal(keys, torch.ones(3, 8, device="cuda"))


def test_other_forms_of_frames() -> None:
    embedder, frames = AutoencoderEmbedder(autoencoder(RELEASED)), latents(RELEASED)
    expected = embedder(frames)
    for given in (
        frames.cuda().to(memory_format=torch.channels_last),
        torch.stack([frames, frames], dim=2).cuda()[:, :, 1],
        frames.double().cuda(),
    ):
        assert error(embedder(given), expected) < 1e-4
    frames[1, 0, 0, 0] = torch.nan
    found = embedder(frames.cuda())
    assert found[1].isnan().all() and error(found[[0, 2]], expected[[0, 2]]) < 1e-4
    assert embedder(frames[:0].cuda()).shape == (0, RELEASED.latent_dim)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_patched_model_searches_by_keys(layer: int) -> None:
    """The same choices as on a CPU; forwards before the clean one, whose timestep is read, do not wait."""
    memory: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1, "embedder": MeanKeys(layer)}
    with patched(ToyWan(), **memory) as handle:
        Pipeline(handle.model).run(10)  # type: ignore[arg-type]
        log = [entry["frames"] for entry in handle.retrieval_log]
    model = ToyWan().cuda()
    model.freqs = model.freqs.cuda()
    with patched(model, **memory) as handle:
        pipeline = Pipeline(model)
        pipeline.run(10)
        assert [entry["frames"] for entry in handle.retrieval_log] == log and any(any(frames) for frames in log)
        x = torch.randn(1, CHANNELS, 2, HEIGHT, WIDTH, device="cuda")
        timesteps = [torch.full((1, 2), step, device="cuda") for step in STEPS]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                for t in timesteps:
                    model(x, t, kv_cache=pipeline.cache, current_start=20 * TOKENS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
