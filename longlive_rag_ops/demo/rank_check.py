"""Whether ranks do what one process does: the same blocks through both, output by output."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from .footage import Footage
from .model import TIMESTEPS, mix_noise
from .ranks import attend_on_ranks
from .settings import AMPLE, FRAMES_PER_BLOCK, DemoSettings
from .stream import model_and_window

__all__ = ["TOLERANCE", "RankCheck", "check_ranks"]

TOLERANCE = 1e-6  # allowed error of an output, relative to the outputs' root mean square


@dataclass(frozen=True)
class RankCheck:
    """Blocks streamed through the ranks' windows and one process's: how many retrieved the same frames, the largest
    error of any attention output of any rank, relative to the outputs' root mean square, and what of it is allowed.

    That is 1e-6. Where parts of attention are joined by their log-sum-exp, it is 1e-6 times the largest log-sum-exp,
    when that is above 1, because its own rounding in float32 is of that size.
    """

    blocks: int
    same_selections: int
    largest_error: float
    allowed_error: float

    @property
    def passed(self) -> bool:
        """Whether ranks are as one process."""
        return self.same_selections == self.blocks and self.largest_error <= self.allowed_error


@torch.inference_mode()
def check_ranks(footage: Footage, settings: DemoSettings, tick: Callable[[], None] = lambda: None) -> RankCheck:
    """Streams a footage through the ranks' windows and, on every rank, through one that has everything.

    Both are given the same queries, keys and values, and room for all history. ``tick`` is called once a block.
    """
    mesh = settings.mesh
    if mesh is None:
        raise ValueError("settings must have a mesh, got None")
    ample = None
    if settings.bank is not None:
        ample = replace(settings.bank, host_bytes=AMPLE, disk_bytes=0, spill=None)
    model, shared = model_and_window(footage, "content", replace(settings, bank=ample))
    alone_bank = ample if ample is not None and ample.storage != "plain" else None
    _, alone = model_and_window(footage, "content", replace(settings, bank=alone_bank, mesh=None))
    noise = torch.Generator().manual_seed(settings.seed + 1)
    same, blocks, worst, largest_lse = 0, 0, 0.0, 1.0
    for start in range(0, footage.frames, FRAMES_PER_BLOCK):
        latents = footage.latents[start : start + FRAMES_PER_BLOCK]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            nonlocal worst, largest_lse
            expected, lse = alone.attend(layer, q, k, v, start, model.grid, return_lse=True)  # noqa: B023
            largest_lse = max(largest_lse, float(lse.abs().max()))
            out = attend_on_ranks(shared, layer, q, k, v, start, model.grid)  # noqa: B023
            error = float((out - expected).abs().max() / expected.square().mean().sqrt())
            worst = math.inf if math.isnan(error) else max(worst, error)  # max() may pass a NaN over
            return expected  # so that errors do not add up

        for timestep in TIMESTEPS:
            model.forward(mix_noise(latents, timestep, noise), timestep, attend)
        model.forward(latents, 0.0, attend)
        same += shared.selected == alone.selected
        blocks += 1
        embedding = settings.embedder.embed(latents).unsqueeze(0)
        for window in (shared, alone):
            window.finish(start, embedding)
        tick()
    for window in (shared, alone):
        if window.bank is not None:
            window.bank.close()
    found = torch.tensor([-same, worst], dtype=torch.float64)
    most = dist.ReduceOp.MAX
    mesh.collectives.begin(
        "comparison with one process", lambda: dist.all_reduce(found, most, group=mesh.group, async_op=True), mesh.group
    ).wait()
    allowed = TOLERANCE * (largest_lse if shared.transfer == "merge" else 1.0)
    return RankCheck(blocks, -int(found[0]), float(found[1]), allowed)
