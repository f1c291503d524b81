"""The demo on many ranks: ``torchrun --nproc-per-node 2 examples/torchrun_demo.py --out DIR``.

Takes the options of ``longlive-rag demo``, and writes the same report and pictures, from the first rank. Every rank
runs the whole (small) model; the history is spread over them by frame, or with ``--head-ranks`` by head as well. Limits
such as ``--host-bytes`` are one rank's. One pass more than the demo's is made, in which every attention output is
compared with one process's: exits 1 when a selection differs or an output is off by more than 1e-6
(see ``demo/rank_check.py`` for what is allowed where parts of attention are joined).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag_ops.cli.demo import add_options, demo_settings
from longlive_rag_ops.demo.show import show
from longlive_rag_ops.demo.table import summary_text
from longlive_rag_ops.distributed import MemoryMesh

TIMEOUT = 900.0  # seconds; the first rank may have clips to fetch, and pictures to draw


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(made)
    ranks = made.add_argument_group("ranks")
    ranks.add_argument(
        "--head-ranks", type=int, default=1, metavar="N", help="ranks that share a frame's heads (default %(default)s)"
    )
    ranks.add_argument(
        "--transfer",
        choices=("auto", "pages", "merge"),
        default="auto",
        help="how frames that other ranks keep are attended to (default %(default)s)",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo on this rank; 0 when all ranks together did what one process does."""
    args = parser().parse_args(argv)
    if not dist.is_torchelastic_launched():
        print("start it with: torchrun --nproc-per-node 2 examples/torchrun_demo.py --out DIR", file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    try:
        ranks = dist.get_world_size()
        if args.head_ranks < 1 or ranks % args.head_ranks:
            raise ValueError(f"--head-ranks: got {args.head_ranks}, which must divide the number of ranks ({ranks})")
        sizes = ranks // args.head_ranks, args.head_ranks
        mesh = MemoryMesh(init_device_mesh("cpu", sizes, mesh_dim_names=("frames", "heads")), timeout=TIMEOUT)
        settings = demo_settings(args, mesh=mesh, transfer=args.transfer)
        shown = show(args.video, args.out, settings, progress=not args.quiet)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        print(f"error on rank {dist.get_rank()}: {error}", file=sys.stderr)
        return 2
    if first:
        print(summary_text(shown.report))
        print(f"report:   {shown.report_path}")
        for picture in shown.pictures:
            print(f"picture:  {picture}")
    compared = shown.report["ranks"]["compared"]
    passed = (
        compared["same_selections"] == compared["blocks"] and compared["largest_error"] <= compared["allowed_error"]
    )
    if first and not passed:
        print(f"ranks DIFFER from one process: {compared}", file=sys.stderr)
    dist.barrier()  # torchrun ends all ranks when one has failed: not before the first has said why
    dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
