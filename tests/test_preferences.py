"""What ``auto`` takes on a GPU: the table, the document about it, and that calls go where it says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from longlive_rag_ops import dense, dense_backends, preferences, reference
from longlive_rag_ops.dense_backends import BACK_ENDS
from longlive_rag_ops.preferences import DTYPES, PREFERENCES, SHAPES, Preference
from longlive_rag_ops.triton_kernels.configs import EVERY

REPOSITORY = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [back_end.name for back_end in BACK_ENDS]


def test_every_call_has_an_answer_and_every_row_a_use() -> None:
    used = set()
    for architecture, shape, dtype, back_end in itertools.product(EVERY, SHAPES, DTYPES, NAMES):
        used.add(preferences.choose(preferences.candidates(architecture, shape, dtype), back_end))
    assert used == set(PREFERENCES)


def test_rows_say_what_they_rest_on() -> None:
    for row in PREFERENCES:
        assert row.reason.startswith(("published: ", "derived: ", "rule: ", "measured: "))
        assert row.engine in ("dense", "triton") and set(row.dense_with) <= set(NAMES)
        assert (row.measured is not None) == row.reason.startswith("measured: ")
        assert row.measured is None or (REPOSITORY / row.measured).is_file()


def test_auto_asks_the_device_nothing_that_triton_could_do_without() -> None:
    for architecture, shape, dtype in itertools.product(EVERY, SHAPES, ("half", "float32")):
        if shape != "run":
            assert [row.engine for row in preferences.candidates(architecture, shape, dtype)] == ["triton"]


@pytest.mark.parametrize(
    ("architecture", "dtype", "back_end", "engine"),
    [
        (90, "half", "cudnn", "dense"),
        (90, "half", "flash_attn_3", "dense"),
        (90, "half", "flash", "triton"),
        (103, "half", "flash_attn_4", "dense"),
        (103, "half", "math", "triton"),
        (86, "half", "flash", "dense"),
        (121, "half", "flash", "dense"),
        (80, "half", "math", "triton"),
        (90, "float32", "math", "dense"),
        (90, "float64", "math", "dense"),
    ],
)
def test_runs(architecture: int, dtype: str, back_end: str, engine: str) -> None:
    assert preferences.choose(preferences.candidates(architecture, "run", dtype), back_end).engine == engine


def test_classes_of_calls() -> None:
    one = torch.ones(1)
    assert preferences.shape_of(3, None, None) == "run"
    assert preferences.shape_of(3, None, one) == "int8"
    assert preferences.shape_of(None, None, None) == "slots"
    assert preferences.shape_of(None, one, None) == "shifts"
    assert preferences.shape_of(None, one, one) == "int8"
    for dtype, head_dim, expected in (
        (torch.bfloat16, 128, "half"),
        (torch.float16, 256, "half"),
        (torch.float16, 264, "float64"),
        (torch.float32, 64, "float32"),
        (torch.float64, 64, "float64"),
    ):
        assert preferences.dtype_class(dtype, head_dim) == expected


def test_a_machine_sees_only_what_it_has() -> None:
    lines = preferences.describe(90, "cudnn")
    assert "float16 or bfloat16; run: dense (cudnn)" in lines
    assert "float16 or bfloat16; run: triton" not in lines
    assert preferences.describe(90, "flash")[0] == "float16 or bfloat16; int8, shifts, slots, counted, run: triton"


def test_the_document_says_what_the_table_says() -> None:
    text = (REPOSITORY / "docs" / "engines.md").read_text()
    groups: dict[tuple[str, ...], list[str]] = {}
    for architecture in EVERY:
        groups.setdefault(tuple(preferences.describe(architecture)), []).append(f"sm_{architecture}")
    for lines, architectures in groups.items():
        assert f"{', '.join(architectures)}:\n\n" + "".join(f"- {line}\n" for line in lines) in text
    flat = " ".join(text.split())
    for row in PREFERENCES:
        assert row.reason in flat
    for name, meaning in SHAPES.items():
        assert f"| `{name}` | {meaning} |" in text
    for back_end in BACK_ENDS:
        assert f"| `{back_end.name}` | {back_end.summary} |" in text


# --- dispatch ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines whose functions ``auto`` called, as ``engine.function``; the functions do nothing."""
    pytest.importorskip("triton")
    from longlive_rag_ops import auto

    made: list[str] = []
    for name, engine in (("triton", auto.triton), ("dense", dense)):
        for function in dense.__all__:
            monkeypatch.setattr(engine, function, lambda *_, told=f"{name}.{function}", **__: made.append(told))
    monkeypatch.setattr(dense_backends, "architecture_of", lambda device: 90)
    return made


