"""How frames are found in a bank and brought to the device: search, prefetch, settle, wait, release; and pins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..config import check_int
from ..index import FrameIndex
from ..modes import normal_tensors
from ..ops.checks import FLOATS, LARGEST_FRAME, check
from ..transfer import HostCopy
from .catalogue import take_back
from .contents import BankContents, Lost
from .errors import core_errors


class BankRetrieval(BankContents):
    """The part of `MemoryBank` that looks for frames and holds them; it adds none and forgets none."""

    @normal_tensors
    def search(
        self,
        query: torch.Tensor,
        k: int,
        *,
        end_frame: int,
        first_frame: int | None = None,
        recent_exclude: int = 0,
        min_score: float | None = None,
        diversity: float = 0.0,
        engine: str = "auto",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames whose embeddings are most similar to the query's: ``topk_retrieve`` over the index.

        The host does not wait. What is found counts as retrieved (policy ``least_retrieved``) and goes to the log.

        Args:
            query: ``(samples, E)``.
            first_frame: oldest frame that may be found; ``sink`` when not given.
            k, end_frame, recent_exclude, min_score, diversity, engine: as ``topk_retrieve`` takes them.

        Returns:
            ids ``(samples, k)`` int64, most similar first, -1 past the last; scores ``(samples, k)``, -inf past the
            last. All -1 while the index is empty.
        """
        first = self.sink if first_frame is None else check_int("first_frame", first_frame, 0)
        with self._turn(), self._range("search"):
            index = self.index
            if index is None:  # so that arguments are checked all the same
                check("query", query, (self.samples, None), FLOATS, query)
                index = FrameIndex(self.samples, max(1, query.shape[1]), query.dtype, self.device)
            ids, scores = torch.ops.longlive.topk_retrieve(
                query.detach(),
                index.embeddings,
                index.ids,
                index.length,
                torch.full((1,), check_int("end_frame", end_frame, 0), dtype=torch.int64, device=self.device),
                k,
                first_frame=first,
                recent_exclude=recent_exclude,
                normalized=True,
                min_score=min_score,
                diversity=diversity,
                engine=engine,
            )
            options = {
                "k": k,
                "end_frame": end_frame,
                "first_frame": first,
                "recent_exclude": recent_exclude,
                "min_score": min_score,
                "diversity": diversity,
            }
            self._found(ids, scores, options)
        return ids, scores

    def found(self, ids: torch.Tensor, scores: torch.Tensor, **options: float | str | None) -> None:
        """Counts and logs what a search over this bank's index and others' has found; see `search`.

        Args:
            ids, scores: ``(samples, k)``; frames that this bank does not have are not counted.
            options: of the search, for the log.
        """
        with self._turn():
            self._found(ids, scores, options)

    def _found(self, ids: torch.Tensor, scores: torch.Tensor, options: Mapping[str, Any]) -> None:
        copied = HostCopy(ids)
        self._counts["searches"] += 1
        self._catalogue.found(copied)
        self.log.searched(copied, HostCopy(scores), options)

    def prefetch(self, frames: Iterable[int]) -> None:
        """Begins to bring frames into device slots, and holds them there until `release`.

        Copies from host memory go layer by layer behind what the current stream was given, reads from disk begin.
        `slot` tells where a frame is after `settle`. A frame the bank does not have is no error: `settle` names it.

        Raises:
            BankFull: slots, or host memory for reads from disk, do not suffice beside what is held. Nothing is fetched.
            TypeError, ValueError: not frame numbers, each once.
            RuntimeError: as for `commit`.
        """
        numbers = frame_numbers(frames)
        with self._turn(), self._range("prefetch"):
            self._check_stream("prefetch")
            tiers = {frame: self._tier(frame) for frame in numbers}
            if numbers:
                with core_errors():
                    self._core.prefetch(numbers, stream=self._stream())
                self._unsettled = True
                for frame in numbers:  # what is asked for anew is not lost any more
                    self._lost.pop(frame, None)
            self._catalogue.fetched.update(frame for frame in numbers if tiers[frame] != "missing")
            self.log.prefetched(tiers)

    def settle(self) -> list[Lost]:
        """Waits for reads from disk and begins their copies to the device; names prefetched frames that cannot be had.

        Those are not held in slots and have left the index, replaced frames excepted, whose new pages are there. What a
        call names it does not name again. Without a prefetch it does nothing.
        """
        self._collect()
        with self._turn():
            lost, self._lost = self._lost, {}
        return list(lost.values())

    def wait(self, layer: int, pool_layer: torch.Tensor | None = None, *, fetched_only: bool = False) -> None:
        """Makes the current stream wait for a layer's copies, from slots and into them, that were begun before.

        Settles first when a prefetch is not settled. The host waits only for reads from disk.

        Args:
            layer: ``0 .. layers-1``.
            pool_layer: what a compiled graph has for ``slots[layer]``, see ``torch.ops.longlive.wait_pages``.
            fetched_only: waits for copies into slots alone, and so not for whatever wrote the pages that were committed
                last: fetched pages may be read then, committed ones must not be overwritten.

        Raises:
            TypeError, ValueError: there is no such layer, or ``pool_layer`` is not what it must be.
            RuntimeError: the bank is closed, the current stream is being captured into a CUDA graph (wait before it is
                replayed), or ``pool_layer`` is a copy of slots on a GPU.
        """
        check_int("layer", layer, 0, self.layers - 1)
        self._check_open()
        self._check_stream("wait")
        copied = pool_layer is not None and self._is_copy(pool_layer, layer)
        if self._unsettled:
            self._collect()
        stream, commits = self._stream(), self._sources.commits
        with core_errors():
            self._core.wait(layer, stream, fetched_only)
        if not fetched_only:
            self._sources.waited(layer, stream, commits)
        if copied and pool_layer is not None:
            at = 1 if self.format.quantised else 2
            arrived = slice(self._first_slot, self._first_slot + self._slot_count)
            index = (slice(None),) * at + (arrived,)
            pool_layer[index] = self.slots[layer][index]

    def release(self, frames: Iterable[int]) -> None:
        """The current stream has been given the last read of these frames' slots: takes back one `prefetch` each.

        Before a slot is filled again, streams that waited for it meanwhile are waited for too, and must still be there.
        A frame that was lost, replaced or forgotten meanwhile is passed over.
        """
        numbers = frame_numbers(frames)
        with self._turn():
            self._core.release(numbers, stream=self._stream())
            take_back(self._catalogue.fetched, numbers)

    # Pins

    def pin(self, frames: int | Iterable[int]) -> None:
        """Keeps frames from being forgotten until they are unpinned as often. Those that are not there are passed over.

        A frame keeps its pins when it is replaced, and loses them when it is damaged.
        """
        with self._turn():
            self._catalogue.pins.update(frame for frame in frame_numbers(frames) if frame in self)

    def unpin(self, frames: int | Iterable[int]) -> None:
        """Takes back one `pin` each. Frames that are not pinned are passed over."""
        with self._turn():
            take_back(self._catalogue.pins, frame_numbers(frames))

    def pins(self, frame: int) -> int:
        """How often a frame is pinned, its fetches not counted."""
        return self._catalogue.pins.get(frame, 0)

    # Private

    def _collect(self) -> None:
        """Settles the core; without the lock while it waits, unless the caller holds it."""
        self._check_open()
        self._unsettled = False
        with self._range("settle"), core_errors():
            found = [Lost(*lost) for lost in self._core.settle()]
        with self._turn():
            self._lost.update({lost.frame: lost for lost in found})  # first: warnings may be made errors
            for lost in found:
                self._lose(lost)
            stats = self._core.stats()
            self._faults.check(stats)
            self.log.settled(found, stats["stall_us"] - self._stall_us)
            self._stall_us = stats["stall_us"]

    def _is_copy(self, pool_layer: torch.Tensor, layer: int) -> bool:
        """Whether a tensor is a compiler's copy of a layer's slots, rather than these or another tensor."""
        slots = self.slots[layer]
        if pool_layer.untyped_storage().data_ptr() == slots.untyped_storage().data_ptr():
            return False
        if self.format.quantised and (pool_layer.dtype != slots.dtype or pool_layer.shape != slots.shape):
            return False
        check("pool_layer (slots of the layer)", pool_layer, slots.shape, (slots.dtype,), slots)
        if pool_layer.is_cuda:
            raise RuntimeError(
                "pool_layer must be the bank's own slots on a GPU, got a copy of them, as compilers make it when the "
                "pool is no input of the graph, or is also used by others than the ops that write it: wait before the "
                "compiled call"
            )
        return True


def frame_numbers(frames: int | Iterable[int]) -> list[int]:
    """Frame numbers, each once."""
    numbers = [frames] if isinstance(frames, int) else list(frames)
    for frame in numbers:
        check_int("frames", frame, 0, LARGEST_FRAME)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"frames must name each frame once, got {numbers}")
    return numbers
