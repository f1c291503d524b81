"""A measurement as a line of JSON: what was timed, beside what, on what.

A results file, ``benchmarks/results/<device>/<suite>.jsonl``, has one record a line. Records of one ``group`` were
timed in turns in one process; ratios are only made within a group.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import Section, Spread, ratio

SCHEMA = 1
ROLES = ("ours", "published", "native", "peer", "ceiling", "part")
UNITS = ("s", "B", "1")  # seconds a call, bytes, a share or an error
PEERS = ("faiss-cpu", "faiss-gpu", "flash-attn", "flash-attn-3", "flash-attn-4", "flashinfer-python")


@dataclass(frozen=True)
class Record:
    """One number, with its spread.

    Attributes:
        suite: micro, scaling, block or quality.
        group: what was timed together.
        contender: its name in the group; unique there.
        role: ours, published, native, peer, ceiling, or part of another contender's time.
        unit: s, B or 1.
        shape: numbers and words that say what the call was over.
        median, low, high: over rounds, with quartiles; None where there is no number, and ``absent`` says why.
        runs: rounds.
        mode: how it was launched: eager, graph, dry (measures nothing).
        over: median and quartiles of the rounds' ratios of this time over another contender's, by its name.
        of_ceiling, ceiling: median share of the rate of that contender of the group, the device's own copy or product.
        flops, bytes: of a call, where they are counted.
        absent: why there is no number.
        wrong: it failed, or its output is not right.
        extra: anything else that belongs to it.
        environment: see `environment`.
    """

    suite: str
    group: str
    contender: str
    role: str
    unit: str = "s"
    shape: dict[str, Any] = field(default_factory=dict)
    median: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    mode: str = "eager"
    over: dict[str, dict[str, float]] = field(default_factory=dict)
    of_ceiling: float | None = None
    ceiling: str = ""
    flops: int = 0
    bytes: int = 0
    absent: str = ""
    wrong: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name, value, allowed in (("role", self.role, ROLES), ("unit", self.unit, UNITS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        for name in ("shape", "over", "extra", "environment"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be an object; got {getattr(self, name)!r}")
        for name in ("median", "low", "high", "of_ceiling"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{name} of {self.contender} must be a number; got {value!r}")
        for name, ratios in self.over.items():
            if not (isinstance(ratios, dict) and isinstance(ratios.get("median"), (int, float))):
                raise ValueError(f"over of {self.contender} must have a median for {name}; got {ratios!r}")
        if (self.median is None) != bool(self.absent):
            raise ValueError(f"a record has a median or says why not; {self.contender}: {self.median}, {self.absent!r}")


def section_records(
    section: Section, suite: str, roles: Mapping[str, str], shape: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[Record]:
    """A record for each row of a section that was timed in turns.

    Args:
        section: its title is the group.
        suite: of the records.
        roles: by name of the row; a peer where it is not named.
        shape: of all rows, to which a row's ``extra["shape"]`` is added.
        facts: the environment.
    """
    timed = {row.name: row for row in section.rows if row.seconds}
    records = []
    for row in section.rows:
        role = roles.get(row.name, "peer")
        known = {"suite": suite, "group": section.title, "contender": row.name, "role": role}
        known |= {"shape": {**shape, **row.shape}, "environment": dict(facts), "flops": row.flops, "bytes": row.bytes}
        if not row.seconds:
            records.append(Record(**known, absent=row.trouble or "not timed", wrong=row.wrong))
            continue
        spread = Spread.of(row.seconds)
        over = {name: asdict(ratio(row.seconds, other.seconds)) for name, other in timed.items() if name != row.name}
        share = section.fraction(row.name) if section.yardstick and row.name != section.yardstick else None
        records.append(
            Record(
                **known,
                median=spread.median,
                low=spread.low,
                high=spread.high,
                runs=len(row.seconds),
                mode=row.mode,
                over=over,
                of_ceiling=share,
                ceiling=section.yardstick if share is not None else "",
                extra=row.extra,
            )
        )
    return records


def environment(device: str = "cpu") -> dict[str, Any]:
    """What is measured on, without the machine's name or any path."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        "kind": device,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    try:
        import triton
    except ImportError:
        pass
    else:
        facts["triton"] = triton.__version__
    facts |= _peers()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]) or None,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
        }
    return facts


def device_folder(facts: Mapping[str, Any]) -> str:
    """A name for a folder of results: of the device, and of a CPU with its cores."""
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    return name if facts["kind"] == "cuda" else f"{name}-{facts['cores']}-cores"


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return _output(command, cwd=Path(__file__).parent) or None


def _output(command: Sequence[str], cwd: Path | None = None) -> str:
    """What a program prints; nothing where there is no such program."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _peers() -> dict[str, str]:
    """Versions of the libraries that suites hold the package against, of those that are installed."""
    found = {}
    for name in PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def is_dry(records: Sequence[Record]) -> bool:
    """Whether a suite's records measure nothing."""
    return any(record.mode == "dry" or record.environment.get("preset") == "tiny" for record in records)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes a results file anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(record), allow_nan=False, sort_keys=True) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """Reads a results file.

    Raises:
        ValueError: a line is no record of this schema; the message names file and line.
    """
    known = {entry.name for entry in fields(Record)}
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"results file {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line, parse_constant=_refused)
            if not isinstance(values, dict):
                raise ValueError("a record must be an object")
            if values.get("schema") != SCHEMA:
                raise ValueError(f"schema must be {SCHEMA}; got {values.get('schema')!r}")
            found.append(Record(**{name: value for name, value in values.items() if name in known}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"results file {path}, line {number}: {error}") from None
    return found


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number")
