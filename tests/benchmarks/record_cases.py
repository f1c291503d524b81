"""Made-up results of every suite, as the suites write them; no number was measured."""

# ruff: noqa: E402  benchmarks is not installed: its folder is added to the path before it is imported
from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.figures import Row, Section
from benchmarks.record import Record, section_records

CPU = {"device": "Made-up CPU", "kind": "cpu", "cores": 2, "threads": 2, "torch": "2.13.0", "python": "3.11.7"}
CPU |= {"commit": "abcdef012345", "date": "2026-01-02", "load_average": 0.5, "preset": "cpu"}
GPU = CPU | {"device": "Made-up GPU", "kind": "cuda", "cuda": "13.0", "preset": "gpu"}
ROLES = {"as published": "published", "native": "native", "copy": "ceiling", "matmul": "ceiling", "read": "ceiling"}
OURS = ("ours, memory on device", "ours, memory in host memory", "ours, memory in host memory as int8")
PARTS = {
    "projections": 0.42,
    "rotation + write": 0.03,
    "embedding": 0.002,
    "retrieval": 0.004,
    "fetch stall": 0.002,
    "attention": 0.48,
}


def group(
    suite: str,
    title: str,
    seconds: Mapping[str, float],
    facts: Mapping[str, Any] = CPU,
    shape: Mapping[str, Any] | None = None,
    work: Mapping[str, tuple[int, int]] | None = None,
    yardstick: str = "",
    mode: str = "eager",
) -> list[Record]:
    """Records of contenders that took these medians in three rounds, the slowest half as slow again."""
    section = Section(title, yardstick=yardstick)
    for name, value in seconds.items():
        flops, moved = (work or {}).get(name, (0, 0))
        times = [value, 1.5 * value, 0.9 * value]
        section.rows.append(Row(name, times, mode, flops, moved))
    roles = {
        name: ROLES.get(name, "ours" if name.rpartition(": ")[2].startswith("ours") else "peer") for name in seconds
    }
    return section_records(section, suite, roles, shape or {}, facts)


def absent(
    suite: str, title: str, name: str, reason: str, facts: Mapping[str, Any] = CPU, wrong: bool = False
) -> Record:
    return Record(suite, title, name, "peer", absent=reason, wrong=wrong, environment=dict(facts))


def attention_step(published: float = 1.5, native: float = 1.0, **options: Any) -> list[Record]:
    """Ours takes one second."""
    seconds = {"as published": published, "native": native, "ours": 1.0}
    return group("micro", "attention step, 12 frames of 390 tokens", seconds, **options)


def micro(facts: Mapping[str, Any] = CPU) -> list[Record]:
    records = attention_step(facts=facts)
    for frames in (6, 12, 30):
        title = f"window_attend, {frames} frames of 390 tokens, 12 heads x 128"
        work = dict.fromkeys(("ours, auto", "ours, triton", "SDPA", "matmul"), (frames * 10**9, 0))
        seconds = {"ours, auto": 0.013 * frames, "ours, triton": 0.02 * frames, "SDPA": 0.0125 * frames}
        records += group(
            "micro", title, seconds | {"matmul": 0.009 * frames}, facts, {"frames": frames}, work, "matmul"
        )
        records.append(absent("micro", title, "flash-attn 3", "absent: no module named flash_attn_interface", facts))
    work = dict.fromkeys(("ours, dense", "copy"), (0, 10**9))
    records += group("micro", "write_frames, 3 frames", {"ours, dense": 0.12, "copy": 0.1}, facts, None, work, "copy")
    return [
        replace(r, extra={"intensity": 500.0 if r.flops else 0.5})
        if r.role != "ceiling" and (r.flops or r.bytes)
        else r
        for r in records
    ]


