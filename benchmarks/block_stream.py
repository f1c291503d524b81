"""A video that a contender generates with the model: each call is its next block, noisy forwards and a clean one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.block_choice import PlannedChoice
from benchmarks.block_clock import NO_CLOCK, Marks, NoClock, PartClock
from benchmarks.block_contenders import BlockAttention
from benchmarks.block_model import ModelSize, VideoTransformer

FORWARDS = 5  # of a block: four noisy ones and a clean one
STEPS = (1000.0, 750.0, 500.0, 250.0)
SHIFT = 5.0  # that timesteps are warped by
NOISES = 4  # that blocks take in turn


class Scene:
    """What all contenders' videos have in common: the model, its text, the noise."""

    def __init__(self, size: ModelSize, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.model = VideoTransformer(size, device, dtype, seed)
        rng = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=device, dtype=dtype)

        self.text = self.model.text(normal(1, size.text, size.width))
        self.noise = normal(NOISES, len(STEPS), 1, size.rows, size.channels)


@dataclass
class BlockStream:
    """A contender's video.

    Attributes:
        choices: of each block, the frames that were retrieved for it.
        seen: the last forward's attention in the last layer, ``(1, n*T, H, D)``. It is what contenders are compared by:
            with random weights the model's own output hardly depends on what its self-attention attends to.
    """

    scene: Scene
    contender: BlockAttention
    plan: PlannedChoice
    choices: list[list[int]] = field(default_factory=list)
    seen: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def blocks(self) -> int:
        """Blocks that are finished."""
        return len(self.choices)

    def __call__(self, noisy: int = FORWARDS - 1, clock: NoClock = NO_CLOCK) -> Tensor:
        """Generates the next block; the clean forward's output, ``(1, n*T, channels)``.

        Args:
            noisy: forwards before the clean one, the last steps of the schedule; at least one.
        """
        start, embeddings = self.scene.size.frames * self.blocks, self.plan.embeddings[self.blocks]
        noise = self.scene.noise[self.blocks % NOISES]
        self.contender.begin(start, clock)
        self.choices.append(self.contender.chosen)
        steps = [SHIFT * step / (1 + (SHIFT - 1) * step / 1000) for step in STEPS[len(STEPS) - noisy :]]
        x = noise[0]
        for number, step in enumerate(steps):
            level = step / 1000
            x = x - level * self._forward(x, step, start, clock)  # the clean latents, by the flow from noise to them
            if number + 1 < noisy:
                level = steps[number + 1] / 1000
                x = (1 - level) * x + level * noise[number + 1]
        clock.lap("rest")
        self.contender.before_clean(start, x, embeddings, clock)
        out = self._forward(x, 0.0, start, clock)
        self.contender.finish(start, embeddings, clock)
        clock.lap("rest")
        return out

    def warm(self, blocks: int) -> None:
        """Generates blocks of one noisy and one clean forward, until there are so many."""
        while self.blocks < blocks:
            self(noisy=1)

    def split(self, marks: Marks, blocks: int = 1) -> list[dict[str, float]]:
        """Generates the next blocks without a stop between them; seconds of the parts of each."""
        clocks = []
        for _ in range(blocks):
            clocks.append(PartClock(marks))
            self(clock=clocks[-1])
        return [clock.seconds() for clock in clocks]

    def _forward(self, x: Tensor, step: float, start: int, clock: NoClock) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = self.contender.attend(layer, q, k, v, start, clock)
            if layer == self.scene.size.layers - 1:
                self.seen = out
            return out

        out = self.scene.model(x, step, self.scene.text, attend, clock)
        self.contender.end_forward(start, clock)
        return out
