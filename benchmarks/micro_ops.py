"""What the micro suite times for each op at a point: our engines, and what one would use instead.

Every function gives entrants whose names begin with ``prefix``. ``every`` adds all peers and variants; without it there
are our engines and the one peer that the op is held against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import attention_peers, figures, peers
from benchmarks import gpu_contenders as contenders
from benchmarks.gpu_contenders import Layer, Tensors, clone, difference, poisoned
from benchmarks.gpu_sections import op
from benchmarks.harness import Absent, Bench, Entrant, compared
from benchmarks.micro_cases import (
    Point,
    attend_case,
    cases,
    first_case,
    merge_bytes,
    merge_case,
    place_case,
    refusable,
    search_case,
)
from longlive_rag_ops import reference
from longlive_rag_ops.engines import ENGINES

Entrants = Callable[[Bench, Point, Sequence[str], str, bool], list[Entrant]]
ROTATED = 7  # a temporal position other than 0, where placing is a copy
EXACT_COSINE = 1e-5  # of float32 sums of a few thousand products
ROUNDED_COSINE = 2**-7  # of a peer that computes in bfloat16, whose steps are 2**-8 between 0.5 and 1


def ours(
    bench: Bench,
    name: str,
    label: str,
    made: Sequence[Tensors],
    engine: str,
    check: Callable[[Tensors], str],
    flops: int = 0,
    bytes: int = 0,
    stored: torch.dtype | None = None,
) -> Entrant:
    """An op by one engine; absent where the engine cannot run on the device, or takes no pages ``stored`` so.

    Args:
        check: runs the op on a copy of the first case and says what is wrong.
    """

    def checked() -> str:
        obstacle = None if engine == "auto" else ENGINES[engine].obstacle(bench.device)
        if engine == "triton" and bench.device == "cpu" and not bench.dry:
            obstacle = "on a CPU it runs only in Triton's interpreter, for tests"
        if obstacle:
            raise Absent(obstacle)
        with refusable(stored):
            return check(clone(made[0]))

    calls = [op(name, case, engine) for case in made]
    return Entrant(label + engine, calls, checked, flops=flops, bytes=bytes)


def topk_retrieve(bench: Bench, point: Point, engines: Sequence[str], prefix: str, every: bool) -> list[Entrant]:
    moved = figures.index_bytes(point.rows, point.shape.embedding, point.dtype.itemsize)
    found: list[Entrant] = []
    for unit, label in ((True, ""), (False, "rows of any length, "))[: 1 + every]:
        made = cases(bench, point, functools.partial(search_case, point=point, unit=unit), moved)
        want = reference.topk_retrieve(**made[0])

        def check(case: Tensors, engine: str, want: Any = want) -> str:
            with poisoned():
                ids, scores = op("topk_retrieve", case, engine)()
            return wrong_frames(case, ids, EXACT_COSINE) or compared((scores, want[1]))

        def close(out: Any, case: Tensors = made[0], want: Any = want) -> str:
            """Rounded scores may change places; the frames found must be as similar."""
            error = difference(out[1].to(want[1].device), want[1])[0]
            limit = EXACT_COSINE if point.dtype == torch.float32 else ROUNDED_COSINE
            return wrong_frames(case, out[0], limit) or ("" if error < 0.02 else f"WRONG scores by {error:.1e}")

        options: dict[str, Any] = {"bytes": point.batch * moved}
        for engine in engines:
            checked = functools.partial(check, engine=engine)
            found.append(ours(bench, "topk_retrieve", prefix + label, made, engine, checked, **options))
        found.append(peers.peer(f"{prefix}{label}torch.topk", made, peers.matmul_topk, close, **options))
        if unit and every:
            found.append(peers.peer(f"{prefix}faiss", made, peers.faiss_search, close, **options))
    return found


def wrong_frames(case: Tensors, ids: torch.Tensor, limit: float) -> str:
    """What is wrong with the frames that were chosen: empty when nothing is.

    They must be candidates, each once, and as similar as the best ones by float64 cosines: which of near equals is
    chosen is free. Frames' numbers are those of their rows here.
    """
    rows, part, ids = case["index"].double(), peers.eligible(case), ids.to(case["index"].device)
    rows = rows if case["normalized"] else reference.unit_rows(rows)
    cosines = torch.bmm(rows, reference.unit_rows(case["query"].double())[..., None])[..., 0]
    free = ids.shape != (len(rows), case["k"]) or bool(((ids < part.start) | (ids >= part.stop)).any())
    if free or any(len(set(row)) < len(row) for row in ids.tolist()):
        return f"WRONG frames {ids.tolist()}"
    found = cosines.gather(1, ids).sort(descending=True).values
    off = float((found - cosines[:, part].topk(case["k"]).values).abs().max())
    return "" if off <= limit else f"WRONG frames {ids.tolist()}, their cosines are off by {off:.1e}"


def write_frames(bench: Bench, point: Point, engines: Sequence[str], prefix: str, every: bool) -> list[Entrant]:
    moved = figures.write_bytes(point.shape, point.dtype.itemsize)
    made = cases(bench, point, Layer.write, moved)

    def check(case: Tensors, call: Callable[[Tensors], Any]) -> str:
        exact = clone(case)
        case["pool_layer"][:, :, case["slots"]] = torch.nan
        case["staging"][:, case["staging_rows"]] = torch.nan
        want = op("write_frames", exact, "reference")()
        with poisoned():
            out = call(case)
        return compared((out, want), *((case[name], exact[name]) for name in ("pool_layer", "staging")))

    options: dict[str, Any] = {"bytes": point.batch * moved}
    found = []
    for engine in engines:
        checked = functools.partial(check, call=lambda case, engine=engine: op("write_frames", case, engine)())
        found.append(ours(bench, "write_frames", prefix, made, engine, checked, **options))
    for dtype in (torch.float32, torch.float64)[: 1 + every]:
        make = functools.partial(peers.plain_write, point.shape, dtype)
        name = f"{prefix}plain PyTorch in {str(dtype).removeprefix('torch.')}"

        def right(out: Any, make: Any = make) -> str:
            return check(clone(made[0]), lambda case: make(case)())

        found.append(peers.peer(name, made, make, right, **options))
    return found


def place_frames(bench: Bench, point: Point, engines: Sequence[str], prefix: str, every: bool) -> list[Entrant]:
    shape, item = point.shape, point.dtype.itemsize
    moved = figures.place_bytes(
        shape, shape.new_pages, (point.stored or point.dtype).itemsize, item, point.stored is not None
    )
    options: dict[str, Any] = {"bytes": point.batch * moved}

    def check(case: Tensors, call: Callable[[Tensors], Any]) -> str:
        exact = clone(case)
        case["pool_layer"][:, :, case["slots"][0]] = torch.nan
        op("place_frames", exact, "reference")()
        call(case)
        return compared((case["pool_layer"], exact["pool_layer"]))

    found = []
    for position, label in ((0, ""), (ROTATED, "rotated, "))[: 1 + every]:
        make = functools.partial(place_case, position=position, stored=point.stored)
        made = cases(bench, point, make, moved)
        for engine in engines:
            checked = functools.partial(check, call=lambda case, engine=engine: op("place_frames", case, engine)())
            found.append(
                ours(bench, "place_frames", prefix + label, made, engine, checked, stored=point.stored, **options)
            )
        if position:
            continue

        def right(out: Any, made: list[Tensors] = made) -> str:
            return check(clone(made[0]), lambda case: peers.plain_place(case)())

        name = "torch.Tensor.to and copy_" if point.stored else "torch.Tensor.copy_"
        found.append(peers.peer(prefix + name, made, peers.plain_place, right, **options))
        if every and point.stored is None:
            for locked, memory in ((False, "pageable"), (True, "page-locked")):
                name = f"{prefix}torch.Tensor.to, from {memory} host memory"
                fetch = functools.partial(peers.fetched, locked)
                right = functools.partial(_pages, made[0])
                # No graph may hold a copy out of pageable memory; both are launched, so that they compare.
                found.append(peers.peer(name, made, fetch, right, launched=True, **options))
    return found


def _pages(case: Tensors, out: Any) -> str:
    same = all(torch.equal(got, case[name]) for got, name in zip(out, ("k_pages", "v_pages"), strict=True))
    return "" if same else "WRONG bytes"


@functools.lru_cache(maxsize=8)  # as many points as a sweep has: ops that share one come one after another
def exact_attention(point: Point, device: str) -> torch.Tensor:
    """Float64 output over a point's `attend_case`, the same for each op that has it."""
    return contenders.exact_attention(**first_case(point, device, functools.partial(attend_case, stored=point.stored)))


