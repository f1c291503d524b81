"""What a window does besides attending to a block: its single steps, and finished frames that are encoded again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .assignment import FRAME, POSITION, SOURCE, STAGED
from .blocks import Block, BlockSequence
from .config import WindowConfig, check_int, local_frames, window_slot
from .history import FrameHistory
from .modes import normal_tensors
from .ops.checks import check, check_scale
from .recache import Recache, abandoned_state, plan_recache
from .transfer import device_copy, device_numbers

if TYPE_CHECKING:
    from .distributed.rank_share import RankShare

PARTS = ("sink", "local", "memory")


class WindowPieces:
    """The part of `MemoryWindow` for backbones whose attention is not one plain call of the op."""

    config: WindowConfig
    layers: int
    batch: int
    tokens_per_frame: int
    engine: str
    rope: torch.Tensor
    rope_split: list[int]
    device: torch.device
    _history: FrameHistory
    _blocks: BlockSequence
    _staging: torch.Tensor
    _last_plan: torch.Tensor
    _window_slots: torch.Tensor
    _recache: Recache | None
    _rewritten: dict[int, set[int]]  # by frame, the layers
    _share: RankShare | None
    _counters: dict[str, int]

    def write(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start_frame: int,
        grid: Sequence[int],
        *,
        canonical: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The first half of `attend`: places and writes the block's pages in one layer, without attention.

        Args:
            layer, q, k, v, start_frame, grid: as in `attend`.
            canonical: ``(B, n*T, Hkv, D)``, keys that the history keeps instead of ``k`` at temporal position 0. For
                backbones that rotate by rules of their own: such a window gets ``q`` and ``k`` as they are to be
                attended, and a rotary table that turns nothing.

        Returns:
            Rotated queries ``(B, n*T, Hq, D)``, for `attend_written`.

        Raises:
            As `attend`.
        """
        grid = self._checked_grid(grid)
        block = self._block_at(start_frame, self._frames_of(q))
        if canonical is not None:
            like = self._history.pages
            check("canonical", canonical, (self.batch, q.shape[1], *like.shape[5:]), (like.dtype,), like)
        arguments = self._arguments(block, layer, grid, place=layer not in block.placed)
        pool_layer, staging, rope, split = (arguments[name] for name in ("pool_layer", "staging", "rope", "rope_split"))
        frames = range(block.start, block.end)
        slots = [window_slot(frame, self.config.sink, self.config.local) for frame in frames]
        rows = [frame % self.config.staging_rows for frame in frames]
        # Before anything is placed, in other slots and from other rows: it may refuse q, k or v.
        rotated = torch.ops.longlive.write_frames(
            q,
            k,
            v,
            pool_layer,
            staging,
            *self._block_tables(block, slots, rows),
            rope,
            split,
            grid,
            engine=self.engine,
        )
        if canonical is not None:
            for row, page in zip(rows, canonical.detach().unflatten(1, (len(rows), -1)).unbind(1), strict=True):
                staging[:, row] = page
        if arguments["place"] and block.placements:
            state = block.state
            for row, pages in ((SOURCE, None), (STAGED, staging)):
                torch.ops.longlive.place_frames(
                    pool_layer,
                    self._window_slots,
                    state[:, row],
                    state[:, POSITION],
                    rope,
                    split,
                    k_pages=pages,
                    engine=self.engine,
                )
        self._begin(block, layer, grid)
        block.placed.add(layer)
        return rotated

    def attend_written(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        parts: Collection[str] = PARTS,
        exclude: Collection[int] = (),
        scale: float | None = None,
        return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The second half of `attend`: queries over the block's window, or a part of it.

        Args:
            layer: one in which the block was written.
            q: ``(B, S, Hq, D)`` as `write` returned them, or turned by the caller.
            parts: which of ``sink``, ``local``, ``memory`` are attended to. Parts joined by
                ``torch.ops.longlive.merge_attention`` make the whole.
            exclude: frames of the sink and local part that are not attended to.

        Returns:
            out ``(B, S, Hq, D)``, lse ``(B, Hq, S)`` or ``(0,)``, as ``window_attend``.

        Raises:
            RuntimeError: no block is open, or it was not written in this layer; or ``transfer`` is ``merge``, so that
                this rank has a part of the memory alone. ValueError: no such part.
        """
        if self._share is not None:
            self._share.check_whole("attend_written", "call attend, which joins the ranks' parts")
        return self._attend_written(layer, q, parts=parts, exclude=exclude, scale=scale, return_lse=return_lse)

    def _attend_written(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        parts: Collection[str] = PARTS,
        exclude: Collection[int] = (),
        scale: float | None = None,
        return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attend_written`, of the pages that this rank has."""
        block = self._blocks.open
        if block is None or layer not in block.layers:
            raise RuntimeError(f"write must come first: layer {layer} has written no block")
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise ValueError(f"parts must be of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
        key = frozenset(parts), tuple(sorted(exclude))
        if key not in block.tables:
            block.tables[key] = device_copy(self._part_slots(block, parts, exclude), self.device)
        return torch.ops.longlive.window_attend(
            q, self._history.pages[layer], block.tables[key], scale=scale, return_lse=return_lse, engine=self.engine
        )

    def rewrite(self, layer: int, k: torch.Tensor, v: torch.Tensor, start_frame: int, grid: Sequence[int]) -> None:
        """Replaces pages of finished frames that are still in the sink or the local part, in one layer.

        For backbones that encode the frames of earlier blocks again with every block. All layers must be given before
        the next `finish` or `recache`, with which the pages are a new generation.

        Args:
            layer: ``0 .. layers-1``.
            k, v: ``(B, m*T, Hkv, D)``, before rotation.
            start_frame: first of the ``m`` frames.
            grid: as in `attend`.

        Raises:
            RuntimeError: a frame is in neither part, or not finished, or frames are being cached again.
            TypeError, ValueError: a shape, dtype, device or size is not allowed.
        """
        grid = self._checked_grid(grid)
        check_int("layer", layer, 0, self.layers - 1)
        count = self._frames_of(k)
        if self._recache is not None:
            raise RuntimeError(f"finish_recache({self._recache.start}) must come before rewrite")
        block, plan = self._blocks.open, self._last_plan
        finished = self._blocks.expected
        if block is not None:
            plan, finished = block.plan, block.start
        frames = range(check_int("start_frame", start_frame, 0), start_frame + count)
        slots = [window_slot(frame, self.config.sink, self.config.local) for frame in frames]
        held = plan[0, FRAME, slots].tolist()
        if frames.stop > finished or held != list(frames):
            local = local_frames(finished, 0, self.config.sink, self.config.local)
            raise RuntimeError(
                f"start_frame and k must name finished frames of the local part, of {list(local)}, got {list(frames)}"
            )
        positions = plan[0, POSITION, slots].tolist()
        # Sink frames are never placed again: the rows of their numbers are local frames'.
        rows = [frame % self.config.staging_rows if frame >= self.config.sink else -1 for frame in frames]
        if block is None or layer not in block.layers:
            self._history.wait(layer)  # for copies of the pages that are overwritten
        self._renew(layer, k, k, v, frames, slots, rows, positions, grid)
        for frame in frames:
            self._rewritten.setdefault(frame, set()).add(layer)

    def recache(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start_frame: int,
        grid: Sequence[int],
        *,
        renew_sink: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of a forward that encodes finished frames once more, as after a change of prompt; no block is open.

        Memory is off: the frames attend to the sink and to each other. When all layers have attended,
        `finish_recache` makes their pages a new generation. A forward that does not end at the newest finished frame
        changes the history only: the newest frames must be cached again after it, before the next block.

        Args:
            layer, q, k, v, grid: as in `attend`; of ``m <= window`` frames.
            start_frame: first of them.
            renew_sink: the first ``sink`` of the frames become the window's sink.
            scale: of the logits; ``D ** -0.5`` when not given.

        Returns:
            ``(B, m*T, Hq, D)``.

        Raises:
            RuntimeError: a block is open, or another range of frames is being cached again.
            TypeError, ValueError: frames that are not finished, more than the window holds, or as for `attend`.
        """
        grid = self._checked_grid(grid)
        check_int("layer", layer, 0, self.layers - 1)
        count = self._frames_of(q)
        check_scale(scale)
        plan = self._recache
        if plan is None or (plan.start, plan.frames) != (start_frame, count):
            if plan is not None:
                raise RuntimeError(
                    f"start_frame must be {plan.start} with {plan.frames} frames until finish_recache({plan.start}) or "
                    f"abandon_recache(), got {start_frame} with {count}"
                )
            if self._blocks.open is not None:
                raise RuntimeError(
                    f"finish({self._blocks.open.start}, ...) must come before recache, the block is open"
                )
            finished = self._blocks.expected
            plan = plan_recache(self._last_plan, start_frame, count, finished, self.config, renew_sink)
            self._replace_rewritten()
        if layer not in plan.layers:
            self._history.wait(layer)
        rotated = self._renew(layer, q, k, v, plan.numbers, plan.slots, plan.staging_rows, plan.positions, grid)
        self._recache = plan
        plan.layers.add(layer)
        table = None
        if plan.run is None:
            table = device_numbers(plan.attended, self.device).expand(self.batch, -1)
        out, _ = torch.ops.longlive.window_attend(
            rotated, self._history.pages[layer], table, run=plan.run, scale=scale, engine=self.engine
        )
        return out

    def abandon_recache(self) -> None:
        """Gives up a `recache` that has begun, as after a forward that failed; without one it does nothing.

        Frames whose window slots it has written must be cached again before the next block. The history may have new
        pages of some layers (with a bank it has none), until its frames are cached again too.
        """
        if self._recache is not None:
            self._last_plan = abandoned_state(self._recache, self._last_plan, self.config)
            self._history.abandon()
            self._recache = None

    def finish_recache(self, start_frame: int) -> None:
        """Makes the pages that `recache` wrote a new generation, in every tier; embeddings stay.

        Raises:
            RuntimeError: no such forward has begun, or a layer has not attended.
        """
        plan = self._recache
        if plan is None or plan.start != start_frame:
            raise RuntimeError(f"start_frame {start_frame} cannot be finished: recache has not begun there")
        missing = sorted(set(range(self.layers)) - plan.layers)
        if missing:
            raise RuntimeError(f"frames {plan.numbers} cannot be finished: layers {missing} have not attended")
        self._history.replaced()
        self._last_plan, self._recache = plan.state, None
        self._counters["recached_frames"] += plan.frames

    def forget(self, before: int) -> list[int]:
        """Gives up history: frames below ``before``, sink frames excepted, are in no tier and no search any more.

        Args:
            before: the oldest frame that is kept.

        Returns:
            The frames that were given up; on a mesh that spreads frames over ranks, those that this rank kept.

        Raises:
            RuntimeError: a block is open; its window holds what was chosen before.
        """
        check_int("before", before, 0)
        if self._blocks.open is not None:
            raise RuntimeError(f"finish({self._blocks.open.start}, ...) must come before forget, the block is open")
        return self._history.forget(before)

    def _replace_rewritten(self) -> None:
        """What `rewrite` was given is a new generation from here on."""
        for frame, layers in self._rewritten.items():
            missing = sorted(set(range(self.layers)) - layers)
            if missing:
                raise RuntimeError(f"rewrite of frame {frame} must be given all layers, layers {missing} are missing")
        if self._rewritten:
            self._history.replaced()
            self._rewritten = {}

    def _check_restored(self, start_frame: int, frames: int) -> None:
        """Raises `RuntimeError` when `recache` of older frames has taken slots that a block's local frames need."""
        sink, local = self.config.sink, self.config.local
        held = self._last_plan[0, FRAME].tolist()
        needed = range(local_frames(start_frame, frames, sink, local).start, start_frame)
        lost = [frame for frame in needed if held[window_slot(frame, sink, local)] != frame]
        if lost:
            raise RuntimeError(
                f"recache must encode frames {lost[0]} .. {start_frame - 1} again before a block at start_frame "
                f"{start_frame}: older frames have taken the window slots of {lost}"
            )

    @normal_tensors
    def _renew(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        frames: range,
        slots: list[int],
        staging_rows: list[int],
        positions: list[int],
        grid: list[int],
    ) -> torch.Tensor:
        """Writes finished frames' pages into window slots, staging buffer and history; returns rotated queries."""
        self._extend_rope(max(*grid, *(position + 1 for position in positions)))
        pages = self._history.pages
        canonical = pages.new_empty(self.batch, len(frames), *pages.shape[4:])
        rotated = torch.ops.longlive.write_frames(
            q,
            k,
            v,
            pages[layer],
            canonical,
            device_numbers(slots, self.device),
            device_numbers(range(len(frames)), self.device),
            device_numbers(positions, self.device),
            self.rope,
            self.rope_split,
            grid,
            engine=self.engine,
        )
        for i, row in enumerate(staging_rows):
            if row >= 0:
                self._staging[layer, :, row] = canonical[:, i]
        self._history.replace(layer, frames, canonical, v.unflatten(1, (len(frames), -1)))
        return rotated

    def _block_tables(self, block: Block, slots: list[int], rows: list[int]) -> Iterator[torch.Tensor]:
        """Window slots, staging rows and temporal positions of the block's frames, on the device."""
        positions = block.plan[0, POSITION, slots].tolist()
        for name, numbers in (("slots", slots), ("rows", rows), ("positions", positions)):
            if name not in block.tables:
                block.tables[name] = device_numbers(numbers, self.device)
            yield block.tables[name]

    def _part_slots(self, block: Block, parts: Collection[str], exclude: Collection[int]) -> torch.Tensor:
        """``(B, W)`` on the host: the slots of the parts that hold a frame, the others -1."""
        config = self.config
        slot = torch.arange(config.window)
        memory = config.window - config.top_k
        of_part = {
            "sink": slot < config.sink,
            "local": (slot >= config.sink) & (slot < memory),
            "memory": slot >= memory,
        }
        wanted = torch.zeros_like(slot, dtype=torch.bool)
        for part in parts:
            wanted |= of_part[part]
        frames = block.plan[:, FRAME]
        left_out = torch.isin(frames, torch.tensor(sorted(exclude), dtype=torch.int64)) & (slot < memory)
        return torch.where((frames >= 0) & wanted & ~left_out, slot, -1)

    def _checked_grid(self, grid: Sequence[int]) -> list[int]:
        raise NotImplementedError

    def _frames_of(self, q: torch.Tensor) -> int:
        raise NotImplementedError

    def _block_at(self, start_frame: int, frames: int) -> Block:
        raise NotImplementedError

    def _begin(self, block: Block, layer: int, grid: list[int]) -> None:
        raise NotImplementedError

    def _arguments(self, block: Block, layer: int, grid: list[int], place: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _extend_rope(self, positions: int) -> None:
        raise NotImplementedError
