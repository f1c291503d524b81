"""The backbone's own cache, which a patched model no longer reads: freed buffers, counters kept up to date."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch

from .adapter import Adapter, Call

Cache = MutableMapping[str, Any]
COUNTERS = ("global_end_index", "local_end_index")
PINS = ("pinned_start", "pinned_len")
GLOBAL_FRAMES = 21  # of a model without a window: what its cache of 32760 tokens holds


def is_fresh(cache: Cache) -> bool:
    """Whether a layer's cache is that of a video that has not begun; waits for the device."""
    return not any(name in cache and int(cache[name]) for name in COUNTERS)


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
    """Sees whether somebody else has changed a video's counters, without reading them from the device."""

    def __init__(self) -> None:
        self._marks: dict[str, tuple[Any, Any]] = {}
        self._values: tuple[int, int] | None = None

    def advance(self, caches: Sequence[Cache], global_end: int, local_end: int) -> None:
        """Sets the counters, in tokens, and remembers them. They change once a block, not with every forward."""
        values = (global_end, local_end)
        if self._values != values:
            for cache in caches:
                for name, value in zip(COUNTERS, values, strict=True):
                    _set(cache, name, value)
            self._values = values
        self.remember(caches[0])

    def remember(self, cache: Cache) -> None:
        """The counters are as they should be."""
        self._marks = {name: _mark(cache[name]) for name in (*COUNTERS, *PINS) if name in cache}

    def changed(self, cache: Cache) -> str | None:
        """The counter that somebody else has changed since, if any."""
        for name, mark in self._marks.items():
            if name not in cache or not _same(mark, _mark(cache[name])):
                return name
        return None


class NativeCacheAdapter(Adapter):
    """Base of families whose call has a list of caches, one a layer: dictionaries with ``k``, ``v`` and counters."""

    def take_over(self, call: Call) -> Callable[[], None] | None:
        for cache in call.cache:  # changes of an inference tensor cannot be seen
            for name in (*COUNTERS, *PINS):
                if isinstance(cache.get(name), torch.Tensor) and cache[name].is_inference():
                    with torch.inference_mode(False):
                        cache[name] = cache[name].clone()
        return release_buffers(call.cache)

    def check(self, call: Call, clip: Any) -> None:
        name = clip.watch.changed(call.cache[0])
        if name is not None:
            counter = call.cache[0].get(name)
            now = "removed" if counter is None else f"changed to {int(counter)} tokens"
            raise RuntimeError(
                f"kv_cache[0][{name!r}] was {now} between forwards. A patched model does not follow what a pipeline "
                "does to its cache beside a prompt re-cache: no kv_flush, no pinned shot sink, no zeroed cache. Start "
                "a new video at frame 0, or unpatch()"
            )

    def advanced(self, call: Call, clip: Any) -> None:
        clip.watch.advance(call.cache, *counters(call, clip))

    def failed(self, call: Call, clip: Any) -> None:
        clip.watch.remember(call.cache[0])  # the model may have changed them before it failed


def counters(call: Call, clip: Any) -> tuple[int, int]:
    """Where the backbone's counters stand after a forward, in tokens: the video's end, and its window's."""
    end = max(call.end_frame, clip.finished_frames)
    return end * call.tokens_per_frame, min(end, clip.config.window) * call.tokens_per_frame


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


def _same(before: tuple[Any, Any], now: tuple[Any, Any]) -> bool:
    if isinstance(now[0], torch.Tensor):
        return before[0] is now[0] and before[1] == now[1]
    return bool(before[0] == now[0])
