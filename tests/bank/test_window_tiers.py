"""The window over a memory bank: the same results, bit for bit, whatever the tiers hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_window_properties import WIDTH, Case, build, embeddings_of, retrieving
from window_pair import Pair, one_thread, rejected

from longlive_rag_ops import BankConfig, MemoryBank, MemoryWindow, WindowConfig
from longlive_rag_ops.bank.page_format import PageFormat
from longlive_rag_ops.history import least_history
from longlive_rag_ops.replay import replay
from longlive_rag_ops.traces import load_trace

__all__ = ["one_thread"]
TRACES = sorted((Path(__file__).parents[1] / "data" / "traces").glob("trace_*.safetensors"))
SMALL = {"layers": 2, "batch": 1, "grid": (2, 2), "kv_heads": 1, "heads": 2, "head_dim": 16}


def record_bytes(pair_options: dict[str, Any], storage: str = "plain") -> int:
    tokens = pair_options["grid"][0] * pair_options["grid"][1]
    sizes = (pair_options["layers"], pair_options["batch"], tokens, pair_options["kv_heads"], pair_options["head_dim"])
    return PageFormat(storage, *sizes, pair_options.get("dtype", torch.float32)).record_bytes


def tiers(case: Case, folder: Path, storage: str = "plain") -> Iterator[tuple[str, BankConfig, int | None]]:
    """Banks from ample to the least that is allowed, with the device slots beside them."""
    config, batch = WindowConfig(**case.window), case.tensors["batch"]
    frames = sum(len(block[0]) for block in case.picks)
    record, fetched = record_bytes(case.tensors, storage), batch * config.top_k
    least = config.sink + least_history(config, batch)
    options: dict[str, Any] = {"storage": storage, "slab_bytes": 3 * record}
    room = max(frames, least) * record
    yield "all on the device", BankConfig(host_bytes=2 * room, **options), frames
    yield "all in host memory", BankConfig(host_bytes=room, **options), fetched
    spill = {"disk_bytes": room, "spill": folder, "shard_bytes": 2 * record}
    fewest = config.frames_per_block + fetched
    yield "most on disk", BankConfig(host_bytes=fewest * record, **spill, **options), None
    yield "most on disk, few slots", BankConfig(host_bytes=fewest * record, **spill, **options), fetched


def outputs(case: Case, **options: Any) -> list[torch.Tensor]:
    pair = Pair(**case.window, **case.tensors, width=WIDTH, seed=case.seed, **options)
    blocks = pair.run(embeddings_of(case), forwards=case.forwards)
    outs = [out for block in blocks for forward in block for out in forward]
    outs += pair.forward()
    if pair.window.bank is not None:
        stats = pair.window.bank.stats()
        assert stats["misses"] == stats["damaged_pages"] == stats["forgotten_frames"] == 0
        pair.window.bank.close()
    return outs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(700, 706))
def test_results_do_not_depend_on_the_tiers(seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    case = retrieving(build(random.Random(seed).randint))
    case.tensors["dtype"] = dtype
    resident = outputs(case)
    for name, bank, slots in tiers(case, tmp_path):
        tiered = outputs(case, bank=bank, history_slots=slots)
        assert all(torch.equal(a, b) for a, b in zip(resident, tiered, strict=True)), name
    assert not list(tmp_path.iterdir()), "the spill folder keeps no named file"


def long_run(storage: str, bank: BankConfig, slots: int | None, blocks: int = 30) -> tuple[Any, ...]:
    """Random blocks whose choices wander; outputs, choices, and what the bank counted."""
    config = WindowConfig(8, 1, 3, 1, 2)
    window = MemoryWindow(
        config, layers=2, batch=2, tokens_per_frame=4, kv_heads=2, head_dim=16, bank=bank, history_slots=slots
    )
    generator, outs, choices = torch.Generator().manual_seed(5), [], []
    for start in range(0, 2 * blocks, 2):
        for _ in range(2):
            for layer in range(2):
                q, k, v = torch.randn(3, 2, 8, 2, 16, generator=generator).unbind(0)
                outs.append(window.attend(layer, q, k, v, start, (2, 2)))
        choices.append(window.selected)
        embeddings = torch.randn(2, 2, 6, generator=generator)
        if start % 4:
            window.retrieve(start, embeddings)
            embeddings.fill_(0)  # the window has its own copy
            window.finish(start)
        else:
            window.finish(start, embeddings)
    assert window.bank is not None
    stats = window.bank.stats()
    window.bank.close()
    return outs, choices, stats


@pytest.mark.parametrize("storage", ["plain", "int8", "fp8"])
def test_every_storage_gives_the_same_from_every_tier(storage: str, tmp_path: Path) -> None:
    record = PageFormat(storage, 2, 2, 4, 2, 16, torch.float32).record_bytes
    ample = long_run(storage, BankConfig(host_bytes=100 * record, storage=storage), 100)
    spill = BankConfig(
        host_bytes=16 * record, disk_bytes=80 * record, spill=tmp_path, storage=storage, slab_bytes=record
    )
    few = long_run(storage, spill, 6)
    assert ample[1] == few[1]
    assert all(torch.equal(a, b) for a, b in zip(ample[0], few[0], strict=True))
    assert ample[2]["hits_device"] > 0 and few[2]["hits_disk"] > 10 and few[2]["hits_host"] > 10
    assert few[2]["host"]["reserved_bytes"] <= 16 * record and few[2]["disk"]["reserved_bytes"] <= 80 * record


def test_quantised_memory_differs_from_plain(tmp_path: Path) -> None:
    """Every retrieved page has passed the quantiser, also those that never left the device."""
    runs = {
        storage: long_run(storage, BankConfig(host_bytes="1MiB", storage=storage), 100)
        for storage in ("plain", "int8", "fp8")
    }
    plain = runs["plain"][0]
    for storage in ("int8", "fp8"):
        errors = [float((a - b).abs().max()) for a, b in zip(runs[storage][0], plain, strict=True)]
        retrieving_from = next(i for i, row in enumerate(runs["plain"][1]) if any(row)) * 4
        assert max(errors[:retrieving_from]) == 0
        assert min(errors[retrieving_from:]) > 0 and max(errors) < 0.3


@pytest.mark.parametrize("policy", ["oldest", "least_retrieved", "most_redundant"])
def test_a_full_bank_forgets(policy: str) -> None:
    """What was forgotten is never chosen again; everything else agrees with the simulator."""
    case = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1, "frames_per_block": 2}
    least = 1 + least_history(WindowConfig(**case), 1)
    bank = BankConfig(host_bytes=(least + 3) * record_bytes(SMALL), policy=policy)
    pair = Pair(**case, **SMALL, bank=bank)
    for _ in range(20):
        pair.forward()
        pair.finish()
        assert pair.window.bank is not None
        held = set(pair.window.bank.frames())
        assert 0 in held, "a sink frame is never forgotten"
        assert len(held) <= least + 3
        pair.sim.forgotten = set(range(1, pair.start)) - held
    assert len(pair.sim.forgotten) == pair.window.stats()["forgotten_frames"] == 40 - least - 3
    if policy == "oldest":
        kept = {f for row in pair.window.selected for f in row}
        free = sorted(held - {0} - kept)
        assert max(pair.sim.forgotten) < free[0]


def test_a_full_bank_that_may_not_forget_says_so() -> None:
    case = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1, "frames_per_block": 2}
    pair = Pair(**case, **SMALL, bank=BankConfig(host_bytes=14 * record_bytes(SMALL)))
    for _ in range(7):
        pair.block()
    pair.forward()
    selected, frames = pair.window.selected, pair.window.window_frames
    for _ in range(2):
        with pytest.raises(RuntimeError, match="used up"):
            pair.window.finish(pair.start, pair.embeddings())
        assert (pair.window.selected, pair.window.window_frames) == (selected, frames)
    pair.forward()  # what was accepted is still served
    pair.window.reset()
    assert pair.window.bank is not None and len(pair.window.bank) == 0


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_traces_replay_from_the_tiers(path: Path, tmp_path: Path) -> None:
    trace = load_trace(path)
    sizes = trace.config
    page = (sizes["tokens_per_frame"], sizes["heads"], sizes["head_dim"])
    record = PageFormat("plain", 1, sizes["batch"], *page, torch.float32).record_bytes
    fewest = 2 * sizes["frames_per_block"] + 2 * sizes["batch"] * sizes["top_k"]
    bank = BankConfig(host_bytes=fewest * record, disk_bytes=200 * record, spill=tmp_path)
    for result in replay(trace, bank=bank):
        assert result.passed, result


WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "not a config": ({"bank": {"host_bytes": 1}}, ("bank", "dict")),
    "too little": ({"bank": BankConfig(host_bytes="32KiB")}, ("host_bytes",)),
    "what to do when full twice": (
        {"bank": BankConfig(host_bytes="64MiB"), "on_full": "forget"},
        ("on_full", "forget"),
    ),
    "too few slots": ({"bank": BankConfig(host_bytes="64MiB"), "history_slots": 5}, ("history_slots", "5", "6")),
}


@pytest.mark.parametrize("name", WRONG)
def test_window_refuses(name: str) -> None:
    options, words = WRONG[name]
    with rejected(*words):
        MemoryWindow(WindowConfig(), layers=1, batch=1, tokens_per_frame=2, kv_heads=1, head_dim=16, **options)


def test_device_bytes_bound_what_is_fetched() -> None:
    record = record_bytes(SMALL)
    sizes = [2 * 2 * 4 * 16 * 4 * frames for frames in (2, 5)]  # keys and values, layers, tokens, channels, float32
    for held, slots in zip(sizes, (2, 5), strict=True):
        pair = Pair(6, 1, 2, 1, 2, **SMALL, bank=BankConfig(host_bytes=40 * record, device_bytes=held))
        for _ in range(10):
            pair.block()
        assert pair.window.pool.shape[3] == 6 + slots and pair.window.bank is not None
        assert pair.window.bank.stats()["device"]["reserved_bytes"] == held
    with rejected("device_bytes"):
        Pair(6, 1, 2, 1, 2, **SMALL, bank=BankConfig(host_bytes=40 * record, device_bytes=sizes[0] - 1))


def test_a_bank_needs_retrieval() -> None:
    with rejected("top_k", "0"):
        MemoryWindow(
            WindowConfig(top_k=0),
            layers=1,
            batch=1,
            tokens_per_frame=2,
            kv_heads=1,
            head_dim=16,
            bank=BankConfig(host_bytes="64MiB"),
        )


def test_embeddings_are_given_once() -> None:
    pair = Pair(6, 1, 2, 1, 2, **SMALL)
    pair.forward()
    embeddings = pair.embeddings()
    pair.window.retrieve(0, embeddings)
    with rejected("embeddings", "retrieve"):
        pair.window.finish(0, embeddings)
    with rejected("start_frame"):
        pair.window.retrieve(2, embeddings)
    with rejected("embeddings", "int64"):
        pair.window.retrieve(0, embeddings.long())
    pair.window.finish(0)
    pair.sim.finish(2, embeddings)
    pair.block()


class Refused(Exception):
    """Raised by a bank's method that a test has made fail."""


