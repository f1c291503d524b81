"""The backbone's own cache, which a patched model no longer reads: freed buffers, counters kept up to date."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch

Cache = MutableMapping[str, Any]
COUNTERS = ("global_end_index", "local_end_index")
PINS = ("pinned_start", "pinned_len")


def release_buffers(caches: Sequence[Cache]) -> Callable[[], None] | None:
    """Replaces each layer's ``k`` and ``v`` by tensors without tokens, and so frees them.

    Pipelines write to them (zeroing, copying slices), which does nothing to a tensor without tokens.

    Returns:
        What allocates them again, zeroed, with the counters at 0; None when they were released before.
    """
    released: list[tuple[Cache, str, torch.Size]] = []
    for cache in caches:
        for name in ("k", "v"):
            buffer = cache.get(name)
            if isinstance(buffer, torch.Tensor) and buffer.dim() == 4 and buffer.shape[1] > 0:
                released.append((cache, name, buffer.shape))
                cache[name] = buffer.new_empty((buffer.shape[0], 0, *buffer.shape[2:]))
    if not released:
        return None

    def give_back() -> None:
        for cache, name, shape in released:
            if cache[name].shape[1] == 0:
                cache[name] = cache[name].new_zeros(shape)
        for cache in caches:
            for name in COUNTERS:
                _set(cache, name, 0)

    return give_back


class CacheWatch:
    """Sees whether somebody else has changed a cache's counters, without reading them from the device."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._values: dict[int, tuple[int, int]] = {}

    def is_fresh(self, cache: Cache) -> bool:
        """Whether a cache is that of a video that has not begun."""
        return not any(name in cache and int(cache[name]) for name in COUNTERS)

    def advance(self, caches: Sequence[Cache], global_end: int, local_end: int) -> None:
        """Sets the counters, in tokens, and remembers them. They change once a block, not with every forward."""
        first, values = caches[0], (global_end, local_end)
        if self._values.get(id(first)) != values:
            for cache in caches:
                for name, value in zip(COUNTERS, values, strict=True):
                    _set(cache, name, value)
            self._values[id(first)] = values
        for name in (*COUNTERS, *PINS):
            if name in first:
                self._seen[id(first), name] = _mark(first[name])

    def check(self, cache: Cache) -> None:
        """RuntimeError when a counter was changed since `advance` by somebody else."""
        for name in (*COUNTERS, *PINS):
            seen = self._seen.get((id(cache), name))
            if seen is not None and not _same(seen, _mark(cache[name])):
                value, before = int(cache[name]), seen[0]
                before = int(before) if isinstance(before, int) else "another tensor or value"
                raise RuntimeError(
                    f"kv_cache[0][{name!r}] was changed between forwards, to {value} tokens (before: {before}). A "
                    "patched model does not follow what a pipeline does to its cache beside a prompt re-cache: no "
                    "kv_flush, no pinned shot sink, no zeroed cache. Start a new video, or unpatch()"
                )

    def forget(self, cache: Cache) -> None:
        """The cache begins a new video."""
        self._values.pop(id(cache), None)
        for name in (*COUNTERS, *PINS):
            self._seen.pop((id(cache), name), None)


def _set(cache: Cache, name: str, value: int) -> None:
    counter = cache.get(name)
    if isinstance(counter, torch.Tensor):
        counter.fill_(value)
    elif counter is not None:
        cache[name] = value


def _mark(counter: Any) -> tuple[Any, Any]:
    """What changes when a counter does: the tensor and how often it was written to, or the number."""
    if isinstance(counter, torch.Tensor):
        return counter, None if counter.is_inference() else counter._version
    return counter, None


def _same(seen: tuple[Any, Any], now: tuple[Any, Any]) -> bool:
    if isinstance(now[0], torch.Tensor):
        return seen[0] is now[0] and seen[1] == now[1]
    return bool(seen[0] == now[0])
