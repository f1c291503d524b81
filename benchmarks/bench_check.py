"""Whether this checkout is slower than what was recorded: ratios within a group, never absolute times.

``python -m benchmarks.bench_check`` (``make bench-check``) runs a few groups of micro on this CPU and holds each ratio
of our time over another contender's, or over the device's own rate, against the recorded one. A group in which one is
more than a quarter larger is run again, twice at most, for machines are never quiet; what is so each time is lost and
makes the exit status 1. 2 is for wrong input and for a run that failed. It is for people and no part of the tests.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.group_table import Table, grouped
from benchmarks.preset import Preset, make_bench, make_preset
from benchmarks.record import Record, device_folder, environment, is_dry, read_records
from benchmarks.result_set import RESULTS

LOSS = 0.25
ROUNDS = 5
ATTEMPTS = 3

Measure = Callable[[], list[Record]]  # runs one group


@dataclass(frozen=True)
class Ratio:
    """Our time over another's, now and as recorded.

    Attributes:
        name: ours, and the other.
        fresh: NaN where it was measured but is no number; None where it could not be measured.
    """

    group: str
    name: str
    recorded: float
    fresh: float | None

    @property
    def loss(self) -> float:
        """How much more of the other's time ours takes: 0.1 is a tenth."""
        return math.nan if self.fresh is None else self.fresh / self.recorded - 1

    @property
    def lost(self) -> bool:
        """A loss that is no number, or of something that is not measured any more, is one."""
        return not self.loss <= LOSS


def chosen_groups(preset: Preset) -> list[Measure]:
    """The groups that are checked: the attention step, and each op at the paper's shape."""
    from benchmarks import suite_micro

    return suite_micro.groups(make_bench(preset), preset)[: 1 + len(suite_micro.OPS)]


def check(
    recorded: Sequence[Record], groups: Sequence[Measure], attempts: int = ATTEMPTS
) -> tuple[list[Ratio], list[Record]]:
    """Runs the groups and compares; those with a loss again. Of each ratio the best attempt counts.

    Returns:
        The ratios, and all records of all attempts.

    Raises:
        ValueError: see `compare`.
    """
    best: dict[tuple[str, str], Ratio] = {}
    every: list[Record] = []
    for _ in range(attempts):
        with torch.inference_mode():
            fresh = [(measure, measure()) for measure in groups]
        made = [record for _, records in fresh for record in records]
        every += made
        for ratio in compare(recorded, made):
            before = best.get((ratio.group, ratio.name))
            if before is None or math.isnan(before.loss) or ratio.loss < before.loss:
                best[ratio.group, ratio.name] = ratio
        lost = {ratio.group for ratio in best.values() if ratio.lost}
        groups = [measure for measure, records in fresh if lost & {record.group for record in records}]
        if not groups:
            break
    return sorted(best.values(), key=_worst_first), every


def _worst_first(ratio: Ratio) -> tuple[float, str, str]:
    return (-math.inf if math.isnan(ratio.loss) else -ratio.loss, ratio.group, ratio.name)


def compare(recorded: Sequence[Record], fresh: Sequence[Record]) -> list[Ratio]:
    """Every ratio that was recorded in a group that has been run again, the largest loss first.

    Ratios between our own engines are left out, and those over contenders that are absent on this machine.

    Raises:
        ValueError: the two have no ratio in common; or a group has another title or other sizes than the recorded one.
    """
    now = grouped(fresh)
    unknown = [title for title in now if title not in grouped(recorded)]
    if unknown:
        raise ValueError(f"the recorded results have no group {'; '.join(unknown)}: record them anew, see README")
    found = []
    for title, group in grouped(recorded).items():
        if title not in now:
            continue
        own = {record.contender: record for record in now[title]}
        others = {r.contender for r in group if r.role not in ("ours", "part") and r.median is not None}
        for mine in group:
            if mine.role != "ours" or mine.median is None:
                continue
            again = own.get(mine.contender)
            if again is not None and again.median is not None and again.shape != mine.shape:
                raise ValueError(f"{title}, {mine.contender}: recorded for {mine.shape}, this run has {again.shape}")
            for other in sorted(others & mine.over.keys()):
                if other in own and own[other].median is None and not own[other].wrong:
                    continue  # not on this machine
                ratio = None if again is None else again.over.get(other, {}).get("median")
                found.append(Ratio(title, f"{mine.contender} over {other}", mine.over[other]["median"], ratio))
    if not found:
        raise ValueError("the recorded results and this run have no ratio in common")
    return sorted(found, key=_worst_first)


