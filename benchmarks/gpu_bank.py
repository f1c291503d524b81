"""Speed of the memory bank on the GPU present: fetch and commit beside the device's own copies of the same pages, and
how much of a fetch is hidden behind attention.

``python -m benchmarks.gpu_bank`` measures; ``--dry-run`` runs all of it once on a CPU with tiny pages and measures
nothing. Bytes are compared before anything is timed; what is wrong is not timed and makes the exit status 1. A missed
target does so only with ``--strict``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import figures
from benchmarks.figures import Row, Section, Shape, Target
from benchmarks.gpu_contenders import first_line
from benchmarks.gpu_ops import DRY, device_facts
from longlive_rag_ops.bank import BankConfig, MemoryBank, PageFormat

LAYERS = 30  # of Wan 2.1 1.3B
RATE, HIDDEN = 0.9, 0.95


@dataclass
class Setting:
    """What is measured, and on what."""

    shape: Shape
    layers: int
    dtype: torch.dtype
    device: str
    rounds: int

    @property
    def format(self) -> PageFormat:
        shape = self.shape
        return PageFormat("plain", self.layers, 1, shape.tokens, shape.heads, shape.head_dim, self.dtype)

    def bank(self, host: int, slots: int) -> MemoryBank:
        """A bank of that many frames in host memory and on the device."""
        config = BankConfig(host_bytes=host * self.format.record_bytes, slab_bytes=self.format.record_bytes)
        return MemoryBank(
            self.format,
            config,
            device_slots=slots,
            device=self.device,
            frames_per_commit=self.shape.new_pages,
            most_fetched=slots,
        )

    def frames(self, count: int) -> torch.Tensor:
        """Pages of that many frames, ``(layers, 2, 1, count, T, H, D)``, random bits."""
        shape = *self.format.slots_shape(count)[:-1], self.format.head_dim * self.dtype.itemsize
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device).view(self.dtype)

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds from an idle device to the end of what was enqueued on the current stream, and the host's part."""
        if self.device == "cpu":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def turns(self, contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Seconds of each in every round, in an order that changes from round to round; the first is not counted."""
        names = list(contenders)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(self.rounds + 1):
            for turn in range(len(names)):
                name = names[(turn + number) % len(names)]
                taken = contenders[name]()
                if number:
                    seconds[name].append(taken)
        return seconds


def pinned(like: torch.Tensor) -> torch.Tensor:
    """Host memory of that shape, page-locked where there is a device."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)


def copy_pages(to: torch.Tensor, source: torch.Tensor) -> None:
    """Every page's keys and values by a copy of their own, as the bank's commit and fetch find them in a pool."""
    for layer in range(to.shape[0]):
        for half in range(2):
            for frame in range(to.shape[3]):
                to[layer, half, 0, frame].copy_(source[layer, half, 0, frame], non_blocking=True)


def views(window: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of each frame, ``(layers, samples, T, H, D)``."""
    return tuple([window[:, half, :, i] for i in range(window.shape[3])] for half in range(2))  # type: ignore[return-value]


def fetch(bank: MemoryBank, frames: Sequence[int]) -> None:
    """All that lies between a choice and attention in the last layer."""
    bank.prefetch(frames)
    for layer in range(bank.layers):
        bank.wait(layer)


def wrong_pages(bank: MemoryBank, frames: Sequence[int], window: torch.Tensor) -> str:
    """What is wrong with the frames' slots: empty when nothing is."""
    for number, frame in enumerate(frames):
        got = bank.slots[:, :, :, bank.slot(frame)].view(torch.uint8)
        if not torch.equal(got, window[:, :, :, number].view(torch.uint8)):
            return f"WRONG bytes in frame {frame}"
    return ""


def copy_rates(setting: Setting) -> Section:
    """Six frames from host memory to slots, and six to host memory."""
    count = setting.shape.new_pages
    window = setting.frames(count)
    keys, values = views(window)
    groups = [range(count), range(count, 2 * count)]
    store, serve = setting.bank(count, 0), setting.bank(2 * count, count)
    store.commit(groups[0], keys, values)
    for group in groups:
        serve.commit(group, keys, values)
    host, target = pinned(window), torch.empty_like(window)
    held = 0

    def fetch_six() -> float:
        nonlocal held
        held = 1 - held
        taken = setting.timed(lambda: fetch(serve, groups[held]))
        serve.release(groups[held])
        return taken

    def commit_six() -> float:
        store.forget(groups[0])
        store.flush()

        def run() -> None:
            store.commit(groups[0], keys, values)
            for layer in range(setting.layers):
                store.wait(layer)

        return setting.timed(run)

    trouble = ""
    for _ in groups:  # each of them from host memory
        fetch_six()
        serve.slots.view(torch.uint8).zero_() if not held else None
    fetch_six()
    trouble = wrong_pages(serve, groups[held], window)
    commit_six()
    for number, frame in enumerate(groups[0]):
        if not torch.equal(store.record(frame), setting.format.encode(keys[number].cpu(), values[number].cpu())):
            trouble = f"WRONG bytes in frame {frame} of host memory"
    megabytes = window.nbytes / count / 1e6
    section = Section(f"copies: {count} frames of {setting.layers} layers, {megabytes:.1f} MB a frame")
    names = ["to device, pinned copies", "to device, bank", "to host, pinned copies", "to host, bank"]
    if trouble:
        section.rows = [Row(name, trouble=trouble, wrong=True) for name in names]
        return section
    seconds = setting.turns(
        {
            names[0]: lambda: setting.timed(lambda: copy_pages(target, host)),
            names[1]: fetch_six,
            names[2]: lambda: setting.timed(lambda: copy_pages(host, window)),
            names[3]: commit_six,
        }
    )
    section.rows = [Row(name, seconds[name], "eager", bytes=window.nbytes) for name in names]
    for what, ours, theirs in (("fetch", names[1], names[0]), ("commit", names[3], names[2])):
        got = section.fraction(ours, theirs)
        section.targets.append(Target(f"bank {what}, share of the rate of pinned copies", got, RATE, least=True))
    store.close()
    serve.close()
    return section


def hiding(setting: Setting) -> Section:
    """A fetch begun before a clean forward, each layer awaited by the noisy forward that follows."""
    shape, count = setting.shape, setting.shape.new_pages
    window = setting.frames(1)
    keys, values = views(window)
    bank = setting.bank(2 * count, count)
    for frame in range(2 * count):
        bank.commit([frame], keys, values)
    q, k, v = (
        torch.randn(1, shape.heads, tokens, shape.head_dim, dtype=setting.dtype, device=setting.device)
        for tokens in (shape.queries, shape.window * shape.tokens, shape.window * shape.tokens)
    )

    def forward(wait: bool) -> None:
        for layer in range(setting.layers):
            if wait:
                bank.wait(layer)
            F.scaled_dot_product_attention(q, k, v)

    held: list[int] = list(range(count))  # the present choice, pinned

    def choose(new: int) -> list[int]:
        """Frames of which ``new`` have no slot."""
        nonlocal held
        bank.release(held)
        others = [frame for frame in range(2 * count) if frame not in held]
        held = held[new:] + others[:new]
        return held

    def alone(new: int) -> float:
        frames = choose(new)
        return setting.timed(lambda: fetch(bank, frames))

    def both(new: int) -> float:
        frames = choose(new)

        def run() -> None:
            bank.prefetch(frames)
            forward(wait=False)
            forward(wait=True)

        return setting.timed(run)

    def compute() -> float:
        def run() -> None:
            forward(wait=False)
            forward(wait=False)

        return setting.timed(run)

    fetch(bank, held)
    before = bank.stats()["fetched_bytes"]
    alone(count)
    moved = bank.stats()["fetched_bytes"] - before
    trouble = "" if moved == count * window.nbytes else f"WRONG: {moved} bytes were fetched"
    for frame in held:
        trouble = trouble or wrong_pages(bank, [frame], window)
    section = Section(
        f"hiding: attention of {setting.layers} layers, twice, {shape.queries} queries of {shape.window} frames"
    )
    contenders: dict[str, Callable[[], float]] = {"two forwards": compute}
    for new in (count, 1):
        contenders[f"fetch of {new}"] = lambda new=new: alone(new)  # type: ignore[misc]
        contenders[f"two forwards, fetch of {new}"] = lambda new=new: both(new)  # type: ignore[misc]
    if trouble:
        section.rows = [Row(name, trouble=trouble, wrong=True) for name in contenders]
        return section
    seconds = setting.turns(contenders)
    for name, times in seconds.items():
        new = int(name.split()[-1]) if name.startswith("fetch") else 0
        section.rows.append(Row(name, times, "eager", bytes=new * window.nbytes))
    for new in (count, 1):
        hidden = [
            1 - (whole - work) / copying
            for whole, work, copying in zip(
                seconds[f"two forwards, fetch of {new}"],
                seconds["two forwards"],
                seconds[f"fetch of {new}"],
                strict=True,
            )
        ]
        got = figures.Spread.of(hidden).median
        section.targets.append(Target(f"share of a fetch of {new} that is hidden", got, HIDDEN, least=True))
    bank.close()
    return section


SECTIONS: dict[str, Callable[[Setting], Section]] = {"copies": copy_rates, "hiding": hiding}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when bytes are wrong, with ``--strict`` also when a target is missed; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bank", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="run it once on a CPU to see that it runs; no results")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that contenders take turns in (default: 20)")
    parser.add_argument("--only", action="append", default=[], metavar="SECTION", help="may be repeated")
    args = parser.parse_args(arguments)
    if args.dry_run:
        print("DRY RUN on a CPU: these numbers measure NOTHING and are not written.\n")
        setting = Setting(DRY, 2, torch.float32, "cpu", 1)
    elif not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device, and torch finds none here; --dry-run only tries the script")
        return 2
    else:
        setting = Setting(Shape(), LAYERS, torch.bfloat16, "cuda", args.rounds)
    out = os.environ.get("LONGLIVE_BENCH_OUT") or os.environ.get("BENCH_OUT") or "bench_out"
    facts: dict[str, Any] = device_facts(setting.device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n", flush=True)
    done: list[Section] = []
    with torch.inference_mode():
        for name, measure in SECTIONS.items():
            if args.only and name not in args.only:
                continue
            try:
                section = measure(setting)
            except Exception as error:  # a section that fails must not take the other's results with it
                section = Section(name, [Row(f"all of {name}", trouble=f"FAILED, {first_line(error)}", wrong=True)])
            done.append(section)
            print(figures.section_text(section) + "\n", flush=True)
            if not args.dry_run:
                Path(out).mkdir(parents=True, exist_ok=True)
                data = facts | {
                    "what": "memory bank on a GPU",
                    "rounds": args.rounds,
                    "sections": figures.as_data(done),
                }
                (Path(out) / "gpu_bank.json").write_text(json.dumps(data, indent=1) + "\n")
    print(figures.targets_text(done))
    if args.dry_run:
        print("\nDRY RUN: whether a target is met here says nothing.")
    wrong = [row.name for section in done for row in section.rows if row.wrong]
    if wrong:
        print(f"\nwrong or failed, not timed: {', '.join(wrong)}")
    missed = any(not target.met for section in done for target in section.targets)
    return int(bool(wrong) or (args.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
