"""The table of tuned configurations: one row for each kernel, family of architectures and class of shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .attention_configs import ATTENTION
from .config_rows import EVERY, Config

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
        {"BYTES": 4096},
        num_warps=4,
        reason="16 rows of 128 channels: two 16-byte loads and stores of a thread for keys and as many for values, all "
        "loads before the first store; 32 to 52 registers, no spill for any head_dim or kind of page tried, so that "
        "nine or more blocks with 8 KiB of loads each fit an SM. Twice the rows spill on sm_80 at head_dim 64.",
    ),
    Config(
        "encode_pages",
        EVERY,
        "any",
        {"BYTES": 4096},
        num_warps=4,
        reason="as place_frames: 16 rows of 128 channels in bfloat16, two 16-byte loads a thread for keys and as many "
        "for values; 32 to 40 registers, no spill for any head_dim or kind of page tried, so that twelve blocks fit "
        "an SM: enough loads in flight although those of values wait for the keys' stores.",
    ),
    Config(
        *("assign_window", (80, 89, 90, 100), "short", {}),
        num_warps=1,
        reason="one warp needs no barriers: 162 registers, no spill",
    ),
    Config(
        *("assign_window", (120,), "short", {}),
        num_warps=2,
        reason="with one warp a register spills at 12 slots, 6 of them memory, across the call of a 64-bit remainder",
    ),
    Config(
        *("assign_window", EVERY, "long", {}),
        num_warps=8,
        reason="256 slots, 64 of them memory: 254 registers, no spill; with 4 warps 250 and more bytes spill",
    ),
    Config(
        "score_rows",
        EVERY,
        "8 bits",
        {"BE": 256, "ENTRIES": 1024, "MOST_ROWS": 32, "BX": 32},
        num_warps=1,
        reason="a warp a program, so that a row is summed by shuffles alone; 4 rows share the query's conversion. "
        "215 registers at 1024 entries",
    ),
    Config(
        "score_rows",
        EVERY,
        "16 bits",
        {"BE": 256, "ENTRIES": 1024, "MOST_ROWS": 32, "BX": 32},
        num_warps=1,
        reason="152 registers at 1024 entries, 12 programs of 8 KiB an SM; about 1250 instructions for 4 rows, half of "
        "what 4 warps on a row take",
    ),
    Config(
        "score_rows",
        EVERY,
        "32 bits",
        {"BE": 256, "ENTRIES": 1024, "MOST_ROWS": 32, "BX": 32},
        num_warps=1,
        reason="140 registers at 1024 entries, 14 programs of 16 KiB an SM",
    ),
    Config(
        "select_keys",
        EVERY,
        "level",
        {"BC": 1024},
        num_warps=4,
        reason="100,000 rows give 98 programs, one wave; 8 keys a thread, 48 registers",
    ),
    Config(
        "select_keys",
        EVERY,
        "last",
        {"BC": 4096},
        num_warps=8,
        reason="a whole index of 4096 rows in one launch; 16 keys a thread, 48 registers",
    ),
    Config(
        "pick_best",
        EVERY,
        "any",
        {"BC": 1024},
        num_warps=4,
        reason="8 blocks a thread and turn: the best of 4096 rows in one turn",
    ),
    Config("slot_tables", EVERY, "any", {"BLOCK": 128}, num_warps=4, reason="an entry a thread; tables have a dozen"),
    Config(
        *("merge_attention", EVERY, "any", {"BLOCK_S": 16}),
        num_warps=4,
        reason="16 rows of 128 channels: a thread reads 64 bytes of each float32 part, in 16-byte loads",
    ),
    *ATTENTION,
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
