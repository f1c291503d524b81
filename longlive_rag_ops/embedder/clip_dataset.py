"""Chunks of consecutive latent frames, drawn from clips on disk.

Every choice - the split, the order, where a chunk starts - is a hash of the seed and of what is chosen. It needs no
state, does not depend on the versions of torch and numpy, and is made in the training process alone: processes that
read files know nothing of it.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from .latent_file import LatentFile
from .training_config import TrainingConfig


class Chunk(NamedTuple):
    """Frames ``start .. start + seq_len - 1`` of the clip of this number."""

    clip: int
    start: int


Batch = list[Chunk]


def draw(*key: object) -> int:
    """64 bits that only the key decides."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def usable_clips(clips: Sequence[LatentFile], config: TrainingConfig) -> list[LatentFile]:
    """The part of the clips that ``data_percentage`` asks for, the first ones.

    Raises:
        ValueError: fewer than two, or one is shorter than a chunk; the message names it.
    """
    used = list(clips[: max(1, int(len(clips) * config.data_percentage))])
    if len(used) < 2:
        raise ValueError(
            f"data must have at least two clips, one to train with and one to validate; got {len(used)} of "
            f"{len(clips)} ({used[0].path}) with data_percentage {config.data_percentage}"
        )
    for clip in used:
        if clip.frames < config.seq_len:
            raise ValueError(
                f"latent file {clip.path} has {clip.frames} frames, a chunk has {config.seq_len} (seq_len); clips must "
                "not be shorter"
            )
    return used


def split_clips(clips: Sequence[LatentFile], config: TrainingConfig) -> tuple[list[int], list[int]]:
    """Numbers of the clips that are trained with, and of those kept for validation, at least one each."""
    order = sorted(range(len(clips)), key=lambda number: draw(config.seed, "split", clips[number].path.name))
    kept = min(max(1, int(len(clips) * config.val_split)), len(clips) - 1)
    return sorted(order[kept:]), sorted(order[:kept])


class EpochBatches(Sampler[Batch]):
    """A batch sampler: what is left of an epoch's training batches, then all validation batches.

    One loader reads both, so that the same processes go on from the one to the other.

    Args:
        clips: all of them.
        config: of the training.

    Attributes:
        train_clips, validation_clips: numbers of the clips.
        training: the epoch's batches, those that are done included.
        validation: the same in every epoch, or losses of two epochs could not be compared.
    """

    def __init__(self, clips: Sequence[LatentFile], config: TrainingConfig) -> None:
        self.clips, self.config = clips, config
        self.train_clips, self.validation_clips = split_clips(clips, config)
        self.training: list[Batch] = []
        self.validation = self._batches(self._chunks(self.validation_clips, "validation"))
        self._done = 0

    @property
    def steps(self) -> int:
        """Training batches in an epoch."""
        return -(-len(self.train_clips) * self.config.chunks_per_clip // self.config.batch_size)

    def chunks(self, steps: int) -> int:
        """Chunks in the first ``steps`` training batches of an epoch."""
        return min(steps * self.config.batch_size, len(self.train_clips) * self.config.chunks_per_clip)

    def begin(self, epoch: int, done: int = 0) -> None:
        """The batches of an epoch, counted from 0, of which the first ``done`` are left out."""
        chunks = self._chunks(self.train_clips, epoch)
        order = sorted(range(len(chunks)), key=lambda number: draw(self.config.seed, "order", epoch, number))
        self.training, self._done = self._batches([chunks[number] for number in order]), done

    def __iter__(self) -> Iterator[Batch]:
        yield from self.training[self._done :]
        yield from self.validation

    def __len__(self) -> int:
        return self.steps - self._done + len(self.validation)

    def names(self, batch: Batch, most: int = 8) -> str:
        """The files of a batch, for errors."""
        paths = list(dict.fromkeys(str(self.clips[chunk.clip].path) for chunk in batch))
        more = f" and {len(paths) - most} more" if len(paths) > most else ""
        return ", ".join(paths[:most]) + more

    def _chunks(self, numbers: Sequence[int], pass_: int | str) -> list[Chunk]:
        found = []
        for number in numbers:
            clip = self.clips[number]
            for turn in range(self.config.chunks_per_clip):
                place = draw(self.config.seed, "start", pass_, clip.path.name, turn)
                found.append(Chunk(number, place % (clip.frames - self.config.seq_len + 1)))
        return found

    def _batches(self, chunks: Sequence[Chunk]) -> list[Batch]:
        size = self.config.batch_size
        return [list(chunks[first : first + size]) for first in range(0, len(chunks), size)]


class ClipDataset(Dataset[torch.Tensor]):
    """Batches of chunks, read when they are asked for. (Files are mapped: what fits stays in the system's page cache.)

    Args:
        clips: the files.
        seq_len: frames in a chunk.
    """

    def __init__(self, clips: Sequence[LatentFile], seq_len: int) -> None:
        self.clips, self.seq_len = clips, seq_len

    def __getitem__(self, chunk: Chunk) -> torch.Tensor:
        """``(seq_len, C, H, W)`` float32.

        Raises:
            ValueError: the file is refused, see `LatentFile.read`. RuntimeError: it cannot be read for another reason.
        """
        clip = self.clips[chunk[0]]
        try:
            return clip.read(chunk[1], chunk[1] + self.seq_len)
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0]
            raise RuntimeError(f"latent file {clip.path} cannot be read: {first}") from error

    def __getitems__(self, batch: Batch) -> torch.Tensor | ValueError | RuntimeError:
        """``(chunks, seq_len, C, H, W)``, or the error: one raised here would reach the user wrapped in a traceback."""
        try:
            return torch.stack([self[chunk] for chunk in batch])
        except (ValueError, RuntimeError) as error:
            return error


def as_it_is(batch: Any) -> Any:
    """The loader's collation: `ClipDataset` returns batches."""
    return batch


def leave_signals(worker: int) -> None:
    """For a process that reads, which has the training process's handlers from its birth.

    Ctrl-C, a hang-up and what ``timeout`` sends go to the whole process group, and it is the training process that ends
    the others, after its step: these leave its group. It ends one that is stuck by SIGTERM, which must not be noted and
    forgotten.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
