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

    def wait(self, layer: int) -> None:
        """Makes the current stream wait for a layer's pages."""


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
    Pages that a prefetch still has to read from disk are waited for on the host. The op counts as writing the pool,
    which is what keeps it in its place under `torch.compile`.

    Args:
        pool_layer: the layer's pages, of any shape, on the bank's device; counts as mutated.
        bank: `MemoryBank.handle`.
        layer: ``0 .. layers-1``.

    Raises:
        TypeError: ``pool_layer`` is no tensor.
        ValueError: there is no such layer, or the pool is on another device than the bank.
        RuntimeError: no open bank has this handle, the current stream is being captured into a CUDA graph (wait before
            replaying it), or the pool requires grad in grad mode.
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
    found.wait(layer)
