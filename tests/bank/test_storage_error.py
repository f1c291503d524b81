"""What docs/storage.md says of errors and sizes: from the results file, which is what measuring again gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longlive_rag_ops.bank.page_format import PageFormat

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import storage_error  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "2026-11-22-storage-error.json"
DOCUMENT = (ROOT / "docs" / "storage.md").read_text()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def test_the_document_has_the_tables_of_the_results(recorded: dict[str, Any]) -> None:
    assert storage_error.markdown(recorded["rows"]) in DOCUMENT
    assert RESULTS.name in DOCUMENT


def test_every_case_has_every_storage(recorded: dict[str, Any]) -> None:
    cases = [*(path.stem for path in sorted(storage_error.TRACES.glob("*.safetensors"))), *storage_error.RANDOM]
    assert len(cases) == 6
    want = [(case, name, str(dtype)) for case in cases for name, dtype in storage_error.STORED]
    assert [(row["case"], row["storage"], f"torch.{row['dtype']}") for row in recorded["rows"]] == want


def test_measuring_again_gives_what_is_recorded(recorded: dict[str, Any]) -> None:
    case = "trace_batch2_sink3"
    again, rows = storage_error.measure(case), [row for row in recorded["rows"] if row["case"] == case]
    assert len(again) == len(rows) == len(storage_error.STORED)
    for one, other in zip(again, rows, strict=True):
        assert (one["storage"], one["dtype"], one["outputs"]) == (other["storage"], other["dtype"], other["outputs"])
        for name in ("rms", "largest"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_a_window_that_is_not_the_recorded_one_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_error, "temporal_position", lambda *_: 0)
    with pytest.raises(ValueError, match="the window rebuilt differs from the recorded output"):
        storage_error.measure("trace_batch2_sink3")


def test_eight_bits_are_as_good_as_said(recorded: dict[str, Any]) -> None:
    """Of traces: int8 within 1 % and fp8 within 3 %, root mean square; plain is better, and int8 a fourth of fp8."""
    rows = {(row["case"], row["dtype"], row["storage"]): row["rms"] for row in recorded["rows"]}
    for (case, dtype, storage), error in rows.items():
        if not case.startswith("trace"):
            continue
        assert 0 < error < {"plain": 0.002, "int8": 0.01, "fp8": 0.03}[storage]
        if storage == "int8":
            assert rows[case, dtype, "plain"] < error < 0.3 * rows[case, dtype, "fp8"]


def test_sizes_in_the_document() -> None:
    sizes = {
        name: PageFormat(name, 1, 1, 1560, 12, 128, torch.bfloat16).page_bytes for name in ("plain", "int8", "fp8")
    }
    for name, size in sizes.items():
        line = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {size:,} |" in line
        assert float(line.split("|")[4]) == pytest.approx(sizes["plain"] / size, abs=5e-4)
        assert name == "plain" or sizes["plain"] / size >= 1.9
