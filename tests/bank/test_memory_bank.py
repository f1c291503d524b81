"""The memory bank as its users see it: bytes, generations, what is forgotten, agreement of index and pages, closing."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import StandIn, stand_in

from longlive_rag_ops import BankConfig, BankFull, DamagedPage, MemoryBank, PageFormat
from longlive_rag_ops.bank import statistics
from longlive_rag_ops.bank.config import STORAGES
from longlive_rag_ops.bank.faults import FaultWatch
from longlive_rag_ops.bank.policies import MostRedundant
from longlive_rag_ops.bank.retrieval_log import MOST_ENTRIES, RetrievalLog
from longlive_rag_ops.index import FrameIndex

LAYERS, SAMPLES, EMBEDDING = 2, 2, 6
SHAPE = (3, 2, 8)  # of a page


def page_format(storage: str = "plain", dtype: torch.dtype = torch.float32) -> PageFormat:
    return PageFormat(storage, LAYERS, SAMPLES, *SHAPE, dtype)


def pages(frames: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, LAYERS, SAMPLES, frames, *SHAPE, generator=generator).to(dtype)
    return both[0], both[1]


def embeddings(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(SAMPLES, frames, EMBEDDING, generator=torch.Generator().manual_seed(seed))


def make(
    host: int = 12, disk: int = 0, spill: Path | None = None, storage: str = "plain", **options: Any
) -> MemoryBank:
    """A bank with limits in frames."""
    form = page_format(storage)
    settings = {name: options.pop(name) for name in ("policy", "log", "direct_io") if name in options}
    config = BankConfig(
        host_bytes=host * form.record_bytes,
        disk_bytes=disk * form.record_bytes,
        spill=spill if disk else None,
        storage=storage,
        slab_bytes=3 * form.record_bytes,
        shard_bytes=4 * form.record_bytes,
        **settings,
    )
    return MemoryBank(form, config, **{"device_slots": 4, "most_fetched": 3, **options})


def commit(bank: MemoryBank, frames: Any, seed: int | None = None, embedded: bool = True, **options: Any) -> list[int]:
    """Commits frames whose pages and embeddings depend on their numbers; overwrites the pages at once."""
    frames = list(frames)
    seeds = [frame if seed is None else seed + frame for frame in frames]
    keys, values = (torch.cat(part, 2) for part in zip(*(pages(1, seed) for seed in seeds), strict=True))
    rows = torch.cat([embeddings(1, seed) for seed in seeds], 1) if embedded else None
    forgotten = bank.commit(frames, keys, values, rows, **options)
    keys.fill_(torch.nan)
    values.fill_(torch.nan)
    return forgotten


def stored(bank: MemoryBank, seed: int) -> torch.Tensor:
    keys, values = pages(1, seed)
    return bank.format.encode(keys[:, :, 0], values[:, :, 0])


def in_slot(bank: MemoryBank, slot: int) -> torch.Tensor:
    """What a device slot holds, as it would be stored."""
    if bank.format.quantised:
        return bank.slots[:, :, slot].cpu()
    return bank.format.encode(bank.slots[:, 0, :, slot], bank.slots[:, 1, :, slot]).cpu()


def check_agreement(bank: MemoryBank, without: tuple[int, ...] = ()) -> None:
    indexed = [] if bank.index is None else bank.index.frames()
    assert indexed == [frame for frame in bank.frames() if frame not in without]


def fetch(bank: MemoryBank, frames: Any) -> list[int]:
    """Brings frames in; returns their slots."""
    bank.prefetch(frames)
    assert bank.settle() == []
    for layer in range(LAYERS):
        bank.wait(layer)
    return [bank.slot(frame) for frame in frames]


# Bytes


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_every_tier_gives_back_the_bytes_that_were_committed(tmp_path: Path, storage: str, tier: str) -> None:
    sizes = {"device": (12, 0, 12), "host": (12, 0, 3), "disk": (6, 12, 3)}[tier]
    host, disk, slots = sizes
    with make(host, disk, tmp_path, storage, device_slots=slots) as bank:
        for start in range(0, 12, 3):
            commit(bank, range(start, start + 3))
        bank.flush()
        stats = bank.stats()
        assert stats[tier]["frames"] >= (6 if tier == "disk" else 12)
        for frame in range(12):
            assert torch.equal(bank.record(frame), stored(bank, frame)), frame
        for start in range(0, 12, 3):
            frames = range(start, start + 3)
            for frame, slot in zip(frames, fetch(bank, frames), strict=True):
                assert torch.equal(in_slot(bank, slot), stored(bank, frame)), frame
            bank.release(frames)
        stats = bank.stats()
        assert stats["hits_device"] + stats["hits_host"] + stats["hits_disk"] == 12
        assert stats[f"hits_{tier}"] > 0 and stats["misses"] == 0
        check_agreement(bank)


def test_keys_and_values_come_back_in_the_compute_dtype() -> None:
    with make() as bank:
        commit(bank, [5])
        keys, values = bank.read(5)
        want = pages(1, 5)
        assert torch.equal(keys, want[0][:, :, 0]) and torch.equal(values, want[1][:, :, 0])
    with make(storage="int8") as bank:
        commit(bank, [5])
        keys, _ = bank.read(5)
        torch.testing.assert_close(keys, want[0][:, :, 0], rtol=0, atol=0.03)


def test_views_of_a_window_s_pool_are_committed_and_its_other_slots_used() -> None:
    form = page_format(dtype=torch.bfloat16)
    pool = form.slots(9, "cpu")
    config = BankConfig(host_bytes=20 * form.record_bytes)
    with MemoryBank(form, config, slots=pool, first_slot=4, device_slots=3, most_fetched=3) as bank:
        keys, values = pages(4, dtype=torch.bfloat16)
        pool[:, 0, :, :4], pool[:, 1, :, :4] = keys, values
        views = [(pool[:, 0, :, slot], pool[:, 1, :, slot]) for slot in (2, 0, 3)]
        bank.commit([7, 8, 9], [k for k, _ in views], [v for _, v in views])
        pool[:, :, :, :4] = torch.nan
        assert sorted(bank.slot(frame) for frame in (7, 8, 9)) == [4, 5, 6]
        for frame, source in ((7, 2), (8, 0), (9, 3)):
            assert torch.equal(pool[:, 0, :, bank.slot(frame)], keys[:, :, source])
            assert torch.equal(bank.read(frame)[1], values[:, :, source])
        assert not pool[:, :, :, 7:].any()


def test_one_tensor_and_a_list_of_views_are_the_same() -> None:
    keys, values = pages(3)
    with make() as one, make() as other:
        one.commit(range(3), keys, values)
        other.commit(iter(range(3)), list(keys.unbind(2)), list(values.unbind(2)))
        for frame in range(3):
            assert torch.equal(one.record(frame), other.record(frame))


def test_limits_hold_whatever_happens(tmp_path: Path) -> None:
    with make(8, 10, tmp_path, policy="oldest", sink=1) as bank:
        for start in range(0, 60, 3):
            commit(bank, range(start, start + 3))
            frames = bank.frames()[-3:]
            fetch(bank, frames)
            bank.release(frames)
            stats = bank.stats()
            for tier in ("device", "host", "disk"):
                assert stats[tier]["bytes"] <= stats[tier]["reserved_bytes"] <= stats[tier]["limit_bytes"], tier
            assert len(bank) <= 8 - 3 + 10
            check_agreement(bank)
        assert len(bank) == 8 - 3 + 10 and bank.room() == 0
        assert bank.stats()["forgotten"] == {"oldest": 60 - 15, "asked": 0, "damaged": 0}


# Generations


def test_a_replaced_frame_has_its_new_pages_in_every_tier(tmp_path: Path) -> None:
    with make(7, 12, tmp_path, device_slots=3) as bank:
        for start in range(0, 12, 3):
            commit(bank, range(start, start + 3))
        bank.flush()
        rows = bank.embedding(1)
        assert commit(bank, [0, 1, 2], seed=1000, embedded=False, replace=True) == []
        assert [bank.generation(frame) for frame in (0, 1, 2, 3)] == [1, 1, 1, 0]
        assert torch.equal(bank.embedding(1), rows)  # kept
        bank.flush()
        for frame, slot in zip(range(3), fetch(bank, range(3)), strict=True):
            assert torch.equal(in_slot(bank, slot), stored(bank, 1000 + frame))
            assert torch.equal(bank.record(frame), stored(bank, 1000 + frame))
        commit(bank, [1], seed=2000, replace=True)
        assert bank.generation(1) == 2 and not torch.equal(bank.embedding(1), rows)
        assert bank.stats()["replaced"] == 4
        check_agreement(bank)


def test_replacing_drops_fetches_and_keeps_pins() -> None:
    with make(policy="oldest") as bank:
        commit(bank, range(3))
        bank.pin([1])
        bank.prefetch([0, 1, 2])
        commit(bank, [1, 2], seed=50, replace=True)
        assert bank.settle() == [(1, "replaced"), (2, "replaced")]
        assert bank.pins(1) == 1 and bank.stats()["pinned_frames"] == 2
        bank.forget([2])  # which nobody holds
        bank.release([0, 1, 2])
        assert bank.stats()["pinned_frames"] == 1
        (slot,) = fetch(bank, [1])
        assert torch.equal(in_slot(bank, slot), stored(bank, 51))


# What is forgotten


@pytest.mark.parametrize("policy", ["oldest", "least_retrieved", "most_redundant"])
def test_sink_pinned_and_fetched_frames_stay(policy: str) -> None:
    with make(12, policy=policy, sink=2) as bank:
        commit(bank, range(2), embedded=False)
        gone: list[int] = []
        kept = [0, 1, 4, 5, 6]
        for start in range(2, 60, 2):
            gone += commit(bank, range(start, start + 2))
            if start == 6:
                bank.pin([4, 5])
                bank.pin([4])
                bank.unpin([4])
                fetch(bank, [6])
            check_agreement(bank, without=(0, 1))
        assert len(bank) == 12 and len(gone) == 60 - 12 == bank.stats()["forgotten_frames"]
        assert all(frame in bank for frame in kept) and not set(gone) & set(kept)
        assert sorted(gone + bank.frames()) == list(range(60))
        bank.unpin([4, 5])
        bank.release([6])
        if policy == "oldest":
            assert commit(bank, [60, 61]) == [4, 5]


def test_the_least_retrieved_are_those_that_searches_find_least() -> None:
    with make(12, policy="least_retrieved") as bank:
        for start in range(0, 12, 3):
            commit(bank, range(start, start + 3))
        for _ in range(3):
            ids, _ = bank.search(embeddings(1, 5)[:, 0], 5, end_frame=12)
        found = set(ids.flatten().tolist())
        assert [bank.retrievals(f) for f in range(12)] == [3 * ids.flatten().tolist().count(f) for f in range(12)]
        never = [frame for frame in range(12) if frame not in found]
        assert commit(bank, [12, 13]) == never[:2]
        assert bank.retrievals(never[0]) == 0


def test_the_most_redundant_go_one_by_one() -> None:
    with make(12, policy="most_redundant") as bank:
        for start in range(0, 9, 3):
            commit(bank, range(start, start + 3))
        keys, values = pages(3)
        twins = torch.cat([embeddings(1, 4)] * 3, 1)
        twins[:, 1, 0] += 1e-3
        bank.commit([20, 21, 22], keys, values, twins)  # as frame 4, nearly as frame 4, as frame 4
        assert commit(bank, [30, 31]) == [4, 20]  # not 22 too: it is alone with 21 then
        assert commit(bank, [32]) == [21]


def test_a_full_bank_says_so_and_is_unchanged() -> None:
    with make(9) as bank:
        commit(bank, range(3))
        commit(bank, range(3, 6))
        commit(bank, range(6, 9))
        with pytest.raises(BankFull, match=r"host_bytes are used up by 9 frames and 2 more .*choose a policy"):
            commit(bank, [9, 10])
        assert bank.frames() == list(range(9)) and bank.room() == 0
        check_agreement(bank)
        commit(bank, [4], replace=True)  # needs no room
    with make(9, policy="oldest", sink=1) as bank:
        for start in range(0, 9, 3):
            commit(bank, range(start, start + 3))
        bank.pin(range(9))
        bank.unpin([8])
        with pytest.raises(BankFull, match=r"only 1 may be forgotten: .*sink frames \(below 1\), pinned, or fetched"):
            commit(bank, [9, 10])
        assert bank.frames() == list(range(9))
        assert commit(bank, [9]) == [8]


def test_forgetting_by_name() -> None:
    with make(sink=1) as bank:
        commit(bank, range(3))
        bank.pin(2)
        with pytest.raises(ValueError, match="frames must not name pinned frames, got 2"):
            bank.forget([1, 2])
        bank.unpin(2)
        fetch(bank, [1])
        for wrong in ([1], [0, 9]):
            with pytest.raises(ValueError):
                bank.forget(wrong)
        assert bank.frames() == [0, 1, 2]
        bank.release([1])
        bank.forget([0, 1])
        assert bank.frames() == [2] == bank.index.frames()
        assert bank.stats()["forgotten"] == {"asked": 2, "damaged": 0}
        commit(bank, [0, 1])
        assert bank.generation(0) == 0
        bank.clear()
        assert bank.frames() == [] and bank.index is None and bank.room() == 12 and bank.settle() == []
        commit(bank, range(3))
        assert torch.equal(bank.record(1), stored(bank, 1))


# Retrieval


def test_searches_are_those_of_the_op() -> None:
    with make(20, sink=1) as bank:
        query = embeddings(1, 77)[:, 0]
        ids, scores = bank.search(query, 3, end_frame=9)
        assert ids.tolist() == [[-1] * 3] * 2 and (scores == -torch.inf).all()
        commit(bank, [0], embedded=False)
        for start in range(1, 16, 3):
            commit(bank, range(start, start + 3))
        rows = torch.cat([embeddings(1, frame) for frame in range(16)], 1)
        for options in (
            {},
            {"recent_exclude": 4},
            {"min_score": 0.1},
            {"diversity": 0.5},
            {"first_frame": 5},
            {"first_frame": 0},
        ):
            got = bank.search(query, 5, end_frame=14, **options)
            want = torch.ops.longlive.topk_retrieve(
                query,
                rows[:, 1:],
                torch.arange(1, 16).expand(2, -1),
                torch.tensor([15]),
                torch.tensor([14]),
                5,
                **{"first_frame": 1, **options},
            )
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


def test_embeddings_that_are_not_finite_are_counted_and_found_nowhere() -> None:
    with make() as bank:
        keys, values = pages(3)
        rows = embeddings(3)
        rows[0, 1] = torch.nan
        rows[:, 2] = torch.inf
        bank.commit(range(3), keys, values, rows)
        ids, _ = bank.search(rows[:, 0], 3, end_frame=3)
        assert sorted(ids[0].tolist()) == [-1, -1, 0] and sorted(ids[1].tolist()) == [-1, 0, 1]
        assert bank.stats()["non_finite_embeddings"] == 3
        check_agreement(bank)


def test_fetched_frames_keep_their_slots_until_they_are_released() -> None:
    with make(12, device_slots=3) as bank:
        for start in range(0, 9, 3):
            commit(bank, range(start, start + 3))
        slots = fetch(bank, [4, 5])
        with pytest.raises(BankFull):
            bank.prefetch([6, 7])
        assert bank.settle() == [] and bank.slot(6) == -1
        for frame in (6, 7, 8):
            fetch(bank, [frame])
            bank.release([frame])
        assert [bank.slot(frame) for frame in (4, 5)] == slots
        for frame, slot in zip((4, 5), slots, strict=True):
            assert torch.equal(in_slot(bank, slot), stored(bank, frame))
        bank.release([4, 5])
        fetch(bank, [0, 1, 2])
        assert bank.slot(4) == bank.slot(5) == -1 and bank.stats()["evictions"] > 0


def test_what_is_missing_is_named_once() -> None:
    with make() as bank:
        commit(bank, range(3))
        bank.prefetch([1, 9])
        assert bank.settle() == [(9, "missing")] and bank.settle() == []
        bank.release([1, 9])
        bank.prefetch([8])
        bank.wait(1)  # settles
        assert bank.settle() == [(8, "missing")] and bank.stats()["misses"] == 2


def spilled_files(folder: Path) -> list[str]:
    """The disk tier's files, which have no names, through this process's descriptors."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()).startswith(str(folder.resolve())):
                found.append(str(link))
        except FileNotFoundError:  # the one that lists
            continue
    return found


