"""A change of prompt: the newest frames are encoded again, and a policy says what becomes of older history."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import torch

from ..transfer import HostCopy
from ..window import MemoryWindow
from .adapter import Call
from .settings import Settings

LOGGER = logging.getLogger("longlive_rag_ops.patch")


class PromptSwitches:
    """The prompt switches of one video.

    Args:
        clip: number of the video.
        settings: of the patch.
        log: gets an entry for each switch.

    Attributes:
        count: switches so far.
    """

    def __init__(self, clip: int, settings: Settings, log: deque[dict[str, Any]]) -> None:
        # Without memory there is no history to be encoded again.
        self.policy = settings.on_prompt_switch if settings.top_k > 0 else "keep"
        self.count = 0
        self._clip, self._log, self._memory = clip, log, settings.top_k > 0
        self._latents: list[tuple[range, HostCopy]] = []
        self._last: tuple[int, int, int] | None = None

    @property
    def needs_latents(self) -> bool:
        """Whether a finished block's latents are kept, for policy ``recache``."""
        return self.policy == "recache"

    def keep_latents(self, call: Call) -> None:
        """A block is final; policy ``recache`` needs its latents."""
        if self.needs_latents:
            self._latents.append((range(call.start_frame, call.end_frame), HostCopy(call.latents())))

    def begin(self, call: Call, finished: int, window: MemoryWindow) -> bool:
        """Notes a switch and applies the policy; False when this is a repetition, after a forward that failed."""
        switch = call.start_frame, call.frames, finished
        if switch == self._last:
            return False
        self._last = switch
        self.count += 1
        entry = {"event": "prompt switch", "clip": self._clip, "at": finished, "policy": self.policy}
        entry |= {"recached": [call.start_frame, call.end_frame]}
        if self.policy == "drop":
            entry["dropped"] = len(window.forget(call.start_frame))
        self._log.append(entry)
        LOGGER.info(
            "prompt switch at frame %d: frames %d to %d are cached again; history before them: %s%s",
            finished,
            call.start_frame,
            call.end_frame - 1,
            self.policy,
            ", with pages of the old prompt" if self.policy == "keep" and self._memory else "",
        )
        return True

    def old_frames(self, call: Call, window: int, sink: int) -> list[tuple[int, torch.Tensor]]:
        """Policy ``recache``: what comes before these frames, as the first frame and latents ``(B, F, C, H, W)`` on
        the host, in runs of at most ``window`` frames, oldest first. Sink frames stay as they are."""
        if self.policy != "recache":
            return []
        frames = {frame: (copy, frame - of.start) for of, copy in self._latents for frame in of}
        runs = []
        for start in range(min(sink, call.start_frame), call.start_frame, window):
            run = range(start, min(start + window, call.start_frame))
            runs.append((start, torch.stack([copy.get()[:, at] for copy, at in map(frames.__getitem__, run)], 1)))
        return runs
