"""What a row of the table of configurations holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Config:
    """One row.

    Attributes:
        kernel: name of the kernel.
        families: `family` of the architectures it is for.
        shape: class of shapes, a word that the kernel's launcher knows.
        constants: block sizes and switches, by the kernel's parameter name.
        num_warps, num_stages: as Triton's launch options.
        reason: why these numbers.
        warpgroup: WARPGROUP instructions on sm_90, as `compile_report` recorded them; None where there is no wgmma.
    """

    kernel: str
    families: tuple[int, ...]
    shape: str
    constants: Mapping[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1
    reason: str = ""
    warpgroup: int | None = None


EVERY = (80, 89, 90, 100, 120)
