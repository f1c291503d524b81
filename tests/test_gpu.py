"""On a GPU: every engine against the oracle, CUDA graphs, torch.compile, streams, devices, offsets beyond 2**31.

``LONGLIVE_GPU_TESTS_ON=cpu`` runs the bodies on a CPU in Triton's interpreter, graphs and streams left out: it shows
slips in the tests before a GPU does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
from test_ops import call, tensors, variants
from tolerance import assert_close_enough

from longlive_rag_ops import reference
from longlive_rag_ops.config import window_slot

ON_CPU = os.environ.get("LONGLIVE_GPU_TESTS_ON") == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda"
DTYPES = [torch.float32, torch.float16] if ON_CPU else [torch.float32, torch.float16, torch.bfloat16]
pytestmark = [] if ON_CPU else pytest.mark.gpu
Case = dict[str, Any]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """New memory is full of NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def there(case: Case) -> Case:
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def clone(case: Case) -> Case:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit; float8 has no comparison of its own on every device."""
    return torch.equal(*(x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (one, other)))


def in_float64(case: Case) -> Case:
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return {n: v.double() if isinstance(v, torch.Tensor) and v.dtype in floats else v for n, v in case.items()}


def results(op: str, case: Case, engine: str) -> list[torch.Tensor]:
    """What the op returns, then every argument it may change."""
    returned = tensors(call(op, case, engine))
    schema = getattr(torch.ops.longlive, op).default._schema
    return [*returned, *(case[a.name] for a in schema.arguments if a.alias_info and a.name in case)]


def plain_attention(case: Case) -> list[torch.Tensor]:
    """`window_attend` as one writes it in the precision of the inputs: turned queries and pages are rounded to it."""
    q, pool = case["q"], case["pool_layer"]
    outs, lses = torch.zeros_like(q), torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    for b in range(q.shape[0]):
        table = case["slots"][b].tolist() if "slots" in case else [*range(case["run"])]
        logits, values = [], []
        for place, slot in enumerate(table):
            if slot < 0:
                continue
            query, (key, value) = q[b], pool[:, b, slot]
            if "shifts" in case:
                shift = -int(case["shifts"][b, place])
                query = reference.turn_in_time(query.float(), case["rope"].float(), case["rope_split"], shift)
                query = query.to(q.dtype)
            if "k_scale" in case:
                key, value = (
                    (page.float() * case[name][b, slot][..., None]).to(q.dtype)
                    for page, name in ((key, "k_scale"), (value, "v_scale"))
                )
            group = q.shape[2] // key.shape[1]
            key, value = (page.repeat_interleave(group, 1).transpose(0, 1) for page in (key, value))
            logits.append(query.transpose(0, 1) @ key.transpose(1, 2) * case.get("scale", q.shape[3] ** -0.5))
            values.append(value)
        if logits:
            joined = torch.cat(logits, -1)
            outs[b] = (joined.softmax(-1) @ torch.cat(values, 1)).transpose(0, 1)
            lses[b] = joined.float().logsumexp(-1)
    return [outs, lses if case.get("return_lse") else lses.new_empty(0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", ["triton", "dense", "auto"])
@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_engines_agree_with_the_oracle(op: str, make: Any, sizes: Any, engine: str, dtype: torch.dtype) -> None:
    case = make(dtype=dtype, **sizes)
    exact = results(op, in_float64(case), "reference")
    plain = plain_attention(case) if op == "window_attend" else results(op, clone(case), "dense")
    got = results(op, there(clone(case)), engine)
    for one, other, want in zip(got, plain, exact, strict=True):
        assert one.device.type == DEVICE and one.dtype == other.dtype
        if not one.is_floating_point():
            assert torch.equal(one.cpu(), want)
        elif one.numel():
            assert_close_enough(one, other, want, rms=None if dtype == torch.bfloat16 else 0.005)


@pytest.mark.parametrize("engine", ["triton", "dense", "auto"])
@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_results_repeat_to_the_bit(op: str, make: Any, sizes: Any, engine: str) -> None:
    case = there(make(dtype=torch.float16, **sizes))
    first = results(op, clone(case), engine)
    for _ in range(1 if ON_CPU else 10):
        for one, other in zip(results(op, clone(case), engine), first, strict=True):
            assert same(one, other)


class Graph:
    """A call captured in a CUDA graph; on a CPU it is called again instead."""

    def __init__(self, function: Callable[[], list[torch.Tensor]]) -> None:
        self._function = function
        if ON_CPU:
            self.results = function()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()  # compiles, allocates workspaces
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = function()

    def replay(self) -> None:
        for result in self.results:
            result.fill_(torch.nan if result.is_floating_point() else -77)
        if ON_CPU:
            for result, value in zip(self.results, self._function(), strict=True):
                result.copy_(value)
        else:
            self._graph.replay()


def overwrite(case: Case, by: Case) -> None:
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            value.copy_(by[name])


@pytest.mark.parametrize("engine", ["triton", "auto"])
@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_ops_in_a_graph_follow_their_inputs(op: str, make: Any, sizes: Any, engine: str) -> None:
    dtype = torch.float16
    first, then = there(make(dtype=dtype, **sizes)), there(make(dtype=dtype, **sizes))
    for name, value in then.items():  # another input of the same shape
        if name in ("q", "query", "v", "outs"):
            value.copy_(value.flip(-1))
    mine = clone(first)
    graph = Graph(lambda: tensors(call(op, mine, engine)))
    for inputs in (then, first, then):
        overwrite(mine, inputs)
        graph.replay()
        other = clone(inputs)
        want = tensors(call(op, other, engine))
        for one, two in zip([*graph.results, *mine.values()], [*want, *other.values()], strict=True):
            assert not isinstance(one, torch.Tensor) or same(one, two)


def video(device: str, dtype: torch.dtype, layers: int) -> list[Case]:
    """Each layer's arguments before a video's first block; state and index are one for all layers."""
    blocks = [cases.retrieve(dtype, slots=6 + 16, seed=layer) for layer in range(layers)]
    shared = blocks[0] | {"index": torch.randn(2, 16, 4, generator=cases.generator(9))}
    shared |= {"index_ids": torch.arange(16).repeat(2, 1), "frame_slot": torch.full((2, 16), -1)}
    own = ("q", "k", "v", "pool_layer", "staging")
    shared = {n: v.to(device) if isinstance(v, torch.Tensor) and n not in own else v for n, v in shared.items()}
    return [shared | {n: block[n].to(device) for n in own} for block in blocks]


def forward(layers: list[Case], engine: str, select: bool, place: bool) -> list[torch.Tensor]:
    """One forward of all layers; the first layer chooses, for all."""
    outs = []
    for number, case in enumerate(layers):
        options = {"select": select and number == 0, "place": place}
        outs += tensors(call("retrieve_attend", case | options, engine))
    return outs


@pytest.mark.parametrize("engine", ["triton", "auto"])
def test_a_video_in_one_graph_a_block(engine: str) -> None:
    """Two layers, two forwards a block, one graph for every block: what differs between blocks is on the device."""
    dtype = torch.float32
    mine, oracle = video(DEVICE, dtype, 2), video("cpu", torch.float32, 2)

    def block(layers: list[Case], engine: str) -> list[torch.Tensor]:
        return [*forward(layers, engine, True, True), *forward(layers, engine, False, False)]

    before = [clone(case) for case in mine]
    graph = Graph(lambda: block(mine, engine))
    for case, was in zip(mine, before, strict=True):
        overwrite(case, was)
    retrieved = 0
    for start in range(0, 16, cases.BLOCK):
        for number, (one, other) in enumerate(zip(mine, oracle, strict=True)):
            new = cases.block(dtype, seed=100 * number + start)
            for case in (one, other):
                for name in "qkv":
                    case[name].copy_(new[name])
                case["start_frame"].fill_(start)
                case["index_length"].fill_(start)
        graph.replay()
        want = block(oracle, "reference")
        for got, exact in zip(graph.results, want, strict=True):
            assert (got.cpu() - exact).abs().max() <= 2e-5 * exact.square().mean().sqrt()
        assert torch.equal(mine[0]["window_state"].cpu(), oracle[0]["window_state"])
        retrieved += int((oracle[0]["window_state"][:, 2] >= 0).sum())
        for case in (*mine, *oracle):  # the block's canonical pages become history
            for frame in range(start, start + cases.BLOCK):
                case["pool_layer"][0, :, 6 + frame] = case["staging"][:, frame % 7]
                case["pool_layer"][1, :, 6 + frame] = case["pool_layer"][1, :, window_slot(frame, 1, 3)]
                case["frame_slot"][:, frame] = 6 + frame
    assert retrieved > 4


class Attention(torch.nn.Module):
    """As a backbone calls it: projections around the op."""

    def __init__(self, case: Case, engine: str) -> None:
        super().__init__()
        self.case, self.engine = case, engine
        self.mix = torch.nn.Linear(16, 16, bias=False, device=DEVICE, dtype=case["q"].dtype)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = torch.ops.longlive.retrieve_attend(
            **(self.case | {"q": self.mix(q), "k": k * 2, "v": v}), engine=self.engine
        )
        return self.mix(out)


@pytest.mark.parametrize("engine", ["triton", "auto"])
def test_compiled_whole(engine: str) -> None:
    torch._dynamo.reset()
    eager, compiled = (there(cases.retrieve_later()) for _ in range(2))
    torch.manual_seed(0)
    model = Attention(eager, engine)
    with torch.no_grad():
        want = model(*(eager[n] for n in "qkv"))
        model.case = compiled
        backend = "aot_eager" if ON_CPU else "inductor"
        got = torch.compile(model, fullgraph=True, backend=backend)(*(compiled[n] for n in "qkv"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name in ("pool_layer", "staging", "window_state"):
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["triton", "auto"])
def test_two_streams_at_a_time(engine: str) -> None:
    """Two videos on two streams: neither finds the other's intermediate results."""
    videos = [there(cases.retrieve_later(torch.float16)) for _ in range(2)]
    videos[1]["q"].mul_(-1)
    videos[1]["v"].add_(1)
    before = [clone(case) for case in videos]
    want = [results("retrieve_attend", clone(case), engine) for case in videos]
    streams = [None if ON_CPU else torch.cuda.Stream() for _ in videos]
    if not ON_CPU:
        torch.cuda.synchronize()
    for _ in range(1 if ON_CPU else 50):
        got = []
        for case, was, stream in zip(videos, before, streams, strict=True):
            with torch.cuda.stream(stream):
                overwrite(case, was)
                got.append(results("retrieve_attend", case, engine))
        if not ON_CPU:
            torch.cuda.synchronize()
        for one, other in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_tensors_on_another_device_than_the_current_one(op: str, make: Any, sizes: Any) -> None:
    if ON_CPU or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = there(make(**sizes))
    want = results(op, clone(case), "triton")
    with torch.cuda.device(0):
        moved = {n: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for n, v in case.items()}
        got = results(op, moved, "triton")
    for one, other in zip(got, want, strict=True):
        assert one.device.index == 1 and torch.equal(one.cpu(), other.cpu())


def test_float64_is_refused_by_triton_and_served_by_auto() -> None:
    case = there(cases.attend(torch.float64))
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        call("window_attend", case, "triton")
    out, _ = call("window_attend", case, "auto")
    torch.testing.assert_close(out.cpu(), call("window_attend", cases.attend(torch.float64), "reference")[0])
