"""Attention at other shapes than the paper's; there are no targets for these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import figures
from benchmarks import gpu_contenders as contenders
from benchmarks.figures import Section
from benchmarks.gpu_contenders import Layer, Tensors
from benchmarks.gpu_sections import attention_entrants, check_out, matmul, paper_cases
from benchmarks.harness import Bench, Entrant

# Queries and keys of a tile, warps, stages: what compiles without spills on sm_90, beside the table's row.
TILES = ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 2), (64, 64, 4, 3))


def sweep(bench: Bench) -> Section:
    """Windows, head dimensions, few queries, ranges of keys, tables with a hole, shifted and quantised pages."""
    section = Section("Attention at other shapes", yardstick="matmul")
    shape, entrants = bench.shape, [matmul(bench)]

    def add(name: str, cases: Sequence[Tensors], frames: int) -> None:
        entrants.extend(attention_entrants(bench, cases, frames, f"{name}: ", ("triton", "auto"))[0])

    for frames in (2, 3) if bench.dry else (6, 9, 18, 24, 30):
        add(f"{frames} frames", paper_cases(bench, frames), frames)
    narrow = replace(shape, head_dim=shape.head_dim // 2, heads=2 * shape.heads)
    add(f"{narrow.heads} heads x {narrow.head_dim}", paper_cases(replace(bench, shape=narrow)), shape.window)
    short = paper_cases(bench)
    for case in short:
        case["q"] = case["q"][:, : bench.many(128, 4)]
    add(f"{short[0]['q'].shape[1]} queries", short, shape.window)

    split = paper_cases(bench)
    exact = contenders.exact_attention(**split[0])
    for splits in (1, 2, 3, 4, 6):
        calls = [functools.partial(attend_split, case, splits) for case in split]
        check = functools.partial(check_out, calls[0], exact)
        flops = figures.attention_flops(shape.queries, shape.window * shape.tokens, shape.heads, shape.head_dim)
        entrants.append(Entrant(f"{splits} ranges of keys: triton", calls, check, flops=flops))
    for tile in () if bench.dry else TILES:
        calls = [functools.partial(attend_split, case, None, tile) for case in split]
        name = "tiles {} x {}, {} warps, {} stages: triton".format(*tile)
        entrants.append(Entrant(name, calls, functools.partial(check_out, calls[0], exact), flops=flops))

    def tables(change: Callable[[Layer, Tensors], None], frames: int) -> list[Tensors]:
        cases = []
        for seed, case in enumerate(paper_cases(bench)):
            layer = Layer(shape, bench.dtype, bench.device, seed)
            case["slots"] = layer.ints([[*range(shape.window)]])
            del case["run"]
            change(layer, case)
            cases.append(case)
        return cases

    def hole(layer: Layer, case: Tensors) -> None:
        case["slots"][0, 2] = -1

    def shifts(layer: Layer, case: Tensors) -> None:
        case |= layer.rope()
        case["shifts"] = layer.ints([[*range(shape.window)]])

    def int8(layer: Layer, case: Tensors) -> None:
        case["pool_layer"], scales = layer.quantised(case["pool_layer"])
        case["k_scale"], case["v_scale"] = scales

    add("a table with a hole", tables(hole, shape.window - 1), shape.window - 1)
    add("shifted pages", tables(shifts, shape.window), shape.window)
    add("int8 pages", tables(int8, shape.window), shape.window)
    bench.run(section, entrants)
    return section


def attend_split(case: Tensors, splits: int | None, tile: tuple[int, int, int, int] | None = None) -> object:
    """Attention with a number of ranges, or a configuration, that the package would not have chosen."""
    from longlive_rag_ops.triton_kernels.configs import EVERY, Config
    from longlive_rag_ops.triton_kernels.window_attend import attend

    row = None
    if tile is not None:
        sizes = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "SHARED": 0, "RESIDENT": 1}
        row = Config("window_attend", EVERY, "sweep", sizes, tile[2], tile[3], "tried beside the table's row")
    return attend(case["q"], case["pool_layer"], case["run"], splits=splits, row=row)
