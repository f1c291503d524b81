"""Whether a memory bank's limits change what comes out: the same blocks in bfloat16, bit for bit.

Nothing is measured in these runs; every attention output of every forward and layer is hashed.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..bank.config import BankConfig
from .footage import Footage
from .model import TIMESTEPS, mix_noise
from .settings import AMPLE, FRAMES_PER_BLOCK, DemoSettings
from .stream import model_and_window

__all__ = ["TierCheck", "check_tiers"]


@dataclass(frozen=True)
class TierCheck:
    """Blocks whose attention outputs were hashed, how many were equal, and with what the bank was compared."""

    blocks: int
    equal: int
    compared_with: str


def check_tiers(footage: Footage, settings: DemoSettings, tick: Callable[[], None] = lambda: None) -> TierCheck:
    """Streams a footage twice: with the limits of ``settings.bank`` and with room for all. ``tick`` once a block."""
    bank = settings.bank
    if bank is None:
        raise ValueError("settings must have a bank, got None")
    ample: BankConfig | None = None
    compared_with = "all history in the window's pool"
    if bank.storage != "plain":
        ample = replace(bank, host_bytes=AMPLE, disk_bytes=0, spill=None)
        compared_with = f"a bank that keeps all {bank.storage} pages in host memory"
    limited, unlimited = (_hashes(footage, replace(settings, bank=b), tick) for b in (bank, ample))
    equal = sum(a == b for a, b in zip(limited, unlimited, strict=True))
    return TierCheck(len(limited), equal, compared_with)


@torch.inference_mode()
def _hashes(footage: Footage, settings: DemoSettings, tick: Callable[[], None]) -> list[str]:
    model, window = model_and_window(footage, "content", settings, torch.bfloat16)
    noise = torch.Generator().manual_seed(settings.seed + 1)
    hashes = []
    for start in range(0, footage.frames, FRAMES_PER_BLOCK):
        latents = footage.latents[start : start + FRAMES_PER_BLOCK]
        seen = hashlib.sha256()

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = window.attend(layer, q.bfloat16(), k.bfloat16(), v.bfloat16(), start, model.grid)  # noqa: B023
            seen.update(out.contiguous().view(torch.uint8).numpy().tobytes())  # noqa: B023
            return out.float()

        for timestep in TIMESTEPS:
            model.forward(mix_noise(latents, timestep, noise), timestep, attend)
        model.forward(latents, 0.0, attend)
        window.finish(start, settings.embedder.embed(latents).unsqueeze(0))
        hashes.append(seen.hexdigest())
        tick()
    if window.bank is not None:
        window.bank.close()
    return hashes