def spoil(folder: Path, size: int) -> None:
    """Flips a bit in every page on disk: the bytes at the start of each."""
    files = spilled_files(folder)
    assert files
    for file in files:
        fd = os.open(file, os.O_RDWR)
        try:
            for offset in range(0, os.fstat(fd).st_size, size):
                byte = os.pread(fd, 1, offset)
                os.pwrite(fd, bytes([byte[0] ^ 1]), offset)
            os.fsync(fd)
        finally:
            os.close(fd)


def on_disk_alone(bank: MemoryBank) -> list[int]:
    return [frame for frame in bank.frames() if bank._core.where(frame)[:3] == (-1, False, True)]


@pytest.mark.parametrize("direct", [True, False])
def test_damaged_pages_are_misses_and_leave_the_index(tmp_path: Path, direct: bool) -> None:
    with make(6, 12, tmp_path, device_slots=3, policy="oldest", direct_io=direct) as bank:
        for start in range(0, 12, 3):
            commit(bank, range(start, start + 3))
        bank.flush()
        first, second, third, *_ = on_disk_alone(bank)
        spoil(tmp_path, bank.format.page_bytes)
        bank.pin([first])
        bank.prefetch([first, 11])
        with pytest.warns(RuntimeWarning, match=rf"frame {first} is lost, damaged: layer \d, sample \d: ") as caught:
            lost = bank.settle()
        assert len(caught) == 1 and caught[0].filename == __file__
        assert [frame for frame, _ in lost if frame != 11] == [first]
        assert re.fullmatch(r"damaged: layer \d, sample \d: .*", dict(lost)[first])
        assert first not in bank and bank.pins(first) == 0 and bank.slot(first) == -1
        check_agreement(bank)
        with pytest.warns(RuntimeWarning, match=f"frame {second} is lost"), pytest.raises(DamagedPage, match="layer"):
            bank.record(second)
        assert second not in bank
        check_agreement(bank)
        with pytest.raises(KeyError):
            bank.record(second)
        bank.prefetch([third])
        with pytest.warns(RuntimeWarning, match=f"frame {third} is lost"):
            bank.wait(0)
        assert [frame for frame, _ in bank.settle()] == [third]
        stats = bank.stats()
        assert stats["forgotten"]["damaged"] >= 3 and stats["damaged_pages"] >= 3 * LAYERS * SAMPLES
        commit(bank, [first])  # as a new frame
        assert torch.equal(bank.record(first), stored(bank, first)) and bank.generation(first) == 0
        check_agreement(bank)


