"""What goes wrong: memory that cannot be locked, old drivers, captures, late devices, failing copies, full disks and
folders that cannot be written to, refused memory, flipped bytes. Each ends in a clear error or a counted fallback, and
nothing that was acknowledged is lost or comes back changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bank_model import LAYERS, RECORD, Late, Limits, World
from stand_in import StandIn, stand_in

from longlive_rag_ops import _C
from longlive_rag_ops.bank import BankConfig, MemoryBank, PageFormat


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn(stand_in(tmp_path_factory.getbasetemp() / "stand-in"))


@pytest.fixture
def fake(library: StandIn) -> Iterator[StandIn]:
    library.reset()
    yield library
    library.reset()


def late_world(fake: StandIn, limits: Limits, folder: Path | str = "") -> World:
    return World(limits, str(folder), Late(fake), device="cuda", driver=str(fake.path))


def live(world: World, frames: range, stream: int) -> None:
    """Commits frames, attends to each, and reads each back."""
    for frame in frames:
        world.commit([frame], stream)
    for frame in frames:
        world.prefetch([frame], stream)
        world.attend(stream)
    world.compute.finish()
    for frame in frames:
        world.read(frame)


# -- the driver


@pytest.mark.parametrize("first", [1, 3])
def test_memory_that_cannot_be_locked_is_used_as_it_is(fake: StandIn, first: int) -> None:
    fake.set(register_oom=first)
    world = late_world(fake, Limits(host=6, slots=2, slab=1))
    live(world, range(6), world.compute.streams[0])
    host = world.bank.stats()["host"]
    assert host["pageable_slabs"] == 6 - (first - 1) and host["locked_bytes"] == (first - 1) * RECORD
    assert "CUDA_ERROR_OUT_OF_MEMORY" in host["pageable_reason"] and host["capacity"] == 6
    world.finish()


def test_one_warning_says_so(fake: StandIn) -> None:
    fake.set(register_oom=2)
    form = PageFormat("plain", 2, 1, 3, 2, 4, torch.float16)
    config = BankConfig(host_bytes=6 * form.record_bytes, slab_bytes=form.record_bytes)
    stream = fake.stream()
    made = MemoryBank(form, config, frames_per_commit=1, _driver=str(fake.path), _stream=lambda: stream)
    pages = torch.zeros(2, 1, 1, 3, 2, 4, dtype=torch.float16)
    with made as bank, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for frame in range(6):
            bank.commit([frame], pages, pages)
        assert bank.stats()["fallbacks"]["pageable_slabs"] == 5
    said = [str(warning.message) for warning in caught if "page-locked" in str(warning.message)]
    assert len(said) == 1 and "OUT_OF_MEMORY" in said[0] and "lock_memory=False" in said[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"driver_version": 12040}, "12.8"), ({"proc_address": 0}, "12.8"), ({"batch_result": 801}, "NOT_SUPPORTED")],
)
def test_without_batch_copies_a_loop_copies(fake: StandIn, options: dict[str, int], reason: str) -> None:
    fake.set(**options)
    world = late_world(fake, Limits(host=6, slots=2))
    live(world, range(6), world.compute.streams[0])
    device = world.bank.stats()["device"]
    assert device["copy_loops"] > 0 == device["batches"] and reason in device["copy_loop_reason"]
    world.finish()


def test_the_default_stream(fake: StandIn) -> None:
    """Its work is ordered like any other's, and the bank's own batches do not go there."""
    world = late_world(fake, Limits(host=6, slots=3))
    live(world, range(6), 0)
    assert fake.count("batches") > 0 and world.bank.stats()["device"]["copy_loops"] == 0
    world.finish()


@pytest.mark.parametrize("how", ["release", "replace", "clear"])
def test_a_slot_waits_for_every_stream_that_may_read_it(fake: StandIn, how: str) -> None:
    """Fetched on one stream, read on a second that is held up, and given up without a word of the second."""
    world = late_world(fake, Limits(host=6, slots=1))
    stream, reader, _ = world.compute.streams
    for frame in (0, 1):
        world.commit([frame], stream)
    world.prefetch([0], stream)
    world.settle()
    fake.run()
    fake.hold(reader)
    world.attend(reader, release=False)
    if how == "release":
        world.release([0], stream)
    elif how == "replace":
        world.commit([0], stream, replace=True)
    else:
        world.clear()
        world.commit([1], stream)
    world.prefetch([1], stream)
    world.settle()
    fake.run()
    assert fake.pending(reader) > 0
    fake.hold(reader, held=False)
    world.attend(stream)
    world.finish()


def test_fetched_pages_do_not_wait_for_what_is_committed(fake: StandIn) -> None:
    """A side stream reads old frames, one of them put into a slot by its commit, beside a committed forward."""
    world = late_world(fake, Limits(host=8, slots=2))
    stream, side, _ = world.compute.streams
    for frame in range(3):  # the first two find free slots
        world.commit([frame], stream)
    fake.run()
    fake.hold(stream)
    pages = world.sources([world.new_record(5)])
    source = [[(part.ctypes.data, *part.strides[:2]) for part in parts] for parts in pages]
    world.bank.commit(frames=[5], pages=source, stream=stream)
    world.bank.prefetch(frames=[1, 2], stream=side)
    world.bank.settle()
    for layer in range(LAYERS):
        world.bank.wait(layer=layer, stream=side, fetched_only=True)
        for frame in (1, 2):
            world._read_slot(frame, world.held[frame], layer, side)
    fake.run()
    assert fake.pending(side) == 0 < fake.pending()
    world.bank.wait(layer=0, stream=side)
    fake.copy(side, pages[0][0].ctypes.data, pages[0][0].ctypes.data, 64)
    fake.run()
    assert fake.pending(side) > 0  # all copies, and so the forward
    fake.hold(stream, held=False)
    world.compute.finish()
    world.bank.close()


@pytest.mark.parametrize("resident", [True, False])
def test_a_page_that_its_commit_put_into_a_slot_is_waited_for(fake: StandIn, resident: bool) -> None:
    world = late_world(fake, Limits(host=8, slots=1))
    stream, side, _ = world.compute.streams
    fake.hold(stream)
    world.commit([0], stream)
    if not resident:  # another takes its slot, and it comes back
        world.commit([1], stream)
        world.prefetch([1], side)
        world.settle()
        world.release([1], side)
    world.prefetch([0], side)
    world.settle()
    for layer in range(LAYERS):
        world.bank.wait(layer=layer, stream=side, fetched_only=True)
        world._read_slot(0, world.held[0], layer, side)
    fake.run()
    assert fake.pending(side) > 0
    fake.hold(stream, held=False)
    world.finish()


def test_a_capture_refuses_everything_and_changes_nothing(fake: StandIn) -> None:
    world = late_world(fake, Limits(host=6, slots=2))
    stream, other, _ = world.compute.streams
    live(world, range(3), stream)
    world.prefetch([0], stream)
    before = {name: value for name, value in world.bank.stats().items() if name != "late_layers"}
    pages = np.zeros((LAYERS, 2, 4096), np.uint8)
    source = [[(pages.ctypes.data, *pages.strides[:2])] * 2]
    fake.capture(stream)
    calls: list[Callable[[], object]] = [
        lambda: world.bank.commit(frames=[5], pages=source, stream=stream),
        lambda: world.bank.commit(frames=[0], pages=source, stream=stream, replace=True),
        lambda: world.bank.prefetch(frames=[1], stream=stream),
        lambda: world.bank.wait(layer=0, stream=stream),
        lambda: world.bank.release(frames=[0], stream=stream),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="captur"):
            call()
    assert {name: value for name, value in world.bank.stats().items() if name != "late_layers"} == before
    world.check()
    # Another stream's work goes on beside the capture.
    world.attend(other)
    assert world.commit([7], other)
    assert fake.capture(stream, on=False) == 0
    world.commit([5], stream)
    world.prefetch([5, 1], stream)
    world.attend(stream)
    world.finish()


def test_a_commit_does_not_wait_for_the_device(fake: StandIn) -> None:
    """A compute stream that is held up holds up nobody but those who need what it writes."""
    world = late_world(fake, Limits(host=6, slots=0))
    stream = world.compute.streams[0]
    fake.hold(stream)
    for frame in range(3):
        assert world.commit([frame], stream)
    reader = threading.Thread(target=world.read, args=(1,), daemon=True)
    reader.start()
    time.sleep(0.1)
    assert reader.is_alive()
    world.check()  # the bank can be asked meanwhile
    fake.hold(stream, held=False)
    fake.run()
    reader.join(10)
    assert not reader.is_alive()
    world.finish()


def test_events_that_seem_never_ready(fake: StandIn, tmp_path: Path) -> None:
    world = late_world(fake, Limits(host=6, disk=6, slots=3), tmp_path)
    for turn in range(10):
        fake.set(not_ready=7 * turn)
        world.commit([turn % 9], world.compute.streams[turn % 2], replace=turn % 9 in world.held)
        world.prefetch([turn // 2], world.compute.streams[turn % 2])
        world.attend(world.compute.streams[turn % 2])
    world.finish()


def test_a_copy_that_fails_loses_nothing_else(fake: StandIn, tmp_path: Path) -> None:
    """The n-th copy of a life fails, for every n: the call says so, and all that was acknowledged is as it was."""
    failures = 0
    for number in range(1, 60):
        fake.reset()
        fake.set(batch_result=801 * (number % 2))  # by batches and by loops
        world = late_world(fake, Limits(host=5, disk=4, slots=2, bounce=2, commit=1), tmp_path)
        stream = world.compute.streams[0]
        world.commit([0], stream)
        fake.set(fail_copy=number)
        for step in range(12):
            frame = step % 6
            replace = frame in world.held
            try:
                if step < 8:
                    world.commit([frame], stream, replace=replace)
                if world.prefetch([frame // 2], stream):
                    world.attend(stream)
            except _C.BankFull:
                raise
            except RuntimeError as error:
                failures += 1
                assert "ILLEGAL_ADDRESS" in str(error)
                # A frame being replaced may be lost with its old pages: nobody was told that either is kept.
                if replace and world.bank.where(frame)[3] < 0:
                    del world.held[frame]
                for held in world.held.values():
                    held.pins = 0
                pinned = [frame for frame in world.bank.frames() if world.bank.where(frame)[0] >= 0]
                world.bank.release(frames=pinned, stream=stream)
                world.asked.clear()
                world.bank.settle()
        fake.set(fail_copy=0)
        world.finish()
    assert failures > 30


def test_closing_after_the_driver_has_shut_down(fake: StandIn) -> None:
    world = late_world(fake, Limits(host=6, slots=2))
    live(world, range(3), world.compute.streams[0])
    fake.set(shut_down=1)
    world.close()


# -- disk and memory


def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("/proc/self", str(tmp_path / "none"), str(tmp_path / "file")):
        with pytest.raises(OSError, match=re.escape(folder)) as caught:
            World(Limits(host=6, disk=4), folder)
        assert caught.value.errno


FULL_DISK = """
import resource, sys
sys.path[:0] = {paths!r}
from bank_model import RECORD, Limits, World
if {file_limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit} * RECORD,) * 2)
world = World(Limits(host=5, disk=20, slots=2, bounce=2, commit=1, shard={shard}), {folder!r})
room = world.bank.room()
committed = 0
for frame in range(30):
    try:
        world.bank.flush()
        committed += world.commit([frame])
    except AssertionError:  # there was room before the disk refused
        break
