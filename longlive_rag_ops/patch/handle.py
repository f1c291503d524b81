"""A patched model: what was put in place of its parts, its videos, and the way back."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch

from ..window import MemoryWindow
from .adapter import Adapter, Call
from .block_embedding import embedder_name
from .clip import MOST_ENTRIES, Clip
from .forward import Forward
from .settings import Settings

MOST_ENDED = 16  # videos whose caches are remembered, to give them their buffers back
_patched: WeakSet[torch.nn.Module] = WeakSet()


class Handle:
    """What `patch` returns. Also a context manager, which unpatches at its end.

    Attributes:
        model: the patched model.
        adapter: of its family.
        retrieval_log: newest ten thousand entries, dictionaries: ``event`` ``retrieval`` with ``clip`` (number of the
            video), ``block`` (first frame of the block that it is for), ``frames`` and ``scores`` (for each sample,
            most similar first); ``event`` ``prompt switch`` with ``clip``, ``at``, ``policy``, ``recached`` (first
            frame and end of those encoded again), and ``dropped`` (frames of history) where there are any.
    """

    def __init__(self, model: torch.nn.Module, adapter: Adapter, settings: Settings) -> None:
        if model in _patched:
            raise RuntimeError("model is patched already: call unpatch() of the handle that patch returned, first")
        self.model = model
        self.adapter = adapter
        self.retrieval_log: deque[dict[str, Any]] = deque(maxlen=MOST_ENTRIES)
        self._settings = adapter.settings(settings)
        self._clips: OrderedDict[int, Clip] = OrderedDict()  # by identity of their cache, least recently used first
        self._ended: OrderedDict[int, Clip] = OrderedDict()
        self._videos = self._switches = 0
        self._forward: Forward | None = None
        self._switching = False
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        _patched.add(model)

    @property
    def patched(self) -> bool:
        """Whether the model is still patched by this handle."""
        return bool(self._undo)

    @property
    def clips(self) -> list[Clip]:
        """The videos under way, the one used last at the end: of guided sampling two."""
        return list(self._clips.values())

    def stats(self) -> dict[str, Any]:
        """Counters: ``family``, ``embedder`` (its name), ``videos`` begun, ``prompt_switches``, and for each video
        under way in ``clips`` its number, finished ``frames``, sizes of the window and `MemoryWindow.stats`, with those
        of its bank."""
        clips = []
        for clip in self._clips.values():
            found: dict[str, Any] = {"clip": clip.number, "frames": clip.finished_frames, "config": clip.config}
            if clip.window is not None:
                found["window"] = clip.window.stats()
                if clip.window.bank is not None:
                    found["bank"] = clip.window.bank.stats()
            clips.append(found)
        return {
            "family": self.adapter.name,
            "embedder": embedder_name(self._settings.embedder),
            "videos": self._videos,
            "prompt_switches": self._switches,
            "clips": clips,
        }

    def plot(self, path: str | Path, clip: int | None = None, sample: int = 0) -> None:
        """Draws which frames were retrieved for which block, coloured by similarity, into a picture file.

        Args:
            path: of the file; its ending says the format.
            clip: number of a video; the newest with an entry when not given.
            sample: of the batch.

        Raises:
            ValueError: nothing was retrieved in that video, or it has no such sample.
            ImportError: matplotlib is missing (extra ``demo`` or ``bench``).
        """
        from .retrieval_plot import plot_retrieval

        plot_retrieval(list(self.retrieval_log), Path(path), clip, sample)

    def unpatch(self) -> None:
        """Takes everything back: the model computes what it did before, bit for bit, from the next video on.

        The caches of the videos under way, and of the sixteen before them, get their buffers back, empty; make older
        ones anew. Banks are closed. Calling it again does nothing.
        """
        self._remove()
        _patched.discard(self.model)
        clips = [*self._ended.values(), *self._clips.values()]
        self._ended.clear()
        self._clips.clear()
        while clips:
            clip = clips.pop()
            clip.close()
            if clip.give_back is not None:
                clip.give_back()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unpatch()

    def _install(self) -> None:
        # Not by hooks: what wraps a model, as LoRA does, may call its forward past them.
        self._undo.append(_replace_forward(self.model, functools.partial(self._run, self.model.forward)))
        for layer, module in enumerate(self.adapter.modules):
            self._undo.append(_replace_forward(module, functools.partial(self._attend, layer, module.forward)))
        self._undo += self.adapter.install()

    def _remove(self) -> None:
        self._forward = None
        errors = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # the others are undone all the same
                errors.append(error)
        if errors:
            raise errors[0]

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        self._before(args, kwargs)
        try:
            output = original(*args, **kwargs)
        except BaseException:
            self._failed()
            raise
        self._after()
        return output

    @torch.compiler.disable
    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forward = None
        call = self.adapter.call(args, kwargs)
        if call is None:
            return
        clip = self._clip(call)
        forward = clip.begin(call)
        if forward.recache and not self._switching:
            self._switches += clip.switches.begin(call, clip.finished_frames, forward.window)
            self._encode_again(clip, call, args, kwargs)
        self._forward = forward

    @torch.compiler.disable
    def _after(self) -> None:
        forward, self._forward = self._forward, None
        if forward is not None:
            forward.clip.end(forward)

    @torch.compiler.disable
    def _failed(self) -> None:
        forward, self._forward = self._forward, None
        if forward is not None:
            self.adapter.failed(forward.call, forward.clip)

    @torch.compiler.disable
    def _attend(self, layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._forward is None:
            return original(*args, **kwargs)
        return self.adapter.attend(self._forward, layer, original, args, kwargs)

    def _clip(self, call: Call) -> Clip:
        """The video that a call belongs to."""
        key = id(call.cache)
        clip = self._clips.get(key)
        if clip is not None and clip.begins_again(call):
            self._videos += 1
            if clip.fits(call):
                clip.begin_video(self._videos, call)
            else:
                clip.close()
                clip = self._new(call, clip)
        elif clip is None:
            if call.start_frame != 0:
                raise RuntimeError(
                    f"a video must begin at frame 0, got frame {call.start_frame} with a cache that is not known: it "
                    "was begun before the model was patched, or max_clips videos were begun after it"
                )
            clip = self._new_clip(call)
        self._clips[key] = clip
        self._clips.move_to_end(key)
        return clip

    def _new_clip(self, call: Call) -> Clip:
        """A new video takes over the memory of one that is given up, when it is of the same shape."""
        most = self._settings.max_clips
        over = list(self._clips)
        if most is not None:
            over = over[: max(0, len(over) + 1 - most)]
        elif over and self._clips[over[-1]].finished_frames == 0:
            over.pop()  # the two caches of guided sampling begin together
        self._videos += 1
        known = self._ended.pop(id(call.cache), None)
        window: MemoryWindow | None = None
        for key in over:
            clip = self._clips.pop(key)
            if window is None and known is None and clip.fits(call):
                window, clip.window = clip.window, None
            clip.close()
            self._ended[key] = clip
            while len(self._ended) > MOST_ENDED:
                self._ended.popitem(last=False)
        return self._new(call, known, window)

    def _new(self, call: Call, known: Clip | None, window: MemoryWindow | None = None) -> Clip:
        """A video whose cache was another's before (``known``), in memory that is there."""
        own = None if known is None else known.own
        clip = Clip(self._videos, call, self.adapter, self._settings, self.retrieval_log, own, window)
        if clip.give_back is None and known is not None:
            clip.give_back = known.give_back
        return clip

    def _encode_again(self, clip: Clip, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Policy ``recache``: the history before these frames passes through the model with the new prompt."""
        self._switching = True
        try:
            for start, latents in clip.switches.old_frames(call, clip.config.window, clip.config.sink):
                again, named = self.adapter.with_latents(args, kwargs, latents.to(call.latents().device), start)
                self.model(*again, **named)
        finally:
            self._switching = False


def _replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Puts ``forward`` into the instance; returns what takes it out again."""
    own = vars(module).get("forward")  # somebody else's patch of the instance
    module.forward = forward

    def undo() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    return undo