# Seen from outside


def test_every_statistic_is_described() -> None:
    with make(policy="oldest") as bank:
        stats = bank.stats()
    text = statistics.bank_stats.__doc__
    for name, value in stats.items():
        assert f"``{name}``" in text, name
        for inner in value if isinstance(value, dict) and name != "forgotten" else ():
            assert f"``{inner}``" in text, inner
    json.dumps(stats)


def test_the_log_tells_what_was_found_and_where_it_was(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with make(6, 12, tmp_path, device_slots=3, log=log) as bank:
        for start in range(0, 12, 3):
            commit(bank, range(start, start + 3))
        bank.flush()
        (cold, *_), resident = on_disk_alone(bank), bank.frames()
        warm = next(f for f in resident if bank.slot(f) < 0 and f not in on_disk_alone(bank))
        hot = next(f for f in resident if bank.slot(f) >= 0)
        ids, scores = bank.search(embeddings(1, 5)[:, 0], 3, end_frame=12, min_score=-0.5)
        bank.prefetch([cold, warm, hot, 99][1:])
        assert log.read_text() == ""
        bank.settle()
        (line,) = log.read_text().splitlines()
        entry = json.loads(line)
        assert entry == bank.log.entries()[0]
        assert entry["frames"] == [[f for f in row if f >= 0] for row in ids.tolist()]
        assert [len(row) for row in entry["scores"]] == [len(row) for row in entry["frames"]]
        assert entry["scores"][0][0] == scores[0, 0].item()
        assert (entry["k"], entry["end_frame"], entry["min_score"]) == (3, 12, -0.5)
        assert entry["tiers"] == {str(warm): "host", str(hot): "device", "99": "missing"}
        assert entry["missing"] == {"99": "missing"} and entry["stall_us"] >= 0
        bank.release([warm, hot])
        bank.prefetch([cold])
        bank.settle()
        bank.search(embeddings(1, 5)[:, 0], 2, end_frame=12)
        bank.search(embeddings(1, 6)[:, 0], 2, end_frame=12)
        bank.log.write(tmp_path / "all.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [entry["number"] for entry in entries] == [0, 1, 2]
    assert entries[1]["tiers"] == {str(cold): "disk"} and "frames" not in entries[1]
    assert "tiers" not in entries[2] and len(entries[2]["frames"][0]) == 2
    assert len(log.read_text().splitlines()) == 4  # the last one when the bank was closed


def core_statistics(**changes: Any) -> dict[str, Any]:
    host = {"pageable_slabs": 0, "pageable_reason": "", "refusal": ""}
    disk = {"buffered_shards": 0, "buffered_reason": "", "refusal": ""}
    return {
        "host": host | changes.pop("host", {}),
        "disk": disk | changes.pop("disk", {}),
        "failed_spills": 0,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({"host": {"pageable_slabs": 2, "pageable_reason": "EPERM"}}, {}, r"could not be page-locked \(EPERM\)"),
        ({"host": {"pageable_slabs": 2, "pageable_reason": "EPERM"}}, {"lock_memory": False}, None),
        ({"host": {"refusal": "ENOMEM"}}, {}, "refused host memory below host_bytes: ENOMEM"),
        ({"disk": {"buffered_shards": 1, "buffered_reason": "EINVAL"}}, {}, r"/s takes no direct I/O \(EINVAL\)"),
        ({"disk": {"buffered_shards": 1, "buffered_reason": "EINVAL"}}, {"direct_io": False}, None),
        ({"disk": {"refusal": "ENOSPC"}, "failed_spills": 2}, {}, "no more room in /s: ENOSPC"),
        ({"failed_spills": 1}, {}, "could not be written to /s"),
        ({}, {}, None),
    ],
)
def test_what_went_wrong_is_said_once(changes: Any, options: dict[str, Any], text: str | None) -> None:
    watch = FaultWatch("bank 7", BankConfig(host_bytes=1, disk_bytes=1, spill="/s", **options), locks=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            watch.check(core_statistics(**changes))
    assert len(caught) == (text is not None)
    for warning in caught:
        assert warning.category is RuntimeWarning and re.search(f"^bank 7: .*{text}", str(warning.message))
    quiet = FaultWatch("bank 8", BankConfig(host_bytes=1), locks=False)
    quiet.check(core_statistics(host={"pageable_slabs": 1}))


def test_the_example_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "bank.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["bank"].closed and scope["pages"].shape == (2, 1, 2, 4, 2, 8)
    assert scope["pages"][0, 0, 0].equal(scope["keys"][1, 0, scope["found"][0]])


# Long videos


@pytest.mark.parametrize("policy", ["oldest", "least_retrieved", "most_redundant"])
def test_a_block_asks_the_core_for_no_list_of_all_frames(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block costs the host does not grow with the frames in the bank."""
    with make(30, policy=policy) as bank:
        monkeypatch.setattr(MemoryBank, "frames", lambda self: pytest.fail("a list of all frames"))
        for start in range(0, 90, 3):
            commit(bank, range(start, start + 3))
            ids, _ = bank.search(embeddings(1, start)[:, 0], 1, end_frame=start + 3)
            found = sorted({frame for frame in ids.flatten().tolist() if frame >= 0})
            bank.prefetch(found)
            assert bank.settle() == []
            bank.release(found)
        assert len(bank) == 30 and bank.stats()["forgotten"][policy] == 60


def test_the_log_in_memory_is_bounded() -> None:
    log = RetrievalLog()
    for number in range(MOST_ENTRIES + 20):
        log.prefetched({number: "host"})
        log.settled([], 0)
    assert [len(log.entries()), log.entries()[0]["number"]] == [MOST_ENTRIES, 20]
    assert MOST_ENTRIES <= 10_000


# What fails half-way


def test_embeddings_that_are_refused_leave_new_frames_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the device has no memory for them: the same commit may be tried again."""
    with make(8, policy="most_redundant") as bank:
        commit(bank, range(2))
        for name in ("added", "put"):
            owner = MostRedundant if name == "added" else FrameIndex
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(MemoryError()))
                commit(bank, range(2, 5))
            assert bank.frames() == [0, 1] == bank.index.frames() and bank.stats()["forgotten_frames"] == 0
        commit(bank, range(2, 5))
        commit(bank, range(5, 8))
        commit(bank, range(8, 11))
        assert len(bank) == 8 and bank.frames() == bank.index.frames()


def test_a_refused_commit_does_not_settle_how_long_embeddings_are() -> None:
    with make() as bank:
        with pytest.raises(ValueError, match="not in the bank"):
            commit(bank, range(3), replace=True)
        keys, values = pages(3)
        bank.commit(range(3), keys, values, torch.randn(SAMPLES, 3, EMBEDDING + 1))
        assert bank.index.embedding_dim == EMBEDDING + 1


def test_a_frame_that_is_asked_for_anew_is_not_lost_any_more() -> None:
    with make() as bank:
        commit(bank, range(3))
        bank.prefetch([7])
        bank.wait(0)  # settles, and keeps for `settle` that frame 7 is missing
        commit(bank, [7])
        bank.prefetch([7])
        assert bank.settle() == [] and bank.slot(7) >= 0
        bank.prefetch([8, 9])
        bank.wait(0)
        bank.prefetch([8])
        assert sorted(lost.frame for lost in bank.settle()) == [8, 9]


def test_lost_frames_are_named_though_warnings_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as bank:
        commit(bank, range(3))
        bank.prefetch([5, 1])
        with monkeypatch.context() as patch, pytest.raises(RuntimeWarning):
            patch.setattr(bank, "_lose", lambda _: (_ for _ in ()).throw(RuntimeWarning()))
            bank.settle()
        assert bank.settle() == [(5, "missing")]


def test_what_a_search_gives_may_be_changed() -> None:
    with make() as bank:
        commit(bank, range(3))
        ids, scores = bank.search(embeddings(1)[:, 0], 1, end_frame=3)
        found = ids.flatten().tolist()
        ids.fill_(-1)
        scores.zero_()
        assert sum(bank.retrievals(frame) for frame in range(3)) == SAMPLES
        bank.prefetch([])
        bank.settle()
        (entry,) = bank.log.entries()
        assert [frame for row in entry["frames"] for frame in row] == found
        assert all(score != 0 for row in entry["scores"] for score in row)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_log_that_cannot_be_written_to_stops_nothing() -> None:
    with make(log="/dev/full") as bank:
        commit(bank, range(3))
        with pytest.warns(RuntimeWarning, match=r"the retrieval log /dev/full is not continued: .*No space") as caught:
            for _ in range(3):
                bank.search(embeddings(1)[:, 0], 1, end_frame=3)
                bank.prefetch([1])
                assert bank.settle() == []
                bank.release([1])
        assert len(caught) == 1 and caught[0].filename == __file__
        assert len(bank.log.entries()) == 3


# Errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": None}, TypeError, ("format", "PageFormat", "NoneType")),
        ({"config": 3}, TypeError, ("config", "BankConfig", "int")),
        ({"sink": -1}, ValueError, ("sink", "-1")),
        ({"frames_per_commit": 0}, ValueError, ("frames_per_commit", "0")),
        ({"device_slots": -1}, ValueError, ("device_slots", "-1")),
        ({"first_slot": 2}, ValueError, ("first_slot", "2")),
        ({"most_fetched": 9}, ValueError, ("device_slots", "most_fetched", "9", "got 4 slots")),
        ({"sink": 100}, ValueError, ("host_bytes", "106 frames", "sink 100")),
        ({"device": "meta"}, ValueError, ("device", "meta")),
        ({"slots": torch.zeros(3)}, ValueError, ("slots", "(3,)")),
        ({"slots": page_format().slots(5, "cpu").double()}, TypeError, ("slots", "float64")),
        (
            {"slots": page_format().slots(5, "cpu"), "first_slot": 4, "device_slots": 2},
            ValueError,
            ("slots", "4 + 2", "5"),
        ),
        ({"slots": page_format().slots(5, "meta")}, ValueError, ("slots", "meta", "cpu")),
    ],
)
def test_arguments_that_are_not_allowed(
    options: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    form = page_format()
    arguments = {"format": form, "config": BankConfig(host_bytes=20 * form.record_bytes), "most_fetched": 3}
    arguments |= {} if "slots" in options else {"device_slots": 4}
    with pytest.raises(error) as caught:
        MemoryBank(**(arguments | options))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_configuration_for_other_pages_and_a_folder_that_is_none(tmp_path: Path) -> None:
    form = page_format("int8")
    with pytest.raises(ValueError, match=r"config's storage must be that of format \('int8'\), got 'plain'"):
        MemoryBank(form, BankConfig(host_bytes="1GiB"))
    with pytest.raises(ValueError, match=r"spill must be an existing folder, got '.*nowhere'"):
        make(12, 12, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"frames": []}, ValueError, ("frames", "1 to 3", "0")),
        ({"frames": range(10, 14)}, ValueError, ("frames", "frames_per_commit", "4")),
        ({"frames": [10, 10, 11]}, ValueError, ("frames", "once", "[10, 10, 11]")),
        ({"frames": [10, 1, 11]}, ValueError, ("frames", "1", "in the bank, and replace is False")),
        ({"frames": [0, 1, 11], "replace": True}, ValueError, ("frames", "11", "not in the bank")),
        ({"frames": [-1, 10, 11]}, ValueError, ("frames", "-1")),
        ({"frames": [10, 11, 2**31]}, ValueError, ("frames", "2147483648")),
        ({"frames": [10, "11", 12]}, TypeError, ("frames", "str")),
        ({"keys": pages(2)[0]}, ValueError, ("keys", "(2, 2, 3, 3, 2, 8)")),
        ({"keys": pages(3)[0].double()}, TypeError, ("keys", "float64")),
        ({"values": list(pages(2)[1].unbind(2))}, ValueError, ("values", "3 tensors", "2")),
        ({"values": [*pages(2)[1].unbind(2), torch.zeros(2, 2, 3, 2, 7)]}, ValueError, ("values", "(2, 2, 3, 2, 7)")),
        ({"keys": [torch.zeros(2, 2, 3, 8, 2).mT] * 3}, ValueError, ("keys", "contiguous")),
        ({"keys": pages(3)[0].to("meta")}, ValueError, ("keys", "meta")),
        ({"embeddings": embeddings(2)}, ValueError, ("embeddings", "(2, 2, 6)")),
        ({"embeddings": torch.zeros(2, 3, 0)}, ValueError, ("embeddings", "0")),
        ({"embeddings": torch.zeros(2, 3, 5)}, ValueError, ("embeddings", "(2, 3, 5)")),
        ({"embeddings": torch.zeros(2, 3, 6, dtype=torch.int64)}, TypeError, ("embeddings", "int64")),
    ],
)
def test_commits_that_are_not_allowed_change_nothing(
    arguments: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    keys, values = pages(3)
    with make(policy="oldest") as bank:
        commit(bank, range(3))
        before = [bank.record(frame) for frame in range(3)]
        with pytest.raises(error) as caught:
            bank.commit(**({"frames": [10, 11, 12], "keys": keys, "values": values} | arguments))
        assert all(word in str(caught.value) for word in words), caught.value
        assert bank.frames() == [0, 1, 2] == bank.index.frames()
        assert all(torch.equal(bank.record(frame), want) for frame, want in enumerate(before))
        assert [bank.generation(frame) for frame in range(3)] == [0, 0, 0]


def test_other_calls_that_are_not_allowed() -> None:
    with make() as bank:
        commit(bank, range(3))
        for call, words in (
            (lambda: bank.prefetch([1, 1]), "frames must name each frame once"),
            (lambda: bank.wait(2), "layer must be between 0 and 1, got 2"),
            (lambda: bank.search(torch.zeros(2, 5), 1, end_frame=3), r"index must have shape \(any, any, 5\)"),
            (lambda: bank.search(torch.zeros(2, 6), -1, end_frame=3), "k must be"),
            (lambda: bank.search(torch.zeros(2, 6), 1, end_frame=-3), "end_frame must be at least 0, got -3"),
            (lambda: bank.record(0, torch.zeros(3, dtype=torch.uint8)), r"out must have shape \(2, 2, 4096\)"),
            (lambda: bank.restore(0, bank.record(0)), "0"),
        ):
            with pytest.raises(ValueError, match=words):
                call()
        with pytest.raises(KeyError, match="frame 7 has no embedding"):
            bank.embedding(7)
        with pytest.raises(KeyError, match="7"):
            bank.record(7)


# Closing


def test_a_closed_bank_says_so_in_every_call() -> None:
    bank = make()
    commit(bank, range(3))
    assert not bank.closed
    bank.close()
    bank.close()
    assert bank.closed and "closed" in repr(bank)
    keys, values = pages(1)
    calls = {
        "commit": ([5], keys, values),
        "search": (embeddings(1)[:, 0], 2),
        "found": (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)),
        "prefetch": ([1],),
        "settle": (),
        "wait": (0,),
        "release": ([1],),
        "forget": ([1],),
        "clear": (),
        "pin": ([1],),
        "unpin": ([1],),
        "slot": (1,),
        "generation": (1,),
        "frames": (),
        "room": (),
        "retrievals": (1,),
        "embedding": (1,),
        "read": (1,),
        "record": (1,),
        "restore": (9, torch.zeros(2, 2, 4096, dtype=torch.uint8)),
        "flush": (),
        "stats": (),
        "save": ("nowhere",),
        "__len__": (),
        "__contains__": (1,),
        "__enter__": (),
        "unchanged": (),
    }
    # Those that are left look at nothing but what was given.
    public = {name for name in dir(MemoryBank) if not name.startswith("_")} | {"__len__", "__contains__", "__enter__"}
    assert public - set(calls) == {"close", "closed", "index", "pins", "open", "count_opened", "forked"}
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match=rf"<MemoryBank {bank.handle}: .*closed> is closed"):
            result = getattr(bank, name)(*arguments, **({"end_frame": 3} if name == "search" else {}))
            if name == "unchanged":
                result.__enter__()


