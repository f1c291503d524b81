"""What the descendants of Wan 2.1 share: CausVid, Self-Forcing and everything built on them.

The model's ``blocks[i].self_attn`` has linear layers ``q``, ``k``, ``v``, ``o`` and norms ``norm_q``, ``norm_k``, and
gets the cache of its layer; ``model.freqs`` is a complex table of 1024 positions, cut into time, height and width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, cast

import torch

from ..rotary import rotary_table
from .adapter import Call, OwnWindow, lacking, whole_frames
from .native_cache import GLOBAL_FRAMES, NativeCacheAdapter, counters, is_fresh

MODEL = ("blocks", "freqs", "patch_size", "patch_embedding", "_forward_inference")
ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim")
# Keys are cached rotated to their own frame, or rotated anew with every forward: the code says so by what it calls.
ROTATIONS = {"causal_online_rope": "slot", "block_relativistic_rope": "slot", "causal_rope_apply": "absolute"}


class WanAdapter(NativeCacheAdapter):
    """Base of the Wan families."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._signature = inspect.signature(cast(Any, model)._forward_inference)

    @classmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        found = lacking(model, MODEL)
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, Sequence | torch.nn.ModuleList) or not len(blocks):
            return found or ["model.blocks[0]"]
        attention = getattr(blocks[0], "self_attn", None)
        if attention is None:
            return [*found, "model.blocks[0].self_attn"]
        found += lacking(attention, ATTENTION, "model.blocks[0].self_attn")
        inference = getattr(model, "_forward_inference", None)
        if inference is not None:
            parameters = inspect.signature(inference).parameters
            found += [
                f"argument {name} of model._forward_inference" for name in cls.arguments() if name not in parameters
            ]
        return found

    @classmethod
    def arguments(cls) -> Sequence[str]:
        """Arguments that the model's forward must take."""
        return ("x", "t", "kv_cache", "current_start")

    def layers(self) -> Sequence[torch.nn.Module]:
        return [block.self_attn for block in cast(Any, self.model).blocks]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        given = self._signature.bind(*args, **kwargs).arguments
        cache = given.get("kv_cache")
        if cache is None:
            return None
        x = given["x"]
        x = x if isinstance(x, torch.Tensor) else torch.stack(list(x))
        patch = cast(Any, self.model).patch_size
        batch, _, frames, height, width = x.shape
        grid = (height // patch[1], width // patch[2])
        start = whole_frames(int(given.get("current_start") or 0), grid[0] * grid[1], "current_start")
        return Call(
            start_frame=start,
            frames=frames // patch[0],
            grid=grid,
            batch=batch,
            cache=cache,
            latents=lambda: x.transpose(1, 2),
            timestep=given.get("t"),
            fresh=lambda: is_fresh(cache[0]),
            renew_sink=bool(given.get("sink_recache_after_switch", False)),
        )

    def own_window(self, call: Call) -> OwnWindow:
        attention = self.modules[0]
        tokens = call.tokens_per_frame
        held = call.cache[0]["k"].shape[1] // tokens
        attended = getattr(attention, "max_attention_size", held * tokens) // tokens
        sink = getattr(attention, "sink_size", 0)
        local = getattr(attention, "local_attn_size", -1)
        if local == -1:
            return OwnWindow(held or GLOBAL_FRAMES, 0, self.own_rule())
        return self.bounded_window(held, attended, sink)

    def bounded_window(self, held: int, attended: int, sink: int) -> OwnWindow:
        """The own window from frames in the buffer, frames attended to, and sink."""
        return OwnWindow(min(held, attended), sink, self.own_rule())

    def own_rule(self) -> str | None:
        """The backbone's own rule of temporal positions; None where its code does not tell."""
        attention = self.modules[0]
        if hasattr(attention, "compression_alpha"):  # Reward-Forcing rotates its whole window with every forward
            return "slot"
        called = _names(getattr(inspect.unwrap(type(attention).forward), "__code__", None))
        return next((rule for name, rule in ROTATIONS.items() if name in called), None)

    def attend(self, forward: Any, layer: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        module = self.modules[layer]
        x = args[0] if args else kwargs["x"]
        shape = (*x.shape[:2], module.num_heads, module.head_dim)
        v = module.v(x).view(shape)
        # A norm with float32 weights gives float32 under autocast; pages are in the dtype of the values.
        q = module.norm_q(module.q(x)).view(shape).to(v.dtype)
        k = module.norm_k(module.k(x)).view(shape).to(v.dtype)
        out = forward.attend(layer, q, k, v)
        return self.returned(module.o(out.flatten(2)), forward)

    def returned(self, x: torch.Tensor, forward: Any) -> Any:
        """What a self-attention module returns."""
        return x

    def rotary(self, head_dim: int) -> tuple[torch.Tensor, list[int]] | None:
        table = cast(Any, self.model).freqs
        pairs = head_dim // 2
        third = pairs // 3
        split = [2 * (pairs - 2 * third), 2 * third, 2 * third]
        rows = torch.stack([table.real, table.imag], dim=-1)
        wan = rotary_table(head_dim, rows.shape[0], split=split, dtype=torch.float64, device=rows.device)
        # The usual table can be made longer than the model's 1024 rows; one that differs is taken as it is.
        return None if torch.allclose(rows.double(), wan, rtol=0, atol=1e-9) else (rows, split)

    def with_latents(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: torch.Tensor, start_frame: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = self._signature.bind(*args, **kwargs)
        given = bound.arguments
        patch = cast(Any, self.model).patch_size
        tokens = (latents.shape[3] // patch[1]) * (latents.shape[4] // patch[2])
        x = latents.transpose(1, 2)
        given["x"] = x.to(given["x"][0].dtype) if isinstance(given["x"], torch.Tensor) else list(x)
        if given["t"].dim() == 2:  # one a frame
            given["t"] = given["t"][:, :1].expand(-1, latents.shape[1])
        given["current_start"] = start_frame * tokens
        if "current_end" in given:
            given["current_end"] = (start_frame + latents.shape[1]) * tokens
        if "sink_recache_after_switch" in given:
            given["sink_recache_after_switch"] = False
        return bound.args, bound.kwargs


def _names(code: CodeType | None) -> set[str]:
    """What a function's code calls by name, functions in it included."""
    if code is None:
        return set()
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


class InPlaceWan(WanAdapter):
    """Wan models whose self-attention writes its cache itself and returns x.

    Self-Forcing, Causal-Forcing, CausVid, Infinity-RoPE, and Reward-Forcing without its averaged sink.
    """

    name = "Wan, cache written in place (Self-Forcing, Causal-Forcing, CausVid, Reward-Forcing, Infinity-RoPE)"

    @classmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        found = super().missing(model)
        return [*found, "a model without _apply_cache_updates"] if hasattr(model, "_apply_cache_updates") else found

    def bounded_window(self, held: int, attended: int, sink: int) -> OwnWindow:
        # It attends to the newest frames of its buffer: of a larger buffer the sink is not among them.
        return OwnWindow(min(held, attended), sink if held <= attended else 0, self.own_rule())


class DeferredWan(WanAdapter):
    """Wan models whose self-attention returns (x, what to do to the cache), which the model does after all layers.

    LongLive 1.0 and LongLive-RAG, both of whose classes cache keys either rotated or not.
    """

    name = "Wan, cache written after all layers (LongLive 1.0, LongLive-RAG)"

    @classmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        found = [*super().missing(model), *lacking(model, ("_apply_cache_updates",))]
        return [*found, "a model without rope_temporal_offset"] if hasattr(model, "rope_temporal_offset") else found

    def returned(self, x: torch.Tensor, forward: Any) -> Any:
        return with_counters(x, forward)


def with_counters(x: torch.Tensor, forward: Any) -> tuple[torch.Tensor, tuple[int, int, None]]:
    """What the model takes of a layer that defers its cache: nothing to write, and where its counters go, in tokens."""
    return x, (*counters(forward.call, forward.clip), None)
