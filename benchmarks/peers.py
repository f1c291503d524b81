"""What one would use instead of the ops, but for attention: search, rotation, copies. Each is absent or works.

A peer is made by a function that may fail in any way, for want of a library, a device, a compiler: that makes it
absent, with the reason. A wrong result does not.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.figures import Shape
from benchmarks.gpu_contenders import Tensors, first_line
from benchmarks.gpu_timer import Call
from benchmarks.harness import Absent, Entrant

Make = Callable[[Tensors], Call]  # prepares what is not timed


def peer(
    name: str,
    cases: Sequence[Tensors],
    make: Make,
    check: Callable[[Any], str],
    *,
    flops: int = 0,
    bytes: int = 0,
    missing: str = "",
    launched: bool = False,
) -> Entrant:
    """An entrant whose calls are made when it is checked.

    Args:
        make: of a case, a call.
        check: of the first call's result, what is wrong with it.
        missing: why it cannot be here; nothing is made then.
        launched: no graph can hold the call.
    """
    calls: list[Call] = []

    def checked() -> str:
        if missing:
            raise Absent(missing)
        try:
            with _quiet():
                calls.extend(make(case) for case in cases)
                out = calls[0]()
        except Absent:
            raise
        except Exception as error:  # absent libraries, old devices, refused shapes: each says so in its own way
            raise Absent(f"does not work here: {first_line(error)}") from error
        return check(out)

    return Entrant(name, calls, checked, flops=flops, bytes=bytes, launched=launched)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries that warn, or log, about what they cannot do here."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def module(name: str) -> Any:
    """An optional library.

    Raises:
        Absent: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name} is not installed") from None


# -- search


def eligible(case: Tensors) -> slice:
    """Rows that may be chosen: ids are row numbers here, and all rows are in use."""
    return slice(case["first_frame"], case["index"].shape[1] - case["recent_exclude"])


def matmul_topk(case: Tensors) -> Call:
    """Normalise, multiply, `torch.topk`; rows that have unit length are not normalised again."""
    rows, query, first = case["index"][:, eligible(case)], case["query"], case["first_frame"]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        unit = rows if case["normalized"] else torch.nn.functional.normalize(rows, dim=-1)
        scores = torch.bmm(unit, torch.nn.functional.normalize(query, dim=-1)[..., None])[..., 0]
        values, ids = torch.topk(scores, case["k"], dim=-1)
        return ids + first, values

    return call


def faiss_search(case: Tensors) -> Call:
    """faiss's exact inner product over unit rows, a range of ids allowed; an index for each sample."""
    faiss = module("faiss")
    if case["index"].device.type != "cpu":
        return _faiss_gpu(faiss, case)
    faiss.omp_set_num_threads(torch.get_num_threads())
    indexes = []
    for rows in case["index"].float():
        indexes.append(faiss.IndexFlatIP(rows.shape[1]))
        indexes[-1].add(torch.nn.functional.normalize(rows, dim=-1).numpy())
    part = eligible(case)
    selector = faiss.IDSelectorRange(part.start, part.stop)
    options = faiss.SearchParameters(sel=selector)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        queries = torch.nn.functional.normalize(case["query"].float(), dim=-1).numpy()
        found = [index.search(queries[b : b + 1], case["k"], params=options) for b, index in enumerate(indexes)]
        scores, ids = (torch.cat([torch.from_numpy(part) for part in parts]) for parts in zip(*found, strict=True))
        return ids, scores

    return call


