"""Speed of the ops on the GPU present, beside what the same device does in the same minute for a matrix product and a
copy, and against targets set beforehand.

``python -m benchmarks.gpu_ops`` measures; ``--dry-run`` runs all of it once on a CPU, with tiny tensors, in Triton's
interpreter, and measures nothing. Before anything is timed its output is held against float64; what is wrong is not
timed and makes the exit status 1. A missed target does so only with ``--strict``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures, gpu_embedder, gpu_sections, gpu_sweep
from benchmarks.figures import Row, Section, Shape
from benchmarks.gpu_contenders import first_line
from benchmarks.gpu_timer import DryTimer, GpuTimer
from benchmarks.harness import Bench

SECTIONS = gpu_sections.SECTIONS | {"embedder": gpu_embedder.embedder, "sweep": gpu_sweep.sweep}
DRY = Shape(grid=(2, 3), block=2, window=8, heads=2, head_dim=32, new_pages=3, embedding=64)


def device_facts(device: str) -> dict[str, Any]:
    """What was measured on, as far as it can be asked without changing anything."""
    import triton

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    facts = {
        "commit": commit or None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "clocks": "as found: neither set nor read",
    }
    if device == "cpu":
        return facts | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
    }


def measure(bench: Bench, wanted: Sequence[str], report: Callable[[list[Section]], None]) -> list[Section]:
    """Runs the sections wanted, one after another; ``report`` is called with all that is done after each."""
    done: list[Section] = []
    for name, function in SECTIONS.items():
        if wanted and name not in wanted:
            continue
        try:
            section = function(bench)
        except Exception as error:  # a section that fails must not take the others' results with it
            section = Section(name, [Row(f"all of {name}", trouble=f"FAILED, {first_line(error)}", wrong=True)])
        done.append(section)
        print(figures.section_text(section) + "\n", flush=True)
        report(done)
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when an output is wrong, with ``--strict`` also when a target is missed; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ops", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="run it once on a CPU to see that it runs; no results")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that contenders take turns in (default: 20)")
    parser.add_argument("--only", action="append", default=[], metavar="SECTION", help="may be repeated")
    args = parser.parse_args(arguments)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
        torch.set_num_threads(1)
        print("DRY RUN on a CPU, in Triton's interpreter: these numbers measure NOTHING and are not written.\n")
        bench = Bench(DRY, torch.float32, "cpu", DryTimer(), dry=True)
    elif not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device, and torch finds none here; --dry-run only tries the script")
        return 2
    else:
        bench = Bench(Shape(), torch.bfloat16, "cuda", GpuTimer(args.rounds))
    out = os.environ.get("LONGLIVE_BENCH_OUT") or os.environ.get("BENCH_OUT") or "bench_out"
    facts = device_facts(bench.device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n", flush=True)

    def report(sections: list[Section]) -> None:
        """Written anew after each section, so that a run that is stopped leaves what it had."""
        if bench.dry:
            return
        Path(out).mkdir(parents=True, exist_ok=True)
        data = facts | {"what": "GPU ops", "rounds": args.rounds, "sections": figures.as_data(sections)}
        (Path(out) / "gpu_ops.json").write_text(json.dumps(data, indent=1) + "\n")

    with torch.inference_mode():
        sections = measure(bench, args.only, report)
    print(figures.targets_text(sections))
    if bench.dry:
        print("\nDRY RUN: whether a target is met here says nothing.")
    wrong = [row.name for section in sections for row in section.rows if row.wrong]
    if wrong:
        print(f"\nwrong or failed, not timed: {', '.join(wrong)}")
    missed = any(not target.met for section in sections for target in section.targets)
    return int(bool(wrong) or (args.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
