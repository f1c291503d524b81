"""Embeddings of a video by which retrieval chooses known frames, of which a stated share was chosen before too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from longlive_rag_ops import WindowConfig
from longlive_rag_ops.config import candidate_end

OWN = 10.0  # of a querying frame's own code, beside weights of about 1


class PlannedChoice:
    """Which frames each block is to retrieve, and embeddings that make it so.

    Every frame has a code of its own, one of ``embedding`` orthogonal directions. The last frame of a block is the
    query for the next one: its embedding adds the codes of the wanted frames, in falling weights, to its own, which is
    so long that a later query for the same frames is further from it than they are.

    A new choice is that of the frames which were wanted least recently: what returns was not in the last few choices.

    Args:
        blocks: of the video.
        rate: share of the chosen frames that the choice before has too, 0 to 1. Blocks with a fraction of a new frame
            on average have one now and then.
        config: of the window.
        embedding: size; frames that far apart share a code, and must not be candidates together.
        span: only the newest ``span`` candidates are wanted, as a bounded history has no others; None for all.

    Attributes:
        wanted: of each block, most similar first; as many as there are candidates until there are ``top_k``.
        embeddings: ``(blocks, 1, n, embedding)`` float32.
        steady: from this block on the rate holds.
    """

    def __init__(
        self,
        blocks: int,
        rate: float,
        config: WindowConfig | None = None,
        *,
        embedding: int = 1024,
        span: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.rate, self.config = rate, config or WindowConfig()
        frames, top_k = self.config.frames_per_block, self.config.top_k
        most_new = math.ceil(top_k * (1 - rate) - 1e-9)
        self.wanted: list[list[int]] = []
        self.steady = 0
        used: dict[int, int] = {}
        for block in range(blocks + 1):
            pool = self._candidates(frames * block, span)
            before = [frame for frame in (self.wanted[-1] if self.wanted else []) if frame in pool]
            fresh = sorted((frame for frame in pool if frame not in before), key=lambda f: (used.get(f, -1), f))
            new = max(top_k - len(before), self.new_frames(block))
            if len(pool) < top_k + most_new:
                self.steady = block + 1
                new = max(top_k - len(before), 0)
            chosen = (before[max(0, len(before) + min(new, len(fresh)) - top_k) :] + fresh[:new])[:top_k]
            used |= dict.fromkeys(chosen, block)
            self.wanted.append(chosen)
        codes = torch.eye(embedding)
        numbers = torch.arange(frames * blocks)
        made = codes[numbers % embedding].reshape(blocks, 1, frames, embedding)
        for block in range(blocks):
            made[block, 0, -1] *= OWN
            for rank, frame in enumerate(self.wanted[block + 1]):
                made[block, 0, -1, frame % embedding] += 1 + 0.05 * (top_k - 1 - rank)
        self.embeddings = made.to(device)
        del self.wanted[blocks]

    def new_frames(self, block: int) -> int:
        """Frames of a block's choice that the one before did not have."""
        share = self.config.top_k * (1 - self.rate)
        return math.floor((block + 1) * share + 1e-9) - math.floor(block * share + 1e-9)

    def trouble(self, choices: Sequence[Sequence[int]], measured_from: int) -> str:
        """What is wrong with a contender's choices of the first blocks: empty when nothing is.

        Args:
            measured_from: from here on the rate must be as stated too.
        """
        for block, (got, want) in enumerate(zip(choices, self.wanted, strict=False)):
            if set(got) != set(want):
                return f"WRONG frames in block {block}: {sorted(got)}, planned {sorted(want)}"
        if measured_from < self.steady:
            return f"WRONG: the rate holds from block {self.steady} on only, measured from {measured_from}"
        new = sum(len(set(got) - set(before)) for got, before in self._pairs(choices, measured_from))
        meant = (len(choices) - measured_from) * self.config.top_k * (1 - self.rate)
        return "" if abs(new - meant) <= 1 else f"WRONG rate: {new} new frames, {meant:.1f} meant"

    def measured_rate(self, choices: Sequence[Sequence[int]], measured_from: int) -> float | None:
        """Share of chosen frames that the choice before has too, over the blocks from ``measured_from`` on."""
        pairs = self._pairs(choices, measured_from)
        chosen = sum(len(got) for got, _ in pairs)
        return sum(len(set(got) & set(before)) for got, before in pairs) / chosen if chosen else None

    @staticmethod
    def _pairs(choices: Sequence[Sequence[int]], first: int) -> list[tuple[Sequence[int], Sequence[int]]]:
        return list(zip(choices[first:], choices[first - 1 :], strict=False))

    def _candidates(self, start: int, span: int | None) -> list[int]:
        """Frames that may be wanted. Querying frames are, only where there are too few others."""
        config = self.config
        end = candidate_end(start, config.window, config.sink) - config.recent_exclude
        every = list(range(config.sink, end))[-span if span else None :]
        last = config.frames_per_block - 1
        plain = [frame for frame in every if frame % config.frames_per_block != last]
        others = [frame for frame in every if frame % config.frames_per_block == last]
        return plain + others[: max(0, config.top_k - len(plain))]
