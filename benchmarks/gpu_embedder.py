"""The section of the retrieval autoencoder: a block's embeddings, beside one layer's attention of the same block."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import figures
from benchmarks.embedder_contenders import FRAMES, Embed, as_published, contiguous, exact, random_autoencoder
from benchmarks.figures import Section, Target
from benchmarks.gpu_contenders import difference, first_line, poisoned
from benchmarks.gpu_sections import attention_entrants, paper_cases
from benchmarks.gpu_timer import Call
from benchmarks.harness import Absent, Bench, Entrant
from longlive_rag_ops.embedder import AutoencoderConfig, AutoencoderEmbedder, LatentAutoencoder

SMALL = AutoencoderConfig(in_channels=4, spatial_h=8, spatial_w=10, latent_dim=16, hidden_dims=(8, 12))  # a dry run's
BLOCK = 500e-6  # seconds that a block's embeddings may take
# Relative errors allowed. TF32 makes 1e-3; bfloat16 as a whole 0.007.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.03}
Make = Callable[[LatentAutoencoder], Embed]


def embedder(bench: Bench) -> Section:
    """Three frames of the released size. Every call has its own weights, so that each finds the cache cold."""
    config = SMALL if bench.dry else AutoencoderConfig()
    section = Section(f"Embedder: {FRAMES} latent frames of {' x '.join(map(str, config.frame_shape))}")
    cases = bench.copies(functools.partial(_case, config, bench.device), _bytes(config))
    options: Any = {"backend": "aot_eager"} if bench.dry else True

    def one_call(dtype: torch.dtype, compile: Any = False) -> Make:
        return lambda model: AutoencoderEmbedder(model, dtype=dtype, compile=compile)

    entrants = []
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for launched, how in ((False, name), (True, f"{name}, launched call by call")):
            entrants.append(_entrant(f"one call, {how}", one_call(dtype), cases, dtype, launched))
        entrants.append(_entrant(f"one call, {name}, contiguous", _in(dtype, contiguous), cases, dtype))
        compiled = _entrant(f"one call, {name}, torch.compile", one_call(dtype, options), cases, dtype, compiled=True)
        compiled.check = functools.partial(_absent_when_it_fails, compiled.calls, compiled.check)
        entrants.append(compiled)
    published = _in(torch.bfloat16, as_published)
    for launched, how in ((False, ""), (True, ", launched call by call")):
        name = f"as published, {FRAMES} calls, bfloat16{how}"
        entrants.append(_entrant(name, published, cases, torch.bfloat16, launched))
    attention, _ = attention_entrants(
        bench, paper_cases(bench), bench.shape.window, "attention of a layer, ", ("auto",)
    )
    bench.run(section, [*entrants, attention[0]])
    for name, how in (("float32", "in a CUDA graph"), ("float32, launched call by call", "launched call by call")):
        row = section.find(f"one call, {name}")
        if row and how == "in a CUDA graph" and row.mode == "eager":
            row = None  # it could not be captured
        got = figures.Spread.of(row.seconds).median * 1e6 if row else None
        section.targets.append(Target(f"embedder, {FRAMES} frames, float32, {how}", got, BLOCK * 1e6, False, " us"))
    return section


def _case(config: AutoencoderConfig, device: str, seed: int) -> tuple[LatentAutoencoder, torch.Tensor]:
    """A model on the device, and a block."""
    rng = torch.Generator(device).manual_seed(seed)
    frames = torch.randn((FRAMES, *config.frame_shape), generator=rng, device=device)
    return random_autoencoder(config, seed).to(device), frames


def _bytes(config: AutoencoderConfig) -> int:
    """Read at least: the encoder's float32 weights and the frames. In bfloat16 the half; the cache is cold there too,
    because four times its size is asked for."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in LatentAutoencoder(config).encoder.parameters())
    height, width = config.spatial_h, config.spatial_w
    return 4 * (weights + FRAMES * config.in_channels * height * width)


def _in(dtype: torch.dtype, make: Make) -> Make:
    """``make`` of a copy of the model in another dtype."""

    def made(model: LatentAutoencoder) -> Embed:
        return make(copy.deepcopy(model).to(dtype))

    return made


def _entrant(
    name: str,
    make: Make,
    cases: Sequence[tuple[LatentAutoencoder, torch.Tensor]],
    dtype: torch.dtype,
    launched: bool = False,
    compiled: bool = False,
) -> Entrant:
    calls: list[Call] = [functools.partial(make(model), frames) for model, frames in cases]
    model, frames = cases[0]

    def check() -> str:
        with contextlib.nullcontext() if compiled else poisoned():  # which compiles anew
            found: Any = calls[0]()
        whole, worst = difference(found, exact(model, frames))
        allowed = ALLOWED[dtype]
        return "" if worst < allowed else f"WRONG by {whole:.1e}, {worst:.1e} at worst; allowed {allowed:g}"

    return Entrant(name, calls, check, launched=launched)


def _absent_when_it_fails(calls: Sequence[Call], check: Callable[[], str]) -> str:
    """Compiles, which needs what a machine may not have."""
    try:
        for call in calls:
            call()
    except Exception as error:  # a missing compiler, an old driver: each says so in its own way
        raise Absent(f"torch.compile does not work here: {first_line(error)}") from error
    return check()
