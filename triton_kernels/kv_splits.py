"""Into how many ranges of keys attention is split, so that the last wave of blocks leaves no multiprocessor idle."""

from __future__ import annotations

from functools import lru_cache

# Costs in units of the time a block takes for 64 keys. Derived from published rates, not measured.
START = 2.0  # a block's start and end: loading queries, filling the pipeline, storing
# Merging writes and reads a float32 tile of queries for each part: 128 x 128 x 8 bytes at an H100's 25 GB/s a
# multiprocessor and ms against 4.2 MFLOP at 6 GFLOP; about half as much on an A100, which is slower at both.
MERGE = 7.4
MOST = 64  # parts; beyond it merging costs more than any wave


@lru_cache
def kv_splits(blocks: int, tiles: int, places: int, keys: int = 64) -> int:
    """The number of parts with the least estimated time.

    All blocks take equally long, so a grid runs in whole waves: 444 blocks on 132 places run as 4 waves, 84 % busy,
    twice as many blocks of half the length as 7, 96 % busy. More parts mean a finer last wave and more to merge.

    Args:
        blocks: blocks of the grid for one part.
        tiles: tiles of keys that a block walks when there is one part; parts are whole tiles.
        places: blocks that the device runs at once.
        keys: in a tile.

    Returns:
        At least 1, at most ``tiles``. It depends on shapes and the device alone, never on data, so that results
        repeat to the bit.
    """
    best, least = 1, float("inf")
    for parts in range(1, max(1, min(tiles, MOST)) + 1):
        waves = -(-blocks * parts // places)
        time = waves * (-(-tiles // parts) * keys / 64 + START)
        if parts > 1:
            time += MERGE * blocks * parts / places
        if time < least:
            best, least = parts, time
    return best
