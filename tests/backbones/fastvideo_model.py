"""FastVideo's causal Wan on a CPU: the published class with small random weights, its caches, videos block by block.

The class is the wheel's own. What surrounds it there (pipelines, CUDA, distributed groups) is not loaded, and where the
class asks for it, it is answered from here; no file of FastVideo is changed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LAYERS, HEADS, HEAD_DIM = 2, 4, 64
CHANNELS, HEIGHT, WIDTH = 16, 8, 12
GRID = (HEIGHT // 2, WIDTH // 2)
TOKENS = GRID[0] * GRID[1]
TEXT, TEXT_DIM = 16, 32
FRAMES = 3  # of a block
TIMESTEPS = (1000, 750, 500, 250)  # of its denoising forwards; one at 0 follows, over the finished frames


@functools.cache
def fastvideo() -> SimpleNamespace:
    """The module with the class, and what else a call needs."""
    with _torchvision():
        _package_without_init("fastvideo")
        causal = importlib.import_module("fastvideo.models.dits.causal_wanvideo")
    platform = type(importlib.import_module("fastvideo.platforms").current_platform)
    # A CPU has no backend of attention there, and a GPU's would not take tensors of the CPU.
    platform.get_attn_backend_cls = classmethod(lambda cls, *_: "fastvideo.attention.backends.sdpa.SDPABackend")
    causal.get_sp_world_size = lambda: 1  # no process group is set up
    return SimpleNamespace(
        Model=causal.CausalWanTransformer3DModel,
        Config=importlib.import_module("fastvideo.configs.models.dits").WanVideoConfig,
        context=importlib.import_module("fastvideo.forward_context").set_forward_context,
    )


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """Something that can be imported as torchvision, of which FastVideo wants the name ``make_grid``.

    The real one, where it is installed, may be of another torch. diffusers and transformers look for it when they are
    imported, so they come first; nobody finds the stand-in afterwards.
    """
    importlib.import_module("diffusers.loaders.lora_base")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
    package, utils = ModuleType("torchvision"), ModuleType("torchvision.utils")
    package.__path__, package.__spec__, utils.__spec__ = (
        [],
        ModuleSpec("torchvision", None),
        ModuleSpec(utils.__name__, None),
    )
    package.utils, utils.make_grid = utils, None  # type: ignore[attr-defined]
    for name in before:
        del sys.modules[name]
    sys.modules |= {"torchvision": package, "torchvision.utils": utils}
    try:
        yield
    finally:
        del sys.modules["torchvision"], sys.modules["torchvision.utils"]
        sys.modules.update(before)


def _package_without_init(name: str) -> None:
    """Lets a package's modules be imported without its ``__init__``, which would load every pipeline."""
    spec = find_spec(name)
    assert spec is not None
    sys.modules.setdefault(name, module_from_spec(spec))


def make_model(policy: str = "absolute", *, local: int = 6, sink: int = 1, seed: int = 0) -> Any:
    """The model in float32; ``policy`` of its rotary embedding: ``absolute`` or ``relativistic``."""
    config = fastvideo().Config()
    sizes = config.arch_config
    sizes.num_layers, sizes.num_attention_heads, sizes.attention_head_dim = LAYERS, HEADS, HEAD_DIM
    sizes.hidden_size, sizes.ffn_dim, sizes.freq_dim = HEADS * HEAD_DIM, 512, 64
    sizes.in_channels = sizes.out_channels = sizes.num_channels_latents = CHANNELS
    sizes.text_len, sizes.text_dim = TEXT, TEXT_DIM
    sizes.local_attn_size, sizes.sink_size, sizes.rope_cache_policy = local, sink, policy
    sizes.num_frames_per_block = FRAMES
    model = fastvideo().Model(config, hf_config={}).eval().requires_grad_(False)
    _fill(model, seed)
    # It returns as many samples as there are rows of sizes, of which its own forward makes one whatever the batch.
    unpatchify = model.unpatchify
    model.unpatchify = lambda x, sizes: unpatchify(x, sizes.expand(len(x), -1))
    return model


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random values for all parameters, by their names; some are 0 when made, so that the output would be."""
    for name, parameter in model.named_parameters():
        values = noise(parameter.shape, seed, zlib.crc32(name.encode()))
        if "table" not in name and parameter.dim() > 1:
            values /= parameter[0].numel() ** 0.5
        else:
            values = (name.endswith("weight") + 0.1 * values) if "norm" in name else 0.1 * values
        parameter.copy_(values)


def noise(shape: Sequence[int], *seeds: int) -> Tensor:
    """Normal random numbers, the same for the same seeds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode())))


