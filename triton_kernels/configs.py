"""The table of tuned configurations: one row for each kernel, family of architectures and class of shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
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

CONFIGS: tuple[Config, ...] = ()


def family(architecture: int) -> int:
    """The architecture whose rows serve ``architecture``: 86 is served as 89, 103 as 100, 121 as 120.

    Raises:
        RuntimeError: there is none.
    """
    for first, name in ((120, 120), (100, 100), (90, 90), (86, 89), (80, 80)):
        if architecture >= first:
            return name
    raise RuntimeError(
        f"engine 'triton' needs compute capability 8.0 or newer, got {architecture / 10:.1f}; "
        "engines that work here: dense, reference"
    )


def config(kernel: str, architecture: int, shape: str = "any") -> Config:
    """The row for a kernel on an architecture."""
    wanted = family(architecture)
    for row in CONFIGS:
        if row.kernel == kernel and row.shape == shape and wanted in row.families:
            for seen in _watchers:
                seen(row)
            return row
    raise LookupError(f"no configuration of {kernel} for sm_{wanted}, shapes {shape}")


_watchers: list[Callable[[Config], None]] = []


@contextlib.contextmanager
def watch(seen: Callable[[Config], None]) -> Iterator[None]:
    """Within it, ``seen`` is called with each row that a launcher looks up."""
    _watchers.append(seen)
    try:
        yield
    finally:
        _watchers.remove(seen)
