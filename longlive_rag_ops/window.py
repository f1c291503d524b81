"""The window as an object: what a backbone's self-attention calls instead of sliding-window attention."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from .assignment import FRAME, POSITION, advance_window, empty_window_state
from .blocks import Block, BlockSequence
from .config import WindowConfig, check_int
from .engines import engine_name
from .history import FrameHistory, ResidentHistory, check_history_slots
from .modes import normal_tensors
from .ops.checks import FLOATS, check, check_rotary
from .pool import HistoryPool
from .recache import Recache
from .rotary import check_split, default_split, rotary_table
from .window_pieces import WindowPieces

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .bank import BankConfig, MemoryBank
    from .distributed import MemoryMesh
    from .distributed.rank_share import RankShare

FIRST_POSITIONS = 1024  # rows of the rotary table before any frame asks for more


class MemoryWindow(WindowPieces):
    """Attention over ``[sink | retrieved memory | local window]`` for a batch of videos, block by block.

    Every block is one or more forwards, each calling `attend` in every layer with the same ``start_frame``; each
    forward overwrites the block's pages. `finish` makes the block final: its pages join the history, its embeddings
    the index, and the frames to retrieve for the next block are chosen, for each sample on its own and for all layers
    at once.

    Args:
        config: sizes of the window.
        layers: self-attention layers that share it.
        batch: samples, ``B``.
        tokens_per_frame: tokens of a latent frame, ``T``.
        kv_heads, head_dim: of keys and values; queries may have a multiple of ``kv_heads``. With a mesh, of all ranks
            together.
        dtype: of queries, keys and values; float64, float32, float16 or bfloat16.
        device: where the pool lives.
        history_slots: most frames of history kept; None keeps all, doubling the pool when it is full, which for a
            moment holds the old and the new one. Name a number where memory is short. With a bank: frames whose pages
            the device holds beside the window, by default what its ``device_bytes`` holds, else twice what one block
            can fetch.
        on_full: with ``history_slots`` and no bank: ``error`` raises when they are used up, ``forget`` gives up the
            least recently retrieved frame.
        bank: limits of a memory bank that keeps the history in host memory and on disk; None keeps it in the pool.
            Results are the same bit for bit, whatever the limits, as long as nothing is forgotten and storage is plain.
            Call `retrieve` as soon as the block's embeddings are there, before its last forward: the pages it finds are
            then fetched while the GPU still computes. When done call ``window.bank.close()``, which gives host memory
            and disk back; else that happens when nobody refers to the window any more. A window whose bank is closed
            cannot go on: its calls raise `RuntimeError`.
        rope: rotary table ``(P, head_dim // 2, 2)``; made by `rotary.rotary_table` when not given.
        rope_split: real channels of (time, height, width); `rotary.default_split` when not given.
        engine: ``auto`` or an engine's name, see `engines`; decided once, when the window is made.
        mesh: a `DeviceMesh` with a dimension ``heads``, ``frames`` or both, or a `distributed.MemoryMesh`, over whose
            ranks the history is spread; all of them make the window, and call it alike. By head, each rank keeps
            ``kv_heads / head_ranks`` heads, and is given queries, keys and values of its own heads, already normalised.
            By frame, each keeps its share of the frames in a bank, which must be given (its limits are one rank's), and
            all are given the same queries, keys and values. Results are those of one rank. See docs/scaling.md.
        transfer: with frames spread over ranks: ``pages`` brings the chosen pages to every rank, ``merge`` joins the
            ranks' attention to their own ones; ``auto`` takes whichever moves fewer bytes, see `distributed.traffic`.
        agreement: with a mesh: whether the ranks compare their windows in every block, by one small collective that
            nobody waits for.

    Raises:
        TypeError, ValueError: an argument is not allowed, or differs between the ranks of a mesh.
        RankFailure: (a RuntimeError) a rank of the mesh has died or not answered in time. Every method may raise it;
            the window cannot go on then.
        RanksDisagree: (a RuntimeError) the ranks hold different windows, as found when a block begins.
    """

    @normal_tensors
    def __init__(
        self,
        config: WindowConfig,
        *,
        layers: int,
        batch: int,
        tokens_per_frame: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        history_slots: int | None = None,
        on_full: str = "error",
        bank: BankConfig | None = None,
        rope: torch.Tensor | None = None,
        rope_split: Sequence[int] | None = None,
        engine: str = "auto",
        mesh: DeviceMesh | MemoryMesh | None = None,
        transfer: str = "auto",
        agreement: bool = True,
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "tokens_per_frame": tokens_per_frame, "kv_heads": kv_heads}
        check = partial(_check_arguments, config, dtype, **sizes, head_dim=head_dim)
        self._share: RankShare | None = None
        if mesh is None:
            check()
        else:
            from .distributed.rank_share import share_of_mesh

            self._share = share_of_mesh(
                mesh,
                config,
                kv_heads,
                bank,
                transfer,
                agreement,
                check,
                layers=layers,
                batch=batch,
                tokens_per_frame=tokens_per_frame,
                head_dim=head_dim,
                dtype=dtype,
                device=device,
                history_slots=history_slots,
                on_full=on_full,
                rope=rope,
                rope_split=rope_split,
                engine=engine,
            )
            kv_heads = self._share.kv_heads
        with nullcontext() if self._share is None else self._share.making(self):
            self.config = config
            self.layers, self.batch, self.tokens_per_frame = layers, batch, tokens_per_frame
            self.engine = engine_name(engine, torch.device(device).type)
            self._own_rope = rope is None
            self.rope_split = check_split(default_split(head_dim) if rope_split is None else rope_split, head_dim)
            self._rope_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            if rope is None:
                rope = rotary_table(
                    head_dim, FIRST_POSITIONS, split=self.rope_split, dtype=self._rope_dtype, device=device
                )
            self.rope = rope
            shape = (layers, 2, batch, tokens_per_frame, kv_heads, head_dim)
            self._history: FrameHistory
            if bank is None:
                check_history_slots(history_slots, config, batch)
                # Without retrieval no history is kept.
                pool = HistoryPool(
                    config.window,
                    shape,
                    dtype=dtype,
                    device=device,
                    capacity=history_slots if config.top_k > 0 else 1,
                    on_full=on_full,
                )
                self._history = ResidentHistory(config, pool, self.engine)
            else:
                if on_full != "error":
                    raise ValueError(f"on_full is for a window without a bank, whose policy says so; got {on_full!r}")
                if self._share is not None and self._share.keeps_history:
                    self._history = self._share.history(shape, dtype, device, bank, history_slots, self.engine)
                else:
                    from .tiered_history import TieredHistory

                    self._history = TieredHistory(config, shape, dtype, device, bank, history_slots, self.engine)
            self.device = self._history.pages.device  # with its number, which "cuda" alone does not say
            check_rotary(self.rope, self.rope_split, head_dim, self._history.pages)
            self._staging = torch.zeros(
                layers,
                batch,
                config.staging_rows,
                tokens_per_frame,
                kv_heads,
                head_dim,
                dtype=dtype,
                device=self.device,
            )
            self._window_slots = torch.arange(config.window, device=self.device).expand(batch, -1)
            # The frames are chosen in `finish`: the op needs no index, and empty ones never change their shape.
            self._no_search = {
                "index": torch.zeros(batch, 0, 1, device=self.device),
                "index_ids": torch.zeros(batch, 0, dtype=torch.int64, device=self.device),
                "index_length": torch.zeros(1, dtype=torch.int64, device=self.device),
                "frame_slot": torch.zeros(batch, 0, dtype=torch.int64, device=self.device),
                "select": False,
            }
        self.reset()

    @normal_tensors
    def reset(self) -> None:
        """Starts a new video: forgets every frame, embedding and counter, keeps the memory and settings.

        With a mesh, all ranks call it. `RankFailure` and `RanksDisagree` do not end with it: a window that has raised
        one raises it again. Should the ranks have disagreed on the last block, which nobody has looked at so far, it
        warns (RuntimeWarning).
        """
        if self._share is not None:
            self._share.reset()
        self._history.clear()
        self._grid: list[int] | None = None  # of the video's first call
        self._blocks = BlockSequence(self.layers, self.config.frames_per_block)
        self._last_plan = empty_window_state(self.batch, self.config.window)
        self._recache: Recache | None = None
        self._rewritten: dict[int, set[int]] = {}
        self._counters = dict.fromkeys(
            (
                "blocks",
                "frames",
                "selected_frames",
                "repeated_frames",
                "placed_pages",
                "recached_frames",
            ),
            0,
        )
        self._seconds = {"retrieval": 0.0, "commit": 0.0}

    @overload
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start_frame: int,
        grid: Sequence[int],
        *,
        return_lse: Literal[True],
        scale: float | None = None,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start_frame: int,
        grid: Sequence[int],
        *,
        return_lse: Literal[False] = False,
        scale: float | None = None,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor: ...

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start_frame: int,
        grid: Sequence[int],
        *,
        return_lse: bool = False,
        scale: float | None = None,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one block in one layer; writes the block's keys and values in place.

        Args:
            layer: ``0 .. layers-1``.
            q: ``(B, n*T, Hq, D)``, k and v ``(B, n*T, Hkv, D)``: before rotation, tokens frame-major, then row-major.
            start_frame: first frame of the block.
            grid: ``(h, w)`` tokens of a frame, the same for the whole video.
            scale: of the logits; ``D ** -0.5`` when not given.
            q_weight, k_weight, eps: query-key RMSNorm over the model width, ``(Hq*D,)`` and ``(Hkv*D,)``; for a
                backbone that has not normalised q and k itself.

        Returns:
            ``(B, n*T, Hq, D)``; with ``return_lse`` also the log-sum-exp ``(B, Hq, n*T)``, float32 (float64 for
            a float64 window).

        Raises:
            RuntimeError: ``start_frame`` is later than the current block's, which is not finished, or earlier.
            TypeError, ValueError: a shape, dtype, device or size is not allowed. The window is unchanged then.
        """
        grid = self._checked_grid(grid)
        frames = self._frames_of(q)
        if self._share is not None:
            self._share.check_norms(q_weight, k_weight)
            if self._share.merges:
                out, lse = self._share.attend_merged(
                    self, self._history, layer, q, k, v, start_frame, grid, frames, scale
                )
                return (out, lse) if return_lse else out
        block = self._block_at(start_frame, frames)
        out, lse = torch.ops.longlive.retrieve_attend(
            q,
            k,
            v,
            **self._arguments(block, layer, grid, place=layer not in block.placed),
            scale=scale,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
            return_lse=return_lse,
        )
        self._begin(block, layer, grid)
        block.placed.add(layer)
        return (out, lse) if return_lse else out

    def arguments(
        self,
        layer: int,
        start_frame: int,
        grid: Sequence[int],
        frames: int | None = None,
        place: bool | None = None,
    ) -> dict[str, Any]:
        """Everything that ``torch.ops.longlive.retrieve_attend`` takes after q, k and v, for one call.

        For modules that call the op themselves; the call must follow. It does not select: `finish` has chosen. Under
        `torch.compile`, take the arguments outside of the compiled region and pass them in.

        Args:
            layer, start_frame, grid: as in `attend`, and with the same errors.
            frames: frames in the block; ``config.frames_per_block`` when not given.
            place: whether the call places the block's pages. By default every call does when there is something to
                place, because only the caller knows whether an earlier one went through; a few copies are saved by
                passing False on all forwards but the block's first in this layer.

        Raises:
            RuntimeError: as `attend`; or ``transfer`` is ``merge``, so that the op would see one rank's pages alone.
        """
        if self._share is not None:
            self._share.check_whole("arguments", "take distributed.merged_attention.merged_arguments")
        grid = self._checked_grid(grid)
        block = self._block_at(start_frame, self.config.frames_per_block if frames is None else frames)
        arguments = self._arguments(block, layer, grid, place=block.placements > 0 if place is None else place)
        self._begin(block, layer, grid)
        return arguments

    def retrieve(self, start_frame: int, embeddings: torch.Tensor) -> None:
        """Begins to search for the next block before the block's clean forward; optional.

        With a bank, the choice then reaches the host while the clean forward is enqueued, and `finish` fetches ahead of
        the device. Without one, this only hands over the embeddings.

        Args:
            start_frame, embeddings: as in `finish`, which then takes no embeddings.

        Raises:
            RuntimeError, TypeError, ValueError: as `finish`. The window is unchanged then.
        """
        self._check_ranks()
        block = self._blocks.finishable(start_frame)
        if self.config.top_k == 0 or block.remembered:
            return
        embeddings = self._check_embeddings(embeddings, block)
        began = time.perf_counter()
        with self._in_step():
            if self._share is not None:
                self._share.given(block.start, embeddings)
            self._history.search(block.end, embeddings[:, -1])
            self._history.prepare(block.end, block.plan)
        block.embeddings = embeddings.clone()  # what the caller does with its tensor before `finish` is its business
        self._seconds["retrieval"] += time.perf_counter() - began

    def finish(self, start_frame: int, embeddings: torch.Tensor | None = None) -> None:
        """Makes the block final: keeps its pages as history, indexes its embeddings, chooses for the next block.

        Args:
            start_frame: first frame of the block.
            embeddings: ``(B, n, E)`` floating point, one a frame; not looked at when ``top_k`` is 0, and not to be
                given when `retrieve` had them. An embedding with NaN or infinity is counted; its frame is never chosen,
                and as the newest it retrieves nothing.

        Raises:
            RuntimeError: no such block is open, a layer has not attended or was not given to `rewrite`, or the history
                is full.
            TypeError, ValueError: the embeddings are not allowed. The window is unchanged in these cases. Should the
                search itself fail (out of memory, say), calling again goes on from there.

        With a mesh, what fails on one rank alone (its bank is full, its disk fails) after ranks have begun to exchange
        something in this call leaves that rank out of step: it raises the error, and from then on `RankFailure`, as the
        others do after the time-out. What fails before, after `retrieve` say, may be tried again until then. This holds
        for `retrieve` and the first call of a block as well.
        """
        self._check_ranks()
        block = self._blocks.finishable(start_frame)
        began = time.perf_counter()
        checked = None
        if self.config.top_k > 0 and not block.remembered:
            if block.embeddings is None:
                checked = self._check_embeddings(embeddings, block)
            elif embeddings is None:
                checked = block.embeddings
            else:
                raise ValueError(f"embeddings must not be given again after retrieve({block.start}, ...)")
        with self._in_step():
            self._replace_rewritten()
            if checked is not None:
                if self._share is not None and block.embeddings is None:
                    self._share.given(block.start, checked)
                self._history.add(block.start, checked, self._staging)
                block.remembered = True
            committed = time.perf_counter()
            if self.config.top_k > 0:
                self._history.choose(block.end, block.plan)
        self._counters["blocks"] += 1
        self._counters["frames"] += block.frames
        self._last_plan = block.plan
        self._blocks.close(block)
        self._seconds["commit"] += committed - began
        self._seconds["retrieval"] += time.perf_counter() - committed

    @property
    def pool(self) -> torch.Tensor:
        """``(layers, 2, samples, slots, tokens_per_frame, kv_heads, head_dim)``: window slots first, then history."""
        return self._history.pages

    @property
    def bank(self) -> MemoryBank | None:
        """The memory bank that keeps the history; None without one."""
        return getattr(self._history, "bank", None)

    @property
    def mesh(self) -> MemoryMesh | None:
        """The ranks over which the history is spread; None without a mesh."""
        return None if self._share is None else self._share.mesh

    @property
    def transfer(self) -> str | None:
        """How frames that other ranks keep are attended to, ``pages`` or ``merge``; None where there are none."""
        return None if self._share is None else self._share.transfer

    @property
    def block_is_whole(self) -> bool:
        """Whether every layer has attended to the open block, so that it could be finished."""
        block = self._blocks.open
        return block is not None and len(block.layers) == self.layers

    @property
    def searched(self) -> bool:
        """Whether `retrieve` has been given the open block's embeddings."""
        block = self._blocks.open
        return block is not None and block.embeddings is not None

    @property
    def selected(self) -> list[list[int]]:
        """For each sample, the frames retrieved for the current block or, between blocks, the next; best first."""
        return [[frame for frame in row if frame >= 0] for row in self._history.selected.tolist()]

    @property
    def selected_scores(self) -> list[list[float]]:
        """Cosine similarities of `selected`."""
        chosen, scores = self._history.selected.tolist(), self._history.selected_scores.tolist()
        return [
            [score for frame, score in zip(*row, strict=True) if frame >= 0] for row in zip(chosen, scores, strict=True)
        ]

    @property
    def window_frames(self) -> list[list[int]]:
        """For each sample, the frames in the window slots of the current (or last) block: sink, local, memory."""
        plan = self._last_plan if self._blocks.open is None else self._blocks.open.plan
        return [[frame for frame in row if frame >= 0] for row in plan[:, FRAME].tolist()]

    def history_slot(self, frame: int) -> int:
        """Slot of a finished frame's canonical page; -1 when the device has none (sink frames, forgotten frames)."""
        return self._history.slot(check_int("frame", frame, 0))

    def history_page(self, frame: int) -> torch.Tensor:
        """A copy of a finished frame's canonical keys and values, from whichever tier has them.

        For looking at; attention does not use it, and with a bank it waits for memory or disk.

        Returns:
            ``(layers, 2, B, T, Hkv, D)``; with quantised storage, what the window would place.

        Raises:
            KeyError: the history does not have the frame. RuntimeError: its page on disk is damaged.
        """
        return self._history.page(check_int("frame", frame, 0))

    def stats(self) -> dict[str, Any]:
        """Counters since `reset`; ``bytes`` held by each part; host ``seconds`` spent in retrieval and commits.

        ``selected_frames`` counts retrieved frames over blocks and samples, ``repeated_frames`` those among them that
        the window already held, ``placed_pages`` the page copies into window slots of each layer, ``recached_frames``
        those that `recache` has encoded again, ``arrived_frames`` on a mesh those whose pages other ranks sent; history
        is this rank's share.
        """
        window = self._history.pages[:, :, :, : self.config.window]
        return {
            **self._counters,
            **self._history.counts(),
            "history_frames": len(self._history),
            "bytes": {"window": window.numel() * window.element_size(), "staging": self._staging.nbytes}
            | self._history.held(),
            "seconds": dict(self._seconds),
        }

    def _check_ranks(self) -> None:
        """Raises `RankFailure` when a rank of the mesh has failed before: the window cannot go on."""
        if self._share is not None:
            self._share.mesh.collectives.check()

    def _in_step(self) -> AbstractContextManager[None]:
        """Around collectives: an error that this rank has alone, after it took part in one, ends its part in them."""
        return nullcontext() if self._share is None else self._share.in_step()

    def _frames_of(self, q: torch.Tensor) -> int:
        pages = self._history.pages
        check("q", q, (self.batch, None, None, pages.shape[-1]), (pages.dtype,), pages)
        if q.shape[1] == 0 or q.shape[1] % self.tokens_per_frame:
            raise ValueError(
                f"q must hold a whole number of frames of {self.tokens_per_frame} tokens (tokens_per_frame), at least "
                f"one; got {q.shape[1]} tokens"
            )
        return int(q.shape[1] // self.tokens_per_frame)

    @normal_tensors
    def _block_at(self, start_frame: int, frames: int) -> Block:
        """The open block, or the next one, which only `_begin` opens: until then a rejected call leaves no trace."""
        self._check_ranks()
        if self._recache is not None:
            raise RuntimeError(f"finish_recache({self._recache.start}) must come before start_frame {start_frame}")
        block = self._blocks.find(start_frame, frames)
        if block is not None:
            return block
        began = time.perf_counter()
        config = self.config
        with self._in_step():
            if self._share is not None:
                self._share.check_agreement()
            self._check_restored(start_frame, frames)
            self._history.settle(self._last_plan)
        plan = advance_window(
            self._last_plan,
            self._history.chosen,
            self._history.slot,
            start_frame,
            frames,
            sink=config.sink,
            top_k=config.top_k,
            staging_rows=config.staging_rows,
            position_rule=config.position_rule,
        )
        block = Block.planned(start_frame, frames, plan, self.device, in_pool=self._history.in_pool)
        self._seconds["retrieval"] += time.perf_counter() - began
        return block

    def _begin(self, block: Block, layer: int, grid: list[int]) -> None:
        """Notes that a layer has attended (or is about to); the first one opens the block."""
        if self._blocks.open is None:
            chosen = self._history.chosen
            memory = self._last_plan[:, FRAME, self.config.window - self.config.top_k :]
            repeated = (chosen[:, :, None] == memory[:, None, :]).any(-1) & (chosen >= 0)
            self._counters["selected_frames"] += int((chosen >= 0).sum())
            self._counters["repeated_frames"] += int(repeated.sum())
            if self._share is not None:
                self._share.began(block, self._history)
            self._blocks.open, self._grid = block, grid
        if layer not in block.layers:
            self._counters["placed_pages"] += block.placements
            block.layers.add(layer)

    def _arguments(self, block: Block, layer: int, grid: list[int], place: bool) -> dict[str, Any]:
        check_int("layer", layer, 0, self.layers - 1)
        absolute = self.config.position_rule == "absolute"
        self._extend_rope(max(*grid, block.end if absolute else self.config.window))
        if layer not in block.layers:
            self._history.wait(layer)
        if place and block.stored is not None:
            self._place_stored(block, layer)
        return {
            **self._no_search,
            "pool_layer": self._history.pages[layer],
            "staging": self._staging[layer],
            "window_state": block.state,
            "start_frame": block.start_frame,
            "rope": self.rope,
            "rope_split": self.rope_split,
            "grid": grid,
            "sink": self.config.sink,
            "top_k": self.config.top_k,
            "recent_exclude": self.config.recent_exclude,
            "place": place,
            "count": block.count,
            "position_rule": self.config.position_rule,
            "engine": self.engine,
        }

    def _place_stored(self, block: Block, layer: int) -> None:
        """Places pages that are not in the pool; the op places what is."""
        torch.ops.longlive.place_frames(
            self._history.pages[layer],
            self._window_slots,
            block.stored,
            block.state[:, POSITION],
            self.rope,
            self.rope_split,
            **self._history.stored_pages(layer),
            engine=self.engine,
        )

    def _checked_grid(self, grid: Sequence[int]) -> list[int]:
        if not isinstance(grid, Sequence) or len(grid) != 2 or any(not isinstance(size, int) for size in grid):
            raise TypeError(f"grid must be (h, w), two ints, got {grid!r}")
        sizes = list(grid)
        if min(sizes) < 1 or sizes[0] * sizes[1] != self.tokens_per_frame:
            raise ValueError(
                f"grid must be (h, w) with h * w = tokens_per_frame ({self.tokens_per_frame}), got {sizes}"
            )
        if self._grid not in (None, sizes):
            raise ValueError(
                f"grid must stay {self._grid}, in which earlier pages were rotated, until reset; got {sizes}"
            )
        return sizes

    def _check_embeddings(self, embeddings: torch.Tensor | None, block: Block) -> torch.Tensor:
        if embeddings is None:
            raise ValueError(f"embeddings must be given when top_k is {self.config.top_k}, got None")
        if not isinstance(embeddings, torch.Tensor):
            raise TypeError(f"embeddings must be a tensor, got {type(embeddings).__name__}")
        shape = (self.batch, block.frames, self._history.embedding_dim)
        check("embeddings", embeddings, shape, FLOATS, self._history.pages)
        if embeddings.shape[2] < 1:
            raise ValueError(f"embeddings must have at least one channel, got shape {tuple(embeddings.shape)}")
        return embeddings.detach()

    def _extend_rope(self, positions: int) -> None:
        """Grows the window's own rotary table; a given one is left as it is, and the op says when it is too short."""
        if self._own_rope and positions > self.rope.shape[0]:
            self.rope = rotary_table(
                2 * self.rope.shape[1], 2 * positions, split=self.rope_split, dtype=self._rope_dtype, device=self.device
            )


def _check_arguments(config: WindowConfig, dtype: torch.dtype, *, head_dim: int, **sizes: int) -> None:
    if not isinstance(config, WindowConfig):
        raise TypeError(f"config must be a WindowConfig, got {type(config).__name__}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {' or '.join(str(allowed) for allowed in FLOATS)}, got {dtype}")
    for name, size in sizes.items():
        check_int(name, size, 1)
    check_int("head_dim", head_dim, 2)
