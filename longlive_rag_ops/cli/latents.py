"""``longlive-rag latents``: makes latent files of videos, to train and judge embedders on."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..demo.latent_encoder import LatentEncoder

DTYPES = ("float32", "float16", "bfloat16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "latents",
        help="make latent files of videos",
        description="Encodes videos by the demo's linear codec, or with --vae by the Wan VAE of diffusers, and writes "
        "their latents as safetensors, which train-embedder reads. The latents of a video are held in memory, with "
        "--vae its decoded frames as well; a video's files are written once all of it is encoded.",
    )
    parser.add_argument("video", nargs="+", metavar="VIDEO", help="video file, or sample:NAME for a sample clip")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="cut each video into equal files of at most N latent frames (default: one file)",
    )
    parser.add_argument(
        "--size", metavar="WxH", help="frame size, multiples of 16 (default: 320x176, with --vae 832x480)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="that is stored (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("Wan VAE")
    group.add_argument("--vae", metavar="FOLDER", help="folder of diffusers' AutoencoderKLWan; nothing is downloaded")
    group.add_argument("--vae-dtype", choices=DTYPES, help="that it computes in (default float32)")
    group.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto: cuda if there)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the files and prints a line for each."""
    import torch

    from ..demo.settings import parse_size
    from ..demo.video_latents import VideoLatents

    for option in ("vae_dtype", "device"):
        if getattr(args, option) is not None and args.vae is None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name}: got {getattr(args, option)!r} without --vae, which it is for")
    size = None if args.size is None else parse_size(args.size)
    videos = VideoLatents(
        args.video, args.out, frames=args.frames, dtype=getattr(torch, args.dtype), overwrite=args.overwrite
    )
    encoder = _encoder(args)
    for made in videos.write(encoder, size or encoder.size, progress=not args.quiet):
        for file in made.files:
            last = file.first + file.shape[0] - 1
            print(f"{file.path}: latent frames {file.first}-{last}, {file.shape} {args.dtype}")
        if made.dropped:
            print(f"{made.video}: frames dropped at the end, which make no whole latent frame: {made.dropped}")
        if made.left:
            names = ", ".join(path.name for path in made.left)
            print(f"note: {args.out} still holds {names} of an earlier, longer cut of {made.video}", file=sys.stderr)
    return 0


def _encoder(args: argparse.Namespace) -> LatentEncoder:
    import torch

    from ..demo.codec import Codec
    from ..demo.latent_encoder import LinearEncoder
    from ..demo.wan_encoder import WanEncoder
    from ..embedder.training import find_device

    if args.vae is None:
        return LinearEncoder(Codec.shipped())
    return WanEncoder(args.vae, find_device(args.device or "auto"), getattr(torch, args.vae_dtype or "float32"))
