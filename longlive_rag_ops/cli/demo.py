"""``longlive-rag demo``: a real video through the memory window, with a report and pictures."""

import argparse
from typing import TYPE_CHECKING, Any

from .window_options import add_window_options

if TYPE_CHECKING:
    from ..bank.config import BankConfig
    from ..demo.settings import DemoSettings

__all__ = ["add_options", "add_parser", "demo_settings", "run"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "demo",
        help="stream a real video through the memory window and show what it retrieves",
        description="Streams a real video through a small frozen transformer whose attention retrieves old frames, and "
        "writes report.json, contact sheets and similarity maps. Without --video, two edits of sample clips are used, "
        "fetched once with pip: one in which a scene returns, one in which none does.",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--video", metavar="FILE", help="video file, or sample:NAME (default: two edits of sample clips)"
    )
    parser.add_argument(
        "--out", default="longlive_demo", metavar="DIR", help="folder to write to (default %(default)s)"
    )
    add_window_options(parser, "window sizes in latent frames (four video frames each)")
    tiers = parser.add_argument_group("memory bank (without --host-bytes all history stays in one pool)")
    tiers.add_argument("--host-bytes", metavar="SIZE", help="host memory for history, such as 64MiB")
    tiers.add_argument(
        "--device-bytes",
        metavar="SIZE",
        help="device memory for fetched frames (default: twice what a block can fetch)",
    )
    tiers.add_argument("--spill", metavar="DIR", help="folder where frames go that host memory cannot hold")
    tiers.add_argument("--disk-bytes", metavar="SIZE", help="most to write there (default 8GiB)")
    tiers.add_argument(
        "--storage",
        choices=("plain", "int8", "fp8"),
        help="how pages are stored (default plain)",
    )
    tiers.add_argument(
        "--policy",
        choices=("error", "oldest", "least_retrieved", "most_redundant"),
        help="what is forgotten when the bank is full (default oldest)",
    )
    parser.add_argument(
        "--embedder",
        default="grid_pool",
        metavar="NAME",
        help="what makes the vectors searched: grid_pool, average_pool, trained (the package's own small autoencoder), "
        "or a checkpoint of a retrieval autoencoder (default %(default)s)",
    )
    parser.add_argument("--blocks", type=int, default=0, metavar="N", help="stream at most N blocks of 3 latent frames")
    parser.add_argument(
        "--size", default="320x176", metavar="WxH", help="frame size, multiples of 16 (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and noise (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads, 0: torch's choice (default 1)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _bank(args: argparse.Namespace) -> "BankConfig | None":
    from ..bank.config import BankConfig

    for option in ("device_bytes", "spill", "disk_bytes", "storage", "policy"):
        given = getattr(args, option)
        if given is not None and args.host_bytes is None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name}: got {given!r} without --host-bytes, which says how much is kept in memory")
    if args.host_bytes is None:
        return None
    if args.disk_bytes is not None and args.spill is None:
        raise ValueError(f"--disk-bytes: got {args.disk_bytes!r} without --spill, which says where")
    return BankConfig(
        host_bytes=args.host_bytes,
        device_bytes=args.device_bytes,
        disk_bytes=0 if args.spill is None else args.disk_bytes or "8GiB",
        spill=args.spill,
        storage=args.storage or "plain",
        policy=args.policy or "oldest",
    )


def demo_settings(args: argparse.Namespace, **others: Any) -> "DemoSettings":
    """The settings that the options ask for, and others."""
    from ..demo.embedding import find_demo_embedder
    from ..demo.settings import DemoSettings, parse_size

    return DemoSettings(
        window=args.window,
        sink=args.sink,
        top_k=args.top_k,
        recent_exclude=args.recent_exclude,
        size=parse_size(args.size),
        blocks=args.blocks,
        seed=args.seed,
        threads=args.threads,
        bank=_bank(args),
        embedder=find_demo_embedder(args.embedder),
        **others,
    )


def run(args: argparse.Namespace) -> int:
    from ..demo.show import show
    from ..demo.table import summary_text

    shown = show(args.video, args.out, demo_settings(args), progress=not args.quiet)
    print(summary_text(shown.report))
    print(f"report:   {shown.report_path}")
    for picture in shown.pictures:
        print(f"picture:  {picture}")
    return 0
