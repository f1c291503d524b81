"""Self-attention over ``[sink | memory | local window]`` as a module: trained on clips, run block by block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .clip_attention import attend_clip
from .clip_windows import BlockWindow, clip_windows
from .config import WindowConfig, check_int
from .modes import normal_tensors
from .ops.checks import FLOATS, check
from .rotary import check_split, default_split, rotary_table
from .window import MemoryWindow

FIRST_POSITIONS = 1024  # rows of a rotary table before any frame asks for more
LONGEST_VIDEO = 16384  # rows of the table that `memory_for` makes where the window cannot make its own


class RetrievalAttention(nn.Module):
    """Self-attention of one layer of a causal video transformer, under the window rule of `WindowConfig`.

    With ``memory`` it generates: one block a call, keys and values of earlier frames in the caller's `MemoryWindow`,
    which all layers share. Without, it trains: a whole clip a call, every block under the window that it would have
    while generating, by plain differentiable attention. Both give the same numbers up to rounding. Parameters have the
    names of Wan 2.1's self-attention (``q``, ``k``, ``v``, ``o``, ``norm_q``, ``norm_k``).

    Training costs what its windows cost: for each block the keys and values of at most ``config.window`` frames are
    gathered, and kept for the backward. ``torch.utils.checkpoint`` around a layer keeps its input alone.

    Args:
        dim: width of the model, ``heads * head_dim``; ``head_dim`` must be even.
        heads: query heads.
        config: sizes of the window. It may be set anew between clips.
        layer: this layer's number, from 0, in the `MemoryWindow`.
        kv_heads: key-value heads, a divisor of ``heads``; ``heads`` when not given.
        qk_norm: RMSNorm of queries and of keys over their whole width, before the rotation.
        eps: of the norm.
        rope_theta: base of the rotary frequencies.
        rope_split: real channels of (time, height, width); `rotary.default_split` when not given.
        bias: of the four projections.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        config: WindowConfig,
        layer: int,
        kv_heads: int | None = None,
        qk_norm: bool = True,
        eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_split: Sequence[int] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, WindowConfig):
            raise TypeError(f"config must be a WindowConfig, got {type(config).__name__}")
        self.dim, self.heads = check_int("dim", dim, 1), check_int("heads", heads, 1)
        self.layer = check_int("layer", layer, 0)
        self.kv_heads = heads if kv_heads is None else check_int("kv_heads", kv_heads, 1, heads)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads ({heads}), got {dim}")
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads ({heads}), got {kv_heads}")
        self.head_dim = dim // heads
        self.rope_split = check_split(default_split(self.head_dim) if rope_split is None else rope_split, self.head_dim)
        self.config, self.eps, self.rope_theta = config, eps, float(rope_theta)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = self.kv_heads * self.head_dim
        self.q = nn.Linear(dim, dim, bias=bias, **options)
        self.k, self.v = (nn.Linear(dim, kv_dim, bias=bias, **options) for _ in "kv")
        self.o = nn.Linear(dim, dim, bias=bias, **options)
        self.norm_q = nn.RMSNorm(dim, eps=eps, **options) if qk_norm else None
        self.norm_k = nn.RMSNorm(kv_dim, eps=eps, **options) if qk_norm else None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, layer={self.layer}, {self.config}"

    def forward(
        self,
        x: torch.Tensor,
        grid: Sequence[int],
        *,
        memory: MemoryWindow | None = None,
        start_frame: int | None = None,
        embeddings: torch.Tensor | None = None,
        clean: torch.Tensor | None = None,
        windows: Sequence[BlockWindow] | None = None,
    ) -> torch.Tensor:
        """Attention of a block (with ``memory``) or of a whole clip (without).

        Args:
            x: ``(B, frames * h * w, dim)``, tokens frame-major, then row-major over the grid.
            grid: ``(h, w)`` tokens of a frame.
            memory: the window, see `memory_for`. The caller finishes the block when all its forwards are done.
                Queries, keys and values are cast to its dtype.
            start_frame: first frame of the block; with ``memory`` only.
            embeddings: ``(B, F, E)``, one a frame of the clip, see `clip_windows`; without ``memory`` only.
            clean: shaped as ``x``: the clean stream's input to this layer, for teacher forcing. Keys and values of a
                block's own frames then come from ``x``, those of all earlier frames from ``clean``. The clean stream's
                own output is a second call, with it as ``x``. By default ``x`` is its own past.
            windows: of `clip_windows`, made once for all layers, instead of ``embeddings``.

        Returns:
            Shaped as ``x``, in its dtype or in autocast's.

        Raises:
            TypeError, ValueError: an argument is missing, not allowed here, or does not fit. The memory is unchanged.
            RuntimeError: blocks come out of order (see `MemoryWindow.attend`), or a gradient is asked of the memory.
        """
        check("x", x, (None, None, self.dim), FLOATS, self.q.weight)
        given = {"start_frame": start_frame, "embeddings": embeddings, "clean": clean, "windows": windows}
        generates = memory is not None
        refused = [name for name, value in given.items() if value is not None and (name == "start_frame") != generates]
        if refused:
            where = "with memory (generation)" if generates else "without memory (training, a clip starts at frame 0)"
            raise ValueError(f"{refused[0]} must be None {where}, got {_brief(given[refused[0]])}")
        if memory is not None:
            return self._generate(x, grid, memory, start_frame)
        tokens = _tokens_of(grid)
        if x.shape[1] == 0 or x.shape[1] % tokens:
            raise ValueError(
                f"x must hold a whole number of frames of {tokens} tokens (grid {tuple(grid)}), at least one; got "
                f"{x.shape[1]} tokens"
            )
        if clean is not None:
            check("clean", clean, x.shape, FLOATS, x)
        batch, frames = x.shape[0], x.shape[1] // tokens
        if windows is None:
            windows = clip_windows(self.config, frames, batch, embeddings, x.device)
        elif embeddings is not None:
            raise ValueError("embeddings must be None when windows are given, which were chosen by them")
        else:
            _check_windows(windows, batch, frames, x.device)
        return self.o(self._attend_clip(x, grid, clean, windows))

    def _generate(
        self, x: torch.Tensor, grid: Sequence[int], memory: MemoryWindow, start_frame: int | None
    ) -> torch.Tensor:
        self._check_memory(memory)
        if start_frame is None:
            raise ValueError("start_frame must be given with memory: the block's first frame; got None")
        if torch.is_grad_enabled() and (x.requires_grad or self.q.weight.requires_grad):
            raise RuntimeError(
                "memory has no backward, and a gradient is asked for: generate under torch.no_grad() or "
                "torch.inference_mode(), and train on whole clips with memory=None"
            )
        q, k, v = (self._heads(project(x)).to(memory.pool.dtype) for project in (self.q, self.k, self.v))
        out = memory.attend(
            self.layer,
            q,
            k,
            v,
            start_frame,
            grid,
            q_weight=None if self.norm_q is None else self.norm_q.weight,
            k_weight=None if self.norm_k is None else self.norm_k.weight,
            eps=self.eps,
        )
        return self.o(out.flatten(-2).to(x.dtype))

    def _check_memory(self, memory: MemoryWindow) -> None:
        if not isinstance(memory, MemoryWindow):
            raise TypeError(f"memory must be a MemoryWindow, got {type(memory).__name__}")
        if memory.config != self.config:
            raise ValueError(f"memory must have the module's config, {self.config}, got {memory.config}")
        if self.layer >= memory.layers:
            raise ValueError(f"memory must have more than {self.layer} layers, the module's layer, got {memory.layers}")
        heads, head_dim = memory.pool.shape[-2:]
        expected = {"kv_heads": self.kv_heads, "head_dim": self.head_dim, "rope_split": self.rope_split}
        got = {"kv_heads": heads, "head_dim": head_dim, "rope_split": memory.rope_split}
        if got != expected:
            raise ValueError(f"memory must have the module's {expected}, got {got}")
        if memory.rope.device.type == "cpu":  # elsewhere the host would wait for the device
            table = self._rope(memory.rope.shape[0], memory.rope.dtype, memory.rope.device)
            if not torch.allclose(memory.rope[-1], table[memory.rope.shape[0] - 1], atol=1e-5):
                raise ValueError(
                    f"memory must have a rotary table of the module's rope_theta, {self.rope_theta}, got another one; "
                    "memory_for makes one that fits"
                )

    def _attend_clip(
        self, x: torch.Tensor, grid: Sequence[int], clean: torch.Tensor | None, windows: Sequence[BlockWindow]
    ) -> torch.Tensor:
        q = self._heads(self.q(x))
        reach = max(*grid, *(window.reach for window in windows))
        precision = torch.float64 if q.dtype == torch.float64 else torch.float32
        return attend_clip(
            _normed(q, self.norm_q),
            self._keys_and_values(x),
            None if clean is None else self._keys_and_values(clean),
            windows,
            self._rope(reach, precision, x.device),
            self.rope_split,
            grid,
        ).flatten(-2)

    def _keys_and_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _normed(self._heads(self.k(x)), self.norm_k), self._heads(self.v(x))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _rope(self, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Rotary table ``(P, D // 2, 2)`` of at least so many positions."""
        rows = FIRST_POSITIONS
        while rows < positions:
            rows *= 2
        return _shared_table(self.head_dim, rows, self.rope_theta, tuple(self.rope_split), dtype, device)


def memory_for(
    model: nn.Module,
    batch: int,
    tokens_per_frame: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> MemoryWindow:
    """A `MemoryWindow` for all `RetrievalAttention` layers of a model.

    Args:
        model: any module that holds the layers; they must agree in their options and be numbered from 0 on.
        batch, tokens_per_frame: of the window.
        dtype, device: of the window; those of the layers' weights when not given.
        options: of `MemoryWindow`: ``bank``, ``history_slots``, ``engine`` and so on.

    Raises:
        TypeError, ValueError: there is no such layer, layers differ, or an option is not allowed.
    """
    layers = [module for module in model.modules() if isinstance(module, RetrievalAttention)]
    if sorted(layer.layer for layer in layers) != list(range(max(1, len(layers)))):
        numbers = [layer.layer for layer in layers]
        raise ValueError(f"model must hold RetrievalAttention layers numbered 0, 1, 2 and so on, got layers {numbers}")
    first = layers[0]
    for name in ("config", "kv_heads", "head_dim", "rope_theta", "rope_split"):
        values = [getattr(layer, name) for layer in layers]
        if any(value != values[0] for value in values):
            raise ValueError(f"model must have one {name} in all of its RetrievalAttention layers, got {values}")
    dtype, device = dtype or first.q.weight.dtype, device or first.q.weight.device
    if first.rope_theta != 10000.0 and "rope" not in options:  # the window makes, and grows, the table of 10000 alone
        rows = LONGEST_VIDEO if first.config.position_rule == "absolute" else max(FIRST_POSITIONS, first.config.window)
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        options["rope"] = rotary_table(first.head_dim, rows, first.rope_theta, first.rope_split, precision, device)
    return MemoryWindow(
        first.config,
        layers=len(layers),
        batch=batch,
        tokens_per_frame=tokens_per_frame,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        dtype=dtype,
        device=device,
        rope_split=first.rope_split,
        **options,
    )


@lru_cache(maxsize=8)
@normal_tensors
def _shared_table(
    head_dim: int, rows: int, theta: float, split: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One rotary table for all layers; no buffer, which ``module.to(torch.bfloat16)`` would round."""
    return rotary_table(head_dim, rows, theta, split, dtype, device)


def _normed(heads: torch.Tensor, norm: nn.RMSNorm | None) -> torch.Tensor:
    """RMSNorm over the width of all heads, in float32 at least; what has no norm passes as it is."""
    if norm is None:
        return heads
    wide = heads.flatten(-2)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return F.rms_norm(wide, wide.shape[-1:], norm.weight.to(wide.dtype), norm.eps).unflatten(-1, heads.shape[-2:])


def _tokens_of(grid: Sequence[int]) -> int:
    if not isinstance(grid, Sequence) or len(grid) != 2 or any(not isinstance(size, int) for size in grid):
        raise TypeError(f"grid must be (h, w), two ints, got {grid!r}")
    if min(grid) < 1:
        raise ValueError(f"grid must be (h, w), both at least 1, got {tuple(grid)}")
    return grid[0] * grid[1]


def _check_windows(windows: Sequence[BlockWindow], batch: int, frames: int, device: torch.device) -> None:
    samples = {len(window.table) for window in windows}
    planned = sum(window.frames for window in windows)
    if samples != {batch} or planned != frames:
        raise ValueError(
            f"windows must be those of {batch} samples and {frames} frames, as x has; got {len(windows)} blocks of "
            f"{' or '.join(map(str, sorted(samples))) or 'no'} samples, {planned} frames"
        )
    if windows[0].positions.device != device:
        raise ValueError(f"windows must be on {device}, as x is, got {windows[0].positions.device}")


def _brief(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]