@contextmanager
def refusing(bank: MemoryBank, method: str) -> Iterator[None]:
    """The bank's method raises, once."""

    def refuse(*_: object, **__: object) -> None:
        setattr(bank, method, call)
        raise Refused

    call = getattr(bank, method)
    setattr(bank, method, refuse)
    with pytest.raises(Refused):
        yield
    assert getattr(bank, method) == call, "was called"


@pytest.mark.parametrize("method", ["search", "commit", "prefetch", "release"])
@pytest.mark.parametrize("early", [False, True])
def test_a_block_that_could_not_be_finished_can_be(method: str, early: bool) -> None:
    """Whatever fails in `finish`, it may be called again; without `retrieve`, with other embeddings."""
    pair = Pair(6, 1, 2, 1, 2, **SMALL, bank=BankConfig(host_bytes=40 * record_bytes(SMALL)))
    bank = pair.window.bank
    assert bank is not None
    for _ in range(14):
        pair.forward()
        first, embeddings = pair.embeddings(), pair.embeddings()
        again = method in ("search", "commit")  # what was stored keeps its embeddings
        if early and method == "search":
            with refusing(bank, method):
                pair.window.retrieve(pair.start, first)
        if early:
            pair.window.retrieve(pair.start, embeddings)
        if not (early and method == "search"):
            with refusing(bank, method):
                pair.window.finish(pair.start, *([] if early else [first if again else embeddings]))
        pair.window.finish(pair.start, *([] if early or not again else [embeddings]))
        pair.sim.finish(2, embeddings)
    pair.block()
    assert pair.window.selected[0]


