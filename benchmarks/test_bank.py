"""The memory bank on a CPU: append and fetch against plain memcpy of the same bytes, spill and fetch from disk against
raw direct I/O of the same size, pattern and queue depth.

``pytest benchmarks/test_bank.py -s`` prints the rates. Bytes are compared before anything is timed. Contenders take
turns round by round in one process; a ratio is the median of the rounds' ratios. Pages have the paper's size, of four
layers instead of thirty, so that it fits on a small machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.bank_raw import Copies, RawDisk
from benchmarks.test_attention_step import cpu_name
from longlive_rag_ops.bank import BankConfig, MemoryBank, PageFormat

FORMAT = PageFormat("plain", 4, 1, 1560, 12, 128, torch.bfloat16)
FRAMES = 6  # moved at a time: as many as a block retrieves
QUEUE = 8
TARGET = 0.8
ROUNDS = int(os.environ.get("LONGLIVE_BENCH_ROUNDS", "15"))
BYTES = FRAMES * FORMAT.record_bytes
Timed = Callable[[], float]


@pytest.fixture
def folder() -> Iterator[Path]:
    """On the file system that is measured: ``LONGLIVE_BENCH_SPILL``, or where temporary files go."""
    path = Path(tempfile.mkdtemp(prefix="longlive-bench-", dir=os.environ.get("LONGLIVE_BENCH_SPILL")))
    yield path
    shutil.rmtree(path)


def source() -> torch.Tensor:
    """A window of finished frames, ``(layers, 2, samples, FRAMES, T, H, D)``, random bits."""
    shape = FORMAT.slots_shape(FRAMES)
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(FORMAT.dtype)


def views(window: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of each frame, ``(layers, samples, T, H, D)``."""
    return [window[:, 0, :, i] for i in range(FRAMES)], [window[:, 1, :, i] for i in range(FRAMES)]


def pages(window: torch.Tensor, slots: Sequence[int]) -> list[torch.Tensor]:
    """Every contiguous piece, frame by frame, in the order of a record."""
    return [
        window[layer, half, sample, slot].view(torch.int16)
        for slot in slots
        for layer in range(FORMAT.layers)
        for sample in range(FORMAT.samples)
        for half in range(2)
    ]


def bank(host: int, disk: int, slots: int, folder: Path | None) -> MemoryBank:
    """A bank of that many records and slots."""
    config = BankConfig(
        host_bytes=host * FORMAT.record_bytes,
        disk_bytes=disk * FORMAT.record_bytes,
        spill=folder,
        lock_memory=False,
        slab_bytes=4 * FORMAT.record_bytes,
        io_threads=QUEUE,
    )
    return MemoryBank(FORMAT, config, device_slots=slots, frames_per_commit=FRAMES, most_fetched=slots)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def fetch(made: MemoryBank, frames: Sequence[int]) -> None:
    """All that lies between a choice and attention to it."""
    made.prefetch(frames)
    assert not made.settle()
    for layer in range(FORMAT.layers):
        made.wait(layer)


def check_slots(made: MemoryBank, frames: Sequence[int], window: torch.Tensor) -> None:
    """The slots of these frames hold the window's pages, bit for bit."""
    slots = [made.slot(frame) for frame in frames]
    for got, want in zip(pages(made.slots, slots), pages(window, range(FRAMES)), strict=True):
        assert torch.equal(got, want)


