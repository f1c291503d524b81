"""On a GPU: bytes through all tiers while kernels are slow, slots read while a fetch wants them, capture, streams.

``LONGLIVE_GPU_TESTS_ON=cpu`` runs the bodies on a CPU, streams and graphs left out: it shows slips in the tests before
a GPU does.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_model import MemoryWorld, bits

from longlive_rag_ops.bank import BankConfig, MemoryBank, PageFormat

ON_CPU = os.environ.get("LONGLIVE_GPU_TESTS_ON") == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = [] if ON_CPU else pytest.mark.gpu
STORAGES = ["plain", "int8", "fp8"]
SLOW = 20_000_000  # cycles: about ten milliseconds, many times what a copy of these pages takes


def sleep(cycles: int = SLOW) -> None:
    """A kernel that does nothing, slowly, on the current stream."""
    if not ON_CPU and cycles:
        torch.cuda._sleep(cycles)


def synchronize() -> None:
    if not ON_CPU:
        torch.cuda.synchronize()


def new_stream() -> Any:
    return None if ON_CPU else torch.cuda.Stream()


def current(stream: Any) -> Any:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def format_of(storage: str) -> PageFormat:
    return PageFormat(storage, 3, 2, 64, 2, 32, torch.float16)


@contextmanager
def made(storage: str, host: int, disk: int, slots: int, folder: Path) -> Iterator[MemoryBank]:
    form = format_of(storage)
    config = BankConfig(
        host_bytes=host * form.record_bytes,
        disk_bytes=disk * form.record_bytes,
        spill=folder if disk else None,
        storage=storage,
    )
    bank = MemoryBank(form, config, device_slots=slots, device=DEVICE, frames_per_commit=2, most_fetched=slots)
    with bank:
        yield bank


def pages_of(form: PageFormat, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``(layers, samples, 1, T, H, D)`` on the device."""
    noise = torch.Generator().manual_seed(seed)
    shape = (2, form.layers, form.samples, 1, *form.page_shape)
    both = torch.randn(shape, generator=noise).to(form.dtype).to(DEVICE)
    return both[0], both[1]


def slot_bits(bank: MemoryBank, frame: int, layer: int) -> torch.Tensor:
    """What the device reads of a frame's slot, enqueued on the current stream: a copy."""
    slot = bank.slot(frame)
    assert slot >= 0
    return bank.slots[layer, :, slot].clone() if bank.format.quantised else bits(bank.slots[layer, :, :, slot]).clone()


def wanted_bits(form: PageFormat, seed: int, layer: int) -> torch.Tensor:
    keys, values = pages_of(form, seed)
    if form.quantised:
        return form.encode(keys[:, :, 0], values[:, :, 0])[layer]
    return bits(torch.stack([keys[layer, :, 0], values[layer, :, 0]]))


def record_of(form: PageFormat, seed: int) -> torch.Tensor:
    keys, values = pages_of(form, seed)
    return form.encode(keys[:, :, 0], values[:, :, 0]).cpu()


def commit_slowly(bank: MemoryBank, frame: int, seed: int) -> None:
    """A slow kernel, then the kernel that writes the pages, a commit at once, and the pages overwritten at once."""
    keys, values = pages_of(bank.format, seed)
    keys_now, values_now = torch.full_like(keys, float("nan")), torch.full_like(values, float("nan"))
    synchronize()
    sleep()
    keys_now.copy_(keys)
    values_now.copy_(values)
    bank.commit([frame], keys_now, values_now)
    for layer in range(bank.layers):
        bank.wait(layer)
        keys_now[layer].fill_(float("inf"))
        values_now[layer].fill_(float("inf"))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("host", "disk"), [(8, 0), (5, 8)])
