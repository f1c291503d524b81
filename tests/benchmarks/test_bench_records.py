"""Results files: what is written is read, what is no record is refused with file and line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import record_cases as cases

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.group_table import group_text, measured_table, quantity, reference
from benchmarks.record import Record, environment, read_records, write_records
from benchmarks.result_set import read_result_set, read_result_sets, result_folders


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    for suite, records in cases.everything().items():
        path = tmp_path / f"{suite}.jsonl"
        write_records(path, records)
        assert read_records(path) == records
        write_records(path, records)
        assert len(path.read_text().splitlines()) == len(records)


WITH = '{"schema": 1, "suite": "a", "group": "g", "contender": "c", "role": "peer", "absent": "x", %s}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "Expecting property name"),
        ("[]", "a record must be an object"),
        ('{"schema": 2}', "schema must be 1; got 2"),
        ("{}", "schema must be 1; got None"),
        (WITH % '"environment": null', "environment must be an object; got None"),
        (WITH % '"over": {"native": {}}', "over of c must have a median for native"),
        (WITH % '"over": {"native": {"median": NaN}}', "NaN is no number"),
        (WITH % '"median": "1.0"', "median of c must be a number; got '1.0'"),
        ('{"schema": 1, "suite": "micro"}', "missing 3 required"),
        ('{"schema": 1, "suite": "a", "group": "g", "contender": "c", "role": "boss", "absent": "x"}', "role must be"),
        ('{"schema": 1, "suite": "a", "group": "g", "contender": "c", "role": "peer"}', "has a median or says why not"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "micro.jsonl"
    write_records(path, cases.attention_step()[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"micro\.jsonl, line 2: .*{says}"):
        read_records(path)


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="median of ours must be a number; got nan"):
        Record("micro", "g", "ours", "ours", median=float("nan"), environment=dict(cases.CPU))
    bad = Record("micro", "g", "ours", "ours", median=1.0, over={"b": {"median": float("nan")}})
    with pytest.raises(ValueError, match="Out of range float"):
        write_records(tmp_path / "micro.jsonl", [bad])


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "micro.jsonl").write_bytes(b"\xff\xfe")
    for name in ("micro.jsonl", "absent.jsonl"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_records(tmp_path / name)


def test_where_git_is_missing_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    facts = environment()
    assert facts["commit"] is None and facts["torch"]


def test_a_field_of_a_later_version_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "micro.jsonl"
    write_records(path, cases.attention_step()[:1])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}) + "\n")
    assert read_records(path) == cases.attention_step()[:1]


def test_a_folder_is_one_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.jsonl file with records"):
        read_result_set(tmp_path)
    write_records(tmp_path / "micro.jsonl", cases.micro())
    write_records(tmp_path / "quality.jsonl", cases.quality())
    one = read_result_set(tmp_path)
    assert (one.device, one.slug, list(one.records)) == (
        "Made-up CPU, 2 cores",
        "made-up-cpu-2-cores",
        ["micro", "quality"],
    )
    assert [other.slug for other in read_result_sets([tmp_path, tmp_path])] == [one.slug, f"{one.slug}@2"]
    write_records(tmp_path / "block.jsonl", cases.block(cases.GPU))
    with pytest.raises(ValueError, match="one device a folder; got made-up-cpu-2-cores, made-up-gpu"):
        read_result_set(tmp_path)


def test_a_record_says_what_it_was_measured_on(tmp_path: Path) -> None:
    write_records(tmp_path / "micro.jsonl", [Record("micro", "g", "ours", "ours", median=1.0)])
    with pytest.raises(ValueError, match=r"micro\.jsonl, record 1: its environment names no device"):
        read_result_set(tmp_path)


def test_only_folders_with_results_count(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(ValueError, match="no folder of benchmarks/results"):
        result_folders(tmp_path)
    write_records(tmp_path / "one" / "micro.jsonl", cases.attention_step())
    assert result_folders(tmp_path) == [tmp_path / "one"]


def test_times_are_given_over_auto_where_it_is_there() -> None:
    mine = reference(cases.group("micro", "g", {"ours, dense": 1.0, "ours, auto": 2.0, "SDPA": 3.0}))
    assert mine is not None and mine.contender == "ours, auto"
    first = reference(cases.group("micro", "g", {"SDPA": 3.0, "ours, dense": 1.0, "ours, triton": 2.0}))
    assert first is not None and first.contender == "ours, dense"
    assert reference(cases.group("micro", "g", {"SDPA": 3.0})) is None


def test_a_table_has_columns_that_say_something() -> None:
    plain = measured_table(cases.attention_step())
    assert plain.header == ["contender", "median", "quartiles", "over ours"]
    assert plain.rows[0] == ["as published", "1.50 s", "1.43 s - 1.88 s", "1.50"]
    full = measured_table(cases.micro()[3:8])
    assert full.header == ["contender", "median", "quartiles", "over ours, auto", "rate", "of matmul"]
    assert full.rows[-1] == ["matmul", "54.0 ms", "51.3 ms - 67.5 ms", "-", "111 GFLOP/s", "-"]


def test_what_is_wrong_or_absent_stands_below_the_table() -> None:
    group = cases.attention_step()
    title = group[0].group
    group += [cases.absent("micro", title, name, "absent: no CUDA") for name in ("a", "b")]
    group.append(cases.absent("micro", title, "c", "WRONG by 1.0e+00", wrong=True))
    assert group_text(group).splitlines()[-2:] == ["  absent: a, b: no CUDA", "  wrong: c: WRONG by 1.0e+00"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "-"),
        (0.0, "s", "0.00 us"),
        (2.5e-6, "s", "2.50 us"),
        (0.0123, "s", "12.3 ms"),
        (123.4, "s", "123 s"),
        (12, "B", "12 B"),
        (1.7e9, "B", "1.70 GB"),
        (2e6, "B", "2.00 MB"),
        (0.00123, "1", "0.00123"),
    ],
)
def test_quantities(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text
