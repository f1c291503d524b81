"""A window of 1, 2 and 4 ranks on this machine's CPU, over gloo: time of a block, bytes received, bytes held.

Run from the repository root: ``python -m benchmarks.scaling_ranks [--out FILE]``; for one number of ranks,
``torchrun --nproc-per-node 2 -m benchmarks.scaling_ranks``. It prints the table of docs/scaling.md.

All ranks share this machine's cores, and in the ``frames`` modes each computes the whole model: what grows with the
ranks here is their number on these cores, and nothing is said about a machine that has a GPU a rank. What is measured
exactly are bytes: those that collectives bring to a rank, held against the formulas of ``distributed.traffic``, and
those that a rank holds.

Outputs of every block are compared with those of one window in the same process before they are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig
from longlive_rag_ops.demo.report import describe_device
from longlive_rag_ops.distributed import MemoryMesh, failure, traffic

CONFIG = WindowConfig()
LAYERS, HEADS, HEAD_DIM, GRID, EMBEDDING, FORWARDS = 2, 4, 64, (10, 11), 256, 5
TOKENS = GRID[0] * GRID[1]
BLOCKS, TIMED = 30, 12
AGREEMENT = 16  # bytes of the comparison of windows
MODES = ("heads", "pages", "merge")
SIZES: dict[str, Any] = {"layers": LAYERS, "batch": 1, "tokens_per_frame": TOKENS, "head_dim": HEAD_DIM}


@contextmanager
def counted(received: list[int]) -> Iterator[None]:
    """Counts the bytes that collectives bring to this rank."""
    saved = [(module, name, getattr(module, name)) for module, name in _collectives()]
    rank = dist.get_rank()

    def counting(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            ranks = dist.get_world_size(kwargs.get("group"))
            out = args[0]
            if name == "broadcast":
                received[0] += 0 if kwargs["src"] == rank else out.nbytes
            elif name == "all_reduce":
                received[0] += out.nbytes
            else:
                received[0] += out.nbytes - out.nbytes // ranks
            return call(*args, **kwargs)

        return collective

    for module, name, call in saved:
        setattr(module, name, counting(call, name))
    try:
        yield
    finally:
        for module, name, call in saved:
            setattr(module, name, call)


def _collectives() -> Iterator[tuple[Any, str]]:
    yield from ((dist, name) for name in ("broadcast", "all_reduce", "all_to_all_single"))
    yield failure, "_all_gather"


def run(mode: str) -> dict[str, Any]:
    """One mode on the ranks of this group: what rank 0 has measured."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    bank = BankConfig(host_bytes="256MiB")
    whole = MemoryWindow(CONFIG, **SIZES, kv_heads=HEADS, bank=bank)
    window, heads = whole, slice(None)
    if ranks > 1:
        mesh = MemoryMesh(init_device_mesh("cpu", (ranks,), mesh_dim_names=("heads" if mode == "heads" else "frames",)))
        transfer = "auto" if mode == "heads" else mode
        window = MemoryWindow(CONFIG, **SIZES, kv_heads=HEADS, bank=bank, mesh=mesh, transfer=transfer)
        if mode == "heads":
            heads = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"block": [], "finish": []}
    received, arrivals = [0], 0
    worst = 0.0
    for block in range(BLOCKS):
        start, timed = 3 * block, block >= BLOCKS - TIMED
        qkv = [torch.randn(1, 3 * TOKENS, HEADS, HEAD_DIM, generator=generator) for _ in range(3)]
        embeddings = torch.randn(1, 3, EMBEDDING, generator=generator)
        mine = [x[:, :, heads].contiguous() for x in qkv]
        before = [0]
        if ranks > 1:
            dist.barrier()
        with counted(received if timed else before):
            began = time.perf_counter()
            for _ in range(FORWARDS if timed else 1):
                outs = [window.attend(layer, *mine, start, GRID) for layer in range(LAYERS)]
            attended = time.perf_counter()
            window.retrieve(start, embeddings)
            window.finish(start)
            ended = time.perf_counter()
        if timed:
            seconds["block"].append(ended - began)
            seconds["finish"].append(ended - attended)
        if window is not whole:
            wanted = [whole.attend(layer, *qkv, start, GRID)[:, :, heads] for layer in range(LAYERS)]
            whole.finish(start, embeddings)
            for out, one in zip(outs, wanted, strict=True):
                error = float((out - one).abs().max())
                assert error <= 1e-6, f"{mode}, {ranks} ranks: off by {error}"  # NaN is
                worst = max(worst, error)
            assert window.selected == whole.selected, f"{mode}, {ranks} ranks: chose other frames"
        if timed:  # what has been asked for since
            held = {frame for row in whole.window_frames for frame in row[-CONFIG.top_k :]}
            arrivals += len({frame for row in whole.selected for frame in row} - held)
    held_bytes = window.stats()["bytes"]
    assert window.bank is not None and whole.bank is not None
    result = {
        "ranks": ranks,
        "mode": mode if ranks > 1 else "one rank",
        "block_ms": [1000 * value for value in seconds["block"]],
        "finish_ms": [1000 * value for value in seconds["finish"]],
        "arrivals_per_block": arrivals / TIMED,
        "received_per_block": received[0] // TIMED,
        "formula_per_block": formula(mode, ranks, arrivals / TIMED),
        "history_bytes": window.bank.stats()["host"]["bytes"],
        "index_bytes": held_bytes["index"],
        "window_bytes": held_bytes["window"] + held_bytes["staging"],
        "arrival_bytes": held_bytes.get("arrivals", 0),
        "largest_difference": worst,
    }
    for closed in {window, whole}:
        assert closed.bank is not None
        closed.bank.close()
    return result


