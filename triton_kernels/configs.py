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

CONFIGS: tuple[Config, ...] = (
    Config(
        "write_frames",
        EVERY,
        "any",
        {"TILES": 16},
        num_warps=4,
        reason="12 heads of 128 in bfloat16 are 9 tiles of 2 tokens and 4 heads, no row empty: 15 LDG.128 (6 of them "
        "norm weights), 12 STG.128, 96 to 102 registers, no spill, so that four or five blocks with 18 KiB of loads "
        "each fit an SM. Partners of a pair come by tl.split, which moves nothing: in place_frames, loading them again "
        "at offset ^ 1 adds 32 two-byte loads and half as many instructions. With at most 16 tiles of 16 bytes a "
        "thread, wider models stay within 128 registers.",
    ),
    Config(
        "place_frames",
        EVERY,
        "any",
        {"BYTES": 8192},
        num_warps=4,
        reason="32 rows of 128 channels: four 16-byte loads and stores of a thread for keys and as many for values, "
        "all loads before the first store; 64 to 66 registers, no spill, so that seven or eight blocks with 16 KiB of "
        "loads each fit an SM.",
    ),
    Config("assign_window", EVERY, "short", {}, num_warps=1, reason="one warp needs no barriers: 162 registers, no spill"),
    Config(
        *("assign_window", EVERY, "long", {}),
        num_warps=8,
        reason="256 slots, 64 of them memory: 254 registers, no spill; with 4 warps 250 and more bytes spill",
    ),
    Config("score_rows", EVERY, "8 bits", {"ELEMENTS": 8192, "ROWS": 64, "BX": 32}, num_warps=4),
    Config("score_rows", EVERY, "16 bits", {"ELEMENTS": 8192, "ROWS": 64, "BX": 32}, num_warps=4),
    Config("score_rows", EVERY, "32 bits", {"ELEMENTS": 8192, "ROWS": 64, "BX": 32}, num_warps=4),
    Config("select_keys", EVERY, "level", {"BC": 1024}, num_warps=4),
    Config("select_keys", EVERY, "last", {"BC": 4096}, num_warps=8),
    Config("pick_best", EVERY, "any", {"BC": 1024}, num_warps=4),
)


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
