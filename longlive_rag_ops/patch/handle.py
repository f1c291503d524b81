"""A patched model: what was put in place of its parts, its videos, and the way back."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .adapter import Adapter, Call
from .clip import MOST_ENTRIES, Clip, Forward
from .settings import Settings

_patched: WeakKeyDictionary[torch.nn.Module, Handle] = WeakKeyDictionary()


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
        self._videos = 0
        self._forward: Forward | None = None
        self._switching = False
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        _patched[model] = self

    @property
    def patched(self) -> bool:
        """Whether the model is still patched by this handle."""
        return bool(self._undo)

    @property
    def clips(self) -> list[Clip]:
        """The videos under way, the one used last at the end: of guided sampling two."""
        return list(self._clips.values())

    def stats(self) -> dict[str, Any]:
        """Counters: ``family``, ``videos`` begun, ``prompt_switches``, and for each video under way in ``clips`` its
        number, finished ``frames``, sizes of the window and `MemoryWindow.stats`, with those of its bank."""
        clips = []
        for clip in self._clips.values():
            found: dict[str, Any] = {"clip": clip.number, "frames": clip.finished_frames, "config": clip.config}
            if clip.window is not None:
                found["window"] = clip.window.stats()
                if clip.window.bank is not None:
                    found["bank"] = clip.window.bank.stats()
            clips.append(found)
        switches = sum(entry["event"] == "prompt switch" for entry in self.retrieval_log)
        return {
            "family": self.adapter.name,
            "videos": self._videos,
            "prompt_switches": switches,
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

        The caches of the videos under way get their buffers back, empty. Banks are closed. Calling it again does
        nothing.
        """
        self._remove()
        if _patched.get(self.model) is self:
            del _patched[self.model]
        for clip in self._clips.values():
            clip.close()
        self._clips.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unpatch()

    def _install(self) -> None:
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._undo.append(before.remove)
        after = self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._undo.append(after.remove)
        for layer, module in enumerate(self.adapter.layers()):
            self._undo.append(_replace_forward(module, functools.partial(self._attend, layer, module.forward)))
        self._undo += self.adapter.install()

    def _remove(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self._forward = None

    @torch.compiler.disable
    def _before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forward = None
        call = self.adapter.call(args, kwargs)
        if call is None:
            return
        clip = self._clip(call)
        forward = clip.begin(call)
        if forward.recache and not self._switching:
            clip.switch_prompt(call)
            if self._settings.on_prompt_switch == "recache":
                self._encode_again(clip, call, args, kwargs)
        self._forward = forward

    @torch.compiler.disable
    def _after(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward, self._forward = self._forward, None
        if forward is not None and output is not None:  # None: the forward has raised
            forward.clip.end(forward)

    @torch.compiler.disable
    def _attend(self, layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._forward is None:
            return original(*args, **kwargs)
        return self.adapter.attend(self._forward, layer, original, args, kwargs)

    def _clip(self, call: Call) -> Clip:
        """The video that a call belongs to."""
        key = id(call.cache)
        clip = self._clips.get(key)
        if clip is not None and call.start_frame == 0 and clip.finished_frames > 0 and call.fresh():
            self._videos += 1
            if clip.fits(call):
                clip.begin_video(self._videos, call)
            else:
                clip.close(give_back=False)
                own = clip.own
                clip = Clip(self._videos, call, self.adapter, self._settings, self.retrieval_log, own)
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
        if most is None:  # the two caches of guided sampling begin together: what is past its first block is over
            begun = [key for key, clip in self._clips.items() if clip.finished_frames == 0]
            over = [key for key in self._clips if key not in begun[-1:]]
        else:
            over = list(self._clips)[: max(0, len(self._clips) + 1 - most)]
        self._videos += 1
        taken: Clip | None = None
        for key in over:
            clip = self._clips.pop(key)
            if taken is None and clip.fits(call):
                taken = clip
                clip.begin_video(self._videos, call)
            else:
                clip.close(give_back=False)
        return taken or Clip(self._videos, call, self.adapter, self._settings, self.retrieval_log)

    def _encode_again(self, clip: Clip, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Policy ``recache``: the history before these frames passes through the model with the new prompt."""
        self._switching = True
        try:
            for frames in clip.old_frames(call):
                latents = torch.stack([clip.latents[frame] for frame in frames], 1).to(call.latents().device)
                again, named = self.adapter.with_latents(args, kwargs, latents, frames.start)
                self.model(*again, **named)
        finally:
            self._switching = False


def _replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Puts ``forward`` into the instance; returns what takes it out again."""
    own = vars(module).get("forward")  # somebody else's patch of the instance
    module.forward = forward

    def undo() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    return undo
