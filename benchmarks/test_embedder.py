"""The retrieval autoencoder's embeddings of a block on a CPU: in one call, as published, beside one layer's attention.

``pytest benchmarks/test_embedder.py -s`` prints milliseconds a block and ratios. Sizes of the encoder and the latents
are the released ones, its weights are random: time does not depend on them. Everything is float32, the published calls
too, whose bfloat16 is for GPUs. The attention is that of one layer in one forward of the same block, with 390 tokens a
frame as in test_attention_step.py and not the model's 1560, which a CPU is too slow for. Contenders take turns round by
round; ratios are medians of the rounds' ratios. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.attention_step import WARM_BLOCKS
from benchmarks.contenders import Ours, Shape
from benchmarks.embedder_contenders import FRAMES, as_published, contiguous, exact, random_autoencoder
from benchmarks.test_attention_step import publish, summary
from longlive_rag_ops.embedder import AutoencoderEmbedder

OURS, CONTIGUOUS = "one call", "one call, contiguous"
PUBLISHED, ATTENTION = "as published", "attention"
Call = Callable[[], torch.Tensor]


def contenders() -> dict[str, Call]:
    """By name, what embeds a block; all have given the same."""
    model = random_autoencoder()
    frames = torch.randn((FRAMES, *model.config.frame_shape), generator=torch.Generator().manual_seed(1))
    ways = {OURS: AutoencoderEmbedder(model), CONTIGUOUS: contiguous(model), PUBLISHED: as_published(model)}
    want = exact(model, frames)
    for name, embed in ways.items():
        worst = float((embed(frames) - want).abs().max())
        assert worst < 1e-5, (name, worst)
    return {name: functools.partial(embed, frames) for name, embed in ways.items()}


def one_attention(shape: Shape) -> Call:
    """One layer's attention in one forward of a block, the window full and six frames retrieved."""
    ours = Ours(shape)
    forwards, embeddings = shape.block(0, 1)
    for block in range(WARM_BLOCKS):
        ours.run_block(block * FRAMES, forwards, embeddings + block)
    ((q, k, v),) = forwards
    return lambda: ours.window.attend(0, q, k, v, WARM_BLOCKS * FRAMES, shape.grid)


@pytest.mark.benchmark(group="embeddings of a block, 3 latent frames of 16 x 60 x 104")
def test_embedder(benchmark) -> None:  # type: ignore[no-untyped-def]
    shape = Shape()
    rounds = int(os.environ.get("LONGLIVE_BENCH_ROUNDS", "15"))
    with torch.inference_mode():
        calls = contenders() | {ATTENTION: one_attention(shape)}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        turn = 0

        def take_turns() -> None:
            nonlocal turn
            names = list(calls)
            for at in range(len(names)):  # another order each round
                name = names[(at + turn) % len(names)]
                began = time.perf_counter()
                calls[name]()
                seconds[name].append(time.perf_counter() - began)
            turn += 1

        benchmark.pedantic(take_turns, rounds=rounds, iterations=1)
    report = summary(
        f"embeddings of a block: {FRAMES} latent frames of 16 x 60 x 104, the released sizes, float32; "
        f"attention: one layer, one forward of the block, {shape.config.window} frames of {shape.tokens} tokens (a "
        f"quarter of the model's), {shape.heads} heads x {shape.head_dim}",
        seconds,
        OURS,
    )
    benchmark.extra_info.update(report)
    publish(report, "embedder")