def test_bytes_through_all_tiers(storage: str, host: int, disk: int, tmp_path: Path) -> None:
    """Each frame is written by a kernel that is late, and its memory reused as soon as that is allowed."""
    frames = range(8 if disk else 6)
    with made(storage, host, disk, 2, tmp_path) as bank:
        for frame in frames:
            commit_slowly(bank, frame, 100 + frame)
        for turn in range(2):
            for frame in frames:
                bank.prefetch([frame])
                assert not bank.settle()
                got = []
                for layer in range(bank.layers):
                    bank.wait(layer)
                    got.append(slot_bits(bank, frame, layer))
                bank.release([frame])
                for layer, each in enumerate(got):
                    assert torch.equal(each, wanted_bits(bank.format, 100 + frame, layer)), (turn, frame, layer)
        bank.flush()
        stats = bank.stats()
        assert stats["fetched_bytes"] > 0 and (not disk or stats["hits_disk"] > 0)
        for frame in frames:
            assert torch.equal(bank.record(frame), record_of(bank.format, 100 + frame))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_slot_that_a_slow_kernel_reads_is_not_filled(storage: str, tmp_path: Path) -> None:
    with made(storage, 8, 0, 1, tmp_path) as bank:
        for frame in range(4):
            commit_slowly(bank, frame, frame)
        for turn in range(8):
            frame = turn % 4
            bank.prefetch([frame])
            for layer in range(bank.layers):
                bank.wait(layer)
            sleep()
            got = [slot_bits(bank, frame, layer) for layer in range(bank.layers)]
            bank.release([frame])
            bank.prefetch([(frame + 1) % 4])  # wants the one slot there is
            synchronize()
            for layer, each in enumerate(got):
                assert torch.equal(each, wanted_bits(bank.format, frame, layer)), (turn, layer)
            bank.release([(frame + 1) % 4])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_replaced_frame_is_never_read_as_it_was(storage: str, tmp_path: Path) -> None:
    """Re-cached while a fetch of it is under way."""
    with made(storage, 6, 6, 3, tmp_path) as bank:
        for frame in range(6):
            commit_slowly(bank, frame, frame)
        for turn in range(6):
            frame = turn
            bank.prefetch([frame])
            keys, values = pages_of(bank.format, 50 + turn)
            sleep(SLOW // 4)
            bank.commit([frame], keys, values, replace=True)
            assert frame in [lost.frame for lost in bank.settle()]
            bank.prefetch([frame])
            for layer in range(bank.layers):
                bank.wait(layer)
                assert torch.equal(slot_bits(bank, frame, layer), wanted_bits(bank.format, 50 + turn, layer))
            bank.release([frame])
            assert torch.equal(bank.record(frame), record_of(bank.format, 50 + turn))


def test_capture_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    if ON_CPU:
        pytest.skip("there is nothing to capture on a CPU")
    with made("plain", 6, 0, 2, tmp_path) as bank:
        keys, values = pages_of(bank.format, 1)
        bank.commit([0], keys, values)
        bank.prefetch([0])
        for layer in range(bank.layers):
            bank.wait(layer)
        calls: list[Callable[[], object]] = [
            lambda: bank.commit([1], keys, values),
            lambda: bank.commit([0], keys, values, replace=True),
            lambda: bank.prefetch([0]),
            lambda: bank.wait(0),
        ]
        x = torch.zeros(4, device=DEVICE)
        before = bank.stats()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
            for call in calls:
                with pytest.raises(RuntimeError, match="captur"):
                    call()
            x.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert (x == 2).all()  # the capture is whole
        after = bank.stats()
        assert list(bank.frames()) == [0] and before["stored_bytes"] == after["stored_bytes"]
        bank.release([0])
        bank.commit([1], keys, values)
        bank.flush()
        assert torch.equal(bank.record(1), record_of(bank.format, 1))


@pytest.mark.parametrize("storage", STORAGES)
def test_several_streams(storage: str, tmp_path: Path) -> None:
    """Written on one stream, attended to on two others, overwritten on a fourth."""
    streams = [new_stream() for _ in range(4)]
    with made(storage, 5, 6, 2, tmp_path) as bank:
        for frame in range(8):
            keys, values = (torch.full_like(half, float("nan")) for half in pages_of(bank.format, 0))
            synchronize()
            with current(streams[0]):
                new = pages_of(bank.format, frame)
                sleep(SLOW // 4)
                keys.copy_(new[0])
                values.copy_(new[1])
                bank.commit([frame], keys, values)
            with current(streams[3]):
                for layer in range(bank.layers):
                    bank.wait(layer)
                    keys[layer].fill_(float("inf"))
                    values[layer].fill_(float("inf"))
            got = []
            for stream in streams[1:3]:  # both hold the frame; neither's read may be overtaken by the next fetch
                with current(stream):
                    bank.prefetch([frame])
                    bank.wait(0)
                    sleep(SLOW // 4 if stream is streams[1] else 0)
                    got.append(slot_bits(bank, frame, 0))
                    bank.release([frame])
            with current(streams[0]):
                bank.prefetch([max(0, frame - 3), max(0, frame - 2)] if frame > 2 else [0])
                bank.release([max(0, frame - 3), max(0, frame - 2)] if frame > 2 else [0])
            synchronize()
            for each in got:
                assert torch.equal(each, wanted_bits(bank.format, frame, 0)), frame


class OnStreams:
    """A framework's work on several streams of the device, late by a random while."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kept = [new_stream() for _ in range(2)]
        self.streams = [0] if ON_CPU else [stream.cuda_stream for stream in self.kept]
        self.reads: list[tuple[torch.Tensor, Callable[[Any], None]]] = []

    def _on(self, stream: int) -> Any:
        return nullcontext() if ON_CPU else torch.cuda.stream(torch.cuda.ExternalStream(stream))

    def write(self, stream: int, to: torch.Tensor, values: torch.Tensor) -> None:
        synchronize_default()
        with self._on(stream):
            sleep(self.random.choice([0, 0, 100_000]))
            to.copy_(values)

    def read(self, stream: int, values: torch.Tensor, then: Callable[[Any], None]) -> None:
        with self._on(stream):
            sleep(self.random.choice([0, 0, 100_000]))
            self.reads.append((values.clone(), then))
        if len(self.reads) > 200:
            self.finish()

    def run(self, operations: int) -> None:
        pass

    def finish(self) -> None:
        synchronize()
        for got, then in self.reads:
            then(got)
        self.reads.clear()


def synchronize_default() -> None:
    """What a test made on the default stream is there before another stream uses it."""
    if not ON_CPU:
        torch.cuda.default_stream().synchronize()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_random_life(storage: str, tmp_path: Path) -> None:
    """Hundreds of calls on two streams against a dictionary of tensors."""
    form = PageFormat(storage, 2, 2, 16, 2, 16, torch.float16)
    config = BankConfig(
        host_bytes=6 * form.record_bytes,
        disk_bytes=6 * form.record_bytes,
        spill=tmp_path,
        storage=storage,
        policy="oldest",
    )
    dice, compute = random.Random(7), OnStreams(7)
    world = MemoryWorld(form, config, slots=3, per_commit=2, device=DEVICE, compute=compute)
    following = 0
    for _ in range(200):
        stream, other = dice.choice(compute.streams), dice.choice(compute.streams)
        frames = sorted(world.held)
        some = sorted(dice.sample(frames, min(len(frames), dice.randint(1, 3))))
        what = dice.choice(["commit", "commit", "replace", "retrieve", "retrieve", "prefetch", "settle", "release"])
        if what == "commit":
            new = list(range(following, following + dice.randint(1, 2)))
            if world.commit(new, [dice.randrange(8) for _ in new], stream=stream, spoil_on=other):
                following = new[-1] + 1
        elif what == "replace" and some:
            world.commit(some[:2], None, replace=True, stream=stream, spoil_on=other)
        elif what == "retrieve" and world.prefetch(some, stream):
            world.attend(stream)
        elif what == "prefetch":
            world.prefetch(some, stream)
        elif what == "settle":
            world.settle(stream)
        elif what == "release":
            world.attend(other)
        world.check()
    assert following > 20 and world.forgotten > 5
    world.finish()
