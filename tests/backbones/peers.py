"""Published backbones from checkouts, tiny and on a CPU, without editing a file of theirs.

`LONGLIVE_PEERS` names the folder that holds the checkouts, each under its repository's name. Several of them have
packages of the same names (`wan`, `utils`, `pipeline`), so a checkout's modules are taken out of `sys.modules` again
once its classes are there.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # tensors this small: waking other threads takes nearly all of the time
SHARED_NAMES = ("wan", "wan_5b", "utils", "pipeline", "ae", "causvid", "model", "demo_utils")
HEIGHT, WIDTH = 8, 12  # of a latent frame: 4 x 6 tokens
TOKENS = 24
STEPS = (1000.0, 750.0, 500.0, 250.0)
SIZES: dict[str, Any] = {
    "model_type": "t2v",
    "patch_size": (1, 2, 2),
    "text_len": 16,
    "in_dim": 16,
    "dim": 256,
    "ffn_dim": 512,
    "freq_dim": 64,
    "text_dim": 32,
    "out_dim": 16,
    "num_heads": 4,
    "num_layers": 2,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


def folder(name: str) -> Path:
    """The checkout of a repository; skips the test when there is none."""
    peers = os.environ.get("LONGLIVE_PEERS")
    if not peers:
        pytest.skip("LONGLIVE_PEERS names no folder of checkouts")
    path = Path(peers) / name
    if not path.is_dir():
        pytest.skip(f"LONGLIVE_PEERS has no checkout {name}")
    return path


@contextmanager
def checkout(name: str, *hollow: str) -> Iterator[Callable[[str], Any]]:
    """Gives an import function for a checkout's modules; ``hollow`` packages are there without their ``__init__``.

    What their ``__init__`` imports (torchvision, text encoders) is not needed for attention.
    """
    root = folder(name)
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] in SHARED_NAMES}
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: 0  # evaluated while some of them are imported
    sys.path.insert(0, str(root))
    try:
        for dotted in hollow:
            package = types.ModuleType(dotted)
            package.__path__ = [str(root.joinpath(*dotted.split(".")))]
            sys.modules[dotted] = package
            parent, _, child = dotted.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, package)
        yield importlib.import_module
    finally:
        sys.path.remove(str(root))
        torch.cuda.current_device = current_device
        for key in list(sys.modules):
            if key.split(".")[0] in SHARED_NAMES:
                del sys.modules[key]
        sys.modules.update(before)


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of theirs, which asks for CUDA or rounds to bfloat16: (B, L, H, D) in the caller's dtype."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2).contiguous()


def on_a_cpu(*modules: Any) -> None:
    """Replaces the attention functions that modules have imported by name."""
    for module in modules:
        for name in ("attention", "flash_attention"):
            if hasattr(module, name):
                setattr(module, name, attention)


def weights(model: torch.nn.Module, seed: int = 1234) -> Any:
    """Random values that depend on a parameter's name alone: two classes with the same names get the same model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            generator = torch.Generator().manual_seed((seed + number) % 2**31)
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "modulation" not in name:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * values)
            else:
                parameter.copy_(0.1 * values)
    return model.eval()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def key_caches(
    frames: int, batch: int = 1, layers: int = 2, heads: int = 4, head_dim: int = 64, **extra: Any
) -> list[Any]:
    """Caches as the pipelines make them; ``extra`` are entries, called to make each layer's."""
    shape = (batch, frames * TOKENS, heads, head_dim)
    counters = ("global_end_index", "local_end_index")
    return [
        {"k": torch.zeros(shape), "v": torch.zeros(shape)}
        | {name: torch.zeros(1, dtype=torch.int64) for name in counters}
        | {name: make() for name, make in extra.items()}
        for _ in range(layers)
    ]


def cross_caches(batch: int = 1, layers: int = 2, heads: int = 4, head_dim: int = 64) -> list[dict[str, Any]]:
    shape = (batch, 16, heads, head_dim)
    return [{"k": torch.zeros(shape), "v": torch.zeros(shape), "is_init": False} for _ in range(layers)]


class Video:
    """A video by a model of the Wan family: blocks of four denoising forwards and a clean one.

    Args:
        model: the model.
        caches: of its self-attention.
        options: called with a block's first frame, gives more arguments for the block's forwards.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        caches: list[Any],
        *,
        batch: int = 1,
        per_block: int = 3,
        seed: int = 7,
        prompt: int = 5,
        dtype: torch.dtype = torch.float32,
        options: Callable[[int], dict[str, Any]] = lambda start: {},
    ) -> None:
        self.model, self.caches, self.per_block, self.seed, self.dtype = model, caches, per_block, seed, dtype
        self.batch, self.options = batch, options
        self.cross = cross_caches(batch)
        self.context = noise(prompt, 1, 16, 32).expand(batch, -1, -1).to(dtype)
        self.blocks: list[Tensor] = []

    @property
    def start(self) -> int:
        return self.per_block * len(self.blocks)

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: float, start: int | None = None, **options: Any) -> Tensor:
        """x ``(B, C, F, H, W)``."""
        return self.model(
            x,
            t=torch.full((x.shape[0], x.shape[2]), timestep),
            context=self.context,
            seq_len=32760,
            kv_cache=self.caches,
            crossattn_cache=self.cross,
            current_start=TOKENS * (self.start if start is None else start),
            **options,
        )

    def block(self) -> Tensor:
        """Generates a block and returns it, ``(B, C, F, H, W)``."""
        options, number = self.options(self.start), len(self.blocks)
        shape = (self.batch, 16, self.per_block, HEIGHT, WIDTH)
        x = noise(1000 * self.seed + number, *shape).to(self.dtype)
        for step, timestep in enumerate(STEPS):
            clean = x - timestep / 1000 * self.forward(x, timestep, **options)
            last = step == len(STEPS) - 1
            again = noise(77777 * self.seed + 10 * number + step, *shape).to(self.dtype)
            x = clean if last else 0.7 * clean + 0.3 * again
        self.forward(x, 0.0, **options)
        self.blocks.append(x)
        return x

    def run(self, blocks: int) -> Tensor:
        """The video so far, after this many more blocks."""
        for _ in range(blocks):
            self.block()
        return torch.cat(self.blocks, 2)


def longlive2_model(**sizes: Any) -> Any:
    """A tiny model of LongLive 2.0; its Triton kernels take no CPU tensors, and it imports a function that is gone."""
    module = pytest.importorskip("transformers.models.x_clip.modeling_x_clip")
    if not hasattr(module, "x_clip_loss"):
        module.x_clip_loss = None
    os.environ |= {"LLV2_TRITON_ROPE": "0", "LLV2_TRITON_ADALN": "0"}
    return wan_model("LongLive-2.0", "wan_5b.modules.causal_model", **sizes)


def wan_model(repository: str, module: str, *hollow: str, base: str | None = None, **sizes: Any) -> Any:
    """A tiny model of a Wan descendant; ``base`` is the package of Wan's own modules, where it is another one."""
    package = module.rsplit(".", 1)[0]
    with checkout(repository, *(hollow or (package.split(".")[0], package))) as load:
        causal, plain = load(module), load(f"{base or package}.model")
        on_a_cpu(causal, plain)
        model = weights(causal.CausalWanModel(**{**SIZES, **sizes}))
    model.num_frame_per_block = 3
    local = sizes.get("local_attn_size", -1)
    for part in model.modules():  # a literal of the constructor, in tokens of another resolution
        if hasattr(part, "max_attention_size") and local != -1:
            part.max_attention_size = local * TOKENS
    return model
