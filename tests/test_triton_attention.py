"""window_attend in Triton against the oracle, in the interpreter or on a GPU: forms, sizes, layouts, refusals."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from attention_cases import DEVICE, check, make, quantise, read_by

pytest.importorskip("triton")
from longlive_rag_ops.triton_kernels import launch, window_plan
from longlive_rag_ops.triton_kernels.slot_tables import compact
from longlive_rag_ops.triton_kernels.window_attend import attend, attend_run, window_attend

WAYS = pytest.mark.parametrize("way", ["pointers", "descriptors"])
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16
TABLES = ["slots", "run", "shifts", "int8"]


@WAYS
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (1, {"head_dim": 8, "samples": 1, "heads": 4, "kv_heads": 2}),
        (24, {"head_dim": 80, "dtype": HALF}),
        (130, {"head_dim": 96, "heads": 1, "samples": 1, "dtype": HALF}),
        (70, {"head_dim": 128, "samples": 1}),
        (33, {"head_dim": 160, "heads": 1, "samples": 1, "length": 5}),
    ],
)
def test_against_the_oracle(table: str, tokens: int, sizes: dict[str, Any], way: str) -> None:
    case = make(tokens, table=table, **sizes)
    with read_by(way):
        check(case, *window_attend(**case))


@WAYS
@pytest.mark.parametrize(("tokens", "table"), [(390, "slots"), (1560, "slots"), (1560, "run")])
def test_long_pages(tokens: int, table: str, way: str) -> None:
    case = make(tokens, heads=1, samples=1, length=5, slots=6, dtype=HALF, table=table)
    with read_by(way):
        check(case, *window_attend(**case))


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_any_scale(scale: float) -> None:
    case = make() | {"scale": scale}
    check(case, *window_attend(**case))


@WAYS
@pytest.mark.parametrize("table", TABLES)
def test_slots_that_are_not_named_may_hold_anything(table: str, way: str) -> None:
    """Rows past the end of a run and of a page lie in the same tile as rows that count; 0 * NaN is NaN."""
    case = make(70, table=table)
    want, _ = window_attend(**case)
    named = torch.zeros(case["pool_layer"].shape[1:3], dtype=torch.bool, device=DEVICE)
    if table == "run":
        named[:, : case["run"]] = True
    else:
        for b, row in enumerate(case["slots"]):
            named[b, row[row >= 0]] = True
    if table == "int8":
        case["pool_layer"][:, ~named] = -128
        case["k_scale"][~named] = case["v_scale"][~named] = torch.nan
    else:
        case["pool_layer"][:, ~named] = torch.nan
    with read_by(way):
        out, lse = window_attend(**case)
    assert out.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@WAYS
@pytest.mark.parametrize("layout", [cases.gapped, cases.strided], ids=["gapped", "strided"])
def test_any_strides(layout: Any, way: str) -> None:
    for table in ("run", "slots"):
        case = make(24, table=table)
        views = {name: layout(x) if name in ("q", "pool_layer", "slots") else x for name, x in case.items()}
        with read_by(way):
            check(case, *window_attend(**views))


@WAYS
def test_a_pool_with_room_between_its_axes(way: str) -> None:
    """Rows that descriptors can read though slots and samples are not one behind the other."""
    case = make(24, head_dim=64)
    wide = torch.full((2, 3, 9, 30, 2, 72), torch.nan, device=DEVICE)
    view = wide[:, 1:, 2:, 4:28, 1:, 8:]
    view.copy_(case["pool_layer"])
    with read_by(way):
        assert window_plan.reading(launch.device_of(view), view, view.dtype) == way
        check(case, *window_attend(**case | {"pool_layer": view}))
        run = {name: x for name, x in case.items() if name != "slots"} | {"run": 5}
        check(run, *window_attend(**run | {"pool_layer": view}))


@WAYS
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("which", ["one sample", "all samples", "no entries"])
def test_nothing_to_attend_to(table: str, which: str, way: str) -> None:
    case = make(24, table=table)
    if table == "run":
        case["run"] = 0
    elif which == "no entries":
        case |= {name: case[name][:, :0] for name in ("slots", "shifts") if name in case}
    else:
        case["slots"][0 if which == "one sample" else slice(None)] = -1
    with read_by(way):
        out, lse = window_attend(**case)
    empty = slice(0, 1) if which == "one sample" and table != "run" else slice(None)
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    if which == "one sample" and table != "run":
        check(case, out, lse)


@pytest.mark.parametrize("sizes", [{"samples": 0}, {"length": 0}])
@pytest.mark.parametrize("table", ["slots", "run"])
def test_empty_sizes(table: str, sizes: dict[str, int]) -> None:
    case = make(24, samples=2, table=table) if "length" in sizes else make(24, table=table)
    case["q"] = case["q"][:, : sizes.get("length", 20)][: sizes.get("samples", 2)]
    case["pool_layer"] = case["pool_layer"][:, : sizes.get("samples", 2)]
    if table == "slots":
        case["slots"] = case["slots"][: sizes.get("samples", 2)]
    out, lse = window_attend(**case)
    assert out.shape == case["q"].shape
    assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])


@WAYS
@pytest.mark.parametrize("tokens", [24, 130])
def test_a_run_counted_on_the_device(tokens: int, way: str) -> None:
    """Each sample has its own count; bits are those of the table that names the same slots in every split."""
    case = make(tokens, samples=3, table="run")
    counts = torch.tensor([3, 0, 7], device=DEVICE)
    case["pool_layer"][:, 0, 3:] = torch.nan
    with read_by(way):
        out, lse = attend_run(case["q"], case["pool_layer"], counts, 7, None, True)
        for b, count in enumerate(counts.tolist()):
            one = {"q": case["q"][b : b + 1], "pool_layer": case["pool_layer"][:, b : b + 1], "run": count}
            check(one, out[b : b + 1], lse[b : b + 1])
        without, empty = attend_run(case["q"], case["pool_layer"], counts, 7)
    assert torch.equal(without, out) and empty.shape == (0,)


@WAYS
@pytest.mark.parametrize("table", TABLES)
def test_splits_of_the_keys(table: str, way: str) -> None:
    """Every number of splits gives the same up to rounding, and each the same bits twice."""
    case = make(70, samples=1, table=table, length=9)
    page_shifts = pages = counts = None
    if table != "run":
        pages, page_shifts, counts = compact(case["slots"], case.get("shifts"))
    given = {name: case.get(name) for name in ("rope", "rope_split", "k_scale", "v_scale")}
    with read_by(way):
        results = [
            attend(
                *(case["q"], case["pool_layer"], 5, pages, counts, None, True),
                **(given | {"shifts": page_shifts}),
                splits=n,
            )
            for n in (1, 2, 3, 5, 5)
        ]
    for out, lse in results:
        check(case, out, lse)
    assert all(torch.equal(a, b) for a, b in zip(*results[-2:], strict=True))


def test_int8_pages_are_as_exact_as_their_dequantised_form() -> None:
    """And within the quantiser's error of the pages themselves: half a step a channel, on keys and on values."""
    case = make(24, head_dim=64)
    full = window_attend(**case)[0]
    largest = case["pool_layer"].abs().amax(dim=(1, 2, 3, 4, 5))  # of keys, of values
    quantise(case)
    out = window_attend(**case)[0]
    step = largest / 127 / 2 + largest * 2.0**-11  # rounding to int8, and of the scale to float16
    logit = case["q"].abs().sum(-1).max() * 64**-0.5 * step[0]  # most that a logit moves
    assert (out - full).abs().max() <= step[1] + 2 * logit * largest[1]
    check(case, *window_attend(**case))