def take_turns(benchmark, contenders: dict[str, Timed]) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    """Seconds of every contender in every round; another order each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for name in names:
        contenders[name]()
    turn = 0

    def one_round() -> None:
        nonlocal turn
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            times[name].append(contenders[name]())
        turn += 1

    benchmark.pedantic(one_round, rounds=ROUNDS, iterations=1)
    return times


def report(benchmark, title: str, times: dict[str, list[float]], pairs: dict[str, str], **facts: object) -> None:  # type: ignore[no-untyped-def]
    """Prints and records rates, and of each pair the first one's rate over the second's."""
    rates = {name: BYTES / statistics.median(each) / 1e9 for name, each in times.items()}
    ratios = {
        f"{ours} / {theirs}": statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))
        for ours, theirs in pairs.items()
    }
    data = {
        "what": f"{title}: {FRAMES} frames of {FORMAT.layers} layers, {FORMAT.page_bytes} bytes a page",
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        **facts,
        "gigabytes_per_second": rates,
        "ratios": ratios,
        "target": TARGET,
        "round_seconds": times,
    }
    benchmark.extra_info.update(data)
    lines = [f"\n{data['what']}", f"{data['device']}, {data['cores']} cores"]
    lines += [f"  {name:<42} {rate:7.2f} GB/s" for name, rate in rates.items()]
    for name, ratio in ratios.items():
        lines.append(f"  {name:<62} {ratio:5.2f}   target {TARGET}: {'met' if ratio >= TARGET else 'MISSED'}")
    print("\n".join(lines))
    out = os.environ.get("LONGLIVE_BENCH_OUT")
    if out:
        path = Path(out) / "bank.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | {title: data}, indent=1) + "\n")


@pytest.mark.benchmark(group="memory bank, host")
def test_host_append_and_fetch(benchmark) -> None:  # type: ignore[no-untyped-def]
    window, flat = source(), source().view(-1)
    keys, values = views(window)
    each = FORMAT.data_bytes // 2
    mine = [flat[i * each : (i + 1) * each].view(torch.int16) for i in range(flat.numel() // each)]
    plain_append = Copies(list(zip(mine, [p.view(-1) for p in pages(window, range(FRAMES))], strict=True)))
    plain_append.run()
    assert all(torch.equal(a, b.view(-1)) for a, b in zip(mine, pages(window, range(FRAMES)), strict=True))
    target = torch.zeros_like(window)
    plain_fetch = Copies(list(zip([p.view(-1) for p in pages(target, range(FRAMES))], mine, strict=True)))
    plain_fetch.run()
    assert torch.equal(target.view(torch.int16), window.view(torch.int16))

    # Two banks: the one that is appended to has no slots, which commit would fill as well. The other has slots for one
    # group of frames and holds two groups, so that every fetch copies.
    store, serve = bank(2 * FRAMES, 0, 0, None), bank(2 * FRAMES, 0, FRAMES, None)
    groups = [list(range(FRAMES)), list(range(FRAMES, 2 * FRAMES))]
    for group in groups:
        store.commit(group, keys, values)
        serve.commit(group, keys, values)
    held = 0

    def append() -> float:
        store.forget(groups[0])
        return seconds(lambda: store.commit(groups[0], keys, values))

    def fetch_host() -> float:
        nonlocal held
        held = 1 - held
        taken = seconds(lambda: fetch(serve, groups[held]))
        serve.release(groups[held])
        return taken

    for _ in range(2):
        fetch_host()
        check_slots(serve, groups[held], window)
        serve.slots.view(torch.int16).fill_(0)  # wrong for the bank; the next fetch must put all of it right
        # ... which it does because none of its frames is resident
    before = serve.stats()["fetched_bytes"]
    fetch_host()
    check_slots(serve, groups[held], window)
    assert serve.stats()["fetched_bytes"] - before == BYTES
    times = take_turns(
        benchmark,
        {
            "append, memcpy": lambda: seconds(plain_append.run),
            "append, bank": append,
            "fetch, memcpy": lambda: seconds(plain_fetch.run),
            "fetch, bank": fetch_host,
        },
    )
    store.close()
    serve.close()
    report(benchmark, "host", times, {"append, bank": "append, memcpy", "fetch, bank": "fetch, memcpy"})


@pytest.mark.benchmark(group="memory bank, disk")
def test_disk_write_and_read(benchmark, folder: Path) -> None:  # type: ignore[no-untyped-def]
    """Spills are timed from the end of a commit, which starts them, to their end."""
    window = source()
    keys, values = views(window)
    pieces = FRAMES * FORMAT.layers * FORMAT.samples
    raw = RawDisk(folder, FORMAT.page_bytes, 4 * pieces, QUEUE)
    raw.check()
    groups = [list(range(FRAMES * i, FRAMES * (i + 1))) for i in range(4)]
    # Host memory for two groups: one that comes and one on its way to disk, or to the slots.
    store, serve = bank(2 * FRAMES, 4 * FRAMES, 0, folder), bank(2 * FRAMES, 4 * FRAMES, FRAMES, folder)
    for made in (store, serve):
        for group in groups:
            made.commit(group, keys, values)
            made.flush()
    turn = {"write": 0, "read": 0, "raw write": 0, "raw read": 0}

    def following(name: str) -> int:
        turn[name] = (turn[name] + 1) % len(groups)
        return turn[name]

    def spill() -> float:
        group = groups[following("write")]
        store.forget(group)
        before = store.stats()["spilled"]
        store.commit(group, keys, values)
        taken = seconds(store.flush)
        assert store.stats()["spilled"] - before == FRAMES
        return taken

    def fetch_disk() -> float:
        group = groups[following("read")]
        before = serve.stats()["hits_disk"]
        taken = seconds(lambda: fetch(serve, group))
        assert serve.stats()["hits_disk"] - before == FRAMES
        serve.release(group)
        return taken

    def raw_transfer(name: str, transfer: Callable[[Sequence[int]], None]) -> float:
        first = following(name) * pieces
        return seconds(lambda: transfer(range(first, first + pieces)))

    for _ in groups:
        fetch_disk()
        check_slots(serve, groups[turn["read"]], window)
    times = take_turns(
        benchmark,
        {
            "write, raw": lambda: raw_transfer("raw write", raw.write),
            "write, bank": spill,
            "read, raw": lambda: raw_transfer("raw read", raw.read),
            "read, bank (copies to slots included)": fetch_disk,
        },
    )
    buffered = serve.stats()["fallbacks"]["buffered_shards"]
    store.close()
    serve.close()
    raw.close()
    report(
        benchmark,
        "disk",
        times,
        {"write, bank": "write, raw", "read, bank (copies to slots included)": "read, raw"},
        queue_depth=QUEUE,
        direct_io=buffered == 0,
    )