def window_attend(bench: Bench, point: Point, engines: Sequence[str], prefix: str, every: bool) -> list[Entrant]:
    shape = point.shape
    each = figures.attention_bytes(shape, shape.window, point.dtype.itemsize)
    made = cases(bench, point, functools.partial(attend_case, stored=point.stored), each)
    exact = exact_attention(point, bench.device)

    def check(case: Tensors, engine: str) -> str:
        with poisoned():
            out, _ = op("window_attend", case, engine)()
        return compared((out, exact))

    flops = _flops(point)
    options: dict[str, Any] = {"flops": flops, "stored": point.stored}
    found = [
        ours(bench, "window_attend", prefix, made, engine, functools.partial(check, engine=engine), **options)
        for engine in engines
    ]
    return found + attention_peers.attention_peers(bench, made, exact, flops, prefix, every)


def retrieve_attend(bench: Bench, point: Point, engines: Sequence[str], prefix: str, every: bool) -> list[Entrant]:
    """Of a block: its later forwards, whose plan is carried out, and its first one, which places all memory frames."""
    shape, flops = point.shape, _flops(point)
    item = point.dtype.itemsize
    each = figures.attention_bytes(shape, shape.window, item) + figures.write_bytes(shape, item)
    ready = cases(bench, point, attend_case, each)
    exact = exact_attention(point, bench.device)
    found = attention_peers.attention_peers(bench, ready, exact, flops, prefix, every=False)
    plans = {"same": "a later forward, ", "new": "a first forward, "} if every else {"same": ""}
    for plan, label in plans.items():
        made = cases(bench, point, functools.partial(Layer.retrieve, plan=plan), each)
        want = contenders.exact_retrieve(made[0])
        for engine in engines:
            checked = functools.partial(_check_retrieve, want=want, engine=engine)
            found.append(ours(bench, "retrieve_attend", prefix + label, made, engine, checked, flops=flops))
    return found


