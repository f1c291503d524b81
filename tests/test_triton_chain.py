"""`retrieve_attend` of the Triton engine: the sequence on the device, without the host waiting for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
from simulator import Rules, Simulator
from tolerance import assert_close_enough
from torch.utils._python_dispatch import TorchDispatchMode
from window_pair import TOLERANCE, error_of, one_thread  # noqa: F401 (a fixture)

pytest.importorskip("triton")

from longlive_rag_ops import reference
from longlive_rag_ops.assignment import FRAME, POSITION, SOURCE, STAGED, empty_window_state
from longlive_rag_ops.config import POSITION_RULES, window_slot
from longlive_rag_ops.rotary import default_split, rotary_table
from longlive_rag_ops.triton_kernels.retrieve_attend import MESSAGE, STEPS, Steps, run_chain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUFFERS = ("pool_layer", "staging", "window_state")


def to_device(case: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in case.items()}


def call(case: dict[str, Any], engine: str = "triton") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.longlive.retrieve_attend(**case, engine=engine)


def attend_by_table(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    counts: torch.Tensor,
    count: int | None,
    most: int,
    scale: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's attention as a step; a count on the host must be that on the device."""
    assert count is None or counts.tolist() == [count] * len(counts)
    numbers = torch.arange(most, device=q.device)
    return reference.window_attend(
        q, pool_layer, torch.where(numbers < counts[:, None], numbers, -1), None, scale, return_lse
    )


ORACLE = Steps(reference.topk_retrieve, reference.write_frames, reference.place_frames, attend_by_table)


class Stream:
    """A video in buffers that stay where they are: one layer, every finished frame's page in the pool."""

    WINDOW, SINK, TOP_K, RECENT, FRAMES = 9, 1, 3, 1, 24
    GRID, HEADS, KV_HEADS, HEAD_DIM, WIDTH = (1, 2), 2, 1, 16, 4

    def __init__(self, rule: str = "slot", samples: int = 2, dtype: torch.dtype = torch.float32) -> None:
        self.rng, self.samples, self.rule, self.dtype = cases.generator(5), samples, rule, dtype
        self.start, tokens = 0, self.GRID[0] * self.GRID[1]
        self.local = self.WINDOW - self.SINK - self.TOP_K
        page = (tokens, self.KV_HEADS, self.HEAD_DIM)
        self.buffers = to_device(
            {
                "pool_layer": torch.zeros(2, samples, self.WINDOW + self.FRAMES, *page, dtype=dtype),
                "staging": torch.zeros(samples, self.local + 2, *page, dtype=dtype),
                "window_state": empty_window_state(samples, self.WINDOW),
                "index": torch.zeros(samples, self.FRAMES, self.WIDTH),
                "index_ids": torch.full((samples, self.FRAMES), -1),
                "index_length": torch.zeros(1, dtype=torch.int64),
                "frame_slot": torch.full((samples, self.FRAMES), -1),
                "start_frame": torch.zeros(1, dtype=torch.int64),
                "rope": rotary_table(self.HEAD_DIM, 64, dtype=torch.float32),
            }
        )

    def arguments(self, **options: Any) -> dict[str, Any]:
        return {
            **self.buffers,
            "rope_split": list(default_split(self.HEAD_DIM)),
            "grid": list(self.GRID),
            "sink": self.SINK,
            "top_k": self.TOP_K,
            "recent_exclude": self.RECENT,
            "position_rule": self.rule,
            "return_lse": True,
            **options,
        }

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng).to(self.dtype)

    def qkv(self, n: int) -> list[torch.Tensor]:
        length = n * self.GRID[0] * self.GRID[1]
        heads = (self.HEADS, self.KV_HEADS, self.KV_HEADS)
        return [self.random(self.samples, length, h, self.HEAD_DIM) for h in heads]

    def commit(self, n: int, embeddings: torch.Tensor) -> None:
        """The block is final: its pages and embeddings become history."""
        b = self.buffers
        for i, frame in enumerate(range(self.start, self.start + n)):
            page = self.WINDOW + frame
            b["pool_layer"][0, :, page] = b["staging"][:, frame % b["staging"].shape[1]]
            b["pool_layer"][1, :, page] = b["pool_layer"][1, :, window_slot(frame, self.SINK, self.local)]
            b["frame_slot"][:, frame], b["index_ids"][:, frame] = page, frame
            b["index"][:, frame] = embeddings[:, i].to(DEVICE)
        self.start += n
        b["start_frame"].fill_(self.start)
        b["index_length"].fill_(self.start)


