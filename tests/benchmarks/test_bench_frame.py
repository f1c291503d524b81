"""``longlive-rag bench`` with suites made up by the test: results after each group, stops, failures, wrong input."""

# ruff: noqa: E402  benchmarks is not installed: its folder is added to the path before it is imported
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import benchmarks
from benchmarks import run_suites
from benchmarks.cpu_timer import CpuTimer
from benchmarks.gpu_timer import DryTimer
from benchmarks.preset import make_bench, make_preset
from benchmarks.record import device_folder, read_records
from longlive_rag_ops.cli import checkout, main
from longlive_rag_ops.cli.bench import _NoBar

FAKE = """
from benchmarks.figures import Section
from benchmarks.harness import Absent, Entrant
from benchmarks.record import section_records

def check_absent():
    raise Absent("not on this machine")

def group_count(preset):
    return 3

def run(bench, preset, done):
    records = []
    for number in (1, 2, 3):
        section = Section(f"group {number}", yardstick="copy")
        bench.run(section, [
            Entrant("copy", [lambda: None], bytes=100),
            Entrant("ours", [lambda: None], lambda: CHECK, bytes=100),
            Entrant("theirs", [lambda: None], check_absent),
        ])
        records += section_records(section, NAME, {"ours": "ours", "copy": "ceiling"}, {"number": number}, preset.facts)
        if number == 3:
            LAST
        done(records)
    return records
"""

Make = Callable[..., None]


def folder_of(out: Path) -> Path:
    """The folder of a dry run's results in ``out``."""
    return out / run_suites.results_folder(make_preset("tiny"))


@pytest.fixture
def make_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes the module of a suite; ``last`` is a statement in its third group, ``check`` what is wrong with ours."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(folder)])
    monkeypatch.setattr(run_suites, "SUITES", ("fake", "other", "gone"))
    for name in ("fake", "other"):
        monkeypatch.delitem(sys.modules, f"benchmarks.suite_{name}", raising=False)

    def make(name: str, last: str = "pass", check: str = "") -> None:
        text = FAKE.replace("LAST", last).replace("CHECK", repr(check)).replace("NAME", repr(name))
        (folder / f"suite_{name}.py").write_text(text)
        monkeypatch.setitem(sys.modules, f"benchmarks.suite_{name}", None)
        monkeypatch.delitem(sys.modules, f"benchmarks.suite_{name}")

    return make


