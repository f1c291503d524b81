"""``torch.ops.longlive.wait_pages``: waits in its place, compiled or not; finds open banks and no others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from longlive_rag_ops import BankConfig, MemoryBank, PageFormat
from longlive_rag_ops.ops import waiting
from longlive_rag_ops.rotary import rotary_table

FORMAT = PageFormat("plain", 3, 1, 4, 2, 8, torch.float32)
wait_pages = torch.ops.longlive.wait_pages


@pytest.fixture
def bank() -> Iterator[MemoryBank]:
    config = BankConfig(host_bytes=20 * FORMAT.record_bytes)
    with MemoryBank(FORMAT, config, slots=FORMAT.slots(6, "cpu"), most_fetched=3) as made:
        yield made


class Arriving:
    """Stands for a bank: counts waits."""

    layers = 40

    def __init__(self) -> None:
        self.waits: list[int] = []
        self.seen: list[torch.Tensor | None] = []
        self.handle = waiting.new_handle(self)

    def wait(self, layer: int, pool_layer: torch.Tensor | None = None) -> None:
        self.waits.append(layer)
        self.seen.append(pool_layer)


class Cold:
    """A bank whose pages are on disk, and are in its slots once they were waited for."""

    def __init__(self, folder: Path, storage: str = "plain", first_slot: int = 2) -> None:
        self.form = PageFormat(storage, 3, 1, 4, 2, 8, torch.float32)
        record = self.form.record_bytes
        config = BankConfig(host_bytes=6 * record, disk_bytes=12 * record, spill=folder, storage=storage)
        pool = self.form.slots(first_slot + 3, "cpu")
        pool.view(-1)[:] = 7
        self.bank = MemoryBank(self.form, config, slots=pool, first_slot=first_slot, most_fetched=3)
        self.pages = torch.randn(12, 2, 3, 1, 1, *self.form.page_shape)
        for frame, (keys, values) in enumerate(self.pages):
            self.bank.commit([frame], keys, values)
        self.bank.flush()
        self.frames = [frame for frame in self.bank.frames() if not self.bank._core.where(frame)[1]]

    def prefetch(self, count: int = 3) -> list[int]:
        """Frames on their way, whose slots still hold something else."""
        frames, self.frames = self.frames[:count], self.frames[count:]
        self.bank.prefetch(frames)
        return frames

    def wanted(self, frame: int, layer: int) -> torch.Tensor:
        """Keys and values ``(2, T, H, D)``."""
        return self.pages[frame, :, layer, 0, 0]


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[Cold]:
    made = Cold(tmp_path)
    with made.bank:
        yield made


def test_it_waits_for_pages_that_a_prefetch_reads_from_disk(cold: Cold) -> None:
    frames = cold.prefetch()
    slots = cold.bank.slots
    for layer in range(3):
        wait_pages(slots[layer], cold.bank.handle, layer)
        for frame in frames:
            assert torch.equal(slots[layer, :, 0, cold.bank.slot(frame)], cold.wanted(frame, layer))
    assert cold.bank.settle() == []


def test_opcheck(bank: MemoryBank) -> None:
    torch.library.opcheck(wait_pages.default, (bank.slots[1], bank.handle, 1))
    apart = torch.zeros(2, 1, 6, 4, 4, 8)[:, :, :, :, ::2]
    torch.library.opcheck(wait_pages.default, (apart, bank.handle, 2))


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_sees_the_pages_that_were_waited_for(cold: Cold, backend: str) -> None:
    """Also where the compiler works on a copy of the pool; what else the pool holds stays."""
    torch._dynamo.reset()

    def step(pool_layer: torch.Tensor, bank: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        pool_layer[:, :, 0] += 1  # a window slot
        wait_pages(pool_layer, bank, layer)
        first = pool_layer * 2
        wait_pages(pool_layer, bank, layer)
        return first, (pool_layer + 1).sum(-1)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    pool = cold.bank.slots
    for layer in range(3):
        frames = cold.prefetch(1)
        doubled, summed = compiled(pool[layer], cold.bank.handle, layer)
        assert not [frame for frame in frames if cold.bank.slot(frame) < 2]
        for frame in frames:
            slot = cold.bank.slot(frame)
            for seen in (doubled / 2, pool[layer]):
                assert torch.equal(seen[:, 0, slot], cold.wanted(frame, layer))
        assert (pool[layer, :, :, 0] == 8).all() and (pool[layer, :, :, 1] == 7).all()
        torch.testing.assert_close(summed, (pool[layer] + 1).sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_attention_and_placement_follow_the_wait(tmp_path: Path, storage: str, backend: str) -> None:
    """As the window uses them: plain pages attended where they arrive, quantised ones placed in the window's pool."""
    torch._dynamo.reset()
    cold = Cold(tmp_path, storage, first_slot=2 if storage == "plain" else 0)
    rope, q = rotary_table(8, 16), torch.randn(1, 4, 2, 8)
    pool = cold.bank.slots if storage == "plain" else torch.zeros(3, 2, 1, 5, 4, 2, 8)
    own: list[bool] = []
    wait = MemoryBank.wait

    def watched(self: MemoryBank, layer: int, pool_layer: torch.Tensor | None = None) -> None:
        own.append(pool_layer is not None and pool_layer.data_ptr() == pool[layer].data_ptr())
        wait(self, layer, pool_layer)

    def attend(pool_layer: torch.Tensor, stored: dict[str, torch.Tensor], layer: int, source: torch.Tensor) -> Any:
        wait_pages(pool_layer, cold.bank.handle, layer)
        slots, positions = torch.zeros_like(source), torch.zeros_like(source)
        torch.ops.longlive.place_frames(pool_layer, slots, source, positions, rope, [4, 2, 2], **stored)
        return torch.ops.longlive.window_attend(q, pool_layer, run=1)[0]

    with cold.bank, pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryBank, "wait", watched)
        compiled = torch.compile(attend, backend=backend, fullgraph=True)
        (frame,) = cold.prefetch(1)
        for layer in range(3):
            stored = {} if storage == "plain" else cold.form.views(cold.bank.slots[layer])
            out = compiled(pool[layer], stored, layer, torch.tensor([[cold.bank.slot(frame)]]))
            keys, values = cold.bank.read(frame)
            want = torch.stack([keys[layer], values[layer]])[:, :, None]
            torch.testing.assert_close(out, torch.ops.longlive.window_attend(q, want, run=1)[0])
        assert len(own) == 3 and all(own) == (backend == "inductor")