def _check_retrieve(case: Tensors, want: tuple[torch.Tensor, ...], engine: str) -> str:
    before = case["window_state"].clone()
    with poisoned():
        out, _ = op("retrieve_attend", case, engine)()
    if not torch.equal(case["window_state"], before):
        return f"WRONG window_state {case['window_state'].tolist()}, expected {before.tolist()}"
    return compared((out, want[0]), (case["pool_layer"], want[1]), (case["staging"], want[2]))


def merge_attention(bench: Bench, point: Point, engines: Sequence[str], prefix: str, every: bool) -> list[Entrant]:
    moved = merge_bytes(point)
    made = cases(bench, point, functools.partial(merge_case, parts=point.parts), moved)
    exact, total = reference.merge_attention(*(made[0][name].double() for name in ("outs", "lses")))

    def check(case: Tensors, engine: str) -> str:
        with poisoned():
            out, lse = op("merge_attention", case, engine)()
        return compared((out, exact), (lse, total))

    options: dict[str, Any] = {"bytes": point.batch * moved}
    found = [
        ours(bench, "merge_attention", prefix, made, engine, functools.partial(check, engine=engine), **options)
        for engine in engines
    ]

    def right(out: Any) -> str:
        return compared((out, exact))

    found.append(peers.peer(f"{prefix}weighted sum in PyTorch", made, peers.plain_merge, right, **options))
    if every:
        found.append(peers.peer(f"{prefix}FlashInfer", made, peers.flash_infer_merge, right, **options))
    return found


def _flops(point: Point) -> int:
    shape = point.shape
    return point.batch * figures.attention_flops(
        shape.queries, shape.window * shape.tokens, shape.heads, shape.head_dim
    )


OPS: dict[str, Entrants] = {
    "topk_retrieve": topk_retrieve,
    "write_frames": write_frames,
    "place_frames": place_frames,
    "window_attend": window_attend,
    "retrieve_attend": retrieve_attend,
    "merge_attention": merge_attention,
}