def call(auto: Any, name: str, dtype: torch.dtype, **changes: Any) -> None:
    case = cases.ALL[name](dtype)
    getattr(auto, name)(*(case | changes).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["topk_retrieve", "write_frames", "place_frames", "merge_attention"])
def test_steps_are_tritons_unless_it_does_not_take_them(name: str, dtype: torch.dtype, calls: list[str]) -> None:
    from longlive_rag_ops import auto

    call(auto, name, dtype)
    assert calls == [f"{'dense' if dtype == torch.float64 else 'triton'}.{name}"]


def test_what_triton_does_not_take_goes_to_the_dense_engine(calls: list[str]) -> None:
    from longlive_rag_ops import auto

    case = cases.topk()
    for change in (
        {"k": auto.LARGEST_K + 1},
        {"index": case["index"].double()},
        {"query": torch.zeros(2, auto.LARGEST_EMBEDDING + 1)},
    ):
        call(auto, "topk_retrieve", torch.float32, **change)
    call(auto, "merge_attention", torch.bfloat16, lses=cases.merge()["lses"].double())
    assert calls == ["dense.topk_retrieve"] * 3 + ["dense.merge_attention"]


@pytest.mark.parametrize(
    ("dtype", "table", "serves", "engine"),
    [
        (torch.bfloat16, "run", "cudnn", "dense"),
        (torch.bfloat16, "run", "flash", "triton"),
        (torch.bfloat16, "slots", "cudnn", "triton"),
        (torch.float32, "run", "math", "dense"),
        (torch.float64, "run", "math", "dense"),
        (torch.float64, "slots", "math", "dense"),
    ],
)
def test_attention_goes_where_the_table_says(
    dtype: torch.dtype, table: str, serves: str, engine: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longlive_rag_ops import auto

    back_end = next(x for x in BACK_ENDS if x.name == serves)
    monkeypatch.setattr(dense_backends, "select", lambda facts: back_end)
    auto.window_attend(**cases.attend(dtype, table))
    assert calls == [f"{engine}.window_attend"]


@pytest.mark.triton
@pytest.mark.parametrize("engine", ["dense", "triton"])
@pytest.mark.parametrize("count", [6, None])
def test_retrieval_with_either_attention(engine: str, count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from longlive_rag_ops import auto

    case = cases.retrieve_later(select=False) | {"count": count, "place": True}
    mine, other = (
        {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in cases.clone(case).items()}
        for _ in "ab"
    )
    row = Preference(EVERY, tuple(SHAPES), tuple(DTYPES), engine, "rule: for this test")
    monkeypatch.setattr(preferences, "PREFERENCES", (row,))
    monkeypatch.setattr(dense_backends, "architecture_of", lambda device: 90)
    attended: list[torch.Tensor] = []
    attend = dense.window_attend
    monkeypatch.setattr(dense, "window_attend", lambda *args: (attended.append(args[0]), attend(*args))[1])
    out, lse = auto.retrieve_attend(**mine)
    want = reference.retrieve_attend(**other)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine["pool_layer"], other["pool_layer"], rtol=1e-5, atol=1e-5)
    assert len(attended) == (engine == "dense" and count is not None)


def test_retrieval_in_float64_is_the_dense_engines(calls: list[str]) -> None:
    from longlive_rag_ops import auto

    auto.retrieve_attend(**cases.retrieve(torch.float64))
    assert calls == ["dense.retrieve_attend"]
