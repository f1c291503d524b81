"""The sections of the GPU benchmark: what each times together, how its outputs are checked, and its targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import figures
from benchmarks import gpu_contenders as contenders
from benchmarks.figures import Section, Target
from benchmarks.gpu_contenders import Layer, Tensors, clone, poisoned
from benchmarks.gpu_timer import Call
from benchmarks.harness import Absent, Bench, Entrant, compared
from longlive_rag_ops import reference

ENGINES = ("triton", "dense", "auto")
ATTENTION, RETRIEVE_SAME, RETRIEVE_NEW = 0.55, 1.05, 1.08
NO_SLOWER = 1.02  # of two medians: the same kernel timed twice does not come out the same either
MOVING, SEARCH_LARGE, SEARCH_SMALL = 0.80, 1.25, 20e-6


def op(name: str, case: Tensors, engine: str) -> Call:
    return functools.partial(getattr(torch.ops.longlive, name), **case, engine=engine)


def matmul(bench: Bench) -> Entrant:
    """The yardstick of arithmetic: a square product of random bfloat16 numbers, the fastest that PyTorch does."""
    size = bench.many(8192, 16)
    one, other = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return Entrant("matmul", [lambda: one @ other], flops=2 * size**3)


def copying(bench: Bench) -> Entrant:
    """The yardstick of moving: a copy far larger than any cache, bytes read and bytes written."""
    source, target = (torch.ones(bench.many(1 << 30, 64), dtype=torch.int8, device=bench.device) for _ in range(2))
    return Entrant("copy", [lambda: target.copy_(source)], bytes=2 * source.numel())


def reading(bench: Bench) -> Entrant:
    """The yardstick of reading: a sum."""
    source = torch.ones(bench.many(1 << 28, 64), dtype=torch.float32, device=bench.device)
    return Entrant("read", [source.sum], bytes=4 * source.numel())


def share(section: Section, name: str, of: str, limit: float, what: str) -> Target:
    return Target(what, section.fraction(name, of), limit, least=True)


# -- attention


def attention_entrants(
    bench: Bench, cases: Sequence[Tensors], frames: int, prefix: str = "", engines: Sequence[str] = ENGINES
) -> tuple[list[Entrant], list[str]]:
    """Our engines and every dense back end on the same tensors, and the names of the back ends."""
    first = cases[0]
    q, pool = first["q"], first["pool_layer"]
    heads, head_dim = q.shape[2:]
    options = {n: v for n, v in first.items() if n not in ("q", "pool_layer")}
    exact = contenders.exact_attention(q, pool, **options)
    flops = figures.attention_flops(q.shape[1], frames * pool.shape[3], heads, head_dim)

    entrants = []
    for engine in engines:
        calls = [op("window_attend", case, engine) for case in cases]
        entrants.append(Entrant(prefix + engine, calls, functools.partial(check_out, calls[0], exact), flops=flops))
    names = []
    if "run" in first and "k_scale" not in first:
        for name, backend in contenders.dense_backends(q).items():
            names.append(prefix + name)
            if isinstance(backend, str):
                entrants.append(Entrant(prefix + name, [], functools.partial(_absent, backend)))
                continue
            calls = [functools.partial(backend, case["q"], case["pool_layer"], case["run"]) for case in cases]
            entrants.append(Entrant(prefix + name, calls, functools.partial(check_out, calls[0], exact), flops=flops))
    return entrants, names


def check_out(call: Call, exact: torch.Tensor) -> str:
    with poisoned():
        out: Any = call()
    return compared((out[0] if isinstance(out, tuple) else out, exact))


def _absent(reason: str) -> str:
    raise Absent(reason)


def paper_cases(bench: Bench, frames: int | None = None) -> list[Tensors]:
    shape, frames = bench.shape, frames or bench.shape.window
    each = figures.attention_bytes(shape, frames, bench.dtype.itemsize)
    return bench.copies(lambda seed: Layer(shape, bench.dtype, bench.device, seed).attend(frames), each)


def attention(bench: Bench) -> Section:
    shape = bench.shape
    section = Section(
        f"Attention: {shape.queries} queries, {shape.window} x {shape.tokens} keys, "
        f"{shape.heads} heads x {shape.head_dim}, {bench.dtype}",
        yardstick="matmul",
    )
    entrants, backends = attention_entrants(bench, paper_cases(bench), shape.window)
    bench.run(section, [matmul(bench), *entrants])
    section.targets.append(share(section, "triton", "matmul", ATTENTION, "window_attend, triton: share of matmul rate"))
    best = figures.fastest(section, backends)
    what = f"window_attend, auto: time over the best dense back end ({best or 'none'})"
    section.targets.append(Target(what, section.over("auto", best) if best else None, NO_SLOWER, least=False))
    return section


# -- the whole call


def retrieve(bench: Bench) -> Section:
    shape, item = bench.shape, bench.dtype.itemsize
    section = Section("retrieve_attend, its selection made before", yardstick="matmul")
    attend, backends = attention_entrants(bench, paper_cases(bench), shape.window, "attention alone, ", ENGINES[:1])
    each = figures.attention_bytes(shape, shape.window, item) + figures.write_bytes(shape, item)

    def cases(plan: str) -> list[Tensors]:
        return bench.copies(lambda seed: Layer(shape, bench.dtype, bench.device, seed).retrieve(plan), each)

    same, new, select = cases("same"), cases("new"), cases("select")
    entrants = [matmul(bench), *attend, write_entrant(bench, "triton", "write_frames alone")]
    forwards = 5
    block = f"a block of {forwards} forwards, {shape.new_pages} new pages"
    for engine in ENGINES[::2]:
        unchanged = [op("retrieve_attend", case, engine) for case in same]
        blocks = [functools.partial(_block, case, engine, forwards) for case in new]
        # The state is put back each time: selecting for a block that is already in the window does nothing.
        choosing = [functools.partial(_choose, case, case["window_state"].clone(), engine) for case in select]
        entrants += [
            Entrant(f"{engine}, unchanged", unchanged, functools.partial(_check_retrieve, same[0], same[0], engine)),
            Entrant(f"{engine}, {block}", blocks, functools.partial(_check_retrieve, new[0], new[0], engine)),
            Entrant(
                f"{engine}, choosing and placing",
                choosing,
                functools.partial(_check_retrieve, select[0], new[0], engine),
            ),
        ]
    bench.run(section, entrants)
    best = figures.fastest(section, backends)
    dense, write = section.find(best or ""), section.find("write_frames alone")
    for engine in ENGINES[::2]:
        for name, times, limit in (
            (f"{engine}, unchanged", 1, RETRIEVE_SAME),
            (f"{engine}, {block}", forwards, RETRIEVE_NEW),
        ):
            row, got = section.find(name), None
            if row and dense and write:
                apart = [times * seconds for seconds in figures.added(dense.seconds, write.seconds)]
                got = figures.ratio(row.seconds, apart).median
            what = f"retrieve_attend, {name}: time over dense attention + write_frames"
            section.targets.append(Target(what, got, limit, least=False))
    return section


def _check_retrieve(case: Tensors, planned: Tensors, engine: str) -> str:
    """``planned`` is the same case with the state that ``case`` must come to, and no selection."""
    exact, pool, staging = contenders.exact_retrieve(planned)
    mine = clone(case)
    with poisoned():
        out, _ = op("retrieve_attend", mine, engine)()
    if not torch.equal(mine["window_state"], planned["window_state"]):
        return f"WRONG window_state {mine['window_state'].tolist()}, expected {planned['window_state'].tolist()}"
    return compared((out, exact), (mine["pool_layer"], pool), (mine["staging"], staging))


def _block(case: Tensors, engine: str, forwards: int) -> None:
    """The forwards of a block in one layer: the first places the pages."""
    for number in range(forwards):
        torch.ops.longlive.retrieve_attend(**(case | {"place": number == 0}), engine=engine)


def _choose(case: Tensors, before: torch.Tensor, engine: str) -> None:
    """A block's very first call."""
    case["window_state"].copy_(before)
    torch.ops.longlive.retrieve_attend(**case, engine=engine)


