"""The published pipeline classes over tiny models: LongLive-RAG's, Self-Forcing's, LongLive's interactive one."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from peers import HEIGHT, SIZES, TOKENS, WIDTH, noise, on_a_cpu, weights
from torch import Tensor

HEADS: dict[str, Any] = {"dim": 1536, "ffn_dim": 256, "num_heads": 12}  # the pipelines' caches have 12 heads of 128
COMMON: dict[str, Any] = {
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "num_frame_per_block": 3,
    "context_noise": 0,
    "independent_first_frame": False,
}


class NoPictures:
    """In place of the video decoder."""

    def decode_to_pixel(self, latents: Tensor, use_cache: bool = False) -> Tensor:
        return latents

    decode_to_pixel_chunk = decode_to_pixel


def build(
    repository: str, pipeline: str, name: str, models: list[str], arguments: dict[str, Any], **options: Any
) -> Any:
    """A pipeline object of a checkout, with random weights and prompts ``a`` and ``b``."""
    omegaconf = pytest.importorskip("omegaconf")
    prompts = {"a": noise(5, 1, 16, 32), "b": noise(6, 1, 16, 32)}
    with peers.checkout(repository, "wan") as load:
        on_a_cpu(load("wan.modules.model"), *(load(model) for model in models))
        for model in models:
            load(model).CausalWanModel.from_pretrained = classmethod(
                lambda cls, path, **sizes: weights(cls(**{**SIZES, **HEADS, **sizes}))
            )
        made = getattr(load(pipeline), name)(
            omegaconf.OmegaConf.create({**COMMON, **arguments}),
            torch.device("cpu"),
            text_encoder=lambda text_prompts: {"prompt_embeds": prompts[text_prompts[0]]},
            vae=NoPictures(),
            **options,
        )
    made.num_transformer_blocks, made.frame_seq_length = 2, TOKENS
    return made


def longlive_rag(kind: str, **sizes: Any) -> Any:
    window = {"local_attn_size": 12, "sink_size": 1, "timestep_shift": 5.0, **sizes}
    if kind == "latentmem":
        window |= {"memory_size": 6, "recent_exclude": 5, "use_latentmem": True, "compression_method": "avg_pool"}
    models = ["wan.modules.causal_model", "wan.modules.causal_model_latentmem"]
    return build(
        "LongLive-RAG", "pipeline.causal_inference", "CausalInferencePipeline", models, {"model_kwargs": window}
    )


def self_forcing(repository: str = "Self-Forcing") -> Any:
    window = {"local_attn_size": 12, "sink_size": 1, "timestep_shift": 5.0}
    models = ["wan.modules.causal_model"]
    made = build(repository, "pipeline.causal_inference", "CausalInferencePipeline", models, {"model_kwargs": window})
    made.generator.model.local_attn_size = made.local_attn_size = 12
    return made


def longlive(kind: str, global_sink: bool) -> Any:
    window: dict[str, Any] = {"local_attn_size": 12, "sink_size": 3, "timestep_shift": 5.0}
    if kind == "infinity":
        window["use_infinite_attention"] = True
    models = ["wan.modules.causal_model", "wan.modules.causal_model_infinity"]
    return build(
        "LongLive",
        "pipeline.interactive_causal_inference",
        "InteractiveCausalInferencePipeline",
        models,
        {"model_kwargs": window, "global_sink": global_sink},
    )


@torch.no_grad()
def generate(pipeline: Any, blocks: int, switch: int | None = None) -> Tensor:
    """Latents of ``3 * blocks`` frames; ``switch`` is the frame from which prompt ``b`` holds."""
    torch.manual_seed(0)
    start = noise(11, 1, 3 * blocks, 16, HEIGHT, WIDTH)
    if switch is not None:
        return pipeline.inference(
            start, text_prompts_list=[["a"], ["b"]], switch_frame_indices=[switch], return_latents=True
        )[1]
    return pipeline.inference(start, ["a"], return_latents=True)[1]
