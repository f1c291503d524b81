"""The attention window's configuration and its integer rules: which frame goes where.

Everything here is plain integers, without torch, so that the oracle, the engines and the host-side bookkeeping
share one statement of the rules. Frames are global latent-frame numbers, counted from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

POSITION_RULES = ("slot", "absolute", "before_window")


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Returns ``value`` when it is an int in ``[low, high]``; names the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} ({value!r})")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value


@dataclass(frozen=True)
class WindowConfig:
    """Sizes of the attention window ``[sink | retrieved memory | local]``, all in latent frames.

    Args:
        window: frames attended to at most, ``W``.
        sink: first frames of the video, always attended to, ``S``.
        top_k: most similar old frames retrieved for each block, ``K``; 0 turns retrieval off.
        recent_exclude: recency guard ``R``: the newest ``R`` evicted frames are never retrieved.
        frames_per_block: most frames generated together, ``n``; a block may have fewer.
        position_rule: temporal rotary positions. ``"slot"``: the window is re-numbered ``0 .. W-1`` and memory sits
            at 0, as LongLive-RAG was published; ``"absolute"``: every frame keeps its global number;
            ``"before_window"``: the sink, and memory with it, sits right before the local part. ``"slot"`` leaves a gap
            of ``K`` positions there once the window is full; without retrieval the two are the same. Attention depends
            on differences of positions alone, so this is the rule of SANA-WM and of Rolling-Forcing's denoising
            forwards, which leave the local part at its global numbers and move the sink up to it. Here the sink stays
            at ``0 .. S-1`` and the local part comes down to it instead: positions stay below ``W``, and so within a
            rotary table of ``W`` rows, however long the video.
        min_score: frames whose cosine with the query is smaller are not retrieved; None retrieves always ``K``.
        diversity: ``0 <= d < 1``; above 0, frames that resemble those already chosen are passed over (maximal marginal
            relevance, see ``topk_retrieve``).

    Raises:
        TypeError: a size is not an int, or a score not a number.
        ValueError: a size is out of range, or ``window - sink - top_k < frames_per_block``: the local part must hold
            the block being generated.
    """

    window: int = 12
    sink: int = 1
    top_k: int = 6
    recent_exclude: int = 5
    frames_per_block: int = 3
    position_rule: str = "slot"
    min_score: float | None = None
    diversity: float = 0.0

    def __post_init__(self) -> None:
        check_int("window", self.window, 1)
        check_int("sink", self.sink, 0)
        check_int("top_k", self.top_k, 0)
        check_int("recent_exclude", self.recent_exclude, 0)
        check_int("frames_per_block", self.frames_per_block, 1)
        check_position_rule(self.position_rule)
        check_choice(self.min_score, self.diversity)
        if self.local < self.frames_per_block:
            raise ValueError(
                f"window - sink - top_k must be at least frames_per_block ({self.frames_per_block}), so that the local "
                f"part holds the block being generated; got {self.window} - {self.sink} - {self.top_k} = {self.local}"
            )

    @property
    def local(self) -> int:
        """Frames in the local part, ``L = W - S - K``, the block being generated included."""
        return self.window - self.sink - self.top_k

    @property
    def staging_rows(self) -> int:
        """Rows of the staging buffer of canonical keys: the local part and one block more."""
        return self.local + self.frames_per_block


def check_choice(min_score: float | None, diversity: float) -> None:
    """Checks the options of the choice."""
    for name, value in (("min_score", min_score), ("diversity", diversity)):
        if (value is not None or name == "diversity") and not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {type(value).__name__} ({value!r})")
    if min_score is not None and not math.isfinite(min_score):
        raise ValueError(f"min_score must be finite or None, got {min_score}")
    if not 0 <= diversity < 1:
        raise ValueError(f"diversity must be at least 0 and less than 1, got {diversity}")


def check_position_rule(rule: str) -> str:
    """Returns ``rule`` when it is one of `POSITION_RULES`, else raises `ValueError`."""
    if rule not in POSITION_RULES:
        raise ValueError(f"position_rule must be one of {', '.join(POSITION_RULES)}; got {rule!r}")
    return rule


def candidate_end(start_frame: int, window: int, sink: int) -> int:
    """One past the newest frame evicted when a block starts at ``start_frame``: ``S + max(0, t - W)``.

    Candidates for retrieval are the frames from ``S`` to this, the newest ``recent_exclude`` of them left out.
    """
    return sink + max(0, start_frame - window)


def local_frames(start_frame: int, frames: int, sink: int, local: int) -> range:
    """The local part while a block starts at ``start_frame``: its newest ``local`` non-sink frames."""
    end = start_frame + frames
    return range(min(max(sink, end - local), end), end)


def window_slot(frame: int, sink: int, local: int) -> int:
    """Window slot of a sink or local frame. The local slots are a ring, so a frame keeps its slot while it is local."""
    return frame if frame < sink else sink + (frame - sink) % local


def temporal_position(frame: int, start_frame: int, frames: int, window: int, sink: int, top_k: int, rule: str) -> int:
    """Temporal rotary position of a sink or local frame while a block of ``frames`` starts at ``start_frame``.

    Rule ``slot``: the frame's own number until the window is full; afterwards the newest frame sits at ``W - 1``, a
    frame ``j`` before it at ``W - 1 - j``, and sink frames at ``0 .. S-1``.

    Rule ``absolute``: the frame's own number.

    Rule ``before_window``: sink frames at ``0 .. S-1``, local frames from ``S`` on without a gap. Without a sink they
    start at 1 where there may be memory, which sits at 0 and must not share a local frame's position. Only differences
    of positions matter to attention, so the local part might as well keep its own numbers and the sink and memory move
    to just before it; counted from the sink, no position reaches ``window``.
    """
    newest = start_frame + frames - 1
    if frame < sink or rule == "absolute":
        return frame
    if rule == "before_window":
        oldest = max(sink, newest + 1 - (window - sink - top_k))  # of the local part, see `local_frames`
        return max(sink, min(top_k, 1)) + frame - oldest
    return frame if newest < window else window - 1 - (newest - frame)


def memory_position(frame: int, rule: str) -> int:
    """Temporal rotary position of a retrieved frame: its own number under rule ``absolute``, else 0.

    Position 0 is the first sink frame's under ``slot`` and ``before_window``. A canonical page is rotated to 0 already,
    so that placing it is a plain copy.
    """
    return frame if rule == "absolute" else 0
