"""Rows of `window_attend` in the table of configurations."""

from __future__ import annotations

from .config_rows import EVERY, Config


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


ATTENTION: tuple[Config, ...] = (
    _attend(
        *("run D 64 descriptors", (90, 100), 128, 128, 8, 3),
        shared=115256,
        warpgroup=8,
        reason="159 to 185 registers, no spill. Tiles of 128 keys rescale the sums half as often as tiles of 64, and "
        "a run has no page ends to waste them on.",
    ),
    _attend(
        *("run D 128 descriptors", (90, 100), 128, 128, 8, 3),
        shared=229432,
        warpgroup=8,
        reason="212 to 237 registers, no spill; P stays in registers. Tiles of 128 keys rescale the sums half as "
        "often as tiles of 64 (148 registers). With two stages the next tile's 64 KiB are asked for only behind the "
        "second product, half of an iteration before they are needed; the third fits with 3 KiB to spare. BLOCK_M 256 "
        "would halve the reads of keys and wants 254 registers.",
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
)
