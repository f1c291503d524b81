"""The memory bank as an object: pages and embeddings of finished frames, bounded, in tiers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..config import check_int
from ..modes import normal_tensors
from ..ops.checks import LARGEST_FRAME, check
from .config import BankConfig
from .errors import BankFull, core_errors
from .page_format import PageFormat
from .retrieval import BankRetrieval, frame_numbers

Pages = torch.Tensor | Sequence[torch.Tensor]


class MemoryBank(BankRetrieval):
    """A bounded store of frames' canonical pages: device slots, host memory, disk; with the index of their embeddings.

    A page is the bank's from `commit` on and never changes within its *generation*: any tier may hold a copy. Pages are
    what the window placed, keys before the temporal rotation. All samples of a frame are stored together.

    Order. Copies begin after what the current stream was given before the call, and are done in the background.
    `wait` makes the current stream wait for a layer: after it, fetched pages may be read and committed ones
    overwritten. On a CPU copies are done when the call returns. Commits and searches belong on one stream, or in an
    order of the caller's.

    Every method may be called from any thread. A bank that nobody refers to is closed.

    Args:
        format: of the pages.
        config: limits and settings.
        slots: tensor of device slots to use, shaped as ``format.slots`` makes them (plain: the window's pool); when not
            given the bank makes its own.
        device_slots: how many; 0 means all of ``slots`` from ``first_slot`` on or, without ``slots``, as many as the
            config's ``device_bytes`` holds.
        first_slot: with ``slots``: the first that is the bank's.
        device: of pages, slots and index; must be that of ``slots``.
        sink: frames below it are never forgotten for others.
        frames_per_commit: most frames of one `commit`.
        most_fetched: frames that can be fetched and held on the device at once, whatever else the bank holds.

    Attributes:
        format, config, sink, layers, samples: as given.
        slots: the device slots, in the format's shape.
        log: the `RetrievalLog`.
        handle: number by which ``torch.ops.longlive.wait_pages`` finds the bank.

    Raises:
        TypeError, ValueError: an argument is not allowed, or a tier cannot hold one commit and one fetch; the message
            names the limit, the bytes needed and given.
        ImportError: the compiled core is not built.
        RuntimeError: there is no CUDA driver for a CUDA device.
        OSError: the folder for the disk tier cannot be written to.
    """

    @normal_tensors
    def commit(
        self,
        frames: Iterable[int],
        keys: Pages,
        values: Pages,
        embeddings: torch.Tensor | None = None,
        *,
        replace: bool = False,
    ) -> list[int]:
        """Stores frames; when the bank is full, forgets others by its policy, never sink or pinned ones.

        The pages are copied in the background: until `wait` they must not be overwritten (the bank keeps them alive).

        Args:
            frames: ``n`` frame numbers, at most ``frames_per_commit``, each once. A frame that is there must be
                replaced.
            keys, values: ``n`` views ``(layers, samples, T, H, D)`` each, or one tensor ``(layers, samples, n, T, H,
                D)`` each, in the compute dtype. Plain pages must be contiguous, ``(T, H, D)``.
            embeddings: ``(samples, n, E)`` floating point; a frame is not found in samples where it has NaN or
                infinity. None: the frames are found by no search or, with ``replace``, by their old embeddings.
            replace: the frames are there, and get a new generation: the old pages are in no tier any more when the call
                returns, fetches of them are dropped, and their slots must not be used.

        Returns:
            Frames that were forgotten.

        Raises:
            BankFull: there is no room, and the policy gives none up.
            TypeError, ValueError: an argument is not allowed.
            RuntimeError: the bank is closed, or the current stream is being captured into a CUDA graph. The bank is
                unchanged in all of these cases, but that frames may have been forgotten when the system has refused
                memory meanwhile.
        """
        numbers = frame_numbers(frames)
        with self._changes, self._turn(), self._range("commit"):
            self._check_stream("commit")
            pages = self._pages_of(numbers, keys, values)
            if embeddings is not None:
                self._catalogue.make_room(numbers, embeddings)
            for frame in numbers:
                if (frame in self) != replace:
                    state = "not in the bank, and replace is True" if replace else "in the bank, and replace is False"
                    raise ValueError(f"frames must not name frame {frame}, which is {state}")
            stream = self._stream()
            sources = self._sources.take(pages, stream)
            forgotten = self._store(numbers, sources, stream, replace)
            self._sources.committed()
            for frame in numbers:
                self._catalogue.fetched.pop(frame, None)
            self._catalogue.join(numbers)
            if embeddings is not None:
                self._embed(numbers, embeddings, new=not replace)
            self._faults.check(self._core.stats())
        return forgotten

    def _store(self, frames: list[int], sources: list[Any], stream: int, replace: bool) -> list[int]:
        forgotten: list[int] = []
        while True:
            if not replace:
                forgotten += self._make_room(len(frames))
            try:
                with core_errors():
                    self._core.commit(frames, sources, stream=stream, replace=replace)
                return forgotten
            except BankFull:  # the system has refused memory that the bank counted on: there is less room now
                if replace or self._core.room() >= len(frames):
                    raise
            except BaseException:  # a device that fails in the middle may take a frame that was being replaced
                for frame in frames:
                    if frame not in self:
                        self._catalogue.drop(frame)
                raise

    def _embed(self, frames: list[int], embeddings: torch.Tensor, *, new: bool, normalized: bool = False) -> None:
        try:
            self._catalogue.embed(frames, embeddings, normalized)
        except BaseException:  # out of memory, say: a new frame is there with its embedding or not at all
            if new:
                self._core.forget(frames)
                for frame in frames:
                    self._catalogue.drop(frame)
            raise

    def forget(self, frames: Iterable[int]) -> None:
        """Drops frames from every tier and from the index, sink frames too.

        ValueError when one is not there or is pinned, or fetched and not released; nothing is dropped then.
        """
        numbers = frame_numbers(frames)
        with self._changes, self._turn():
            for frame in numbers:
                if frame in self._catalogue.pins:
                    raise ValueError(f"frames must not name pinned frames, got {frame}")
            self._core.forget(numbers)
            for frame in numbers:
                self._catalogue.drop(frame)
            self._counts["asked"] += len(numbers)

    def clear(self) -> None:
        """Drops every frame, embedding and pin, and what a prefetch has asked for; counters stay."""
        with self._changes, self._turn():
            self._core.clear()
            self._core.settle()
            self._catalogue.clear()
            self._lost, self._unsettled = {}, False

    @normal_tensors
    def restore(
        self,
        frame: int,
        record: torch.Tensor,
        *,
        generation: int = 0,
        embedding: torch.Tensor | None = None,
        retrievals: int = 0,
    ) -> None:
        """Stores a frame as `record`, `generation`, `embedding` and `retrievals` gave it.

        The record is copied before the call returns. BankFull when there is no room (nothing is forgotten for it),
        ValueError when the frame is there.
        """
        check_int("frame", frame, 0, LARGEST_FRAME)
        check_int("generation", generation, 0)
        self._check_record("record", record)
        record = record.contiguous()
        with self._changes, self._turn():
            if embedding is not None:
                self._catalogue.make_room([frame], embedding[:, None])
            with core_errors():
                self._core.insert(frame, record.data_ptr(), generation=generation)
            self._catalogue.join([frame])
            if embedding is not None:
                self._embed([frame], embedding[:, None], new=True, normalized=True)
            self._catalogue.set_retrievals(frame, retrievals)
            self._faults.check(self._core.stats())

    def save(self, path: str | os.PathLike[str]) -> list[tuple[int, str]]:
        """Saves every frame with its generation and embedding, and how often it was retrieved, for `open`.

        What is saved is the bank at one moment: until it is, commits and whatever else adds, replaces or forgets frames
        wait, in other threads; searches and fetches do not. Frames go through one buffer, a frame's size. Whatever
        happens, the folder holds what it held or what it is to hold; see docs/bank.md.

        Args:
            path: folder, made when it is not there; a bank that was saved there is replaced, also the one that this one
                was opened from.

        Returns:
            Frames that were not saved because a page is damaged, with the reason; a warning names them too.

        Raises:
            OSError: it could not be written (no space, say). BlockingIOError: another save into the folder is under
                way. FileExistsError: the folder's ``manifest.json`` is no saved bank's. The folder is as it was, except
                that a failure of the very last step, making the new state durable, leaves that in place.
            RuntimeError: the bank is closed.
        """
        from .saved import save_bank

        return save_bank(self, path)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: BankConfig, *, format: PageFormat | None = None, **options: Any
    ) -> MemoryBank:
        """A bank with what `save` has put into a folder, which is not needed afterwards.

        A frame with a page that is damaged or cannot be read is left out, with its embedding: a warning names it, layer
        and sample, and `stats` counts it. When the saved bank has more frames than ``config`` has room for, its policy
        chooses among all of them which to forget, sink frames excepted.

        Args:
            path: the folder.
            config: limits and settings; its storage must be the saved bank's.
            format: what the pages must be; None: whatever they are.
            options: keyword arguments of the constructor; ``sink`` is the saved bank's when not given.

        Raises:
            SavedBankError: (a ValueError) there is no saved bank (`NoSavedBank`), a newer program saved it
                (`NewerVersion`), or its manifest or index is damaged.
            BankFull: there is no room, and the policy gives no frame up.
            TypeError, ValueError: format or config do not fit the saved bank, or as for the constructor.
            OSError: a file cannot be read.
        """
        from .saved import open_bank

        return open_bank(path, config, bank_type=cls, format=format, **options)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """While it lasts no other thread adds, replaces or forgets frames; only damaged ones may go."""
        with self._changes:
            self._check_open()
            yield

    def count_opened(self, forgotten: int, damaged_frames: int, damaged_pages: int) -> None:
        """Counts what was left out of a saved bank when it was opened."""
        with self._turn():
            self._counts[self.config.policy] += forgotten
            self._counts["damaged"] += damaged_frames
            self._counts["damaged_pages"] += damaged_pages

    # Private

    def _pages_of(self, frames: list[int], keys: Pages, values: Pages) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not 1 <= len(frames) <= self.frames_per_commit:
            raise ValueError(f"frames must name 1 to {self.frames_per_commit} (frames_per_commit), got {len(frames)}")
        shape = (self.layers, self.samples, *self.format.page_shape)
        views = []
        for name, pages in (("keys", keys), ("values", values)):
            if isinstance(pages, torch.Tensor):
                whole = (*shape[:2], len(frames), *shape[2:])
                check(name, pages, whole, (self.format.dtype,), self.slots)
                pages = pages.unbind(2)
            if len(pages) != len(frames):
                raise ValueError(f"{name} must be {len(frames)} tensors, one a frame; got {len(pages)}")
            for page in pages:
                check(name, page, shape, (self.format.dtype,), self.slots)
            views.append([page.detach() for page in pages])
        return list(zip(*views, strict=True))

    def _make_room(self, frames: int) -> list[int]:
        missing = frames - self._core.room()
        if missing <= 0:
            return []
        names = "host_bytes" if self.config.spill is None else "host_bytes and disk_bytes"
        full = f"{names} are used up by {len(self)} frames"
        if self.config.policy == "error":
            raise BankFull(
                f"{full} and {frames} more are committed: raise them, or choose a policy by which others are forgotten"
            )
        if self._catalogue.forgettable() < missing:
            raise BankFull(
                f"{full}, {frames} more are committed, and only {self._catalogue.forgettable()} may be forgotten: the "
                f"others are sink frames (below {self.sink}), pinned, or fetched and not released"
            )
        forgotten: list[int] = []
        while len(forgotten) < missing and (frame := self._catalogue.choose()) is not None:
            if frame in self:  # not lost to damage meanwhile, in a thread that has yet to take its turn
                self._core.forget([frame])
                forgotten.append(frame)
            self._catalogue.drop(frame)
        self._counts[self.config.policy] += len(forgotten)
        return forgotten
