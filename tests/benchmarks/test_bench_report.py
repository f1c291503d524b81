"""The report from made-up records: pieces of Markdown, pictures, the same bytes twice, no path."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import record_cases as cases

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import bench_report
from benchmarks.record import write_records
from benchmarks.result_set import ResultSet, folders_in, read_result_set, read_result_sets
from longlive_rag_ops.cli import main

STEP = """#### attention step, 12 frames of 390 tokens

| contender | median | quartiles | over ours |
| --- | ---: | ---: | ---: |
| as published | 1.50 s | 1.43 s - 1.88 s | 1.50 |
| native | 1.00 s | 950 ms - 1.25 s | 1.00 |
| ours | 1.00 s | 950 ms - 1.25 s | 1.00 |
"""
ATTEND = """#### window_attend, 12 frames of 390 tokens, 12 heads x 128

frames 12.

| contender | median | quartiles | over ours, auto | rate | of matmul |
| --- | ---: | ---: | ---: | ---: | ---: |
| ours, auto | 156 ms | 148 ms - 195 ms | 1.00 | 76.9 GFLOP/s | 69.2 % |
| ours, triton | 240 ms | 228 ms - 300 ms | 1.54 | 50.0 GFLOP/s | 45.0 % |
| SDPA | 150 ms | 143 ms - 188 ms | 0.96 | 80.0 GFLOP/s | 72.0 % |
| matmul | 108 ms | 103 ms - 135 ms | - | 111 GFLOP/s | - |

- absent: flash-attn 3: no module named flash_attn_interface
"""
PARTS = """| part of | projections | rotation + write | attention | embedding | retrieval | fetch stall |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| as published | 840 ms (42.0 %) | 60.0 ms (3.0 %) | 960 ms (48.0 %) | - | - | - |
"""
TARGET = (
    "| block with memory: ours over native | Made-up GPU | at most 0.85 | 0.9180 | missed by 8 % | "
    "ours, memory in host memory as int8, repeat rate 0.95, the worst of 9 |"
)


def results(folder: Path, facts: dict[str, object]) -> Path:
    for suite, records in cases.everything(facts).items():
        write_records(folder / f"{suite}.jsonl", records)
    return folder


@pytest.fixture
def sets(tmp_path: Path) -> list[ResultSet]:
    return [read_result_set(results(tmp_path / name, facts)) for name, facts in (("a", cases.CPU), ("b", cases.GPU))]


def text_of(sets: list[ResultSet]) -> str:
    return bench_report.report_text(sets, {one.slug: [] for one in sets})


def test_tables_of_groups_and_of_targets(sets: list[ResultSet]) -> None:
    text = text_of(sets)
    for piece in (STEP, ATTEND, PARTS, TARGET):
        assert piece in text
    assert text.index("## What it must show") < text.index("## Made-up CPU, 2 cores") < text.index("## Made-up GPU")
    facts = "threads 2, cores 2, torch 2.13.0, Python 3.11.7, commit abcdef012345, date 2026-01-02, load average"
    assert text.count(facts) == 4
    assert "| ours, dense | 3.2e-07 | - |" in text  # an error has no rounds
    assert "over ours" not in text.split("### Numerical error")[1].split("##")[0]
    assert "not measured" not in text


def test_a_target_without_a_device_is_not_measured(sets: list[ResultSet]) -> None:
    text = text_of(sets[:1])
    assert "| fetch stall: share of the block | a CUDA device | at most 1 % | - | not measured |  |" in text
    assert "| attention step: ours over native | Made-up CPU, 2 cores | at most 1.03 | 1.0000 | met |" in text


def test_a_dry_run_is_named_so(sets: list[ResultSet]) -> None:
    dry = ResultSet(sets[0].slug, {"micro": [replace(record, mode="dry") for record in sets[0].records["micro"]]})
    text = text_of([dry])
    assert "**A dry run: these numbers measure nothing.**" in text and text.count("| met |") == 1  # of the header


def test_the_command_writes_report_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the bench extra)")
    folders = [str(results(tmp_path / name, facts)) for name, facts in (("a", cases.CPU), ("b", cases.GPU))]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert main(["bench-report", *folders, "--out", str(out)]) == 0
    names = sorted(path.name for path in outs[0].iterdir())
    pictures = ("attention", "block", "ceiling", "retrieval", "roofline", "traffic")
    slugs = ("made-up-cpu-2-cores", "made-up-gpu")
    assert names == sorted(["report.md", *(f"{slug}-{name}.png" for slug in slugs for name in pictures)])
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    text = (outs[0] / "report.md").read_text()
    for name in names:
        if name != "report.md":
            assert (outs[0] / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    assert str(tmp_path) not in text and "/" not in text.replace("benchmarks/README.md", "").replace(
        "FLOP/s", ""
    ).replace("GB/s", "")
    assert capsys.readouterr().out.count("written: ") == 2 * len(names)


def test_by_default_the_report_lies_beside_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the bench extra)")
    write_records(tmp_path / "quality.jsonl", cases.quality())
    assert main(["bench-report", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.jsonl", "report.md"]  # nothing to draw


def test_what_is_no_results_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-report", str(tmp_path / "none")]) == 2
    assert "no .jsonl file in it, nor in a folder of it" in capsys.readouterr().err
    (tmp_path / "micro.jsonl").touch()
    assert main(["bench-report", str(tmp_path)]) == 2
    assert "no .jsonl file with records in it" in capsys.readouterr().err
    assert main(["bench-report", ""]) == 2
    assert "DIR and --out must name folders" in capsys.readouterr().err
    (tmp_path / "micro.jsonl").write_text("{}\n")
    assert main(["bench-report", str(tmp_path)]) == 2
    assert "micro.jsonl, line 1: schema must be 1" in capsys.readouterr().err


def test_two_files_of_a_suite_are_two_runs(tmp_path: Path) -> None:
    for name in ("micro", "older"):
        write_records(tmp_path / f"{name}.jsonl", cases.micro())
    with pytest.raises(ValueError, match=r"one file a suite; got micro in micro\.jsonl and older\.jsonl"):
        read_result_set(tmp_path)


def test_two_sets_of_a_device_are_told_apart(tmp_path: Path) -> None:
    for name, commit in (("a", "aaaa"), ("b", "bbbb")):
        results(tmp_path / name, cases.CPU | {"commit": commit})
    one, two = read_result_sets(folders_in(tmp_path))
    assert (one.device, two.device) == (
        "Made-up CPU, 2 cores (set 1, commit aaaa)",
        "Made-up CPU, 2 cores (set 2, commit bbbb)",
    )
    assert one.slug != two.slug


def test_a_dry_suite_says_nothing_of_the_others(sets: list[ResultSet]) -> None:
    """An error has no mode: the preset says that it was measured with toys."""
    records = dict(sets[0].records)
    records["quality"] = [replace(r, environment=r.environment | {"preset": "tiny"}) for r in records["quality"]]
    text = text_of([ResultSet(sets[0].slug, records)])
    before, after = text.split("### Numerical error")
    assert "A dry run" not in before and "**A dry run: these numbers measure nothing.**" in after
