"""The contract of the ops: engines agree with the oracle, schemas and fakes hold, gradients and aliases are refused."""

from __future__ import annotations

import itertools
from typing import Any

import cases
import pytest
import torch
import torch._dynamo.testing

import longlive_rag_ops  # noqa: F401  registers the ops
from longlive_rag_ops import reference
from longlive_rag_ops.ops.schemas import SCHEMAS

OPS = sorted(set(SCHEMAS) - {"wait_pages"})  # which has no engines: tests/bank/test_wait_pages.py
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


TABLES = ("slots", "run", "run without lse", "empty", "shifts", "int8")


def call(op: str, case: dict[str, Any], engine: str = "auto") -> Any:
    return getattr(torch.ops.longlive, op)(**case, engine=engine)


def tensors(result: Any) -> list[torch.Tensor]:
    return [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)


def variants() -> list[Any]:
    """Every op in every form that has a path of its own."""
    forms = [
        ("topk_retrieve", cases.topk, {}),
        ("topk_retrieve", cases.topk, {"rows": 3}),
        *(("topk_retrieve", cases.topk, {"options": options}) for options in ("int8", "gate", "diverse")),
        ("write_frames", cases.write, {}),
        ("write_frames", cases.write, {"weights": True}),
        ("write_frames", cases.write, {"head_dim": 128, "heads": 2}),
        *(("place_frames", cases.place, {"pages": pages}) for pages in ("pool", "keys", "int8", "fp8")),
        *(("window_attend", cases.attend, {"table": table}) for table in TABLES),
        ("window_attend", cases.attend, {"heads": 2, "head_dim": 96}),
        ("retrieve_attend", cases.retrieve, {}),
        ("retrieve_attend", cases.retrieve_later, {}),
        ("retrieve_attend", cases.retrieve_later, {"weights": True}),
        ("retrieve_attend", cases.retrieve_later, {"normalized": True}),
        ("retrieve_attend", cases.retrieve_later, {"select": False}),
        ("merge_attention", cases.merge, {}),
    ]
    return [pytest.param(op, make, sizes, id=f"{op}-{make.__name__}-{sizes}") for op, make, sizes in forms]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_dense_engine_agrees_with_the_oracle(op: str, make: Any, sizes: Any, dtype: torch.dtype) -> None:
    exact, fast = make(dtype=dtype, **sizes), make(dtype=dtype, **sizes)
    want, got = tensors(call(op, exact, "reference")), tensors(call(op, fast, "dense"))
    for name in exact:  # buffers the op mutates
        if isinstance(exact[name], torch.Tensor) and exact[name].dtype in FLOATS:
            want.append(exact[name])
            got.append(fast[name])
    for one, other in zip(want, got, strict=True):
        assert other.dtype == one.dtype and other.shape == one.shape
        assert not other.isnan().any()
        # lse and scores of half-precision inputs are float32, but carry the rounding of the inputs' products
        torch.testing.assert_close(other, one, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_strided_inputs_give_the_same_result(op: str, make: Any, sizes: Any) -> None:
    plain = make(**sizes)
    views = {
        name: cases.strided(value) if isinstance(value, torch.Tensor) and value.dim() > 3 else value
        for name, value in make(**sizes).items()
    }
    for one, other in zip(tensors(call(op, plain)), tensors(call(op, views)), strict=True):
        torch.testing.assert_close(other, one, rtol=2e-6, atol=2e-6)
    for name, value in views.items():
        if isinstance(value, torch.Tensor) and value.dtype in FLOATS:
            torch.testing.assert_close(value, plain[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_any_argument_may_have_gaps(op: str, make: Any, sizes: Any) -> None:
    """Every tensor argument in turn with an innermost stride of 2: kernels that assume 1 read garbage silently."""
    plain = make(**sizes)
    want = tensors(call(op, plain, "reference"))
    for name in [n for n, v in plain.items() if isinstance(v, torch.Tensor)]:
        case = make(**sizes)
        case[name] = cases.gapped(case[name])
        for one, other in zip(want, tensors(call(op, case)), strict=True):
            torch.testing.assert_close(other, one, rtol=5e-6, atol=5e-6)
        if case[name].dtype in FLOATS:
            torch.testing.assert_close(case[name], plain[name], rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_opcheck(op: str, make: Any, sizes: Any, layout: str) -> None:
    if "fp8" in sizes.values():
        pytest.skip("opcheck itself multiplies every floating-point input, which torch cannot for float8")
    case = make(**sizes)
    if layout == "strided":
        case = {
            name: cases.strided(value) if isinstance(value, torch.Tensor) and value.dim() > 3 else value
            for name, value in case.items()
        }
    torch.library.opcheck(getattr(torch.ops.longlive, op).default, *split_arguments(op, case))


def split_arguments(op: str, case: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """opcheck wants positional arguments as a tuple."""
    schema = getattr(torch.ops.longlive, op).default._schema
    positional = [a.name for a in schema.arguments if not a.kwarg_only and a.name in case]
    return tuple(case[name] for name in positional), {n: v for n, v in case.items() if n not in positional}


@pytest.mark.parametrize("op", OPS)
def test_only_declared_arguments_are_mutated_and_nothing_is_aliased(op: str) -> None:
    case = cases.ALL[op]()
    before = cases.clone(case)
    results = tensors(call(op, case))
    mutable = {a.name for a in getattr(torch.ops.longlive, op).default._schema.arguments if a.alias_info}
    changed = {
        name for name, value in case.items() if isinstance(value, torch.Tensor) and not torch.equal(value, before[name])
    }
    assert changed == mutable
    owned = {value.untyped_storage().data_ptr() for value in case.values() if isinstance(value, torch.Tensor)}
    for result in results:
        assert result.numel() == 0 or result.untyped_storage().data_ptr() not in owned


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_refused_in_grad_mode_only(op: str) -> None:
    case = cases.ALL[op]()
    name = next(n for n, v in case.items() if isinstance(v, torch.Tensor) and v.is_floating_point())
    case[name] = case[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"longlive.{op} has no backward: {name} requires grad"):
        call(op, case)
    with torch.no_grad():
        for result in tensors(call(op, case)):
            assert not result.requires_grad


@pytest.mark.parametrize("op", OPS)
def test_inference_mode(op: str) -> None:
    with torch.inference_mode():
        for result in tensors(call(op, cases.ALL[op]())):
            assert result.shape is not None and not result.isnan().any()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_break(op: str, backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = cases.ALL[op](), cases.ALL[op]()

    def step(**case: Any) -> Any:
        """Arithmetic before and after the op, so that there is something to fuse and to reorder."""
        mutable = {n: v for n, v in case.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        first = next(iter(mutable))
        buffer = first in ("pool_layer",)
        arguments = case if buffer else case | {first: case[first] * 1.5}
        results = tensors(call(op, arguments))
        return [result + 1 if result.is_floating_point() else result for result in results]

    want = step(**eager)
    got = torch.compile(step, backend=backend, fullgraph=True)(**compiled)
    for one, other in zip([*want, *only_tensors(eager)], [*got, *only_tensors(compiled)], strict=True):
        torch.testing.assert_close(other, one)


def only_tensors(case: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in case.values() if isinstance(value, torch.Tensor)]


def test_compiled_writes_are_neither_dropped_nor_reordered() -> None:
    """Two blocks' writes and attentions in one graph: each attention sees the writes before it and none after."""
    torch._dynamo.reset()

    def step(case: dict[str, Any], k: torch.Tensor) -> list[torch.Tensor]:
        ops = torch.ops.longlive
        common = {n: case[n] for n in ("pool_layer", "staging", "slots", "staging_rows", "positions")}
        common |= {n: case[n] for n in ("rope", "rope_split", "grid")}
        rotated = ops.write_frames(case["q"], case["k"], case["v"], **common)
        first, _ = ops.window_attend(rotated, case["pool_layer"], run=5)
        rotated = ops.write_frames(case["q"], k @ torch.eye(k.shape[-1]), case["v"] * 2, **common)
        second, _ = ops.window_attend(rotated, case["pool_layer"], run=5)
        return [first, second, case["pool_layer"], case["staging"]]

    k = cases.block(seed=5)["k"]
    want = step(cases.write(), k)
    for backend in ("aot_eager", "inductor"):
        got = torch.compile(step, backend=backend, fullgraph=True)(cases.write(), k)
        for one, other in zip(want, got, strict=True):
            torch.testing.assert_close(other, one)
    assert not torch.allclose(want[0], want[1])


def test_nothing_to_attend_to_is_zero_and_minus_infinity() -> None:
    for engine in ("reference", "dense"):
        out, lse = call("window_attend", cases.attend(table="empty"), engine)
        assert torch.equal(out[0], torch.zeros_like(out[0])) and (lse[0] == -torch.inf).all()
        assert out[1].abs().min() > 0 and lse[1].isfinite().all()
        inputs = cases.block()
        out, lse = torch.ops.longlive.window_attend(
            inputs["q"], inputs["pool_layer"], run=0, return_lse=True, engine=engine
        )
        assert not out.any() and (lse == -torch.inf).all()


def test_merging_parts_equals_attending_to_all_at_once() -> None:
    inputs = cases.block(torch.float64)
    q, pool = inputs["q"], inputs["pool_layer"]
    whole, whole_lse = torch.ops.longlive.window_attend(q, pool, run=9, return_lse=True)
    tables = [[0, 1, 2], [3, -1, -1], [-1, -1, -1], [4, 5, 8], [6, 7, -1]]
    parts = [torch.ops.longlive.window_attend(q, pool, torch.tensor([table] * 2), return_lse=True) for table in tables]
    for engine in ("reference", "dense"):
        out, lse = torch.ops.longlive.merge_attention(
            torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]), engine=engine
        )
        torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)


def test_merging_ignores_what_an_empty_part_holds() -> None:
    outs, lses = torch.ones(2, 1, 3, 1, 4), torch.zeros(2, 1, 1, 3)
    outs[1], lses[1] = torch.nan, -torch.inf
    for engine in ("reference", "dense"):
        out, lse = torch.ops.longlive.merge_attention(outs, lses, engine=engine)
        assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])
        out, lse = torch.ops.longlive.merge_attention(outs[1:], lses[1:], engine=engine)
        assert not out.any() and (lse == -torch.inf).all()
    lses[1] = -200.0  # a weight too small for float32 is one all the same
    for engine in ("reference", "dense"):
        assert torch.ops.longlive.merge_attention(outs, lses, engine=engine)[0].isnan().all()


def test_merging_passes_a_part_s_nan_on() -> None:
    """A number in its place would look like a result."""
    outs, lses = torch.ones(2, 1, 3, 1, 4), torch.zeros(2, 1, 1, 3)
    lses[1, 0, 0, 1] = torch.nan
    for engine in ("reference", "dense"):
        out, lse = torch.ops.longlive.merge_attention(outs, lses, engine=engine)
        assert out.isnan().all(-1).flatten().tolist() == lse.isnan().flatten().tolist() == [False, True, False]


def test_selecting_and_placing_again_changes_nothing() -> None:
    """A call that failed half-way, and a second layer that says select again, must not lose the placement plan."""
    once, again = cases.retrieve_later(), cases.retrieve_later()
    want, _ = call("retrieve_attend", once)
    other_layer = cases.retrieve_later()
    assert (once["window_state"][:, 2] >= 0).any() and (once["window_state"][:, 3] >= 0).any()
    for _ in range(2):
        got, _ = call("retrieve_attend", again)
        assert torch.equal(got, want) and torch.equal(again["window_state"], once["window_state"])
    got, _ = call("retrieve_attend", other_layer | {"window_state": again["window_state"]})
    assert torch.equal(got, want)


def test_empty_batches() -> None:
    for engine in ("reference", "dense"):
        pool = torch.zeros(2, 0, 3, 4, 2, 8)
        slots = torch.zeros(0, 2, dtype=torch.int64)
        for form in ({"slots": slots}, {"run": 2}):
            out, lse = torch.ops.longlive.window_attend(
                torch.zeros(0, 5, 2, 8), pool, **form, return_lse=True, engine=engine
            )
            assert out.shape == (0, 5, 2, 8) and lse.shape == (0, 2, 5)


def test_compiling_does_not_specialise_on_the_number_of_slots() -> None:
    torch._dynamo.reset()
    inputs = cases.block(slots=40)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(
        lambda run: torch.ops.longlive.window_attend(inputs["q"], inputs["pool_layer"], run=run)[0],
        backend=counter,
        fullgraph=True,
    )
    for run in range(1, 40):
        torch.testing.assert_close(
            step(run), torch.ops.longlive.window_attend(inputs["q"], inputs["pool_layer"], run=run)[0]
        )
    assert counter.frame_count <= 3


def test_order_of_slots_does_not_matter() -> None:
    inputs = cases.block(torch.float64)
    q, pool = inputs["q"], inputs["pool_layer"]
    one, _ = torch.ops.longlive.window_attend(q, pool, torch.tensor([[0, 5, 3, 7]] * 2))
    other, _ = torch.ops.longlive.window_attend(q, pool, torch.tensor([[7, -1, 3, 0, 5]] * 2))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_placing_a_canonical_page_equals_rotating_once() -> None:
    """What design calls place once: temporal and spatial channels are disjoint, so nothing is rounded twice."""
    for dtype, engine in itertools.product(FLOATS, ("reference", "dense")):
        case = cases.write(dtype)
        torch.ops.longlive.write_frames(**case, engine=engine)
        placed = case["pool_layer"][0][:, case["slots"]].clone()
        torch.ops.longlive.place_frames(
            case["pool_layer"],
            case["slots"].repeat(2, 1),
            case["staging_rows"].repeat(2, 1),
            case["positions"].repeat(2, 1),
            case["rope"],
            case["rope_split"],
            k_pages=case["staging"],
            engine=engine,
        )
        assert torch.equal(case["pool_layer"][0][:, case["slots"]], placed)


def test_rotation_depends_on_relative_time_only() -> None:
    inputs = cases.block(torch.float64)
    dots = []
    for shift in (0, 11):
        q, k = (
            reference.rotate(
                inputs[name][..., :2, :], inputs["rope"], inputs["rope_split"], cases.GRID, torch.tensor([3, 5]) + shift
            )
            for name in "qk"
        )
        dots.append(torch.einsum("bshd,bthd->bhst", q, k))
    torch.testing.assert_close(dots[0], dots[1], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_cuda_agrees_with_cpu(op: str, make: Any, sizes: Any) -> None:
    case = make(**sizes)
    there = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in make(**sizes).items()}
    for one, other in zip(tensors(call(op, case)), tensors(call(op, there)), strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-5, atol=1e-5)
    for one, other in zip(only_tensors(case), only_tensors(there), strict=True):
        if one.dtype in FLOATS:
            torch.testing.assert_close(other.cpu(), one, rtol=1e-5, atol=1e-5)
