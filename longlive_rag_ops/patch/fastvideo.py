"""FastVideo's causal Wan: self-attention modules get queries and keys, and return what is not projected yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from ..rotary import default_split, rotary_table
from .adapter import Call, OwnWindow, lacking, whole_frames
from .native_cache import GLOBAL_FRAMES, NativeCacheAdapter, is_fresh


class FastVideoWan(NativeCacheAdapter):
    """``fastvideo.models.dits.causal_wanvideo.CausalWanTransformer3DModel``."""

    name = "FastVideo's causal Wan"

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._signature = inspect.signature(cast(Any, model)._forward_inference)
        self._attention = inspect.signature(type(self.layers()[0]).forward)

    @classmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        found = lacking(model, ("blocks", "patch_size", "num_attention_heads", "_forward_inference"))
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, torch.nn.ModuleList) or not len(blocks):
            return found or ["model.blocks[0]"]
        attention = getattr(blocks[0], "attn1", None)
        if attention is None:
            return [*found, "model.blocks[0].attn1"]
        return found + lacking(attention, ("rope_cache_policy", "head_dim", "sink_size"), "model.blocks[0].attn1")

    def layers(self) -> Sequence[torch.nn.Module]:
        return [block.attn1 for block in cast(Any, self.model).blocks]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        cache = kwargs.get("kv_cache")  # by name only: that is how the model tells generation from training
        if cache is None:
            return None
        given = self._signature.bind(*args, **kwargs).arguments
        x = given["hidden_states"]
        patch = cast(Any, self.model).patch_size
        batch, _, frames, height, width = x.shape
        grid = (height // patch[1], width // patch[2])
        # Rotation goes by start_frame; current_start only says where in the cache.
        start = given.get("start_frame")
        if start is None:
            start = whole_frames(int(given.get("current_start") or 0), grid[0] * grid[1], "current_start")
        return Call(
            start_frame=int(start),
            frames=frames // patch[0],
            grid=grid,
            batch=batch,
            cache=cache,
            latents=lambda: x.transpose(1, 2),
            timestep=given["timestep"],
            fresh=lambda: is_fresh(cache[0]),
        )

    def own_window(self, call: Call) -> OwnWindow:
        attention = self.modules[0]
        rule = "slot" if attention.rope_cache_policy == "relativistic" else "absolute"
        held = call.cache[0]["k"].shape[1] // call.tokens_per_frame
        local = attention.local_attn_size
        if local == -1:
            return OwnWindow(GLOBAL_FRAMES, 0, rule)
        # It attends to the newest frames of its buffer: of a larger buffer the sink is not among them.
        return OwnWindow(min(held, local), attention.sink_size if held <= local else 0, rule)

    def attend(self, forward: Any, layer: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        given = self._attention.bind(None, *args, **kwargs).arguments
        q, k, v = given["q"], given["k"], given["v"]
        if layer == 0:
            self._check_rotation(forward.call, given["freqs_cis"], q.shape[3])
        return forward.attend(layer, q.to(v.dtype), k.to(v.dtype), v)

    def _check_rotation(self, call: Call, given: tuple[torch.Tensor, torch.Tensor], head_dim: int) -> None:
        """The angles of its last token must be Wan's, by whose table the window rotates.

        Raises:
            ValueError: they are not.
        """
        if call.start_frame > 0:  # looked at while the video begins: it waits for the device
            return
        height, width = call.grid
        frame = given[0].shape[0] // (height * width) - 1
        table = rotary_table(head_dim, max(frame + 1, height, width), device=given[0].device)
        time, side, _ = (channels // 2 for channels in default_split(head_dim))
        rows = table[frame, :time], table[height - 1, time : time + side], table[width - 1, time + side :]
        expected = torch.cat(rows)
        found = torch.stack([part[-1].double() for part in given], dim=-1)
        if len(found) == head_dim:  # both channels of a pair have their angle, as since FastVideo 0.2
            expected = expected.repeat_interleave(2, dim=0)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=1e-5):
            raise ValueError(
                "freqs_cis must be the angles of Wan's rotary embedding (theta 10000, channels split over time, height "
                "and width), got others"
            )