# -- pages


def write_entrant(bench: Bench, engine: str, name: str) -> Entrant:
    shape, moved = bench.shape, figures.write_bytes(bench.shape, bench.dtype.itemsize)
    cases = bench.copies(lambda seed: Layer(shape, bench.dtype, bench.device, seed).write(), moved)

    def check() -> str:
        exact, mine = clone(cases[0]), clone(cases[0])
        mine["pool_layer"][:, :, mine["slots"]] = torch.nan
        mine["staging"][:, mine["staging_rows"]] = torch.nan
        want = op("write_frames", exact, "reference")()
        with poisoned():
            out = op("write_frames", mine, engine)()
        return compared((out, want), *((mine[n], exact[n]) for n in ("pool_layer", "staging")))

    return Entrant(name, [op("write_frames", case, engine) for case in cases], check, bytes=moved)


def place_entrant(bench: Bench, engine: str, name: str, position: int, stored: torch.dtype | None) -> Entrant:
    shape, item = bench.shape, bench.dtype.itemsize
    read = item if stored is None else stored.itemsize
    moved = figures.place_bytes(shape, shape.new_pages, read, item, stored is not None)
    cases = bench.copies(lambda seed: Layer(shape, bench.dtype, bench.device, seed).place(position, stored), moved)

    def check() -> str:
        exact, mine = clone(cases[0]), clone(cases[0])
        mine["pool_layer"][:, :, mine["slots"][0]] = torch.nan
        op("place_frames", exact, "reference")()
        op("place_frames", mine, engine)()
        return compared((mine["pool_layer"], exact["pool_layer"]))

    return Entrant(name, [op("place_frames", case, engine) for case in cases], check, bytes=moved)