stats = world.bank.stats()
print(room, committed, world.bank.room(), stats["disk"]["capacity"], stats["failed_spills"], stats["disk"]["refusal"])
assert committed == len(world.held) and world.bank.room() <= 0
for turn in range(2):
    for frame in list(world.held):
        world.read(frame)
    for frame in list(world.held):
        if world.prefetch([frame]):
            world.attend()
for frame in list(world.held)[:3]:
    world.forget([frame])
    assert world.commit([100 + frame])
for frame in list(world.held):
    world.read(frame)
world.close()
"""


def run_apart(code: str, *prefix: str) -> str:
    done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def paths() -> list[str]:
    here = Path(__file__).resolve()
    return [str(here.parent), str(here.parents[2])]


@pytest.mark.parametrize("shard", [1, 4])
def test_a_disk_that_takes_no_more(tmp_path: Path, shard: int) -> None:
    """Files may not grow beyond two records: shards of one fit, shards of four do not."""
    code = FULL_DISK.format(paths=paths(), file_limit=2, shard=shard, folder=str(tmp_path))
    room, committed, left, capacity, _, *reason = run_apart(code).split()
    if shard == 1:
        assert (int(room), int(committed), int(left), int(capacity)) == (23, 23, 0, 20) and not reason
    else:
        assert int(capacity) == 0 and int(committed) >= 5 - 2 and "large" in " ".join(reason)


def test_a_full_file_system(tmp_path: Path) -> None:
    """A tmpfs of 128 KiB, where the system lets us mount one."""
    unshare = shutil.which("unshare")
    mount = ["-rm", "sh", "-c", f'mount -t tmpfs -o size=128k none {tmp_path} && exec "$@"', "sh"]
    if unshare is None or subprocess.run([unshare, *mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    code = FULL_DISK.format(paths=paths(), file_limit=0, shard=2, folder=str(tmp_path))
    _, committed, _, capacity, _, *reason = run_apart(code, unshare, *mount).split()
    assert 4 <= int(capacity) <= 8 and int(committed) >= int(capacity) and "space" in " ".join(reason).lower()


REFUSED_MEMORY = """
import ctypes, resource, sys
import numpy.random
sys.path[:0] = {paths!r}
from bank_model import RECORD, Limits, World
world = World(Limits(host=8000, slots=0, bounce=0, commit=1, slab=64), "")
numpy.random.default_rng(0)  # what is loaded when it is first used takes memory, too
# Slabs are what is to be refused, not the few bytes that a call needs: the heap keeps 4 MiB for those below `kept`.
small = [ctypes.create_string_buffer(4096) for _ in range(1024)]
kept = ctypes.create_string_buffer(4096)
del small
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, resource.RLIM_INFINITY))
committed = 0
while True:
    try:
        committed += world.commit([committed])
    except AssertionError:
        break
    world.kept.clear()
    world.held[committed - 1].record = None  # so that memory goes to the bank alone
resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, resource.RLIM_INFINITY))
stats = world.bank.stats()["host"]
print(committed, stats["capacity"], world.bank.room(), stats["refusal"])
assert committed == stats["capacity"] == len(world.held) and world.bank.room() == 0
for frame in range(0, committed, 7):
    world.versions = frame  # frames were made in this order
    world.held[frame].record = world.new_record(frame)
    world.read(frame)
world.forget([0, 1])
assert world.commit([5000])
"""


def test_memory_that_the_system_refuses() -> None:
    committed, _, _, *reason = run_apart(REFUSED_MEMORY.format(paths=paths())).split()
    assert 300 < int(committed) < 8000 and reason


def shard_files(folder: Path) -> list[int]:
    """Descriptors of this process's nameless files in a folder."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()).startswith(str(folder)):
                found.append(int(link.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("where", [0, 4095 - 3384, 4096 * 3 + 5, RECORD - 1])
def test_a_flipped_byte_is_a_miss_that_names_the_frame(tmp_path: Path, where: int) -> None:
    """Anywhere in a record on disk, padding included: no byte of it is ever given out."""
    world = World(Limits(host=4, disk=6, slots=2, bounce=2, commit=1, shard=1), str(tmp_path))
    for frame in range(8):
        world.commit([frame])
        world.bank.flush()
    alone = [frame for frame in world.held if world.bank.where(frame)[:2] == (-1, False)]
    assert len(alone) >= 2
    for file in shard_files(tmp_path):
        with Path(f"/proc/self/fd/{file}").open("r+b", buffering=0) as again:  # direct I/O would ask for whole blocks
            byte = os.pread(again.fileno(), 1, where)
            os.pwrite(again.fileno(), bytes([byte[0] ^ 0x10]), where)
            os.fsync(again.fileno())
    world.bank.prefetch(frames=[alone[0]])
    lost = world.bank.settle()
    assert [frame for frame, _ in lost] == [alone[0]]
    assert re.match(r"damaged: layer \d, sample \d: ", lost[0][1])
    with pytest.raises(_C.Damaged, match=f"frame {alone[1]} is damaged: layer"):
        world.read(alone[1])
    stats = world.bank.stats()
    assert stats["damaged_pages"] == 2
    for frame in alone[:2]:
        assert world.bank.where(frame)[3] == -1 and frame not in world.bank.frames()
        del world.held[frame]
        world.read(frame)  # not there
    for frame in [frame for frame in world.held if world.bank.where(frame)[1]]:
        world.read(frame)
    for frame in alone[:2]:
        assert world.commit([frame])
        world.read(frame)
    world.close()


def test_configurations_that_cannot_hold_a_commit_and_a_fetch(tmp_path: Path) -> None:
    for limits in (
        Limits(host=1, disk=0, slots=2, commit=2),
        Limits(host=3, disk=6, slots=3, bounce=3, commit=1),
        Limits(host=0, disk=6, slots=0, bounce=0, commit=1),
    ):
        with pytest.raises(ValueError, match=r"host|record"):
            World(limits, str(tmp_path))


@pytest.mark.parametrize("how", ["replace", "clear"])
def test_pages_whose_read_is_under_way_can_be_replaced(tmp_path: Path, how: str) -> None:
    """Pages so large that a read takes longer than the call that makes it worthless."""
    size, frames = 8 << 20, 4
    slots = np.zeros((frames, size), np.uint8)
    bank = _C.Bank(
        layers=1,
        samples=1,
        page_bytes=size,
        segments=[(0, size)],
        slots=[(slots.ctypes.data, 0, 0, size)],
        slot_count=frames,
        host_bytes=(frames + 1) * size,
        slab_bytes=size,
        disk_bytes=3 * frames * size,
        shard_bytes=size,
        spill=str(tmp_path),
        io_threads=1,
        bounce_records=frames,
        commit_records=1,
    )
    page = np.zeros(size, np.uint8)

    def commit(frame: int, byte: int, replace: bool = False) -> None:
        page[:] = byte
        bank.commit(frames=[frame], pages=[[(page.ctypes.data, 0, 0)]], replace=replace)

    for frame in range(3 * frames):
        commit(frame, frame)
        bank.flush()
    dropped = 0
    for turn in range(6):
        away = [frame for frame in bank.frames() if bank.where(frame)[:2] == (-1, False)][:frames]
        assert len(away) >= 2
        bank.prefetch(frames=away)
        last, byte = away[-1], 100 + turn
        if how == "replace":
            commit(last, byte, replace=True)
            dropped += (last, "replaced") in bank.settle()
        else:
            bank.clear()
            commit(last, byte)
            bank.settle()
        got = np.zeros(size, np.uint8)
        bank.read(frame=last, address=got.ctypes.data)
        assert (got == byte).all()
        bank.prefetch(frames=[last])
        bank.wait(layer=0)
        assert (slots[bank.where(last)[0]] == byte).all()
        bank.release(frames=away)
        if how == "clear":
            bank.clear()
            for frame in range(3 * frames):
                commit(frame, frame)
                bank.flush()
    assert how == "clear" or (dropped == 6 and bank.stats()["dropped_fetches"] == 6)
    bank.close()
