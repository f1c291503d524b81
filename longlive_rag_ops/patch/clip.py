"""One video that a patched model generates: its window, its blocks as they are finished, what was retrieved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..config import WindowConfig
from ..window import MemoryWindow
from .adapter import Adapter, Call, OwnWindow
from .block_embedding import BlockEmbedding
from .forward import Forward
from .native_cache import CacheWatch
from .prompt_switch import PromptSwitches
from .settings import Settings

MOST_ENTRIES = 10_000  # of the retrieval log: some hours of video


class Clip:
    """One video. Calls of the model come to it in order; it sees where blocks begin and end.

    Args:
        number: of the video, for logs.
        call: its first call.
        adapter, settings: of the patch.
        log: gets an entry for each retrieval and each prompt switch.
        own: the backbone's own window, where its cache does not tell any more.
        window: another video's, of the same sizes, whose memory this one takes.

    Attributes:
        window: None until the first attention tells its shapes.
        finished_frames: frames that are final.
        give_back: gives the cache its buffers back.
        watch: of the cache's counters.
        switches: of the prompt.
    """

    def __init__(
        self,
        number: int,
        call: Call,
        adapter: Adapter,
        settings: Settings,
        log: deque[dict[str, Any]],
        own: OwnWindow | None = None,
        window: MemoryWindow | None = None,
    ) -> None:
        self.adapter = adapter
        self.settings = settings
        self.log = log
        self.own = adapter.own_window(call) if own is None else own
        self.window = window
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
        self.watch = CacheWatch()
        self.switches = PromptSwitches(number, self.settings, self.log)
        self._open: Call | None = None
        self._forwards = 0  # of the open block
        self._usual: tuple[int, float | None] | None = None  # forwards of the last block, its last timestep
        self._last: Call | None = None  # the block that was finished last
        self._embedding = BlockEmbedding(self.settings, len(self.adapter.modules))
        self._searched = 0  # number of the forward whose embeddings the window searches with
        if self.window is not None:
            self.window.reset()
        again = self.adapter.take_over(call)
        if again is not None:
            self.give_back = again

    def fits(self, call: Call) -> bool:
        """Whether a video that begins with this call can go on in this one's memory."""
        same = call.cache is self.cache or self.adapter.own_window(call) == self.own
        shape = call.batch, call.grid, call.latents().dtype, call.latents().device
        return same and shape == self._shape and self._config(call) == self.config

    def begins_again(self, call: Call) -> bool:
        """Whether a call over frame 0 is a new video's, with the same cache."""
        if call.start_frame != 0 or (self._open is None and self.finished_frames == 0):
            return False
        if self.finished_frames == 0:  # another forward of the first block, unless the counters were set back
            try:
                self.adapter.check(call, self)
                return False
            except RuntimeError:
                pass
        return call.fresh()

    def close(self) -> None:
        """The video is over: its bank is closed, its memory given up."""
        if self.window is not None and self.window.bank is not None:
            self.window.bank.close()
        self.window = self._open = self._last = None
        self.switches = PromptSwitches(self.number, self.settings, self.log)

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

    def prepare(self, forward: Forward, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Makes the window when there is none yet, and embeds the keys of the embedder's layer."""
        if self.window is None:
            self.window = self._new_window(forward.call, k, v)
        if layer == self._embedding.layer and not forward.recache:
            self._embedding.take_keys(forward.call, k)
            self._retrieve(forward)

    def _new_window(self, call: Call, k: torch.Tensor, v: torch.Tensor) -> MemoryWindow:
        head_dim, settings = k.shape[3], self.settings
        in_pieces = self.adapter.in_pieces and settings.transfer == "auto"
        table, split = self.adapter.rotary(head_dim) or (None, None)
        if table is not None:
            table = table.to(device=k.device, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
        return MemoryWindow(
            self.config,
            layers=len(self.adapter.modules),
            batch=call.batch,
            tokens_per_frame=call.tokens_per_frame,
            kv_heads=k.shape[2] * (1 if settings.mesh is None else settings.mesh.head_ranks),
            head_dim=head_dim,
            dtype=v.dtype,
            device=k.device,
            history_slots=settings.history_slots,
            bank=settings.bank,
            rope=table,
            rope_split=split,
            engine=settings.engine,
            mesh=settings.mesh,
            transfer="pages" if in_pieces else settings.transfer,
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
        self._check_length(call)
        if self._open is None:
            self._forwards = self._searched = 0
            self._embedding.begin_block()
        self._forwards += 1
        clean = self._is_clean(call)
        # The block may be found to be final only when the next one begins, and pipelines use their buffers again.
        self._open = call if clean else self._copied(call)
        forward = Forward(self, call, clean=clean)
        if self.config.top_k > 0 and self._embedding.layer is None:
            self._retrieve(forward)
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

    def _retrieve(self, forward: Forward) -> None:
        """In the block's last forward, when it is known to be that: what is found is fetched while the rest of it runs.

        Embeddings may come in any of its layers: all of them have attended before, and the search changes no page.
        """
        if forward.clean and self.window is not None and self.window.block_is_whole:
            self.window.retrieve(forward.call.start_frame, self._embedding.of(forward.call))
            self._searched = self._forwards

    def _finish(self, early: bool = False) -> None:
        """The open block is final: its last forward was the clean one; ``early``: that forward said so itself."""
        call, window = self._open, self.window
        if call is None or window is None:
            raise RuntimeError("no forward of the open block has come as far as its attention: make it again")
        wanted = self.config.top_k > 0
        embeddings = None
        if wanted and not (window.searched and self._searched == self._forwards):
            embeddings = self._embedding.of(call)
            if window.searched:  # with those of a forward that failed; another one took its place
                window.retrieve(call.start_frame, embeddings)
                embeddings = None
        window.finish(call.start_frame, embeddings)
        if not early and wanted:
            self._usual = self._forwards, None if call.timestep is None else _largest(call.timestep)
        self.finished_frames = call.end_frame
        self._open, self._last = None, call
        self.switches.keep_latents(call)
        if wanted:
            entry = {"event": "retrieval", "clip": self.number, "block": call.end_frame}
            self.log.append(entry | {"frames": window.selected, "scores": window.selected_scores})

    def _begin_recache(self, call: Call) -> Forward:
        last = self._last
        if last is not None and (call.start_frame, call.frames) == (last.start_frame, last.frames):
            raise RuntimeError(
                f"the block of frames {call.start_frame} .. {call.end_frame - 1} is final, as its last forward was "
                "like the last one of the block before; got another forward of it"
            )
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
        if self.window is not None:
            self.window.abandon_recache()  # one that has failed, and is made again
        return Forward(self, call, recache=True)

    def _copied(self, call: Call) -> Call:
        if self.config.top_k == 0:
            return call
        call = replace(call, timestep=None if call.timestep is None else call.timestep.clone())
        if self._embedding.layer is not None and not self.switches.needs_latents:
            return call
        latents = call.latents().clone()
        return replace(call, latents=lambda: latents)

    def _check_length(self, call: Call) -> None:
        config = self.config
        if call.frames > config.local:
            raise ValueError(
                f"a forward must generate at most window - sink - top_k = {config.window} - {config.sink} - "
                f"{config.top_k} = {config.local} frames, which is the local part; got {call.frames}"
            )
        if call.frames > config.frames_per_block:
            raise ValueError(
                f"frames_per_block must be at least {call.frames} for this forward, got {config.frames_per_block}: "
                "name it when the first block is shorter than others"
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