def make_cache(
    *, batch: int = 1, frames: int = 6, whole_numbers: bool = False, tokens: int = TOKENS
) -> list[dict[str, Any]]:
    """Keys and values of every layer as FastVideo's pipeline makes them, counters as tensors or as Python ints."""

    def counter() -> Any:
        return 0 if whole_numbers else torch.zeros(1, dtype=torch.long)

    def buffer() -> Tensor:
        return torch.zeros(batch, frames * tokens, HEADS, HEAD_DIM)

    return [
        {"k": buffer(), "v": buffer(), "global_end_index": counter(), "local_end_index": counter()}
        for _ in range(LAYERS)
    ]


class Video:
    """A video under way: a model, a cache, a prompt. Its random numbers depend on ``seed`` and the frame alone.

    Args:
        model: as `make_model` has it.
        cache: as `make_cache`; one of the model's own window when not given.
        seed, prompt: of the noise, of the text's embedding.
        size: height and width of the latents.

    Attributes:
        blocks: finished latents ``(B, C, n, H, W)``, a tensor for each block.
        frames: finished ones.
    """

    def __init__(
        self,
        model: Any,
        cache: list[dict[str, Any]] | None = None,
        *,
        batch: int = 1,
        seed: int = 0,
        prompt: int = 0,
        size: tuple[int, int] = (HEIGHT, WIDTH),
    ) -> None:
        self.model, self.batch, self.seed, self.size = model, batch, seed, size
        self.cache = make_cache(batch=batch, frames=model.local_attn_size) if cache is None else cache
        # One for all samples: FastVideo's causal forward takes no batch of texts.
        self.text = noise((1, TEXT, TEXT_DIM), prompt)
        self.text_cache: list[dict[str, Any]] = [{"k": None, "v": None, "is_init": False} for _ in range(LAYERS)]
        self.blocks: list[Tensor] = []
        self.frames = 0

    def forward(self, x: Tensor, timestep: int, start: int | None = None) -> Tensor:
        """One forward over the frames ``x`` from ``start`` on, by default from the end of the video."""
        start = self.frames if start is None else start
        tokens = x.shape[3] * x.shape[4] // 4
        with fastvideo().context(current_timestep=0, attn_metadata=None), torch.no_grad():
            return self.model(
                x,
                self.text,
                torch.full((x.shape[0], 1), timestep),
                kv_cache=self.cache,
                crossattn_cache=self.text_cache,
                current_start=start * tokens,
                start_frame=start,
            )

    def noise(self, frames: int = FRAMES, step: int = 0) -> Tensor:
        """Noise of the next block."""
        return noise((self.batch, CHANNELS, frames, *self.size), self.seed, self.frames, step)

    def denoised(self, x: Tensor, flow: Tensor, step: int) -> Tensor:
        """What the forward after denoising step ``step`` takes; after the last one, the finished frames."""
        clean = x - TIMESTEPS[step] / 1000 * flow
        return clean if step == len(TIMESTEPS) - 1 else 0.7 * clean + 0.3 * self.noise(x.shape[2], step + 1)

    def denoise(self, frames: int = FRAMES) -> Tensor:
        """The denoising forwards of the next block: its frames, finished but for the forward at 0."""
        x = self.noise(frames)
        for step, timestep in enumerate(TIMESTEPS):
            x = self.denoised(x, self.forward(x, timestep), step)
        return x

    def finish(self, x: Tensor) -> None:
        """The last forward of a block."""
        self.forward(x, 0)
        self.blocks.append(x)
        self.frames += x.shape[2]

    def extend(self, blocks: int, frames: int = FRAMES) -> Tensor:
        """Generates blocks; returns the whole video ``(B, C, F, H, W)``."""
        for _ in range(blocks):
            self.finish(self.denoise(frames))
        return torch.cat(self.blocks, dim=2)