def test_a_suite_end_to_end(make_suite: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_suite("fake")
    make_suite("other")
    out = tmp_path / "out"
    assert main(["bench", "other", "fake", "other", "--preset", "tiny", "--out", str(out), "--quiet"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [printed.count(f"group {number}\n") for number in (1, 2, 3)] == [2, 2, 2]
    assert "absent: theirs: not on this machine" in printed
    assert "these numbers measure nothing" in printed
    assert folder_of(out).name.endswith("-cores-dry-run"), "beside what was measured on this device"
    assert sorted(path.name for path in folder_of(out).iterdir()) == ["fake.jsonl", "other.jsonl"]
    records = read_records(folder_of(out) / "fake.jsonl")
    assert [(record.group, record.contender) for record in records][:3] == [
        ("group 1", "copy"),
        ("group 1", "ours"),
        ("group 1", "theirs"),
    ]
    assert len(records) == 9
    assert records[1].environment["preset"] == "tiny" and records[1].mode == "dry"
    assert records[1].ceiling == "copy" and set(records[1].over) == {"copy"}


def test_rounds_are_those_asked_for(make_suite: Make, tmp_path: Path) -> None:
    make_suite("fake")
    assert main(["bench", "fake", "--rounds", "2", "--threads", "1", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    (path,) = (tmp_path / "out").glob("*/fake.jsonl")
    assert path.parent.name == device_folder(read_records(path)[0].environment)
    records = read_records(path)
    assert {record.runs for record in records} == {2, 0} and records[0].environment["threads"] == 1


def test_a_stop_leaves_what_was_done(make_suite: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_suite("fake")
    command = ["bench", "fake", "--preset", "tiny", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 0
    make_suite("fake", last="raise KeyboardInterrupt")
    assert main(command) == 130
    records = read_records(folder_of(tmp_path / "out") / "fake.jsonl")
    assert [record.group for record in records] == 3 * ["group 1"] + 3 * ["group 2"] + ["suite fake"]
    assert (records[-1].contender, records[-1].absent) == ("the rest of fake", "stopped before the end")
    assert "interrupted" in capsys.readouterr().err


def test_a_stop_before_the_first_group_leaves_no_older_results(make_suite: Make, tmp_path: Path) -> None:
    make_suite("fake")
    command = ["bench", "fake", "--preset", "tiny", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 0
    make_suite("fake")
    text = (
        (tmp_path / "modules" / "suite_fake.py")
        .read_text()
        .replace("    records = []\n", "    raise KeyboardInterrupt\n")
    )
    (tmp_path / "modules" / "suite_fake.py").write_text(text)
    assert main(command) == 130
    (record,) = read_records(folder_of(tmp_path / "out") / "fake.jsonl")
    assert record.absent == "stopped before the end"


def test_a_failure_is_recorded_and_does_not_stop_the_next_suite(
    make_suite: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_suite("fake", last="raise RuntimeError('no such kernel')")
    make_suite("other")
    assert main(["bench", "fake", "other", "--preset", "tiny", "--out", str(tmp_path), "--quiet"]) == 1
    last = read_records(folder_of(tmp_path) / "fake.jsonl")[-1]
    assert (last.contender, last.absent, last.wrong) == ("the rest of fake", "RuntimeError: no such kernel", True)
    assert (
        len(read_records(folder_of(tmp_path) / "fake.jsonl")) == 7
        and len(read_records(folder_of(tmp_path) / "other.jsonl")) == 9
    )
    printed = capsys.readouterr().out
    assert "Traceback" in printed and "wrong or failed, not timed:\n  suite fake: the rest of fake" in printed


def test_a_record_that_is_no_number_costs_the_rest_of_its_suite_alone(make_suite: Make, tmp_path: Path) -> None:
    make_suite("fake", last="records[-3].__dict__['median'] = float('nan')")
    make_suite("other")
    assert main(["bench", "fake", "other", "--preset", "tiny", "--out", str(tmp_path), "--quiet"]) == 1
    records = read_records(folder_of(tmp_path) / "fake.jsonl")
    assert [record.group for record in records[-2:]] == ["group 2", "suite fake"] and records[-1].wrong
    assert len(read_records(folder_of(tmp_path) / "other.jsonl")) == 9


def test_a_reader_that_goes_away_stops_nothing(make_suite: Make, tmp_path: Path) -> None:
    make_suite("fake")

    def gone(text: str) -> None:
        raise BrokenPipeError

    assert run_suites.run_suites(["fake"], make_preset("tiny"), tmp_path, _NoBar(), gone) == 0
    assert len(read_records(folder_of(tmp_path) / "fake.jsonl")) == 9


def test_a_folder_that_cannot_be_written_to_is_named(
    make_suite: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_suite("fake")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["bench", "fake", "--preset", "tiny", "--out", str(out), "--quiet"]) == 2
        assert f"error: --out must be a folder that can be written to; got '{out}" in capsys.readouterr().err
    assert main(["bench", "fake", "--preset", "tiny", "--out", ""]) == 2
    assert "--out must name a folder" in capsys.readouterr().err


def test_groups_are_counted_before_they_run(make_suite: Make) -> None:
    make_suite("fake")
    make_suite("other")
    assert run_suites.count_groups(["other", "fake", "other"], make_preset("tiny")) == 6


def test_a_wrong_output_is_not_timed_and_fails(
    make_suite: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_suite("fake", check="WRONG by 1")
    assert main(["bench", "fake", "--preset", "tiny", "--out", str(tmp_path), "--quiet"]) == 1
    record = read_records(folder_of(tmp_path) / "fake.jsonl")[1]
    assert (record.median, record.wrong, record.absent) == (None, True, "WRONG by 1")
    assert "wrong: ours: WRONG by 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "suite must be one of micro, scaling, block, quality; got 'nope'"),
        (["--preset", "tpu"], "preset must be one of cpu, gpu, tiny; got 'tpu'"),
        (["--rounds", "0"], "rounds must be at least 1; got 0"),
        (["--threads", "-1"], "threads must be at least 1; got -1"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"
    assert not (tmp_path / "out").exists()


def test_a_missing_module_is_an_error(make_suite: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_suite("fake")
    assert main(["bench", "fake", "gone", "--preset", "tiny", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: suite gone: benchmarks/suite_gone.py is missing\n"


def test_the_gpu_preset_needs_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--preset", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "preset gpu needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "bench-report"])
def test_without_a_clone_it_says_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = SimpleNamespace(__file__=str(tmp_path / "site-packages" / "longlive_rag_ops" / "__init__.py"))
    monkeypatch.setattr(checkout, "longlive_rag_ops", installed)
    assert main([command]) == 2
    assert f"error: {command} needs a clone of the repository" in capsys.readouterr().err


def test_another_package_named_benchmarks_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks", SimpleNamespace(__path__=[str(tmp_path / "benchmarks")]))
    assert main(["bench", "--out", str(tmp_path / "out")]) == 2
    assert "another package named benchmarks is imported first" in capsys.readouterr().err


def test_a_benchmarks_of_the_current_folder_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    command = [sys.executable, "-m", "longlive_rag_ops", "bench", "nope"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: suite must be one of micro, scaling, block, quality; got 'nope'\n",
    )


def test_presets() -> None:
    cpu, tiny = make_preset("cpu"), make_preset("tiny")
    assert (cpu.device, cpu.dtype, cpu.rounds) == ("cpu", torch.float32, 7)
    assert cpu.facts["preset"] == "cpu" and cpu.facts["kind"] == "cpu" and cpu.threads == torch.get_num_threads()
    bench = make_bench(make_preset("cpu", rounds=3))
    assert isinstance(bench.timer, CpuTimer) and bench.timer.rounds == 3 and not bench.dry
    assert isinstance(make_bench(tiny).timer, DryTimer) and make_bench(tiny).dry
