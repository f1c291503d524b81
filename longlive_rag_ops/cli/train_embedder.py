"""``longlive-rag train-embedder``: trains the retrieval autoencoder on a folder of latents."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from ..embedder.training_config import TrainingConfig, read_settings

if TYPE_CHECKING:
    from ..embedder.training import TrainingResult


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command; every setting of `TrainingConfig` is an option."""
    parser = subparsers.add_parser(
        "train-embedder",
        help="train the retrieval autoencoder on a folder of latents",
        description="Trains the autoencoder whose encoder embeds latent frames for retrieval. OUT gets "
        "best.safetensors, last.pt, config.json, metrics.jsonl and TensorBoard's files. Ctrl-C ends it after the step "
        "that is being computed, --resume goes on there. Configuration files of LongLive-RAG work as they are.",
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder of clips (.safetensors, .pt, .pth, .npy: frames, C, H, W)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--config", metavar="FILE", help="settings (.json, .yaml), which the options below override")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT, with its settings")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto: cuda if there)")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads, 0: torch's choice (default 0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no line for each epoch")
    group = parser.add_argument_group("settings, under the names of LongLive-RAG's training")
    for setting in fields(TrainingConfig):
        _add_setting(group, setting.name, setting.default, **setting.metadata)
    parser.set_defaults(run=run)


def _add_setting(
    group: argparse._ArgumentGroup, name: str, default: object, *, kind: type, meaning: str, **rules: object
) -> None:
    option = "--" + name.replace("_", "-")
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = meaning if default is None else f"{meaning} (default: {shown})"
    # Options that are not given are not there: the file or the run says what they are.
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif kind is tuple:
        group.add_argument(option, type=int, nargs="+", metavar="N", default=argparse.SUPPRESS, help=text)
    elif kind is str:
        group.add_argument(option, choices=rules["choices"], default=argparse.SUPPRESS, help=text)  # type: ignore[arg-type]
    else:
        metavar = "N" if kind is int else "X"
        group.add_argument(option, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)


def run(args: argparse.Namespace) -> int:
    """Trains; 0 at the end, 128 and the signal's number when it was stopped (Ctrl-C: 130)."""
    try:
        return _train(args)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads (`| head -1`), and the interpreter would say so at its end, with its own status
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(args: argparse.Namespace) -> int:
    import torch

    from ..embedder.run_folder import RunFolder
    from ..embedder.training import train
    from ..embedder.training_log import show

    if args.threads < 0:
        raise ValueError(f"--threads must be at least 0, got {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    values, ignored = read_settings(args.config) if args.config is not None else ({}, [])
    if ignored:
        show(f"{args.config}: ignored, they mean nothing here: {', '.join(ignored)}")
    values |= {setting.name: getattr(args, setting.name) for setting in fields(TrainingConfig) if setting.name in args}
    config = replace(RunFolder(args.out).saved_config() if args.resume else TrainingConfig(), **values)
    result = train(args.data, args.out, config, resume=args.resume, device=args.device, progress=not args.quiet)
    show(_end(result, args, config))
    return 0 if result.signal is None else 128 + result.signal


def _end(result: TrainingResult, args: argparse.Namespace, config: TrainingConfig) -> str:
    from ..embedder.run_folder import option_words

    best = "no epoch done yet"
    if result.best is not None:
        best = f"best: epoch {result.best_epoch}, validation loss {result.best_loss:.6g}, in {result.best}"
    if result.signal is None:
        why = f"no better for {config.patience} epochs" if result.early else "all epochs done"
        return f"ended after epoch {result.epochs} ({why})\n{best}"
    command = shlex.join(
        ["longlive-rag", "train-embedder", *option_words("data", args.data), *option_words("out", args.out)]
        + ([] if args.device == "auto" else ["--device", args.device])
        + ([] if not args.threads else ["--threads", str(args.threads)])
        + ["--resume"]
    )
    name = signal.Signals(result.signal).name
    return (
        f"stopped by {name}, {result.epochs} epochs and the steps since then are saved\n{best}\ngo on with: {command}"
    )
