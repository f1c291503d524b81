"""What a rank was given as embeddings, all of a video so far, as one short number to compare with other ranks'."""

from __future__ import annotations

import hashlib

import torch

from ..transfer import HostCopy

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a channel


def embedding_mark(embeddings: torch.Tensor) -> torch.Tensor:
    """A number for each embedding ``(..., E)``, of its bits: ``(...)`` int64.

    Channels are weighed by odd numbers, so that other bits in one channel, or the same ones in another order, make
    another number; it is exact whatever the order in which a device sums.
    """
    words = embeddings.contiguous().view(WORDS[embeddings.dtype.itemsize]).to(torch.int64)
    weights = 2 * torch.arange(words.shape[-1], dtype=torch.int64, device=words.device) + 1
    return (words * weights).sum(-1)


class EmbeddingDigest:
    """A digest that runs over the embeddings of a video's blocks, in order.

    On a CPU it takes their bytes. On a GPU it takes their marks, whose copy to the host is begun when they are given,
    and is there when the choice that follows on them is.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new video begins."""
        self._hash = hashlib.blake2b(digest_size=8)
        self._given: tuple[int, tuple[int, ...], bytes | HostCopy] | None = None

    def give(self, start: int, embeddings: torch.Tensor) -> None:
        """Takes the embeddings ``(B, n, E)`` of the block at ``start``, in place of what it was given before for it."""
        embeddings = embeddings.detach()
        if embeddings.is_cuda:
            taken: bytes | HostCopy = HostCopy(embedding_mark(embeddings))
        else:
            bits = embeddings.contiguous().view(torch.uint8)
            taken = hashlib.blake2b(bits.numpy().tobytes(), digest_size=8).digest()
        self._given = start, tuple(embeddings.shape), taken

    def taken(self) -> torch.Tensor:
        """``(8,)`` uint8 on the host, of all that was given; what was given last cannot be replaced any more."""
        if self._given is not None:
            start, shape, taken = self._given
            self._hash.update(f"{start} {shape}".encode())
            self._hash.update(taken if isinstance(taken, bytes) else taken.get().numpy().tobytes())
            self._given = None
        return torch.frombuffer(bytearray(self._hash.digest()), dtype=torch.uint8)
