"""What the suites must show, and what records say of it.

The limits were set before anything was measured, but for those of flatness: of that it was only said that time must
not grow, and they leave room for what two medians of the same differ by. Ratios of times are of contenders of one
group. Where several records decide a target, the worst of them does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.figures import Target
from benchmarks.group_table import Table, grouped, plain, time_over
from benchmarks.record import Record, is_dry

ATTENTION_STEP, BLOCK, LONG_RUN = (
    "attention step",
    "block",
    "long run",
)  # each before the first comma of a group's title
HISTORY = "attention against history"  # likewise
STEP_OVER_PUBLISHED, STEP_OVER_NATIVE = 1.3, 1.03
BLOCK_OVER_NATIVE, BLOCK_OVER_PUBLISHED = 0.85, 0.55
PART_OF_BLOCK = 1.0  # per cent
FLAT_STEP = 1.10  # a layer's step with the longest history over the one with the shortest, search and commit included
FLAT = 1.03  # the last blocks' time over the first ones'; two medians of the same do not come out the same either

Found = tuple[float, str]  # a number, and what it is of


@dataclass(frozen=True)
class Rule:
    """One target, and how it is found.

    Attributes:
        suite, kind: that measure it: a suite, on cpu or cuda.
        groups: that decide it: what their titles begin with.
        find: all numbers that records have for it; the worst decides.
        least: whether ``limit`` is the least or the most allowed.
    """

    what: str
    suite: str
    kind: str
    groups: str
    limit: float
    least: bool
    find: Callable[[Sequence[Record]], list[Found]]
    unit: str = ""

    def judge(self, records: Sequence[Record]) -> Target:
        """The target with what was measured; ``note`` names the record that decides, or says that this was dry.

        A contender of ours that failed or is absent might have been the worst one: what is left is not met.
        """
        own = [r for r in records if r.suite == self.suite and r.environment.get("kind") == self.kind]
        deciding = (self.groups, f"suite {self.suite}")
        lacking = sum(r.role == "ours" and r.median is None and r.group.split(",")[0] in deciding for r in own)
        found = self.find(own)
        if not found:
            return Target(self.what, None, self.limit, self.least, self.unit, "", lacking)
        got, where = (min if self.least else max)(found)
        others = f", the worst of {len(found)}" if len(found) > 1 else ""
        note = "dry run" if is_dry(own) else where + others
        return Target(self.what, got, self.limit, self.least, self.unit, note, lacking)


def judged(records: Sequence[Record], kind: str, suites: Sequence[str] = ()) -> list[Target]:
    """The targets of a kind of device, held against the records of one device; only those of ``suites``, if given."""
    return [rule.judge(records) for rule in RULES if rule.kind == kind and (not suites or rule.suite in suites)]


def targets_table(targets: Sequence[Target]) -> Table:
    """Every target beside what was measured."""
    rows = [[t.what, limit_text(t), got_text(t), verdict(t), t.note or "-"] for t in targets]
    return Table(("target", "set", "got", "met", "of"), rows)


def verdict(target: Target) -> str:
    """Met, or by how much it is missed: relative for ratios, in points for shares."""
    if target.got is None:
        return "not measured"
    if target.note == "dry run":
        return "dry run, says nothing"
    if target.met:
        return "met"
    if target.lacking and replace(target, lacking=0).met:
        return f"not whole: {target.lacking} of ours not measured"
    if target.unit:
        return f"missed by {abs(target.got - target.limit):.2g} points"
    return f"missed by {100 * abs(target.got / target.limit - 1):.2g} %"


def limit_text(target: Target) -> str:
    return f"{'at least' if target.least else 'at most'} {target.limit:g}{target.unit}"


def got_text(target: Target) -> str:
    return "-" if target.got is None else f"{target.got:.3g}{target.unit}" if target.unit else f"{target.got:.4f}"


def _groups(records: Sequence[Record], beginning: str) -> list[list[Record]]:
    return [group for title, group in grouped(records).items() if title.split(",")[0] == beginning]


def _timed(group: Sequence[Record], role: str) -> list[Record]:
    return [record for record in group if record.role == role and record.median is not None and record.unit == "s"]


def _step(role: str, inverse: bool = False) -> Callable[[Sequence[Record]], list[Found]]:
    """Our attention step's time over that of a role; ``inverse``: the other's over ours."""

    def find(records: Sequence[Record]) -> list[Found]:
        found = []
        for group in _groups(records, ATTENTION_STEP):
            for mine in _timed(group, "ours"):
                for other in _timed(group, role):
                    value = time_over(other, mine) if inverse else time_over(mine, other)
                    found += [] if value is None else [(value, _where(mine))]
        return found

    return find


def _block(name: str) -> Callable[[Sequence[Record]], list[Found]]:
    """The block's time over that of a contender, of every place of memory and repeat rate."""

    def find(records: Sequence[Record]) -> list[Found]:
        found = []
        for group in _groups(records, BLOCK):
            for mine in _timed(group, "ours"):
                for other in (record for record in group if record.contender == name):
                    value = time_over(mine, other)
                    found += [] if value is None else [(value, _where(mine))]
        return found

    return find


