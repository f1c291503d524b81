"""Videos of one layer with a history of any length: what each block retrieves is known, and what it must return."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import gpu_contenders
from benchmarks.contenders import AsPublished, Forward, Shape
from benchmarks.one_thread import one_thread
from longlive_rag_ops import WindowConfig, reference
from longlive_rag_ops.config import candidate_end, local_frames, temporal_position
from longlive_rag_ops.rotary import default_split, rotary_table

FORWARDS = 5  # of a block: 4 noisy ones and a clean one
OWN = 10.0  # of a querying frame's own code, beside weights of about 1
FILLERS = 64  # embeddings that frames nobody wants have in turn


class TwoChoices:
    """Embeddings by which blocks retrieve two sets of frames in turn, so that each places all memory frames anew.

    A frame that is wanted has a code of its own, one of as many orthogonal directions. The last frame of a block is the
    next one's query: the codes of the wanted frames in falling weights, and a long code of its own, by which later
    queries for the same frames are further from it than they are. What all other frames have is orthogonal to these.

    Args:
        first: the frame that the first of these blocks begins with; both sets are spread over its candidates.
        config: of the window.
        embedding: size, at least 6 times ``top_k``.
    """

    def __init__(self, first: int, config: WindowConfig, embedding: int, device: torch.device | str) -> None:
        self.first, self.config = first, config
        end = candidate_end(first, config.window, config.sink) - config.recent_exclude
        frames = torch.linspace(config.sink, end - 1, 2 * config.top_k).long().tolist()
        if len(set(frames)) < len(frames):
            raise ValueError(f"first: got {first}; {2 * config.top_k} candidates are needed before it")
        self.sets = frames[::2], frames[1::2]
        self._coded, self._code = {frame: code for code, frame in enumerate(frames)}, len(frames)
        self._own = (embedding - len(frames)) // 2
        rng = torch.Generator().manual_seed(0)
        self._fillers = torch.zeros(FILLERS, embedding)
        beyond = self._code + self._own
        self._fillers[:, beyond:] = torch.randn(FILLERS, embedding - beyond, generator=rng)
        self._device = device

    def wanted(self, start: int) -> list[int]:
        """Frames retrieved for the block at ``start``, most similar first."""
        return self.sets[(start - self.first) // self.config.frames_per_block % 2]

    def embeddings(self, start: int) -> torch.Tensor:
        """``(1, n, E)`` float32 of the block at ``start``."""
        n = self.config.frames_per_block
        frames = range(start, start + n)
        made = self._fillers[[frame % FILLERS for frame in frames]]
        for row, frame in enumerate(frames):
            if frame in self._coded:
                made[row] = 0
                made[row, self._coded[frame]] = 1
        if start + n >= self.first:
            made[-1] = 0
            made[-1, self._code + (start - self.first) // n % self._own] = OWN
            for rank, frame in enumerate(self.wanted(start + n)):
                made[-1, self._coded[frame]] += 1 + 0.05 * (self.config.top_k - 1 - rank)
        return made[None].to(self._device)


class Video:
    """The blocks that all contenders are given: q, k, v of each frame.

    A block before ``first`` has one forward, one of a few in turn. From there on each block has the same five.
    """

    def __init__(self, shape: Shape, first: int, embedding: int, seed: int = 0) -> None:
        self.shape, self.config, self.first = shape, shape.config, first
        self.forwards, _ = shape.block(seed, FORWARDS)
        self.choices = TwoChoices(first, self.config, embedding, shape.device)

    def filling(self, start: int) -> list[Forward]:
        """The one forward of a block before ``first``."""
        return [self.forwards[start // self.config.frames_per_block % FORWARDS]]

    def exact(self, start: int) -> torch.Tensor:
        """A block's last output, ``(1, n*T, H, D)``, by the rules of the window: rotated tensors are rounded to their
        dtype, as pages are, all else is float64."""
        config, shape = self.config, self.shape
        n, tokens = config.frames_per_block, shape.tokens
        placed = [*range(config.sink), *local_frames(start, n, config.sink, config.local)]
        positions = [
            temporal_position(f, start, n, config.window, config.sink, config.top_k, config.position_rule)
            for f in placed
        ]
        rope = rotary_table(shape.head_dim, device=shape.device)
        split = default_split(shape.head_dim)

        def turned(x: torch.Tensor, at: list[int]) -> torch.Tensor:
            return reference.rotate(x, rope, split, shape.grid, torch.tensor(at)).double()

        frames = [*placed, *self.choices.wanted(start)]
        keys, values = (torch.cat([self._frame(frame, part) for frame in frames], dim=1) for part in (1, 2))
        keys = turned(keys, positions + [0] * (len(frames) - len(placed)))
        pool = torch.stack([keys, values.double()]).unflatten(2, (len(frames), tokens))
        own = positions[placed.index(start) : placed.index(start) + n]
        return gpu_contenders.exact_attention(turned(self.forwards[-1][0], own), pool, run=len(frames))

    def _frame(self, frame: int, part: int) -> torch.Tensor:
        """Keys (1) or values (2) of a finished frame, or of the block's last forward."""
        start, tokens = frame - frame % self.config.frames_per_block, self.shape.tokens
        x = (self.filling(start) if start < self.first else self.forwards)[-1][part]
        return x.unflatten(1, (-1, tokens))[:, frame - start]


