"""Our way to do the self-attention of all layers of a block; the others are in `block_native`, `block_published`.

A contender is told when a block and a forward begin and end, and attends in each layer. All use the same dense
attention. With a running clock they say where their time goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.block_clock import NoClock
from benchmarks.block_embedder import package_embedder
from benchmarks.block_model import ModelSize
from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig
from longlive_rag_ops.bank import PageFormat


class BlockAttention(Protocol):
    """Self-attention of a video, block by block."""

    chosen: list[int]  # frames retrieved for the block

    def begin(self, start: int, clock: NoClock) -> None:
        """Before a block's first forward."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int, clock: NoClock) -> Tensor:
        """q, k, v and the output are ``(1, n*T, H, D)``, not rotated."""
        ...

    def end_forward(self, start: int, clock: NoClock) -> None: ...

    def before_clean(self, start: int, x: Tensor, embeddings: Tensor, clock: NoClock) -> None:
        """The block's clean latents ``(1, n*T, channels)`` are there, its last forward is not.

        Args:
            embeddings: ``(1, n, E)``, by which frames are chosen, whatever an embedder makes of the latents.
        """
        ...

    def finish(self, start: int, embeddings: Tensor, clock: NoClock) -> None: ...

    def held(self) -> dict[str, int]:
        """Bytes held, ``device`` and ``host``."""
        ...

    def close(self) -> None: ...


class Ours:
    """`MemoryWindow`, its memory on the device or in a bank in host memory.

    A block that is timed calls `attend`. One that is split calls `write` and then the op that attends to the window's
    run of slots: the same numbers, in two calls.

    Args:
        frames: of history that there is room for: slots on the device, or frames in host memory.
        storage: ``device`` for no bank, else the bank's: ``plain`` or ``int8``.
        policy: of the bank when it is full.
        engine: of the window.
        config: of the window.
    """

    def __init__(
        self,
        size: ModelSize,
        device: str,
        dtype: torch.dtype,
        frames: int,
        storage: str = "device",
        *,
        policy: str = "error",
        engine: str = "auto",
        config: WindowConfig | None = None,
    ) -> None:
        self.size, self.grid = size, size.grid
        self._embed = package_embedder(size)
        bank = None
        if storage != "device":
            form = PageFormat(storage, size.layers, 1, size.tokens, size.heads, size.head_dim, dtype)
            slab = min(256 * 2**20, 8 * form.record_bytes)
            bank = BankConfig(
                host_bytes=frames * form.record_bytes, storage=storage, policy=policy, slab_bytes=max(1, slab)
            )
        self.window = MemoryWindow(
            config or WindowConfig(),
            layers=size.layers,
            batch=1,
            tokens_per_frame=size.tokens,
            kv_heads=size.heads,
            head_dim=size.head_dim,
            dtype=dtype,
            device=device,
            history_slots=None if bank else frames,
            bank=bank,
            engine=engine,
        )
        self.chosen: list[int] = []
        self._waited: set[int] = set()  # layers of the block, with a running clock

    def begin(self, start: int, clock: NoClock) -> None:
        self.chosen, self._waited = self.window.selected[0], set()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int, clock: NoClock) -> Tensor:
        if not clock.running:
            return self.window.attend(layer, q, k, v, start, self.grid)
        self._wait(layer, clock)
        window = self.window
        turned = window.write(layer, q, k, v, start, self.grid)
        clock.lap("rotation + write")
        held = len(window.window_frames[0])
        out, _ = torch.ops.longlive.window_attend(turned, window.pool[layer], run=held, engine=window.engine)
        clock.lap("attention")
        return out

    def _wait(self, layer: int, clock: NoClock) -> None:
        """What the window does on a layer's first call, ahead of it: then nothing is left to wait for."""
        bank = self.window.bank
        if bank is None or layer in self._waited:
            return
        if not self._waited and (lost := bank.settle()):
            raise RuntimeError(f"frames were lost: {lost}")
        bank.wait(layer)
        self._waited.add(layer)
        clock.lap("fetch stall")

    def end_forward(self, start: int, clock: NoClock) -> None:
        pass

    def before_clean(self, start: int, x: Tensor, embeddings: Tensor, clock: NoClock) -> None:
        self._embed(x)  # for its time alone: with random weights it would choose at no stated repeat rate
        clock.lap("embedding")
        self.window.retrieve(start, embeddings)
        clock.lap("retrieval")

    def finish(self, start: int, embeddings: Tensor, clock: NoClock) -> None:
        """Keeping the block's pages counts as writing; on a CPU, where a fetch is done when it returns, it stalls."""
        if not clock.running:
            self.window.finish(start)
            return
        history, bank = self.window._history, self.window.bank
        followed: list[Any] = [_Followed(history, "add", lambda: clock.lap("rotation + write"))]
        if bank is not None:
            followed.append(
                _Followed(bank, "prefetch", lambda: clock.lap("fetch stall"), lambda: clock.lap("retrieval"))
            )
        try:
            self.window.finish(start)
        finally:
            for one in followed:
                one.undo()
        clock.lap("retrieval")

    def held(self) -> dict[str, int]:
        held = self.window.stats()["bytes"]
        host = held.pop("host", 0) + held.pop("disk", 0)
        held.pop("history")  # in history_reserved
        return {"device": sum(held.values()), "host": host}

    def close(self) -> None:
        if self.window.bank is not None:
            self.window.bank.close()


class _Followed:
    """An object's method, with a call before and after it until `undo`."""

    def __init__(
        self, owner: Any, name: str, after: Callable[[], object], before: Callable[[], object] = lambda: None
    ) -> None:
        self._owner, self._name = owner, name
        method = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            before()
            result = method(*args, **options)
            after()
            return result

        setattr(owner, name, call)

    def undo(self) -> None:
        delattr(self._owner, self._name)
