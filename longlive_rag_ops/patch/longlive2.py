"""LongLive 2.0's 5B model: a descendant of Wan with a temporal scale, an offset a shot, and two ways to cache keys."""

from __future__ import annotations

from typing import Any, cast

import torch

from .adapter import Call, OwnWindow, lacking
from .wan import WanAdapter, with_counters


class LongLive2Wan(WanAdapter):
    """LongLive 2.0's 5B model in bf16: temporal scale and offset, rotated or un-rotated keys by a switch."""

    name = "Wan 5B (LongLive 2.0)"

    @classmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        own = ("_apply_cache_updates", "rope_temporal_offset", "use_relative_rope", "t_scale")
        return [*super().missing(model), *lacking(model, own)]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        call = super().call(args, kwargs)
        if call is not None and call.cache[0].get("quantized", False):
            raise ValueError("kv_cache must hold bf16 keys and values, got an NVFP4 cache: use storage= of a bank")
        return call

    def bounded_window(self, held: int, attended: int, sink: int) -> OwnWindow:
        # Its global sink and its shots' sink lie over each other until a shot is pinned.
        everywhere = getattr(self.modules[0], "global_sink_size", 0)
        return super().bounded_window(held, attended, max(sink, everywhere))

    def returned(self, x: torch.Tensor, forward: Any) -> Any:
        return with_counters(x, forward)

    def own_rule(self) -> str | None:
        return "slot" if cast(Any, self.model).use_relative_rope else "absolute"

    def rotary(self, head_dim: int) -> tuple[torch.Tensor, list[int]] | None:
        model = cast(Any, self.model)
        given = super().rotary(head_dim)
        if model.t_scale == 1.0:
            return given
        pairs = head_dim // 2
        time = pairs - 2 * (pairs // 3)
        table = torch.stack([model.freqs.real, model.freqs.imag], dim=-1).clone()
        step = model.freqs[1, :time].angle()
        angle = torch.arange(table.shape[0], dtype=step.dtype, device=step.device)[:, None] * (model.t_scale * step)
        table[:, :time] = torch.stack([angle.cos(), angle.sin()], dim=-1)
        return table, [2 * time, 2 * (pairs // 3), 2 * (pairs // 3)]

    def check(self, call: Call, clip: Any) -> None:
        super().check(call, clip)
        offset = cast(Any, self.model).rope_temporal_offset
        if clip.config.position_rule == "absolute" and bool(torch.as_tensor(offset).ne(0).any()):
            raise RuntimeError(
                f"position_rule must be slot or before_window when shots are set apart in time, got absolute with "
                f"rope_temporal_offset {offset}"
            )
