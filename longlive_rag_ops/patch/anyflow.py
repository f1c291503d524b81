"""diffusers' AnyFlow-FAR: chunks of frames, the newest at full resolution, the older ones with fewer tokens.

A denoising forward attends to [compressed chunks | newest chunks | its own chunk]; after a chunk one more forward, the
cache step, encodes all frames again. The window takes the place of the cache at full resolution. Compressed chunks stay
the model's own, and retrieved frames are attended to beside them, at full resolution and at their own position.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..config import local_frames
from .adapter import Adapter, Call, OwnWindow, lacking
from .settings import Settings

MODEL = ("blocks", "rope", "far_patch_embedding", "_forward_cache", "_forward_inference", "config")
CONFIG = ("patch_size", "full_chunk_limit", "chunk_partition")
ATTENTION = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out", "heads")
PADDED = 128  # the model fills its queries, and with them its keys, up to a multiple of this


@dataclass(frozen=True)
class AnyFlowCall(Call):
    """A forward, with the frames of each chunk up to its own."""

    chunks: tuple[int, ...] = ()


class AnyFlow(Adapter):
    """``diffusers`` ``AnyFlowFARTransformer3DModel``, as ``AnyFlowFARPipeline`` drives it.

    Its own window grows by ``top_k``: a frame that memory drove out of the local part would be in no part at all until
    its chunk is compressed.
    """

    name = "AnyFlow-FAR (diffusers)"
    memory_rule = None
    in_pieces = True

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._config = cast(Any, model).config
        self._signature = inspect.signature(cast(Any, model).forward)
        self._longest_chunk = max(self._config.chunk_partition)
        self._top_k = 0

    @classmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        found = lacking(model, MODEL)
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, torch.nn.ModuleList) or not len(blocks):
            return found or ["model.blocks[0]"]
        found += lacking(getattr(model, "config", None), CONFIG, "model.config")
        return found + lacking(getattr(blocks[0], "attn1", None), ATTENTION, "model.blocks[0].attn1")

    def settings(self, settings: Settings) -> Settings:
        self._top_k = settings.top_k
        return settings

    def layers(self) -> Sequence[torch.nn.Module]:
        return [block.attn1 for block in cast(Any, self.model).blocks]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        given = self._signature.bind(*args, **kwargs).arguments
        cache = given.get("kv_cache")
        if cache is None:
            return None
        flag, x = given["kv_cache_flag"], given["hidden_states"]
        chunks = tuple(given["chunk_partition"])
        _, height, width = self._config.patch_size
        call = AnyFlowCall(
            start_frame=sum(chunks[:-1]),
            frames=chunks[-1],
            grid=(x.shape[3] // height, x.shape[4] // width),
            batch=x.shape[0],
            cache=cache,
            latents=lambda: x[:, -chunks[-1] :],  # a cache step has all frames of the video
            clean=bool(flag["is_cache_step"]),
            fresh=lambda: flag["num_cached_chunks"] == 0,
            chunks=chunks,
        )
        held = cache[0]["full_cache"].shape[3] // call.tokens_per_frame
        if held > 0:  # a video's first forward; its chunks may be longer than the model's usual ones
            self._longest_chunk = held // self._config.full_chunk_limit
        return call

    def own_window(self, call: Call) -> OwnWindow:
        return OwnWindow(self._config.full_chunk_limit * self._longest_chunk + self._top_k, 0, "absolute")

    def frames_per_block(self) -> int | None:
        return self._longest_chunk

    def rotary(self, head_dim: int) -> tuple[torch.Tensor, list[int]] | None:
        model = cast(Any, self.model)
        table = model.rope._build_freqs(model.device)
        side = 2 * (head_dim // 6)
        return torch.stack([table.real, table.imag], dim=-1), [head_dim - 2 * side, side, side]

    def attend(self, forward: Any, layer: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if forward.call.clean:
            return self._encode(forward, layer, original, args, kwargs)
        attention = self.modules[layer]
        x = args[0] if args else kwargs["hidden_states"]
        q, k, v = attention.norm_q(attention.to_q(x)), attention.norm_k(attention.to_k(x)), attention.to_v(x)
        q, k, v = (part.to(x.dtype).unflatten(2, (attention.heads, -1)) for part in (q, k, v))
        call, window = forward.call, forward.prepare(layer, k, v)
        compressed = sum(call.chunks[: -self._config.full_chunk_limit])
        rotated = window.write(layer, q, k, v, call.start_frame, call.grid)
        # Chunks differ in length: the local part may reach back into one that the model has compressed.
        exclude = range(window.config.sink, compressed)
        out, lse = window.attend_written(layer, rotated, exclude=exclude, return_lse=True)
        if compressed:
            tokens = kwargs["kv_cache_flag"]["num_cached_compressed_tokens"]
            keys, values = kwargs["kv_cache"]["compressed_cache"][..., :tokens, :]
            rotary = kwargs["rotary_emb"]
            pages = torch.stack([_turned(keys, rotary["key"][:, :, :tokens]), values]).transpose(2, 3)
            # In a rule other than the model's own the window has turned the queries otherwise than compressed keys are.
            queries = _turned(q.transpose(1, 2), rotary["query"]).transpose(1, 2)
            far, far_lse = torch.ops.longlive.window_attend(
                queries.contiguous(),
                pages.unflatten(2, (compressed, -1)).contiguous(),
                run=compressed,
                return_lse=True,
                engine=window.engine,
            )
            out, lse = torch.ops.longlive.merge_attention(
                torch.stack([far, out]), torch.stack([far_lse, lse]), engine=window.engine
            )
        padding = -q.shape[1] % PADDED
        if padding:
            # The model attends to its padding: keys and values of zero, a logit of 0 each.
            share = torch.sigmoid(lse - math.log(padding)).transpose(1, 2).unsqueeze(3)
            out = (out * share).to(x.dtype)
        out = out.flatten(2)
        for step in attention.to_out:
            out = step(out)
        return out

    def _encode(
        self, forward: Any, layer: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """A cache step: the model's own attention, which caches to a buffer whose pages go to the window."""
        call, cache = forward.call, kwargs["kv_cache"]
        shape = list(cache["full_cache"].shape)
        shape[3] = kwargs["kv_cache_flag"]["num_full_tokens"]
        full = cache["full_cache"].new_empty(shape)
        out = original(*args, **{**kwargs, "kv_cache": {**cache, "full_cache": full}})
        k, v = full.transpose(2, 3).unflatten(2, (-1, call.tokens_per_frame))

        def pages(of: torch.Tensor, first: int, last: int) -> torch.Tensor:
            return of[:, first:last].flatten(1, 2).contiguous()

        old = k.shape[1] - call.frames
        newest = pages(k, old, k.shape[1]), pages(v, old, v.shape[1])
        window = forward.prepare(layer, *newest)
        window.write(layer, newest[0], *newest, call.start_frame, call.grid)
        config = window.config
        held = local_frames(call.start_frame, call.frames, config.sink, config.local)
        # The sink goes with the local part where there is no gap between them.
        skipped = max(0, (held.start if held.start > config.sink else 0) - (call.start_frame - old))
        if skipped < old:
            first = call.start_frame - old + skipped
            window.rewrite(layer, pages(k, skipped, old), pages(v, skipped, old), first, call.grid)
        return out

    def take_over(self, call: Call) -> Callable[[], None] | None:
        released = []
        for layer in range(len(self.layers())):
            cache = call.cache[layer]
            full = cache["full_cache"]
            if full.shape[3] > 0:
                released.append((cache, full.shape))
                cache["full_cache"] = full.new_empty((*full.shape[:3], 0, full.shape[4]))

        def give_back() -> None:
            for cache, shape in released:
                cache["full_cache"] = cache["full_cache"].new_zeros(shape)

        return give_back if released else None

    def check(self, call: Call, clip: Any) -> None:
        if call.end_frame <= clip.finished_frames:
            raise RuntimeError(
                f"chunk_partition must end with a new chunk, got {list(cast(AnyFlowCall, call).chunks)} when "
                f"{clip.finished_frames} frames are finished: a chunk gets one cache step, which is its last forward"
            )


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """``(B, H, L, D)`` times complex ``(1, 1, L, D // 2)``, in the precision of the angles as the model does."""
    pairs = torch.view_as_complex(x.to(angles.real.dtype).unflatten(3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(3).to(x.dtype)
