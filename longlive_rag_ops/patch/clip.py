"""One video that a patched model generates: its window, its blocks as they are finished, what was retrieved."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import WindowConfig
from ..window import MemoryWindow
from .adapter import Adapter, Call, OwnWindow
from .settings import Settings

LOGGER = logging.getLogger("longlive_rag_ops.patch")
MOST_ENTRIES = 10_000  # of the retrieval log: some hours of video


@dataclass
class Forward:
    """One forward of the model that is under way.

    Attributes:
        clip: the video.
        call: what the forward is.
        recache: it encodes finished frames again.
        clean: the block is final after it.
    """

    clip: Clip
    call: Call
    recache: bool = False
    clean: bool = False

    @property
    def window(self) -> MemoryWindow:
        """The video's window, for adapters whose attention is not one call of `attend`. Made by `prepare`."""
        window = self.clip.window
        if window is None:
            raise RuntimeError("prepare must come first: the window's shapes are not known yet")
        return window

    def prepare(self, k: torch.Tensor, v: torch.Tensor) -> MemoryWindow:
        """The window, made on the first call for keys and values ``(B, n*T, Hkv, D)``."""
        self.clip.prepare(self.call, k, v)
        return self.window

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Attention over sink, retrieved memory and local part: ``torch.ops.longlive.retrieve_attend``.

        Args:
            layer: of the backbone.
            q: ``(B, n*T, Hq, D)``, k and v ``(B, n*T, Hkv, D)``: before rotation, in one dtype, tokens frame-major.

        Returns:
            ``(B, n*T, Hq, D)``, before the output projection.
        """
        call, window = self.call, self.prepare(k, v)
        if self.recache:
            return window.recache(layer, q, k, v, call.start_frame, call.grid, renew_sink=call.renew_sink, scale=scale)
        return window.attend(layer, q, k, v, call.start_frame, call.grid, scale=scale)


class Clip:
    """One video. Calls of the model come to it in order; it sees where blocks begin and end.

    Args:
        number: of the video, for logs.
        call: its first call.
        adapter, settings: of the patch.
        log: gets an entry for each retrieval and each prompt switch.
        own: the backbone's own window, where its cache does not tell any more.

    Attributes:
        window: None until the first attention tells its shapes.
        finished_frames: frames that are final.
    """

    def __init__(
        self,
        number: int,
        call: Call,
        adapter: Adapter,
        settings: Settings,
        log: deque[dict[str, Any]],
        own: OwnWindow | None = None,
    ) -> None:
        self.adapter = adapter
        self.settings = settings
        self.log = log
        self.own = adapter.own_window(call) if own is None else own
        self.window: MemoryWindow | None = None
        self.config = self._config(call)
        self.give_back: Callable[[], None] | None = None
        self.begin_video(number, call)

    def begin_video(self, number: int, call: Call) -> None:
        """Forgets the last video, keeps its memory."""
        self.number = number
        self.cache = call.cache  # held, so that no other object gets its identity
        self.batch, self.grid = call.batch, call.grid
        self._shape = call.batch, call.grid, call.latents().dtype, call.latents().device
        self.finished_frames = 0
        self.latents: list[torch.Tensor] = []  # of finished frames, (B, C, H, W) on the host, for policy recache
        self._open: Call | None = None
        self._forwards = 0  # of the open block
        self._usual: tuple[int, float | None] | None = None  # forwards of the last block, its last timestep
        self._last: Call | None = None  # the block that was finished last
        if self.window is not None:
            self.window.reset()
        self.adapter.began(call)
        again = self.adapter.take_over(call)
        if again is not None:
            self.give_back = again

    def fits(self, call: Call) -> bool:
        """Whether a video that begins with this call can go on in this one's memory."""
        same = call.cache is self.cache or self.adapter.own_window(call) == self.own
        shape = call.batch, call.grid, call.latents().dtype, call.latents().device
        return same and shape == self._shape and self._config(call) == self.config

    def close(self, give_back: bool = True) -> None:
        """The video is over: its bank is closed, and its cache gets its buffers back where that is wanted."""
        if self.window is not None and self.window.bank is not None:
            self.window.bank.close()
        if give_back and self.give_back is not None:
            self.give_back()
        self.give_back = self.window = None

    def old_frames(self, call: Call) -> list[range]:
        """Finished frames before those of a prompt re-cache, in runs of a forward's length, oldest first."""
        size, first = self.config.window, min(self.config.sink, call.start_frame)
        return [range(at, min(at + size, call.start_frame)) for at in range(first, call.start_frame, size)]

    def _config(self, call: Call) -> WindowConfig:
        own, settings = self.own, self.settings
        rule = own.position_rule
        if settings.top_k > 0 and self.adapter.memory_rule is not None:
            rule = self.adapter.memory_rule
        if settings.position_rule is not None:
            rule = settings.position_rule
        if rule is None:
            raise ValueError(
                f"position_rule must be given for {type(self.adapter.model).__name__}, whose own rule of temporal "
                "positions is not known: the one it was trained with, slot or absolute"
            )
        frames = max(self.adapter.frames_per_block() or 0, call.frames)
        return settings.config(own.window, own.sink, rule, frames)

    def prepare(self, call: Call, k: torch.Tensor, v: torch.Tensor) -> None:
        """Makes the window when there is none yet."""
        if self.window is not None:
            return
        head_dim, settings = k.shape[3], self.settings
        table, split = self.adapter.rotary(head_dim) or (None, None)
        if table is not None:
            table = table.to(device=k.device, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
        self.window = MemoryWindow(
            self.config,
            layers=len(self.adapter.layers()),
            batch=call.batch,
            tokens_per_frame=call.tokens_per_frame,
            kv_heads=k.shape[2],
            head_dim=head_dim,
            dtype=v.dtype,
            device=k.device,
            history_slots=settings.history_slots,
            bank=settings.bank,
            rope=table,
            rope_split=split,
            engine=settings.engine,
        )

    def begin(self, call: Call) -> Forward:
        """A forward begins.

        Raises:
            ValueError: another batch or resolution than the video's, or more frames than the local part holds.
            RuntimeError: frames that cannot come now, or somebody else changed the cache.
        """
        self._check_shape(call)
        self.adapter.check(call, self)
        if self._open is not None and self._ends_block(call, self._open):
            self._finish()
        if self._open is None and call.end_frame <= self.finished_frames:
            return self._begin_recache(call)
        expected = self.finished_frames if self._open is None else self._open.start_frame
        if call.start_frame != expected or (self._open is not None and call.frames != self._open.frames):
            self._refuse(call)
        if call.frames > self.config.local:
            config = self.config
            raise ValueError(
                f"a forward must generate at most window - sink - top_k = {config.window} - {config.sink} - "
                f"{config.top_k} = {config.local} frames, which is the local part; got {call.frames}"
            )
        if self._open is None:
            self._forwards = 0
        self._open = call
        self._forwards += 1
        forward = Forward(self, call, clean=self._is_clean(call))
        if forward.clean and self.window is not None and self.window.block_is_whole:
            # What is found is fetched while the forward runs.
            self.window.retrieve(call.start_frame, self._embeddings(call))
        return forward

    def end(self, forward: Forward) -> None:
        """A forward is over, all layers have attended."""
        call = forward.call
        if forward.recache:
            window = forward.window
            window.finish_recache(call.start_frame)
        elif forward.clean:
            self._finish(early=True)
        self.adapter.advanced(call, self)

    def _is_clean(self, call: Call) -> bool:
        """Whether this forward is the block's last: it says so, or it is the one that was the last block's last.

        The timestep is read from the device only when the number of forwards fits, once a block. A block that is
        mistaken for unfinished is finished when the next one begins.
        """
        if call.clean is not None:
            return call.clean
        if self._usual is None or self.config.top_k == 0 or self._forwards != self._usual[0]:
            return False
        return call.timestep is not None and _largest(call.timestep) == self._usual[1]

    def _finish(self, early: bool = False) -> None:
        """The open block is final: its last forward was the clean one; ``early``: that forward said so itself."""
        call, window = self._open, self.window
        assert call is not None and window is not None
        wanted = self.config.top_k > 0
        window.finish(call.start_frame, self._embeddings(call) if wanted and not window.searched else None)
        if not early and wanted:
            self._usual = self._forwards, None if call.timestep is None else _largest(call.timestep)
        self.finished_frames = call.end_frame
        self._open, self._last = None, call
        if self.settings.on_prompt_switch == "recache":
            self.latents += [frame.detach().to("cpu", copy=True) for frame in call.latents().unbind(1)]
        if wanted:
            entry = {"event": "retrieval", "clip": self.number, "block": call.end_frame}
            self.log.append(entry | {"frames": window.selected, "scores": window.selected_scores})

    def _embeddings(self, call: Call) -> torch.Tensor:
        """``(B, n, E)`` of the call's frames."""
        latents = call.latents()
        found = self.settings.embedder(latents.flatten(0, 1))
        frames = latents.shape[0] * latents.shape[1]
        if not isinstance(found, torch.Tensor) or found.dim() != 2 or found.shape[0] != frames:
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"embedder must return ({frames}, E) for frames {(frames, *latents.shape[2:])}, got {got}")
        return found.unflatten(0, latents.shape[:2])

    def _begin_recache(self, call: Call) -> Forward:
        last = self._last
        if last is not None and last.timestep is not None and call.timestep is not None:
            finished, now = _largest(last.timestep), _largest(call.timestep)
            if now != finished:
                raise RuntimeError(
                    f"frames {call.start_frame} .. {call.end_frame - 1} are finished, the last of them by a forward at "
                    f"timestep {finished}; got another one at {now}: a finished block is final, and a prompt re-cache "
                    "encodes clean frames. A new video needs a new cache, or its counters at 0"
                )
        if call.frames > self.config.window:
            raise ValueError(
                f"a prompt re-cache must hold at most window ({self.config.window}) frames, got {call.frames}"
            )
        return Forward(self, call, recache=True)

    def switch_prompt(self, call: Call) -> None:
        """Frames are encoded again with another prompt: what becomes of the history before them."""
        policy, window = self.settings.on_prompt_switch, self.window
        entry = {"event": "prompt switch", "clip": self.number, "at": self.finished_frames, "policy": policy}
        entry |= {"recached": [call.start_frame, call.end_frame]}
        if policy == "drop" and window is not None:
            entry["dropped"] = len(window.forget(call.start_frame))
        self.log.append(entry)
        LOGGER.info(
            "prompt switch at frame %d: frames %d to %d are cached again; history before them: %s%s",
            self.finished_frames,
            call.start_frame,
            call.end_frame - 1,
            policy,
            ", with pages of the old prompt" if policy == "keep" and self.config.top_k > 0 else "",
        )

    def _check_shape(self, call: Call) -> None:
        for name, now, before in (("batch", call.batch, self.batch), ("grid", call.grid, self.grid)):
            if now != before:
                raise ValueError(
                    f"{name} must stay {before} within a video, got {now} at frame {call.start_frame}: begin a new "
                    "video at frame 0 with a new cache"
                )

    @staticmethod
    def _ends_block(call: Call, block: Call) -> bool:
        """Whether the open block is final, whatever its forwards were: the next one begins, or a prompt re-cache."""
        recache = call.start_frame < block.start_frame and call.end_frame == block.end_frame
        return recache or call.start_frame == block.end_frame

    def _refuse(self, call: Call) -> None:
        where = f"frames {call.start_frame} .. {call.end_frame - 1}"
        if self._open is not None:
            allowed = f"{self._open.start_frame} .. {self._open.end_frame - 1} again, or those from there on"
        else:
            allowed = f"those from {self.finished_frames} on"
        raise RuntimeError(
            f"frames must be {allowed}, or finished ones for a prompt re-cache; got {where}: blocks follow one another "
            "without a gap, and a finished block is final"
        )


def _largest(timestep: torch.Tensor) -> float:
    """The largest timestep; waits for the device."""
    return float(timestep.max())
