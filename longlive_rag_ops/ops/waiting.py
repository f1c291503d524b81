"""``torch.ops.longlive.wait_pages``, and the handles by which an op finds a bank."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Protocol

import torch

from .checks import check_range, is_fake
from .registration import register


class Waiting(Protocol):
    """What the op needs of a bank."""

    layers: int

    def wait(self, layer: int, pool_layer: torch.Tensor | None = None) -> None:
        """`MemoryBank.wait`."""


_banks: weakref.WeakValueDictionary[int, Waiting] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_lock = threading.Lock()


def new_handle(bank: Waiting) -> int:
    """A number for a bank, never used again in this process. It does not keep the bank alive."""
    with _lock:
        handle = next(_numbers)
        _banks[handle] = bank
    return handle


def drop_handle(handle: int) -> None:
    """Makes a handle unknown; does nothing when it is."""
    with _lock:
        _banks.pop(handle, None)


@register
def wait_pages(pool_layer: torch.Tensor, bank: int, layer: int) -> None:
    """Makes the current stream wait for the pages of one layer, so that what follows may read them.

    Waits for all of that layer's copies that the bank has enqueued, from its device slots and into them (`MemoryBank`).
    Pages that a prefetch still has to read from disk are waited for on the host. The op counts as writing
    ``pool_layer``, which keeps it in its place under `torch.compile`: what follows and takes that tensor follows.

    A compiler may give the op a copy of the slots, to be copied back later. Inductor does not where the pool is an
    input; other backends always do. On a CPU the copy is filled in. On a GPU it is an error, because copying it back
    would run into pages that arrive in the meantime.

    Args:
        pool_layer: for plain storage the layer's slots, ``bank.slots[layer]``, window slots included if they are the
            window's pool. For quantised storage those, or any tensor that what follows takes, as the window's pool.
        bank: `MemoryBank.handle`.
        layer: ``0 .. layers-1``.

    Raises:
        TypeError, ValueError: ``pool_layer`` is not what it must be, or there is no such layer.
        RuntimeError: no open bank has this handle, the current stream is being captured into a CUDA graph (wait before
            replaying it), ``pool_layer`` is a copy of slots on a GPU, or requires grad in grad mode.
    """
    if is_fake(pool_layer):
        return
    with _lock:
        found = _banks.get(bank)
    if found is None:
        raise RuntimeError(
            f"bank must be the handle of an open MemoryBank, got {bank}: closed, or none of this process"
        )
    check_range("layer", layer, 0, found.layers - 1)
    found.wait(layer, pool_layer)