def _parts(*names: str) -> Callable[[Sequence[Record]], list[Found]]:
    """What parts together take of our block, in per cent."""

    def find(records: Sequence[Record]) -> list[Found]:
        found = []
        for group in _groups(records, BLOCK):
            for owner in _timed(group, "ours"):
                shares = [
                    time_over(part, owner)
                    for part in _timed(group, "part")
                    if part.extra.get("of") == owner.contender and part.extra.get("part") in names
                ]
                if shares:
                    found.append((100 * math.fsum(share or 0.0 for share in shares), _where(owner)))
        return found

    return find


def _flat(records: Sequence[Record]) -> list[Found]:
    """Time of a long run's last blocks over that of its first ones."""
    found = []
    for group in _groups(records, LONG_RUN):
        runs: dict[str, list[Record]] = {}
        for record in _timed(group, "ours"):
            if "first_block" in record.shape:
                runs.setdefault(record.contender.rpartition(", blocks")[0], []).append(record)
        for run in runs.values():
            run.sort(key=lambda record: record.shape["first_block"])
            value = time_over(run[-1], run[0]) if len(run) > 1 else None
            found += [] if value is None else [(value, f"{run[-1].contender} over {run[0].contender}")]
    return found


def _history(records: Sequence[Record]) -> list[Found]:
    """Time of each of our ways to do a block with the longest history over that with the shortest."""
    found = []
    for group in _groups(records, HISTORY):
        ways: dict[str, list[Record]] = {}
        for record in _timed(group, "ours"):
            if "history" in record.shape:
                ways.setdefault(record.contender.rpartition(": ")[2], []).append(record)
        for way in ways.values():
            way.sort(key=lambda record: record.shape["history"])
            value = time_over(way[-1], way[0]) if len(way) > 1 else None
            found += [] if value is None else [(value, f"{way[-1].contender} over {way[0].contender}")]
    return found


def _where(record: Record) -> str:
    """A record by name; its repeat rate, or else its group, says which of several; and who attends."""
    repeat, engine = (record.shape.get(name) for name in ("repeat_rate", "our_attention"))
    by = f", attention by {engine}" if engine else ""
    if repeat is None:
        return f"{record.group}: {record.contender}{by}"
    return f"{record.contender}, repeat rate {plain(repeat)}{by}"


NATIVE, PUBLISHED = "native", "as published"  # contenders
RULES = (
    Rule(
        "attention step: as published over ours",
        "micro",
        "cpu",
        ATTENTION_STEP,
        STEP_OVER_PUBLISHED,
        True,
        _step("published", inverse=True),
    ),
    Rule("attention step: ours over native", "micro", "cpu", ATTENTION_STEP, STEP_OVER_NATIVE, False, _step("native")),
    *(
        Rule("attention: longest history over shortest", "scaling", kind, HISTORY, FLAT_STEP, False, _history)
        for kind in ("cpu", "cuda")
    ),
    Rule("block with memory: ours over native", "block", "cuda", BLOCK, BLOCK_OVER_NATIVE, False, _block(NATIVE)),
    Rule(
        "block with memory: ours over as published",
        "block",
        "cuda",
        BLOCK,
        BLOCK_OVER_PUBLISHED,
        False,
        _block(PUBLISHED),
    ),
    Rule(
        "embedding and retrieval: share of the block",
        "block",
        "cuda",
        BLOCK,
        PART_OF_BLOCK,
        False,
        _parts("embedding", "retrieval"),
        " %",
    ),
    Rule("fetch stall: share of the block", "block", "cuda", BLOCK, PART_OF_BLOCK, False, _parts("fetch stall"), " %"),
    Rule("long run: last blocks over first blocks", "block", "cuda", LONG_RUN, FLAT, False, _flat),
)