def test_a_forgotten_bank_is_closed_without_waiting_for_the_collector(tmp_path: Path) -> None:
    bank = make(6, 12, tmp_path, log=tmp_path / "log")
    for start in range(0, 9, 3):
        commit(bank, range(start, start + 3))
    core, log, gone = bank._core, bank.log, weakref.ref(bank)
    assert spilled_files(tmp_path)
    gc.disable()
    try:
        del bank
        assert gone() is None and core.closed and log._file is None
        assert spilled_files(tmp_path) == []
    finally:
        gc.enable()


def test_a_process_may_end_with_open_banks(tmp_path: Path) -> None:
    code = """
import torch
from longlive_rag_ops import BankConfig, MemoryBank, PageFormat
form = PageFormat("plain", 2, 1, 64, 2, 64, torch.float32)
bank = MemoryBank(form, BankConfig(host_bytes=4 * form.record_bytes, disk_bytes=20 * form.record_bytes, spill={0!r}))
for frame in range(12):
    bank.commit([frame], torch.ones(2, 1, 1, 64, 2, 64), torch.ones(2, 1, 1, 64, 2, 64))
print(len(bank))
"""
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{0!r}", repr(str(tmp_path)))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_importable_without_the_compiled_core() -> None:
    code = """
import sys
sys.modules["longlive_rag_ops._C"] = None
import torch, longlive_rag_ops as package
form = package.PageFormat("plain", 1, 1, 2, 1, 8, torch.float32)
config = package.BankConfig(host_bytes="1MiB")
try:
    package.MemoryBank(form, config)
except ImportError as error:
    print("ImportError" in repr(error) and "longlive_rag_ops._C cannot be loaded" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# Sharing


def test_several_banks_keep_to_themselves(tmp_path: Path) -> None:
    with make(6, 9, tmp_path) as one, make(6, 9, tmp_path, storage="fp8") as other:
        assert one.handle != other.handle
        for start in range(0, 9, 3):
            commit(one, range(start, start + 3))
            commit(other, range(start, start + 3), seed=500)
        one.flush()
        for frame in range(9):
            assert torch.equal(one.record(frame), stored(one, frame))
            assert torch.equal(other.record(frame), stored(other, 500 + frame))
        one.close()
        assert torch.equal(other.record(3), stored(other, 503))


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_threads_share_a_bank(tmp_path: Path, storage: str) -> None:
    """One commits, the others search, fetch and read what is there; every byte that comes back is right."""
    problems: list[BaseException] = []
    done = threading.Event()
    with make(10, 14, tmp_path, storage, policy="oldest", device_slots=6) as bank:
        commit(bank, range(3))

        def guarded(work: Any) -> None:
            try:
                work()
            except BaseException as error:
                problems.append(error)
                done.set()

        def writer() -> None:
            end = time.monotonic() + 3
            for start in itertools.count(3, 3):
                commit(bank, range(start, start + 3))
                if start % 5 == 0:
                    commit(bank, [start], replace=True)  # with the same bytes
                if time.monotonic() > end or done.is_set():
                    break
            done.set()

        def fetcher() -> None:
            while not done.is_set():
                ids, _ = bank.search(embeddings(1, 3)[:, 0], 1, end_frame=10**6)
                frame = int(ids[0, 0])
                try:
                    bank.prefetch([frame])
                except BankFull:
                    continue
                bank.settle()  # which may name what another thread has lost
                bank.wait(0)
                bank.wait(1)
                bank.release([frame])

        def reader() -> None:
            while not done.is_set():
                for frame in bank.frames()[-4:]:
                    try:
                        assert torch.equal(bank.record(frame), stored(bank, frame)), frame
                    except KeyError:  # forgotten meanwhile
                        continue
                bank.stats()

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (writer, fetcher, fetcher, reader)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not problems, problems
        check_agreement(bank)
        for frame in bank.frames():
            assert torch.equal(bank.record(frame), stored(bank, frame))


def test_closing_while_others_wait(tmp_path: Path) -> None:
    for _ in range(5):
        bank = make(6, 12, tmp_path, device_slots=3)
        for start in range(0, 12, 3):
            commit(bank, range(start, start + 3))
        seen: list[BaseException] = []

        def use(bank: MemoryBank = bank, seen: list[BaseException] = seen) -> None:
            try:
                while True:
                    bank.prefetch([0, 1])
                    bank.settle()
                    bank.release([0, 1])
            except RuntimeError as error:
                seen.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        time.sleep(0.01)
        bank.close()
        thread.join(30)
        assert not thread.is_alive() and "closed" in str(seen[0])


def test_it_works_in_inference_mode() -> None:
    with torch.inference_mode():
        bank = make(policy="most_redundant")
        keys, values = (part.clone() for part in pages(3))
        bank.commit(range(3), keys, values, embeddings(3).clone())
    for start in range(3, 18, 3):
        commit(bank, range(start, start + 3))
    with torch.inference_mode():
        commit(bank, range(18, 21))
        fetch(bank, [20])
    bank.slots.add_(1)  # made in inference mode, this could not be written here
    bank.close()


# Copies that are done later, through the stand-in for the CUDA driver


@pytest.fixture
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    machine = StandIn(stand_in(tmp_path_factory.getbasetemp() / "stand_in"))
    machine.reset()
    yield machine
    gc.collect()
    machine.reset()


def late(driver: StandIn, storage: str, stream: int, **options: Any) -> MemoryBank:
    form = page_format(storage)
    config = BankConfig(host_bytes=20 * form.record_bytes, storage=storage)
    arguments = {"device_slots": 3, "most_fetched": 3, **options}
    return MemoryBank(form, config, _driver=str(driver.path), _stream=lambda: stream, **arguments)


@pytest.mark.parametrize("storage", STORAGES)
def test_sources_are_kept_until_their_copies_are_done(driver: StandIn, storage: str) -> None:
    """Commits without a wait between them: pages that nobody else holds, and the one buffer of quantised pages."""
    stream = driver.stream()
    with late(driver, storage, stream) as bank:
        for start in range(0, 9, 3):
            keys, values = pages(3, start)
            held = weakref.ref(keys), weakref.ref(values)
            bank.commit(range(start, start + 3), list(keys.unbind(2)), list(values.unbind(2)))
            del keys, values
            assert driver.pending() > 0
            torch.empty(2, LAYERS, SAMPLES, 3, *SHAPE).fill_(torch.nan)  # takes what was given back
        del held
        bank.flush()
        assert driver.violations() == []
        for start in range(0, 9, 3):
            keys, values = pages(3, start)
            for i in range(3):
                want = bank.format.encode(keys[:, :, i], values[:, :, i])
                assert torch.equal(bank.record(start + i), want), start + i


def test_the_buffer_of_quantised_pages_is_not_written_while_it_is_read(driver: StandIn) -> None:
    stream = driver.stream()
    with late(driver, "int8", stream) as bank:
        buffer = bank._sources._buffer
        commit(bank, range(3))
        assert driver.touching(buffer.data_ptr(), buffer.nbytes) > 0
        before = buffer.clone()
        encoded = []
        encode = PageFormat.encode

        def watched(self: PageFormat, *arguments: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
            encoded.append((driver.touching(buffer.data_ptr(), buffer.nbytes), torch.equal(buffer, before)))
            return encode(self, *arguments, out=out, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PageFormat, "encode", watched)
            commit(bank, range(3, 6))
        assert encoded[0] == (0, True)


def test_a_wait_in_between_saves_the_commit_its_own(driver: StandIn) -> None:
    """The compute stream that waited for every layer since the last commit is not made to wait again."""
    stream, other = driver.stream(), driver.stream()
    waits: list[tuple[int, int]] = []
    with late(driver, "plain", stream) as bank:
        core = bank._core

        class Watched:
            def wait(self, layer: int, on: int) -> None:
                waits.append((layer, on))
                core.wait(layer, on)

            def __getattr__(self, name: str) -> Any:
                return getattr(core, name)

        bank._sources._core = Watched()
        commit_later(bank, [0])
        assert waits == []  # for there is nothing to wait for
        bank.wait(0)
        commit_later(bank, [1])
        assert waits == [(1, stream)]
        waits.clear()
        bank.wait(0)
        bank.wait(1)
        commit_later(bank, [2])
        assert waits == []
        bank.wait(0)
        bank.wait(1)
        bank._given_stream = lambda: other  # which has not waited
        commit_later(bank, [3])
        assert waits == [(0, other), (1, other)]


KEPT: list[torch.Tensor] = []


def commit_later(bank: MemoryBank, frames: list[int]) -> None:
    keys, values = pages(len(frames))
    KEPT.extend([keys, values])
    bank.commit(frames, keys, values)


def test_capture_is_refused(driver: StandIn) -> None:
    stream = driver.stream()
    with late(driver, "plain", stream) as bank:
        commit_later(bank, [0])
        driver.capture(stream)
        keys, values = pages(1)
        for call in (lambda: bank.wait(0), lambda: bank.prefetch([0]), lambda: bank.commit([1], keys, values)):
            with pytest.raises(RuntimeError, match="captur"):
                call()
        driver.capture(stream, False)
        assert bank.frames() == [0]
        bank.wait(0)


def test_memory_that_cannot_be_locked_is_warned_of_once(driver: StandIn) -> None:
    driver.set(register_oom=1)
    with pytest.warns(RuntimeWarning, match="could not be page-locked") as caught, late(driver, "plain", 0) as bank:
        commit_later(bank, [0])
        commit_later(bank, [1])
        assert bank.stats()["fallbacks"]["pageable_slabs"] == 1
        assert "cuMemHostRegister" in bank.stats()["fallbacks"]["reasons"]["pageable_slabs"]
    assert len(caught) == 1