def pages(bench: Bench) -> Section:
    shape = bench.shape
    section = Section(f"Pages: a block of {shape.block} frames, {shape.new_pages} pages placed", yardstick="copy")
    forms: list[tuple[str, int, torch.dtype | None]] = [
        ("at position 0", 0, None),
        ("rotated", 7, None),
        ("int8", 7, torch.int8),
        ("fp8", 7, torch.float8_e4m3fn),
    ]
    entrants = [copying(bench)]
    for engine in ENGINES[:2]:
        entrants.append(write_entrant(bench, engine, f"write_frames, {engine}"))
        entrants += [
            place_entrant(bench, engine, f"place_frames {what}, {engine}", position, stored)
            for what, position, stored in forms
        ]
    bench.run(section, entrants)
    for row in section.rows:
        if row.name.endswith("triton"):
            section.targets.append(share(section, row.name, "copy", MOVING, f"{row.name}: share of copy rate"))
    return section


# -- search


def search(bench: Bench) -> Section:
    large, small = bench.many(100_000, 200), bench.many(4096, 50)
    section = Section(f"Search: {large} and {small} rows of {bench.shape.embedding}", yardstick="read")
    entrants = [reading(bench)]
    for rows in (large, small):
        moved = figures.index_bytes(rows, bench.shape.embedding, bench.dtype.itemsize)
        make = lambda seed, rows=rows: Layer(bench.shape, bench.dtype, bench.device, seed).search(rows)  # noqa: E731
        cases = bench.copies(make, moved)
        want, scores = reference.topk_retrieve(**cases[0])
        for engine in ENGINES[:2]:

            def check(case: Tensors = cases[0], engine: str = engine, want: Any = want, scores: Any = scores) -> str:
                with poisoned():
                    ids, got = op("topk_retrieve", case, engine)()
                if not torch.equal(ids, want) and not torch.allclose(got, scores, rtol=1e-5, atol=1e-6):
                    return f"WRONG frames {ids.tolist()}, expected {want.tolist()}"
                return compared((got, scores))

            calls = [op("topk_retrieve", case, engine) for case in cases]
            entrants.append(Entrant(f"{engine}, {rows} rows", calls, check, bytes=moved))
        plain = [functools.partial(_plain_topk, case) for case in cases]
        entrants.append(Entrant(f"torch.topk(index @ query), {rows} rows", plain, bytes=moved))
    bench.run(section, entrants)
    part = section.fraction(f"triton, {large} rows")
    what = f"topk_retrieve, {large} rows: time over reading them at the rate of a sum"
    section.targets.append(Target(what, 1 / part if part else None, SEARCH_LARGE, least=False))
    row = section.find(f"triton, {small} rows")
    got = figures.Spread.of(row.seconds).median * 1e6 if row and row.mode != "eager" else None
    what = f"topk_retrieve, {small} rows in a CUDA graph"
    section.targets.append(Target(what, got, SEARCH_SMALL * 1e6, least=False, unit=" us"))
    return section


def _plain_topk(case: Tensors) -> torch.Tensor:
    """What one would write without the op, on unit rows: no bounds, no exclusion, no rule for ties."""
    return torch.topk(torch.mv(case["index"][0], case["query"][0]), case["k"]).indices


SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "attention": attention,
    "retrieve": retrieve,
    "pages": pages,
    "search": search,
}
