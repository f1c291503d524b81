"""Runs suites of benchmarks: each writes its results file after every group, and prints the group's table.

A suite is a module ``benchmarks.suite_<name>`` with ``run(bench, preset, done) -> records``; it calls ``done`` with all
its records so far, ``group_count(preset)`` times in all, after a group or some. ``longlive-rag bench`` is the command.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from benchmarks.gpu_contenders import first_line
from benchmarks.group_table import group_text, grouped
from benchmarks.harness import Bench
from benchmarks.preset import Done, Preset, make_bench
from benchmarks.record import Record, device_folder, write_records
from benchmarks.targets import judged, targets_table

SUITES = ("micro", "scaling", "block", "quality")  # in this order when none is named

Suite = Callable[[Bench, Preset, Done], list[Record]]


class Bar(Protocol):
    """What is used of tqdm's bar."""

    def set_description(self, text: str) -> object: ...

    def update(self, count: int) -> object: ...

    def __enter__(self) -> Bar: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...


def find_suites(names: Sequence[str]) -> dict[str, Suite]:
    """The suites of these names, all where there are none.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a suite's module is not there.
    """
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {name!r}")
    found: dict[str, Suite] = {}
    for name in dict.fromkeys(names or SUITES):
        module = f"benchmarks.suite_{name}"
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(f"suite {name}: benchmarks/suite_{name}.py is missing")
        found[name] = importlib.import_module(module).run
    return found


def count_groups(names: Sequence[str], preset: Preset) -> int:
    """How often the bar of suites of these names advances. Errors as of `find_suites`."""
    return sum(sys.modules[run.__module__].group_count(preset) for run in find_suites(names).values())


def run_suites(names: Sequence[str], preset: Preset, out: Path, bar: Bar, show: Callable[[str], object] = print) -> int:
    """Runs suites one after another.

    Args:
        names: of suites; all where there are none.
        out: folder of ``<device>/<suite>.jsonl``; an older file of a suite that runs is replaced.
        bar: advances by one whenever a suite has more records.
        show: prints a text.

    Returns:
        0; 1 where something failed or its output is wrong. A target that is missed is printed and changes nothing.

    Raises:
        ValueError, RuntimeError: see `find_suites`; or ``out`` cannot be written to.
    """
    suites = find_suites(names)
    folder = out / results_folder(preset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    show = _lasting(show)
    show(facts_text(preset))
    records: list[Record] = []
    with bar:
        for name, suite in suites.items():
            bar.set_description(name)
            records += _run_suite(name, suite, preset, folder / f"{name}.jsonl", bar, show)
            if preset.device == "cuda":
                torch.cuda.empty_cache()
    targets = judged(records, str(preset.facts["kind"]), list(suites))
    if targets:
        show(targets_table(targets).text() + "\n")
    wrong = [f"{record.group}: {record.contender}" for record in records if record.wrong]
    if wrong:
        show("wrong or failed, not timed:\n  " + "\n  ".join(wrong))
    if preset.name == "tiny":
        show("preset tiny: these numbers measure nothing")
    return int(bool(wrong))


def results_folder(preset: Preset) -> str:
    """Name of the folder for a preset's results on this machine; a dry run's, which measure nothing, lie apart."""
    return device_folder(preset.facts) + ("-dry-run" if preset.name == "tiny" else "")


def _lasting(show: Callable[[str], object]) -> Callable[[str], None]:
    """Goes on when nobody reads any more, as under ``| head``: the results are in files."""

    def shown(text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            show(text)

    return shown


def facts_text(preset: Preset) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in preset.facts.items()) + "\n"


def _run_suite(
    name: str, suite: Suite, preset: Preset, path: Path, bar: Bar, show: Callable[[str], object]
) -> list[Record]:
    """The suite's records. Until it has ended, its file says that it has not: what is there may be a part."""
    so_far: list[Record] = []
    shown: set[str] = set()

    def rest(reason: str, wrong: bool = False) -> Record:
        facts = dict(preset.facts)
        return Record(
            name, f"suite {name}", f"the rest of {name}", "ours", absent=reason, wrong=wrong, environment=facts
        )

    def done(records: list[Record], *, whole: bool = False) -> None:
        _write(path, records if whole else [*records, rest("stopped before the end")])
        so_far[:] = records
        groups = grouped(so_far)
        last = None if whole else next(reversed(groups), None)  # it may have more contenders to come
        for title, group in groups.items():
            if title not in shown and title != last:
                show(group_text(group) + "\n")
                shown.add(title)
        if not whole:
            bar.update(1)

    try:
        _write(path, [rest("stopped before the end")])  # else it would keep an older run's numbers
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    try:
        with torch.inference_mode():
            done(suite(make_bench(preset), preset, done), whole=True)
    except Exception as error:  # a suite that fails must not take the others' results with it
        show(traceback.format_exc())
        done([*so_far, rest(first_line(error), wrong=True)], whole=True)
    return so_far


def _unwritable(out: Path, error: OSError) -> ValueError:
    return ValueError(f"--out must be a folder that can be written to; got {str(out)!r} ({error.strerror})")


def _write(path: Path, records: Sequence[Record]) -> None:
    """Anew, in one step: what was there stays whole until this is."""
    partial = path.with_name(f".{path.name}.partial")
    write_records(partial, records)
    partial.replace(path)
