"""SANA-WM's refiner: a sink that moves up to the local part, and rotary angles that differ from head to head.

The window cannot turn such keys, and need not. Pages of the local part stay turned to their own frame for ever. Sink
and history pages are canonical: the history's turned to frame 0, a sink frame's to its own number. Where the sink has
moved, queries are turned back by as much instead, for the sink and for memory, which sits where the first sink frame
does: right before the local part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import local_frames
from ..rotary import default_split
from .adapter import Adapter, Call, OwnWindow, lacking
from .settings import Settings

BUILD = "build_rotary_emb_for_absolute_positions"
MODEL = ("transformer_blocks", "proj_in", "time_embed", "config", BUILD)
ATTENTION = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out", "to_gate_logits", "heads", "rope_type")
KEPT_FRAMES = 11  # the refiner's kv_max_frames and block_size, as it was trained
BLOCK_FRAMES = 3
POSITIONS = 16384  # frames of a video: two hours

Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SanaCall(Call):
    """A forward, with what its rotary embedding was made of.

    Attributes:
        sink: sink frames of the pipeline.
        place: number of the frame where the pipeline puts the first of them.
        built: arguments that the rotary embedding was made with.
    """

    sink: int = 0
    place: int = 0
    built: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """Where a forward's keys are, the same in all layers.

    Attributes:
        exclude: frames of the local part that the pipeline has dropped.
        back: angles by which queries are turned back, for each sink frame; empty while the sink is in its own place.
        first: angles of frame 0; None where nothing is kept as history.
    """

    exclude: range
    back: list[Angles]
    first: Angles | None


class SanaRefiner(Adapter):
    """``diffusers`` ``SanaWMLTX2RefinerTransformer3DModel``, as ``SanaWMLTX2Refiner`` drives it.

    Its rule of positions is ``before_window`` with local frames at their own numbers, with memory and without. The
    window's bookkeeping calls that ``absolute``, because it places no page anew: both names mean the same here.
    """

    name = "SANA-WM refiner (diffusers)"
    memory_rule = None
    in_pieces = True

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._signature = inspect.signature(cast(Any, model).forward)
        self._build = getattr(model, BUILD)
        self._built = WeakTensorKeyDictionary()
        self._geometry: tuple[Call, Geometry] | None = None

    @classmethod
    def missing(cls, model: torch.nn.Module) -> list[str]:
        found = lacking(model, MODEL)
        blocks = getattr(model, "transformer_blocks", None)
        if not isinstance(blocks, torch.nn.ModuleList) or not len(blocks):
            return found or ["model.transformer_blocks[0]"]
        if getattr(getattr(model, "config", None), "patch_size_t", 1) != 1:
            found.append("model.config.patch_size_t of 1")
        return found + lacking(getattr(blocks[0], "attn1", None), ATTENTION, "model.transformer_blocks[0].attn1")

    def settings(self, settings: Settings) -> Settings:
        if settings.position_rule == "slot":
            raise ValueError(
                "position_rule must be before_window, absolute or None for the SANA-WM refiner, which has one rule: "
                "local frames at their own numbers, sink and memory right before them; got 'slot'"
            )
        if settings.sink == 0:
            _check_sink(settings.top_k, 0)
        return settings if settings.position_rule is None else replace(settings, position_rule="absolute")

    def layers(self) -> Sequence[torch.nn.Module]:
        return [block.attn1 for block in cast(Any, self.model).transformer_blocks]

    def install(self) -> list[Callable[[], None]]:
        own, build = vars(self.model).get(BUILD), self._build
        signature = inspect.signature(build)

        def remembered(*args: Any, **kwargs: Any) -> Angles:
            found = build(*args, **kwargs)
            self._built[found[0]] = dict(signature.bind(*args, **kwargs).arguments)
            return found

        def undo() -> None:
            if own is None:
                delattr(self.model, BUILD)
            else:
                setattr(self.model, BUILD, own)

        setattr(self.model, BUILD, remembered)
        return [undo]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        given = self._signature.bind(*args, **kwargs).arguments
        cache, mode, x = given.get("kv_cache"), given.get("kv_cache_mode"), given["hidden_states"]
        if cache is None or mode is None:
            return None
        built = self._arguments(given["video_rotary_emb"], "video_rotary_emb")
        frames = list(built["frame_positions"])
        patch = cast(Any, self.model).config.patch_size
        grid = (built["height"] // patch, built["width"] // patch)
        sink = frames if mode == "capture_pre_rope" else []
        if not sink and cache.sink_pe is not None:
            sink = self._arguments(cache.sink_pe, "kv_cache.sink_pe")["frame_positions"]
        return SanaCall(
            start_frame=frames[0],
            frames=len(frames),
            grid=grid,
            batch=x.shape[0],
            cache=cache,
            latents=lambda: x.unflatten(1, (len(frames), *grid)).permute(0, 1, 4, 2, 3),
            clean=mode != "inject",
            sink=len(sink),
            place=sink[0] if sink else 0,
            built=built,
        )

    def _arguments(self, rotary: Angles, name: str) -> dict[str, Any]:
        built = self._built.get(rotary[0])
        if built is None:
            raise ValueError(f"{name} must be what {BUILD} of the patched model returned, got another tensor")
        frames = list(built["frame_positions"])
        if not frames or frames != list(range(frames[0], frames[0] + len(frames))):
            raise ValueError(f"frame_positions of {name} must be consecutive frames, got {frames}")
        return cast(dict[str, Any], built)

    def own_window(self, call: Call) -> OwnWindow:
        return OwnWindow(KEPT_FRAMES + BLOCK_FRAMES, cast(SanaCall, call).sink, "absolute")

    def frames_per_block(self) -> int | None:
        return BLOCK_FRAMES

    def rotary(self, head_dim: int) -> tuple[torch.Tensor, list[int]] | None:
        still = torch.tensor([1.0, 0.0], device=next(self.model.parameters()).device)
        return still.expand(POSITIONS, head_dim // 2, 2), list(default_split(head_dim))

    def attend(self, forward: Any, layer: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        attention = self.modules[layer]
        x = args[0] if args else kwargs["hidden_states"]
        q, k, v = attention.norm_q(attention.to_q(x)), attention.norm_k(attention.to_k(x)), attention.to_v(x)
        q, k, v = (part.unflatten(2, (attention.heads, -1)) for part in (q, k, v))
        angles = self._angles(kwargs["query_rotary_emb"])
        turned = self._turned(q, *angles)
        call, window = forward.call, forward.prepare(layer, k, v)
        geometry = self._layout(call, window)
        canonical = None if geometry.first is None else self._turned(k, *geometry.first).to(v.dtype)
        query = window.write(
            layer,
            turned.to(v.dtype),
            self._turned(k, *angles).to(v.dtype),
            v,
            call.start_frame,
            call.grid,
            canonical=canonical,
        )
        if not geometry.back:
            out, _ = window.attend_written(layer, query, exclude=geometry.exclude)
        else:
            found = [window.attend_written(layer, query, parts=("local",), exclude=geometry.exclude, return_lse=True)]
            for frame, (cos, sin) in enumerate(geometry.back):
                others = [other for other in range(call.sink) if other != frame]
                parts = ("sink", "memory") if frame == 0 else ("sink",)
                back = self._turned(turned, cos, -sin).to(v.dtype)
                found.append(window.attend_written(layer, back, parts=parts, exclude=others, return_lse=True))
            outs, lses = (torch.stack(part) for part in zip(*found, strict=True))
            out, _ = torch.ops.longlive.merge_attention(outs, lses, engine=window.engine)
        if attention.to_gate_logits is not None:
            out = out * (2.0 * torch.sigmoid(attention.to_gate_logits(x))).unsqueeze(3)
        out = out.flatten(2)
        for step in attention.to_out:
            out = step(out)
        if call.clean:
            # The pipeline reads what was captured and joins it to its history: let there be nothing.
            cache, nothing = kwargs["kv_cache"], x.new_empty(x.shape[0], 0, k.shape[2] * k.shape[3])
            first = kwargs["kv_cache_mode"] == "capture_pre_rope"
            (cache.store_captured_pre_rope if first else cache.store_captured_post_rope)(nothing, nothing)
        return out

    def _layout(self, call: SanaCall, window: Any) -> Geometry:
        if self._geometry is not None and self._geometry[0] is call:
            return self._geometry[1]
        config, sink = window.config, call.sink
        held = local_frames(call.start_frame, call.frames, sink, config.local)
        # What the pipeline has dropped follows from where it puts the sink; memory may leave room for fewer.
        first = max(held.start, call.place + sink)
        back, zero = [], None
        if first > sink:
            for now, then in zip(self._of(call, range(first - sink, first)), self._of(call, range(sink)), strict=True):
                # All tokens of a frame have moved alike: only their angles of time have.
                (cos, sin), (cos_0, sin_0) = ([part[:, :1] for part in angles] for angles in (now, then))
                back.append((cos * cos_0 + sin * sin_0, sin * cos_0 - cos * sin_0))
        if config.top_k > 0 and call.start_frame >= sink:
            ((cos, sin),) = self._of(call, range(1))
            zero = cos.repeat(1, call.frames, 1, 1), sin.repeat(1, call.frames, 1, 1)
        found = Geometry(range(held.start, first), back, zero)
        self._geometry = call, found
        return found

    def _of(self, call: SanaCall, frames: Sequence[int]) -> Iterable[Angles]:
        """Angles of each of these frames' tokens."""
        if not frames:
            return []
        cos, sin = self._angles(self._build(**{**call.built, "frame_positions": list(frames)}))
        tokens = call.tokens_per_frame
        return zip(cos.split(tokens, dim=1), sin.split(tokens, dim=1), strict=True)

    def _angles(self, rotary: Angles) -> Angles:
        """Cosine and sine of each pair, ``(B, L, H, D // 2)``, of either kind of rotary embedding."""
        attention = self.modules[0]
        if attention.rope_type == "split":
            cos, sin = (part.transpose(1, 2) for part in rotary)
        else:
            cos, sin = (part[..., ::2].unflatten(2, (attention.heads, -1)) for part in rotary)
        return cos, sin

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``(B, L, H, D)`` turned by angles of pairs, in float32 as the model does."""
        split = self.modules[0].rope_type == "split"
        a, b = x.float().unflatten(3, (2, -1) if split else (-1, 2)).unbind(3 if split else 4)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=3 if split else 4).flatten(3)

    def advanced(self, call: Call, clip: Any) -> None:
        self._geometry = None

    def check(self, call: Call, clip: Any) -> None:
        config, sink, place = clip.config, cast(SanaCall, call).sink, cast(SanaCall, call).place
        if call.end_frame <= clip.finished_frames:
            raise RuntimeError(
                f"frame_positions must be of a new block, got {call.start_frame} .. {call.end_frame - 1} when "
                f"{clip.finished_frames} frames are finished: a block's last forward is the one that captures it"
            )
        if config.sink != sink:
            raise ValueError(f"sink must be {sink}, the pipeline's sink_size, or None; got {config.sink}")
        _check_sink(config.top_k, sink)
        if call.frames > config.frames_per_block:
            raise ValueError(
                f"frames_per_block must be at least {call.frames}, the pipeline's block_size; got "
                f"{config.frames_per_block}"
            )
        attended = call.end_frame - place
        if clip.settings.window is None and config.top_k == 0 and attended > config.window:
            raise ValueError(
                f"window must be given where the pipeline's kv_max_frames + block_size is more than {config.window}: "
                f"it would attend to {attended} frames by itself"
            )


def _check_sink(top_k: int, sink: int) -> None:
    if top_k > 0 and sink < 1:
        raise ValueError(
            f"sink must be at least 1 when frames are retrieved (top_k {top_k}), because they sit where the sink does; "
            f"got {sink}"
        )