def formula(mode: str, ranks: int, arrivals: float) -> int:
    """Bytes a block and rank, on average over ranks, by `distributed.traffic`."""
    form = traffic.PageFormat("plain", LAYERS, 1, TOKENS, HEADS, HEAD_DIM, torch.float32)
    if ranks == 1:
        return 0
    if mode == "heads":
        return AGREEMENT
    search = AGREEMENT + traffic.search_received(form, CONFIG.top_k, ranks)
    if mode == "merge":
        return search + traffic.merge_received(form, CONFIG.frames_per_block, FORWARDS, ranks)
    return search + round(arrivals * (ranks - 1) / ranks * traffic.frame_bytes(form))


def every_mode() -> list[dict[str, Any]]:
    """All modes of this group: times of the slowest rank, of the fastest and of the median block; bytes of all ranks'
    mean."""
    rows = []
    for mode in MODES if dist.get_world_size() > 1 else MODES[:1]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, run(mode))
        row = dict(found[0])
        for name in row:
            if name.endswith("_ms"):  # of the slowest rank in each block
                slowest = [max(times) for times in zip(*(each[name] for each in found), strict=True)]
                row[name] = {"fastest": round(min(slowest), 2), "median": round(statistics.median(slowest), 2)}
            elif name == "largest_difference":
                row[name] = max(each[name] for each in found)
            elif name.endswith(("_bytes", "_per_block")) and name != "arrivals_per_block":
                row[name] = round(statistics.mean(each[name] for each in found))
        rows.append(row)
    return rows


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, f"store{ranks}")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    rows = every_mode()
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/scaling.md."""
    lines = [
        "| ranks | mode | ms a block, median | fastest | `finish`, median | received a block | by formula | history |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        sizes = (row[name] for name in ("received_per_block", "formula_per_block", "history_bytes"))
        lines.append(
            f"| {row['ranks']} | {row['mode']} | {row['block_ms']['median']:.0f} | {row['block_ms']['fastest']:.0f} | "
            f"{row['finish_ms']['median']:.1f} | " + " | ".join(f"{size:,}" for size in sizes) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = describe_device()  # how busy it was before
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("gloo")
        rows = every_mode()
        first = dist.get_rank() == 0
        dist.barrier()
        dist.destroy_process_group()
        if not first:
            return
    else:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for ranks in (1, 2, 4):
                torch.multiprocessing.start_processes(_rank, (ranks, folder), nprocs=ranks, start_method="spawn")
                rows += json.loads(Path(folder, f"{ranks}.json").read_text())
    print(markdown(rows))
    if arguments.out is not None:
        sizes = {**SIZES, "heads": HEADS, "embedding": EMBEDDING, "forwards": FORWARDS, "window": CONFIG.window}
        what = "a window of ranks on one machine, over gloo; all ranks share its cores, one thread each"
        results = {
            "schema": 1,
            "what": what,
            "device": device,
            "sizes": sizes,
            "blocks": BLOCKS,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