def test_small_scales_of_values_keep_their_digits_in_half_precision() -> None:
    case = make(24, head_dim=64, dtype=torch.float16, table="int8")
    case["v_scale"] = case["v_scale"].float() * 2.0**-8
    want = window_attend(**case | {"q": case["q"].float()})[0]
    got = window_attend(**case)[0].float()
    assert ((got - want).square().mean() / want.square().mean()).sqrt() < 2e-3


def test_compacting_a_table() -> None:
    slots = torch.tensor([[-1, 4, -1, 0, 2], [-1] * 5, [3, 1, 0, 2, 4]], device=DEVICE)
    shifts = torch.arange(15, device=DEVICE).view(3, 5) - 7
    pages, moved, counts = compact(slots, shifts)
    assert counts.tolist() == [3, 0, 5]
    assert pages[0, :3].tolist() == [4, 0, 2] and pages[2].tolist() == [3, 1, 0, 2, 4]
    assert moved is not None and moved[0, :3].tolist() == [-6, -4, -3] and moved[2].tolist() == shifts[2].tolist()
    long = torch.where(torch.arange(1000) % 3 == 0, torch.arange(1000), -1)[None].to(DEVICE)
    pages, _, counts = compact(cases.gapped(long.cpu()).to(DEVICE))
    assert counts.tolist() == [334] and pages[0, :334].tolist() == list(range(0, 1000, 3))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make(4, table="run")
    with pytest.raises(TypeError, match=r"float64; engines that take it: dense, reference"):
        window_attend(**{n: x.double() if isinstance(x, torch.Tensor) else x for n, x in wide.items()})
    with pytest.raises(ValueError, match=r"up to 256 channels, got 288"):
        window_attend(**make(4, head_dim=288, table="run"))
    if launch.INTERPRETED:
        with pytest.raises(RuntimeError, match=r"bfloat16.*float32 or torch.float16, or engine 'dense'"):
            window_attend(**make(4, table="run", dtype=torch.bfloat16))
    small = launch.Device(80, 108, 1000)
    with launch.assume(small), pytest.raises(RuntimeError, match=r"needs \d+ bytes.*gives 1000.*dense, reference"):
        window_attend(**wide)