@pytest.mark.parametrize(("steps", "rule"), [(STEPS, "slot"), *((ORACLE, rule) for rule in POSITION_RULES)])
def test_a_video_is_the_simulators(steps: Steps, rule: str) -> None:
    stream = Stream(rule)
    rules = Rules(stream.WINDOW, stream.SINK, stream.TOP_K, stream.RECENT, rule)
    sim = Simulator(rules, stream.samples)
    retrieved = set()
    for block, n in enumerate((2, 2, 2, 2, 2, 2, 1, 2, 2)):
        for forward in range(1 + block % 2):
            q, k, v = stream.qkv(n)
            parts = sim.parts(0, n)
            count = sum(map(len, parts)) if forward else None
            retrieved.update(parts[2])
            once = forward == 0
            inputs = [x.to(DEVICE) for x in (q, k, v)]
            out, lse = run_chain(steps, *inputs, **stream.arguments(select=once, place=once, count=count))
            want, want_lse = sim.attend(0, q, k, v, stream.GRID)
            assert error_of(out.cpu(), want) <= TOLERANCE[stream.dtype], f"block {stream.start}"
            assert torch.allclose(lse.cpu().double(), want_lse, rtol=2e-5, atol=2e-5)
            assert stream.buffers["window_state"][0, FRAME, -3:].tolist()[: len(parts[2])] == sim.memory_slots(0)
        embeddings = stream.random(stream.samples, n, stream.WIDTH)
        stream.commit(n, embeddings)
        sim.finish(n, embeddings)
    assert len(retrieved) > stream.TOP_K


def int8_index(case: dict[str, Any]) -> dict[str, Any]:
    scale = case["index"].abs().amax(-1) / 127
    return {"index": (case["index"] / scale[..., None]).round().to(torch.int8), "index_scale": scale}


def no_index(case: dict[str, Any]) -> dict[str, Any]:
    return {n: case[n][:, :0] for n in ("index", "index_ids")} | {"index_length": torch.tensor([0])}


VARIANTS: dict[str, Any] = {
    "first block": (cases.retrieve, {}, lambda case: {}),
    "later": (cases.retrieve_later, {}, lambda case: {}),
    "norm": (cases.retrieve_later, {"weights": True}, lambda case: {}),
    "unit rows": (cases.retrieve_later, {"normalized": True}, lambda case: {}),
    "no select": (cases.retrieve_later, {"select": False}, lambda case: {}),
    "no place": (cases.retrieve_later, {}, lambda case: {"place": False}),
    "count": (cases.retrieve_later, {}, lambda case: {"count": 6}),
    "absolute": (cases.retrieve_later, {}, lambda case: {"position_rule": "absolute"}),
    "before_window": (cases.retrieve_later, {}, lambda case: {"position_rule": "before_window"}),
    "int8 index": (cases.retrieve_later, {}, int8_index),
    "least score": (cases.retrieve_later, {}, lambda case: {"min_score": 0.5}),
    "diversity": (cases.retrieve_later, {}, lambda case: {"diversity": 0.6}),
    "no query": (cases.retrieve_later, {}, lambda case: {"index_length": torch.tensor([13])}),
    "empty index": (cases.retrieve_later, {}, no_index),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in VARIANTS), *((name, torch.float16) for name in ("later", "norm", "count"))],
)
def test_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    make, sizes, change = VARIANTS[name]
    case = make(dtype=dtype, **sizes)
    case |= change(case)
    exact = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() and "index" not in n else x
        for n, x in cases.clone(case).items()
    }
    plain, case = cases.clone(case), to_device(case)
    results = [call(case), call(plain, "dense"), call(exact, "reference")]
    for got, other, want in zip(*results, strict=True):
        assert_close_enough(got, other, want)
    assert torch.equal(case["window_state"].cpu(), exact["window_state"])
    for buffer in ("pool_layer", "staging"):
        assert_close_enough(case[buffer], plain[buffer], exact[buffer])