def test_a_block_that_could_not_begin_can() -> None:
    """Pages that were replaced while they were fetched are fetched again, be it at the second attempt."""
    pair = Pair(6, 1, 2, 0, 2, **SMALL, bank=BankConfig(host_bytes=80 * record_bytes(SMALL)), history_slots=2)
    bank, refused = pair.window.bank, 0
    assert bank is not None
    for _ in range(20):
        asked = sorted(pair.window._history._fetched)  # type: ignore[attr-defined]
        for frame in asked:
            keys, values = bank.read(frame)
            bank.commit([frame], [keys], [values], replace=True)
        others = [frame for frame in range(1, pair.start) if frame not in asked][:2]
        if asked and len(others) == 2:
            bank.prefetch(others)  # take the slots
            bank.release(others)
            with refusing(bank, "prefetch"):
                pair.forward()
            refused += 1
        pair.block()
    assert refused > 3


def test_a_page_can_be_looked_at_from_every_tier(tmp_path: Path) -> None:
    record = record_bytes(SMALL)
    banks: list[BankConfig | None] = [
        None,
        BankConfig(host_bytes=12 * record, disk_bytes=40 * record, spill=tmp_path),
    ]
    pages = []
    for bank in banks:
        pair = Pair(6, 1, 2, 1, 2, **SMALL, bank=bank)
        for _ in range(12):
            pair.block()
        pages.append(torch.stack([pair.window.history_page(frame) for frame in range(1, 24)]))
        with pytest.raises(KeyError, match="24"):
            pair.window.history_page(24)
    assert torch.equal(*pages)
