"""The contract of the ops under the Triton engine: every form of every op, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from test_ops import OPS, call, split_arguments, tensors, variants
from tolerance import assert_close_enough

from longlive_rag_ops import reference
from longlive_rag_ops.replay import replay
from longlive_rag_ops.traces import load_trace

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
TRACES = sorted((Path(__file__).parent / "data" / "traces").glob("*.safetensors"))


def there(case: dict[str, Any]) -> dict[str, Any]:
    """A copy of the case on the device under test."""
    return {n: v.to(DEVICE, copy=True) if isinstance(v, torch.Tensor) else v for n, v in case.items()}


def exact(case: dict[str, Any]) -> dict[str, Any]:
    """The case in float64; quantised pages stay as they are."""
    floats = (torch.float32, *HALVES)
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.dtype in floats else value
        for name, value in cases.clone(case).items()
    }


def placed(case: dict[str, Any]) -> dict[str, Any]:
    """An attention to shifted pages as plain PyTorch has it: keys turned, rounded to their dtype, then attended to."""
    slots, shifts, pool = case["slots"], case["shifts"], case["pool_layer"]
    pages = [pool[:, b, row.clamp(min=0)] for b, row in enumerate(slots)]  # (2, N, T, Hkv, D) each
    for row, by in zip(pages, shifts.tolist(), strict=True):
        for entry, shift in enumerate(by):
            shift = shift if abs(shift) < case["rope"].shape[0] else 0  # of a slot of -1: anything
            row[0, entry] = reference.turn_in_time(row[0, entry].double(), case["rope"], case["rope_split"], shift)
    kept = {name: value for name, value in case.items() if name not in ("shifts", "rope", "rope_split")}
    numbers = torch.arange(slots.shape[1]).expand_as(slots)
    return kept | {"pool_layer": torch.stack(pages, 1), "slots": torch.where(slots >= 0, numbers, -1)}


def mutable(op: str) -> list[str]:
    """Arguments that an op writes to."""
    return [a.name for a in getattr(torch.ops.longlive, op).default._schema.arguments if a.alias_info]


def outcome(op: str, case: dict[str, Any], engine: str) -> list[torch.Tensor]:
    """What an op returns, then the buffers it has written to."""
    return [*tensors(call(op, case, engine)), *(case[name] for name in mutable(op))]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_triton_agrees_with_the_oracle(op: str, make: Any, sizes: Any, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16 and op in ("window_attend", "retrieve_attend"):
        pytest.skip("the interpreter computes products of bfloat16 wrongly")
    case = make(dtype=dtype, **sizes)
    got = outcome(op, there(case), "triton")
    plain = outcome(op, placed(case) if "shifts" in case else cases.clone(case), "dense")
    want = outcome(op, exact(case), "reference")
    for one, other, true in zip(got, plain, want, strict=True):
        assert one.dtype == other.dtype
        if one.is_floating_point():
            assert_close_enough(one, other, true)
        else:
            assert torch.equal(one.cpu(), true)


@pytest.mark.parametrize(("op", "make", "sizes"), variants())
def test_any_argument_may_have_gaps(op: str, make: Any, sizes: Any) -> None:
    """Each tensor argument in turn, then all together: the innermost stride is 2, and every other one changes too.

    Of the sequence only all together: its steps were tried one by one.
    """
    case = make(**sizes)
    names = [name for name, value in case.items() if isinstance(value, torch.Tensor)]
    want = outcome(op, there(case), "triton")
    for gapped in [names] if op == "retrieve_attend" else [*([name] for name in names), names]:
        views = there(case)
        views |= {name: cases.gapped(views[name]) for name in gapped}
        for one, other in zip(want, outcome(op, views, "triton"), strict=True):
            torch.testing.assert_close(other, one, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("op", OPS)
def test_results_are_repeatable_to_the_last_bit(op: str) -> None:
    case = cases.ALL[op]()
    first, again = (outcome(op, there(case), "triton") for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    case = there(cases.ALL[op]()) | {"engine": "triton"}
    torch.library.opcheck(getattr(torch.ops.longlive, op).default, *split_arguments(op, case))


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_break(op: str) -> None:
    torch._dynamo.reset()
    want = outcome(op, there(cases.ALL[op]()), "triton")
    case = there(cases.ALL[op]())
    step = torch.compile(lambda **inputs: tensors(call(op, inputs, "triton")), backend="aot_eager", fullgraph=True)
    results = step(**case)
    for one, other in zip(want, [*results, *(case[name] for name in mutable(op))], strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("op", [op for op in OPS if op != "merge_attention"])
def test_float64_is_refused_with_the_engines_that_take_it(op: str) -> None:
    case = there(cases.ALL[op](torch.float64))
    before = cases.clone(case)
    with pytest.raises(TypeError, match=r"engine 'triton' takes .*float64; engines that take it: dense, reference"):
        call(op, case, "triton")
    for name, value in case.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, before[name])


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU multiplies bfloat16 right")
def test_the_interpreter_refuses_products_of_bfloat16() -> None:
    for op in ("window_attend", "retrieve_attend"):
        with pytest.raises(RuntimeError, match="bfloat16"):
            call(op, cases.ALL[op](torch.bfloat16), "triton")


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_traces_replay(path: Path) -> None:
    results = list(replay(load_trace(path), "triton", DEVICE))
    assert results and all(result.passed for result in results)