def troubles_text(fresh: Sequence[Record]) -> str:
    """What was wrong or failed in any attempt, and how."""
    return "\n".join(dict.fromkeys(f"{r.group}: {r.contender}: {r.absent}" for r in fresh if r.wrong))


def comparison_text(ratios: Sequence[Ratio]) -> str:
    """A table a group."""
    lines = []
    for group in dict.fromkeys(ratio.group for ratio in ratios):
        rows = []
        for one in (ratio for ratio in ratios if ratio.group == group):
            now = "not measured" if one.fresh is None else f"{one.fresh:.3f}"
            change = "-" if math.isnan(one.loss) else f"{100 * one.loss:+.0f} %"
            rows.append([one.name, f"{one.recorded:.3f}", now, change, "LOST" if one.lost else "ok"])
        lines += [group, Table(("ratio", "recorded", "now", "change", "verdict"), rows).text(), ""]
    return "\n".join(lines)


def find_results(root: Path = RESULTS) -> Path:
    """The folder of this machine's results, or else that of the newest results of a CPU.

    Raises:
        ValueError: there is none.
    """
    own = root / device_folder(environment())
    if (own / "micro.jsonl").exists():
        return own
    dated = []
    for path in sorted(root.glob("*/micro.jsonl")):
        facts = next((record.environment for record in read_records(path)), {})
        if facts.get("kind") == "cpu":
            dated.append((str(facts.get("date", "")), path.parent))
    if not dated:
        raise ValueError("no results of a CPU in benchmarks/results; --results names a folder with micro.jsonl")
    return max(dated)[1]


def read_recorded(folder: Path) -> list[Record]:
    """The folder's records of micro.

    Raises:
        ValueError: it has none, or they are not of a CPU.
    """
    path = folder / "micro.jsonl"
    if not path.exists():
        raise ValueError(f"--results: {folder} has no micro.jsonl")
    records = read_records(path)
    if not records or is_dry(records) or any(record.environment.get("kind") != "cpu" for record in records):
        raise ValueError(f"--results: {path} must hold measurements of a CPU")
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a ratio is lost; 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_check", description=__doc__)
    parser.add_argument("--results", metavar="FOLDER", help="recorded results (default: this device's, or the newest)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="(default %(default)s)")
    args = parser.parse_args(arguments)
    try:
        folder = Path(args.results) if args.results else find_results()
        recorded = read_recorded(folder)
        facts = recorded[0].environment
        print(f"recorded: {folder.name}, {facts.get('threads')} threads, commit {facts.get('commit')}", flush=True)
        preset = make_preset("cpu", args.rounds, facts.get("threads"))
        ratios, fresh = check(recorded, chosen_groups(preset))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # 1 would say that something was lost
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(comparison_text(ratios))
    if troubles := troubles_text(fresh):
        print(f"wrong or failed:\n{troubles}\n")
    lost = [f"{one.group}: {one.name}" for one in ratios if one.lost]
    if lost:
        print(f"bench-check: lost more than {100 * LOSS:.0f} %, or not measured:\n  " + "\n  ".join(lost))
        return 1
    print(f"bench-check: none of {len(ratios)} ratios lost more than {100 * LOSS:.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
