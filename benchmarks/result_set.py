"""Folders of results: which there are, and the records of each, one device a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.group_table import plain
from benchmarks.record import PEERS, Record, device_folder, read_records
from benchmarks.run_suites import SUITES

RESULTS = Path(__file__).parent / "results"
# Of an environment: what stands for which key; what is not there is left out.
FACTS = {
    "threads": "threads",
    "cores": "cores",
    "torch": "torch",
    "triton": "Triton",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "compute_capability": "compute capability",
    "driver": "driver",
    **{name: name for name in PEERS},
    "python": "Python",
    "commit": "commit",
    "date": "date",
    "load_average": "load average at the start",
    "preset": "preset",
}


@dataclass(frozen=True)
class ResultSet:
    """What was measured on one device.

    Attributes:
        slug: a name for files; no two of a report have the same.
        records: by suite, in the order of the suites.
        apart: what tells it from another set of the same device, for people.
    """

    slug: str
    records: dict[str, list[Record]]
    apart: str = ""

    @property
    def all(self) -> list[Record]:
        return [record for own in self.records.values() for record in own]

    @property
    def environment(self) -> dict[str, Any]:
        return self.all[0].environment

    @property
    def kind(self) -> str:
        return str(self.environment["kind"])

    @property
    def device(self) -> str:
        """For people."""
        facts = self.environment
        name = str(facts["device"]) if self.kind == "cuda" else f"{facts['device']}, {facts['cores']} cores"
        return name + (f" ({self.apart})" if self.apart else "")


def result_folders(root: Path = RESULTS) -> list[Path]:
    """Folders in ``root`` that hold results files.

    Raises:
        ValueError: there are none.
    """
    found = sorted({path.parent for path in root.glob("*/*.jsonl")})
    if not found:
        raise ValueError("no folder of benchmarks/results holds .jsonl files; longlive-rag bench --out DIR makes them")
    return found


def read_result_set(folder: Path) -> ResultSet:
    """The results in a folder.

    Raises:
        ValueError: there are none; a line is no record; a record does not say what it was measured on; the records are
            of several devices.
    """
    records: dict[str, list[Record]] = {}
    devices: set[str] = set()
    sources: dict[str, Path] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, record in enumerate(read_records(path), 1):
            if not {"device", "kind", "cores"} <= record.environment.keys():
                raise ValueError(
                    f"results file {path}, record {number}: its environment names no device, kind and cores"
                )
            first = sources.setdefault(record.suite, path)
            if first != path:  # two runs would become one group
                raise ValueError(
                    f"results folder {folder}: one file a suite; got {record.suite} in {first.name} and {path.name}"
                )
            devices.add(device_folder(record.environment))
            records.setdefault(record.suite, []).append(record)
    if not records:
        raise ValueError(f"results folder {folder}: no .jsonl file with records in it")
    if len(devices) > 1:
        raise ValueError(f"results folder {folder}: one device a folder; got {', '.join(sorted(devices))}")
    order = {name: number for number, name in enumerate(SUITES)}
    known = sorted(records, key=lambda name: (order.get(name, len(order)), name))
    return ResultSet(devices.pop(), {name: records[name] for name in known})


def read_result_sets(folders: Sequence[Path]) -> list[ResultSet]:
    """Several; a device's second set has a number behind its name."""
    sets = [read_result_set(folder) for folder in folders]
    found: list[ResultSet] = []
    for number, one in enumerate(sets, 1):
        if sum(other.slug == one.slug for other in sets) > 1:
            earlier = sum(other.slug == one.slug for other in sets[: number - 1])
            slug = f"{one.slug}@{earlier + 1}" if earlier else one.slug
            one = ResultSet(slug, one.records, f"set {number}, commit {one.environment.get('commit')}")
        found.append(one)
    return found


def folders_in(folder: Path) -> list[Path]:
    """The folder itself where it holds results files, else those of its folders that do, one a device.

    Raises:
        ValueError: none does.
    """
    found = [folder] if list(folder.glob("*.jsonl")) else sorted({path.parent for path in folder.glob("*/*.jsonl")})
    if not found:
        raise ValueError(f"results folder {folder}: no .jsonl file in it, nor in a folder of it")
    return found


def facts_text(records: Sequence[Record]) -> str:
    """What records were measured on and how often, everything that occurs: one line."""
    parts = []
    for key, name in FACTS.items():
        values = dict.fromkeys(plain(r.environment[key]) for r in records if r.environment.get(key) is not None)
        if values:
            parts.append(f"{name} {' and '.join(values)}")
    rounds = sorted({r.runs for r in records if r.runs > 1 and r.over and r.role != "part"})
    if rounds:
        parts.append(f"{rounds[0]} rounds" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]} rounds")
    return ", ".join(parts)
