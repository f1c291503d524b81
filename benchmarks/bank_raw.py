"""What the bank is held against on a CPU: plain memcpy, and direct I/O by a plain pool of threads."""

from __future__ import annotations

import concurrent.futures
import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch


class Copies:
    """A list of plain copies, carried out one after another in the calling thread, as the bank's host device does."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._kept = pairs
        self._runs = []
        for to, source in pairs:
            assert to.is_contiguous() and source.is_contiguous() and to.nbytes == source.nbytes
            self._runs.append((to.data_ptr(), source.data_ptr(), to.nbytes))
        self.bytes = sum(count for _, _, count in self._runs)

    def run(self) -> None:
        for to, source, count in self._runs:
            ctypes.memmove(to, source, count)


class RawDisk:
    """Pieces of one preallocated file, written and read by direct I/O with a number of them under way at a time.

    Args:
        folder: where the file is made; it has no name, and is gone when this is closed.
        piece, pieces: bytes of one transfer, a multiple of 4096, and how many there are.
        depth: threads.
    """

    def __init__(self, folder: Path, piece: int, pieces: int, depth: int) -> None:
        name = folder / "raw"
        self._file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        name.unlink()
        os.posix_fallocate(self._file, 0, piece * pieces)
        self._piece = piece
        self._memory = [mmap.mmap(-1, piece) for _ in range(pieces)]
        for number, memory in enumerate(self._memory):
            memory.write(number.to_bytes(8, "little") * (piece // 8))
        self._pool = concurrent.futures.ThreadPoolExecutor(depth)
        list(self._pool.map(lambda _: None, range(depth)))  # the threads are there before anything is timed

    def write(self, pieces: Sequence[int]) -> None:
        self._all(os.pwritev, pieces)

    def read(self, pieces: Sequence[int]) -> None:
        self._all(os.preadv, pieces)

    def check(self) -> None:
        """What is read is what was written."""
        pieces = range(len(self._memory))
        self.write(pieces)
        for memory in self._memory:
            memory.seek(0)
            memory.write(bytes(self._piece))
        self.read(pieces)
        for number, memory in enumerate(self._memory):
            assert memory[:] == number.to_bytes(8, "little") * (self._piece // 8), number

    def _all(self, transfer, pieces: Sequence[int]) -> None:  # type: ignore[no-untyped-def]
        def one(number: int) -> None:
            moved = transfer(self._file, [self._memory[number]], number * self._piece)
            assert moved == self._piece, (number, moved)

        list(self._pool.map(one, pieces))

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._file)
