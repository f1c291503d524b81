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


def _attend(
    shape: str,
    families: tuple[int, ...],
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    *,
    shared: int,
    reason: str,
    resident: int = 1,
    warpgroup: int | None = None,
) -> Config:
    """A row of window_attend: queries and keys of a tile, least bytes of shared memory, blocks that an SM holds."""
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SHARED": shared, "RESIDENT": resident}
    return Config("window_attend", families, shape, sizes, num_warps, num_stages, reason, warpgroup)


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
    # window_attend
    Config("slot_tables", EVERY, "any", {"BLOCK": 128}, num_warps=4, reason="an entry a thread; tables have a dozen"),
    Config(
        *("merge_attention", EVERY, "any", {"BLOCK_S": 16}),
        num_warps=4,
        reason="16 rows of 128 channels: a thread reads 64 bytes of each float32 part, in 16-byte loads",
    ),
    _attend(
        *("run D 64 descriptors", (90, 100), 128, 128, 8, 3),
        shared=115256,
        warpgroup=8,
        reason="159 to 185 registers, no spill. Tiles of 128 keys rescale the sums half as often as tiles of 64, and "
        "a run has no page ends to waste them on.",
    ),
    _attend(
        *("run D 128 descriptors", (90, 100), 128, 128, 8, 2),
        shared=163872,
        warpgroup=8,
        reason="212 to 225 registers, no spill; P stays in registers. Tiles of 128 keys rescale the sums half as "
        "often as tiles of 64 (148 registers). BLOCK_M 256 would halve the reads of keys and wants 254 "
        "registers. A third stage would fit with 3 KiB to spare, which another release of Triton may want.",
    ),
    _attend(
        *("run D 256 descriptors", (90, 100), 128, 32, 8, 3),
        shared=163880,
        warpgroup=8,
        reason="210 to 244 registers, no spill; 64 keys a tile spill on sm_100, 255 registers on sm_90",
    ),
    _attend(
        *("pages D 64 descriptors", (90, 100), 128, 64, 8, 5),
        shared=65608,
        resident=2,
        warpgroup=4,
        reason="111 to 114 registers, so that two blocks an SM fit; otherwise as D 128",
    ),
    _attend(
        *("pages D 128 descriptors", (90, 100), 128, 64, 8, 5),
        shared=131144,
        warpgroup=4,
        reason="137 to 146 registers, no spill. Five stages are three buffers of keys and values: the table's entry "
        "takes two, and three stages leave two buffers. Of pages of 1560 tokens, tiles of 64 waste 2.6 %, of "
        "128 6.7 %. Two blocks an SM would need 128 registers, and a cap of that makes each wgmma wait for "
        "the one before.",
    ),
    _attend(
        *("pages D 256 descriptors", (90, 100), 128, 64, 8, 3),
        shared=196644,
        warpgroup=4,
        reason="223 to 240 registers, no spill; two buffers are what fits beside the queries",
    ),
    _attend(
        *("turned D 64 descriptors", (90, 100), 128, 64, 8, 3),
        shared=65592,
        warpgroup=4,
        reason="140 to 156 registers, no spill",
    ),
    _attend(
        *("turned D 128 descriptors", (90, 100), 128, 64, 8, 3),
        shared=131128,
        warpgroup=4,
        reason="226 to 234 registers, no spill: turning a page's query needs them, the products themselves 138",
    ),
    _attend(
        *("turned D 256 descriptors", (90,), 64, 64, 8, 2),
        shared=163872,
        warpgroup=4,
        reason="231 registers, no spill; 128 queries spill",
    ),
    _attend(
        *("turned D 256 descriptors", (100,), 32, 32, 8, 2),
        shared=51224,
        reason="128 registers, no spill; 64 queries spill",
    ),
    _attend(
        *("int8 pages D 64 descriptors", (90, 100), 128, 64, 8, 5),
        shared=49200,
        warpgroup=4,
        reason="142 to 190 registers, no spill; as pages, with tiles of half the bytes",
    ),
    _attend(
        *("int8 pages D 128 descriptors", (90, 100), 128, 64, 8, 5),
        shared=81960,
        warpgroup=4,
        reason="186 to 202 registers, no spill: tiles pass through registers to be converted",
    ),
    _attend(
        *("int8 pages D 256 descriptors", (90, 100), 64, 32, 8, 3),
        shared=65576,
        warpgroup=4,
        reason="175 to 249 registers, no spill; 64 queries by 64 keys or 128 by 32 spill",
    ),
    _attend(
        *("int8 turned D 64 descriptors", (90, 100), 128, 32, 8, 3),
        shared=28720,
        warpgroup=4,
        reason="201 to 254 registers, no spill; 64 keys a tile spill on sm_90",
    ),
    _attend(
        *("int8 turned D 128 descriptors", (90, 100), 64, 32, 8, 2),
        shared=32792,
        warpgroup=4,
        reason="214 to 240 registers, no spill; larger tiles spill",
    ),
    _attend(
        *("int8 turned D 256 descriptors", (90, 100), 32, 32, 4, 2),
        shared=34840,
        reason="198 to 208 registers, no spill; 64 queries spill, and 32 are mma.sync on sm_90 too",
    ),
    _attend(
        *("run D 64 pointers", (80, 89, 120), 128, 64, 8, 3),
        shared=49152,
        reason="180 to 186 registers, no spill",
    ),
    _attend(
        *("run D 128 pointers", (80, 89, 120), 128, 32, 8, 3),
        shared=65536,
        reason="192 registers on sm_80; tiles of 64 keys leave it 0 of 255, for the loop is there twice, with and "
        "without a mask, and spill on sm_120 with two samples",
    ),
    _attend(
        *("run D 256 pointers", (80, 89, 120), 64, 32, 8, 2),
        shared=65536,
        reason="165 to 172 registers, no spill; 128 queries spill on sm_80, a third stage does not fit sm_89",
    ),
    _attend(
        *("pages D 64 pointers", (80, 89, 120), 128, 64, 8, 3),
        shared=32772,
        reason="168 to 185 registers, no spill",
    ),
    _attend(
        *("pages D 128 pointers", (80, 89, 120), 128, 64, 8, 5),
        shared=98312,
        reason="200 to 204 registers, no spill; three buffers, see D 128 with descriptors; 3 KiB are left on sm_89 "
        "and sm_120",
    ),
    _attend(
        *("pages D 256 pointers", (80, 89, 120), 64, 32, 8, 2),
        shared=65536,
        reason="159 to 170 registers, no spill; 128 queries spill on sm_80 and sm_89, 64 keys do not fit sm_89",
    ),
    _attend(
        *("turned D 64 pointers", (80, 89, 120), 128, 64, 8, 3),
        shared=49152,
        reason="195 to 230 registers, no spill",
    ),
    _attend(
        *("turned D 128 pointers", (80, 89, 120), 64, 64, 8, 2),
        shared=57344,
        reason="168 to 253 registers, no spill; 128 queries spill on sm_80",
    ),
    _attend(
        *("turned D 256 pointers", (80, 89, 120), 32, 32, 8, 2),
        shared=51200,
        reason="152 to 166 registers, no spill; 64 queries and two stages do not fit sm_89 with 64 keys, three not "
        "with 32",
    ),
    _attend(
        *("int8 pages D 64 pointers", (80, 89, 120), 128, 64, 8, 3),
        shared=32768,
        reason="249 to 252 registers, no spill",
    ),
    _attend(
        *("int8 pages D 128 pointers", (80, 89, 120), 128, 32, 8, 3),
        shared=49152,
        reason="170 to 200 registers, no spill; 64 keys a tile take all 255 on sm_80",
    ),
    _attend(
        *("int8 pages D 256 pointers", (80, 89, 120), 64, 32, 8, 2),
        shared=49152,
        reason="182 to 209 registers, no spill",
    ),
    _attend(
        *("int8 turned D 64 pointers", (80, 89, 120), 128, 32, 8, 2),
        shared=16384,
        reason="241 to 250 registers, no spill",
    ),
    _attend(
        *("int8 turned D 128 pointers", (80, 89, 120), 64, 32, 8, 2),
        shared=32768,
        reason="162 to 202 registers, no spill",
    ),
    _attend(
        *("int8 turned D 256 pointers", (80, 89, 120), 32, 32, 8, 2),
        shared=34816,
        reason="176 to 214 registers, no spill",
    ),
    _attend(
        *("elements D 64", EVERY, 64, 32, 4, 1),
        shared=8192,
        reason="96 to 254 registers, no spill in any form; with 8 warps it spills on sm_100",
    ),
    _attend(
        *("elements D 128", EVERY, 16, 32, 4, 1),
        shared=8192,
        reason="96 to 248 registers, no spill in any form: elements are read one by one, each with its address, and "
        "no larger tile leaves room for that. To be right, not fast.",
    ),
    _attend(
        *("elements D 256", EVERY, 16, 32, 8, 1),
        shared=16384,
        reason="165 to 243 registers, no spill; as D 128",
    ),
    _attend(
        *("float32 D 64", EVERY, 16, 32, 4, 2),
        shared=28672,
        reason="96 to 230 registers, no spill: IEEE products have no tensor cores, and Triton keeps both factors' "
        "channels in registers; 32 by 32 spills",
    ),
    _attend(
        *("float32 D 128", EVERY, 16, 16, 8, 1),
        shared=17408,
        reason="72 to 190 registers, no spill; with a second stage every size of tile spills on sm_80, with 4 warps "
        "on sm_90",
    ),
    _attend(
        *("float32 D 256", EVERY, 16, 16, 4, 1),
        shared=33792,
        reason="110 to 184 registers, no spill; by descriptors it spills on sm_90",
    ),
    # end of window_attend
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