def scaling(facts: Mapping[str, Any] = CPU) -> list[Record]:
    records = []
    for history in (100, 1000, 10_000, 100_000, 1_000_000):
        names = ("ours", "torch.topk", "faiss", "read")
        work = dict.fromkeys(names, (0, 4096 * history))
        seconds = {"ours": 6e-6 + 5e-7 * history, "torch.topk": 1.5e-5 + 9e-7 * history, "read": 4e-7 * history}
        title, shape = f"retrieval against history, {history} frames", {"history": history, "embedding": 1024}
        records += group("scaling", title, seconds, facts, shape, work, "read")
        records.append(absent("scaling", title, "faiss", "absent: no module named faiss", facts))
    records += attention_over_history(facts)
    for repeat in (0.0, 0.5, 0.95):
        title = f"bank traffic against repeat rate, {repeat:g}"
        for name, role, moved in (("ours", "ours", 1.7e9 * (1 - repeat)), ("as published", "published", 8.5e9)):
            known: dict[str, Any] = {"unit": "B", "median": moved, "shape": {"repeat_rate": repeat}}
            records.append(Record("scaling", title, name, role, environment=dict(facts), **known))
    return records


def attention_over_history(facts: Mapping[str, Any] = CPU, growth: float = 0.02) -> list[Record]:
    """With the longest history ours takes ``growth`` more than with the shortest, and twice that with the search."""
    lengths, seconds = (100, 1000, 10_000), {}
    for number, history in enumerate(lengths):
        more = growth * number / (len(lengths) - 1)
        seconds |= {f"history of {history} frames: ours": 0.05 * (1 + more)}
        seconds |= {f"history of {history} frames: ours, with choice and commit": 0.055 * (1 + 2 * more)}
    seconds |= {"history of 100 frames: dense over all history": 0.2, "native": 0.049}
    records = group("scaling", "attention against history, one layer", seconds, facts)
    return [
        replace(record, shape={"history": int(record.contender.split()[2])}) if ": " in record.contender else record
        for record in records
    ]


def block(facts: Mapping[str, Any] = CPU, over_native: float = 0.9, stall: float = 0.002) -> list[Record]:
    """Ours takes ``over_native`` of native's second, and a little more from place to place; ``stall`` of it waits."""
    records = []
    for repeat in (0.0, 0.5, 0.95):
        title = f"block, 30 layers, 12 heads x 128, repeat rate {repeat:g}"
        seconds = {"as published": 2.0, "native": 1.0}
        seconds |= {name: over_native * (1 + 0.01 * number) for number, name in enumerate(OURS)}
        whole = group("block", title, seconds, facts, {"layers": 30, "repeat_rate": repeat})
        records += [replace(record, extra={"peak_device_bytes": 3 * 10**9}) for record in whole]
        for owner in whole:
            for part, share in (PARTS | {"fetch stall": stall}).items():
                if owner.role == "ours" or part not in ("embedding", "retrieval", "fetch stall"):
                    records.append(
                        Record(
                            "block",
                            title,
                            f"{owner.contender}: {part}",
                            "part",
                            median=share * (owner.median or 0.0),
                            runs=3,
                            shape=dict(owner.shape),
                            extra={"of": owner.contender, "part": part},
                            environment=dict(facts),
                        )
                    )
    return records + long_run(facts)


def long_run(facts: Mapping[str, Any] = CPU, late: float = 1.01) -> list[Record]:
    title, records = "long run, memory in host memory", []
    for first, last, seconds in ((1, 40, 1.0), (601, 640, late)):
        shape = {"first_block": first, "last_block": last}
        records += group("block", title, {f"ours, blocks {first}-{last}": seconds}, facts, shape)
    return records


def quality(facts: Mapping[str, Any] = CPU) -> list[Record]:
    title = "error against float64, window_attend"
    return [
        Record("quality", title, name, "ours", unit="1", median=error, environment=dict(facts))
        for name, error in (("ours, dense", 3.2e-7), ("ours, int8 pages", 4.1e-3))
    ]


def everything(facts: Mapping[str, Any] = CPU) -> dict[str, list[Record]]:
    """By suite."""
    return {"micro": micro(facts), "scaling": scaling(facts), "block": block(facts), "quality": quality(facts)}