def test_strides_change_nothing() -> None:
    tight = to_device(cases.retrieve_later())
    loose = {n: cases.gapped(x) if isinstance(x, torch.Tensor) and x.dim() > 1 else x for n, x in tight.items()}
    loose = to_device(loose)
    for got, want in zip(call(loose), call(tight), strict=True):
        torch.testing.assert_close(got, want)
    assert all(torch.equal(loose[n], tight[n]) for n in BUFFERS)


def test_selecting_and_placing_again_changes_nothing() -> None:
    once, again = to_device(cases.retrieve_later()), to_device(cases.retrieve_later())
    want, _ = call(once)
    assert (once["window_state"][:, SOURCE] >= 0).any() and (once["window_state"][:, STAGED] >= 0).any()
    for _ in range(2):
        got, _ = call(again)
        assert torch.equal(got, want) and torch.equal(again["window_state"], once["window_state"])
    other_layer = to_device(cases.retrieve_later()) | {"window_state": again["window_state"]}
    assert torch.equal(call(other_layer)[0], want)


def test_the_message_fits_a_device_assertion() -> None:
    assert len(MESSAGE.encode()) < 255


FAULTS: dict[str, Any] = {
    "skipped block": (True, {"start_frame": torch.tensor([16])}, None),
    "no page": (True, {"frame_slot": torch.full((2, 16), -1)}, None),
    "short rope": (True, {"rope": rotary_table(16, 5, dtype=torch.float32)}, None),
    "wrong count": (True, {"count": 5}, None),
    "not selected": (False, {"start_frame": torch.tensor([16])}, None),
    "wrong position": (False, {}, (POSITION, 0, -1)),
    "wrong source": (False, {}, (SOURCE, 0, 3)),
    "wrong staging row": (False, {}, (STAGED, 0, 7)),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion ends the process's use of the GPU")
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_raised_before_anything_is_written(name: str) -> None:
    select, changes, entry = FAULTS[name]
    case = cases.retrieve_later(select=select) | changes
    if entry is not None:
        row, slot, number = entry
        case["window_state"][1, row, slot] = number
    before = cases.clone(case)
    with pytest.raises(RuntimeError, match=r"window_state must hold .* select=True .*frame_slot .*rope .*count"):
        call(case)
    assert all(torch.equal(case[n], before[n]) for n in BUFFERS)


def test_float64_is_refused_before_anything_is_written() -> None:
    case = to_device(cases.retrieve_later(torch.float64))
    before = cases.clone(case)
    with pytest.raises(TypeError, match=r"float64.*dense, reference"):
        call(case)
    assert all(torch.equal(case[n], before[n]) for n in BUFFERS)


class NoReading(TorchDispatchMode):
    """Fails where a tensor's values would be brought to the host."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in self.FORBIDDEN or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_reading(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(self: torch.Tensor, *args: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    with patch.context() as inside, NoReading():
        for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__", "nonzero"):
            inside.setattr(torch.Tensor, name, refuse)
        yield


def test_the_host_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case, other = to_device(cases.retrieve_later()), to_device(cases.retrieve_later())
    with pytest.raises(AssertionError), no_reading(monkeypatch):
        reference.retrieve_attend(**other)
    for options in ({}, {"select": False, "count": 6}):
        with no_reading(monkeypatch):
            run_chain(STEPS, **case | options)


@pytest.mark.gpu
def test_nothing_synchronises() -> None:
    case = to_device(cases.retrieve_later())
    call(case)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        for count in (None, 6):
            call(case | {"count": count})
    finally:
        torch.cuda.set_sync_debug_mode("default")