def _faiss_gpu(faiss: Any, case: Tensors) -> Call:
    """The same by faiss's GPU index, which takes no range of ids: it has the rows that may be chosen, and no others."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise Absent(f"faiss {faiss.__version__} as it is installed has no GPU index (no StandardGpuResources)")
    module("faiss.contrib.torch_utils")  # has indexes take tensors on the device
    part, resources, indexes = eligible(case), faiss.StandardGpuResources(), []
    for rows in case["index"][:, part].float():
        indexes.append(faiss.GpuIndexFlatIP(resources, rows.shape[1]))
        indexes[-1].add(torch.nn.functional.normalize(rows, dim=-1).contiguous())
    query = case["query"].float()

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        queries = torch.nn.functional.normalize(query, dim=-1)
        found = [index.search(queries[b : b + 1], case["k"]) for b, index in enumerate(indexes)]
        scores, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids + part.start, scores

    return call


# -- pages


def phases(case: Tensors, shape: Shape, positions: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Complex turns ``(n * T, 1, D / 2)`` of frames' tokens at temporal positions, in float32 or float64 parts."""
    table = torch.view_as_complex(case["rope"].to(dtype))
    time, high, wide = table.split([channels // 2 for channels in case["rope_split"]], dim=1)
    height, width = shape.grid
    frames = len(positions)
    return torch.cat(
        [
            time[list(positions)].view(frames, 1, 1, -1).expand(-1, height, width, -1),
            high[:height].view(1, height, 1, -1).expand(frames, -1, width, -1),
            wide[:width].view(1, 1, width, -1).expand(frames, height, -1, -1),
        ],
        dim=-1,
    ).reshape(frames * height * width, 1, -1)


def turned(x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """``x (..., D)`` rotated, in the phases' precision, in its own dtype."""
    pairs = torch.view_as_complex(x.to(phase.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phase).flatten(-2).to(x.dtype)


def plain_write(shape: Shape, dtype: torch.dtype, case: Tensors) -> Call:
    """`write_frames` in plain PyTorch: complex products with phases made beforehand, and assignments."""
    pool, staging, slots = case["pool_layer"], case["staging"], case["slots"]
    still = phases(case, shape, [0] * shape.block, dtype)
    moved = phases(case, shape, case["positions"].tolist(), dtype)

    def call() -> torch.Tensor:
        pool[0][:, slots] = turned(case["k"], moved).unflatten(1, (shape.block, -1))
        pool[1][:, slots] = case["v"].unflatten(1, (shape.block, -1))
        staging[:, case["staging_rows"]] = turned(case["k"], still).unflatten(1, (shape.block, -1))
        return turned(case["q"], moved)

    return call


def plain_place(case: Tensors) -> Call:
    """`place_frames` at position 0 in plain PyTorch: `copy_`; of eight-bit pages, `to` times factors and `copy_`."""
    pool, pages = case["pool_layer"], case["k_pages"].shape[1]
    sources = [(case["k_pages"], case.get("k_scale")), (case["v_pages"], case.get("v_scale"))]

    def call() -> torch.Tensor:
        for target, (source, scale) in zip(pool, sources, strict=True):
            values = source if scale is None else source.to(pool.dtype) * scale.to(pool.dtype)[..., None]
            target[:, :pages].copy_(values)
        return pool

    return call


def fetched(page_locked: bool, case: Tensors) -> Call:
    """The pages out of host memory by `torch.Tensor.to`, one call for keys and one for values, to new memory."""
    device = case["pool_layer"].device
    if device.type == "cpu" and page_locked:
        raise Absent("needs a CUDA device")
    hosts = [case[name].cpu() for name in ("k_pages", "v_pages")]
    hosts = [x.pin_memory() for x in hosts] if page_locked else hosts
    return lambda: [x.to(device, non_blocking=True, copy=True) for x in hosts]


def plain_merge(case: Tensors) -> Call:
    """`merge_attention` as a weighted sum in float32."""
    outs, lses = case["outs"], case["lses"]

    def call() -> torch.Tensor:
        weights = torch.softmax(lses, dim=0).transpose(2, 3)[..., None]  # (P, B, S, H, 1)
        return (outs * weights).sum(0).to(outs.dtype)

    return call


def flash_infer_merge(case: Tensors) -> Call:
    """FlashInfer's merge, whose states are ``(S, P, H, D)`` and whose log-sum-exps are to base 2; of one sample."""
    function = module("flashinfer").merge_states
    if case["outs"].shape[1] != 1:
        raise Absent("one sample only")
    states = case["outs"][:, 0].transpose(0, 1).contiguous()
    sums = (case["lses"][:, 0].permute(2, 0, 1) * math.log2(math.e)).contiguous()
    return lambda: function(states, sums)[0][None]