class OursVideo:
    """`MemoryWindow` at the block after a history of ``video.first`` frames.

    Args:
        spare: blocks that there is room for beyond that; older frames make room after them.
    """

    def __init__(self, video: Video, engine: str, spare: int) -> None:
        self.video, self.start = video, 0
        shape, n = video.shape, video.config.frames_per_block
        room = video.first + n * spare
        self.window = shape.window(history_slots=room, on_full="forget", engine=engine)
        with one_thread():
            while self.start < video.first:
                self._run(video.filling(self.start))
                self._finish()

    def attend(self) -> torch.Tensor:
        """The five forwards of the current block, the first of which places its memory; the last one's output.

        It may be called again: a block is written anew by every forward.
        """
        return self._run(self.video.forwards)

    def block(self) -> torch.Tensor:
        """The current block as a whole: `attend`, its pages to history, its embeddings to the index, the choice."""
        out = self.attend()
        self._finish()
        return out

    def attend_to_all(self) -> torch.Tensor:
        """As many forwards over as many pages as the history had frames at first, which is what no memory would cost.

        Not over the blocks since: others advance this video while it is timed, and the work must stay the same.
        """
        shape, out = self.video.shape, torch.empty(0)
        for q, _, _ in self.video.forwards:
            out, _ = torch.ops.longlive.window_attend(
                q, self.window.pool[0], run=self.video.first, engine=self.window.engine
            )
        return out.view(1, -1, shape.heads, shape.head_dim)

    def wrong(self) -> str:
        """What is wrong with the current block: empty when nothing is."""
        if self.window.selected[0] != self.video.choices.wanted(self.start):
            return f"WRONG frames {self.window.selected[0]}, planned {self.video.choices.wanted(self.start)}"
        return ""

    def _run(self, forwards: list[Forward]) -> torch.Tensor:
        out = torch.empty(0)
        for number, (q, k, v) in enumerate(forwards):
            arguments = self.window.arguments(0, self.start, self.video.shape.grid, place=number == 0)
            out, _ = torch.ops.longlive.retrieve_attend(q, k, v, **arguments)
        return out

    def _finish(self) -> None:
        self.window.finish(self.start, self.video.choices.embeddings(self.start))
        self.start += self.video.config.frames_per_block


class StreamedVideo:
    """A contender of `contenders`, with ``run_block``, after as many frames."""

    def __init__(self, video: Video, contender: Any) -> None:
        self.video, self.contender, self.start = video, contender, 0
        with one_thread():
            while self.start < video.first:
                self._run(video.filling(self.start))

    def block(self) -> torch.Tensor:
        """The next block of five forwards."""
        return self._run(self.video.forwards)

    def wrong(self) -> str:
        """What is wrong with what is published retrieves: empty when nothing is."""
        if not isinstance(self.contender, AsPublished):
            return ""
        found = [row + self.video.config.sink for row in self.contender.choose()]
        want = self.video.choices.wanted(self.start)
        return "" if found == want else f"WRONG frames {found}, planned {want}"

    def _run(self, forwards: list[Forward]) -> torch.Tensor:
        out = self.contender.run_block(self.start, forwards, self.video.choices.embeddings(self.start))
        self.start += self.video.config.frames_per_block
        return out