def test_layers_and_banks_are_not_compiled_for_one_by_one() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def step(pool_layer: torch.Tensor, bank: int, layer: int) -> torch.Tensor:
        wait_pages(pool_layer, bank, layer)
        return pool_layer + 1

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for _ in range(3):
        arriving, pool = Arriving(), torch.zeros(40, 5)
        for layer in range(40):
            compiled(pool[layer], arriving.handle, layer)
        assert arriving.waits == list(range(40))
    assert counter.frame_count <= 4


def test_only_the_pool_counts_as_written() -> None:
    schema = wait_pages.default._schema
    assert [argument.name for argument in schema.arguments if argument.alias_info] == ["pool_layer"]
    assert schema.returns == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_tensors_wait_for_nothing(device: str) -> None:
    arriving = Arriving()
    if device == "meta":
        wait_pages(torch.zeros(3, 2, device="meta"), arriving.handle, 0)
    else:
        with torch._subclasses.FakeTensorMode():
            wait_pages(torch.zeros(3, 2), arriving.handle, 0)
    assert arriving.waits == []


def test_handles_of_banks_that_are_gone(bank: MemoryBank) -> None:
    pool = bank.slots[0]
    wait_pages(pool, bank.handle, 0)
    bank.close()
    for handle in (bank.handle, 10**9, 0, -1):
        with pytest.raises(RuntimeError, match=rf"bank must be the handle of an open MemoryBank, got {handle}: closed"):
            wait_pages(pool, handle, 0)
    arriving = Arriving()
    handle, gone = arriving.handle, weakref.ref(arriving)
    wait_pages(pool, handle, 0)
    del arriving
    gc.collect()
    assert gone() is None  # the handle does not keep it
    with pytest.raises(RuntimeError, match="bank must be the handle"):
        wait_pages(pool, handle, 0)


def test_a_copy_is_filled_in_and_anything_else_refused(bank: MemoryBank) -> None:
    keys, values = torch.randn(2, 3, 1, 3, *FORMAT.page_shape)
    bank.commit(range(3), keys, values)
    copy = torch.zeros_like(bank.slots[1])
    wait_pages(copy, bank.handle, 1)
    assert torch.equal(copy, bank.slots[1]) and copy.any()
    with pytest.raises(
        ValueError, match=r"pool_layer \(slots of the layer\) must have shape \(2, 1, 6, 4, 2, 8\), got"
    ):
        wait_pages(copy[:, :, :5], bank.handle, 1)
    with pytest.raises(TypeError, match=r"pool_layer .* must have dtype torch.float32"):
        wait_pages(copy.double(), bank.handle, 1)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_that_there_are_not(bank: MemoryBank, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer must be between 0 and 2, got {layer}"):
        wait_pages(bank.slots[0], bank.handle, layer)


def test_gradients_are_refused(bank: MemoryBank) -> None:
    pool = bank.slots[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"longlive\.wait_pages has no backward: pool_layer requires grad"):
        wait_pages(pool, bank.handle, 0)
    with torch.no_grad():
        wait_pages(pool, bank.handle, 0)


@pytest.mark.gpu
def test_a_graph_being_captured_is_refused() -> None:
    config = BankConfig(host_bytes=20 * FORMAT.record_bytes)
    with MemoryBank(FORMAT, config, device_slots=3, device="cuda") as bank:
        graph = torch.cuda.CUDAGraph()
        pool = bank.slots[0]
        wait_pages(pool, bank.handle, 0)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match="wait cannot be captured into a CUDA graph"), torch.cuda.graph(graph):
            wait_pages(pool, bank.handle, 0)
        wait_pages(pool, bank.handle, 0)


@pytest.mark.gpu
def test_compiled_waits_on_a_gpu() -> None:
    """Under Inductor and its CUDA graphs' exclusion: pages fetched from host memory are seen by the compiled reader."""
    torch._dynamo.reset()
    config = BankConfig(host_bytes=20 * FORMAT.record_bytes)
    with MemoryBank(FORMAT, config, device_slots=3, most_fetched=3, device="cuda") as bank:
        pages = torch.randn(12, 2, 3, 1, 1, *FORMAT.page_shape, device="cuda")
        for frame, (keys, values) in enumerate(pages):
            bank.commit([frame], keys, values)

        @torch.compile(fullgraph=True)
        def read(pool_layer: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
            wait_pages(pool_layer, handle, layer)
            return pool_layer * 1.0

        for start in range(0, 12, 3):
            bank.prefetch(range(start, start + 3))
            for layer in range(3):
                got: Any = read(bank.slots[layer], bank.handle, layer)
                for frame in range(start, start + 3):
                    assert torch.equal(got[:, 0, bank.slot(frame)], pages[frame, :, layer, 0, 0])
            bank.release(range(start, start + 3))
