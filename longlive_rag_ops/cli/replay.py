"""``longlive-rag replay``: runs what was recorded of attention or of an embedder again, and compares."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..replay import BlockResult

MOST_RANKS = 64  # processes that one machine is asked for


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "replay",
        help="replay a recorded attention trace or embedder and compare",
        description="Attention: prints, per block, the frames chosen, whether they equal the recorded ones, and the "
        "largest error of the outputs relative to their root mean square. Embedder: prints the error of embeddings, "
        "reconstruction and each loss. Exits 1 when a choice differs or an error exceeds 2e-5 (embedder: 1e-5).",
    )
    parser.add_argument("traces", nargs="+", metavar="TRACE.safetensors", help="recorded traces")
    parser.add_argument(
        "--engine",
        default="auto",
        help="auto, reference, dense or triton (default: auto); on a CPU triton runs in its interpreter, slowly",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes of this machine that share the history by frame (default: 1; attention on a CPU alone)",
    )
    parser.add_argument(
        "--transfer",
        default="auto",
        choices=("auto", "pages", "merge"),
        help="with --ranks: whether the pages that other ranks keep travel, or parts of attention are merged",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replays each trace; 0 when all agree, 1 otherwise."""
    if args.engine == "triton" and args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which is later

    import torch

    from ..config import check_int
    from ..embedder.recording import is_recording
    from ..engines import check_engine
    from ..safetensors_file import map_safetensors

    check_engine(args.engine)
    check_int("--ranks", args.ranks, 1, MOST_RANKS)
    if args.ranks > 1 and args.device != "cpu":
        raise ValueError(f"--ranks: got {args.ranks} with --device {args.device}; ranks of this command run on a CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch finds no CUDA device on this machine; allowed here: cpu")
    failed = 0
    for name in args.traces:
        path = Path(name)
        embedder = is_recording(*map_safetensors(path, "trace"))
        if embedder and args.ranks > 1:
            raise ValueError(f"--ranks: got {args.ranks}, but {path} is an embedder, which one process runs")
        if embedder:
            agrees = _replay_embedder(path, args.device)
        else:
            agrees = _replay_attention(path, args.engine, args.device, args.ranks, args.transfer)
        failed += not agrees
    return 1 if failed else 0


def _replay_attention(path: Path, engine: str, device: str, ranks: int, transfer: str) -> bool:
    from ..replay import TOLERANCE, replay
    from ..traces import load_trace

    trace = load_trace(path)
    shared = "" if ranks == 1 else f", {ranks} ranks that share the history by frame"
    print(f"{path}: {trace.config['blocks']} blocks, engine {engine}, device {device}{shared}")
    if ranks == 1:
        replayed: Iterable[BlockResult] = replay(trace, engine, device)
    else:
        from ..distributed.trace_replay import replay_on_ranks

        replayed = replay_on_ranks(path, ranks, engine, transfer)
    results = []
    for result in replayed:
        print(_line(result))
        results.append(result)
    wrong = sum(not result.passed for result in results)
    worst = max((result.error for result in results), default=0.0)
    verdict = "agrees with the recording" if not wrong else f"{wrong} of {len(results)} blocks DIFFER"
    print(f"  {verdict}; largest error {worst:.1e} of the output's root mean square (allowed {TOLERANCE:.0e})")
    return wrong == 0


def _replay_embedder(path: Path, device: str) -> bool:
    from ..embedder.recording import TOLERANCE, compare, load_recording

    recording = load_recording(path)
    clips, frames = recording.tensors["input"].shape[:2]
    print(f"{path}: an embedder, {clips} clips of {frames} frames, {recording.model.config}, device {device}")
    results = list(compare(recording, device))
    for result in results:
        print(f"  {result.name:<28}  error {result.error:.1e}{'' if result.passed else '  <- fails'}")
    wrong = sum(not result.passed for result in results)
    verdict = "agrees with the recording" if not wrong else f"{wrong} of {len(results)} tensors DIFFER"
    print(f"  {verdict}; errors are of the recorded root mean square (allowed {TOLERANCE:.0e})")
    return wrong == 0


def _line(result: BlockResult) -> str:
    samples = " | ".join(" ".join(map(str, frames)) or "-" for frames in result.chosen)
    verdict = "same" if result.same_choice else f"DIFFERS, recorded {result.recorded}"
    mark = "" if result.passed else "  <- fails"
    return (
        f"  block {result.block:3d}  start {result.start_frame:4d}  chosen {samples:<24}  {verdict}  "
        f"error {result.error:.1e}{mark}"
    )
