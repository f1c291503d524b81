"""``longlive-rag fit-codec``: fits the demo's linear codec on videos."""

import argparse
from itertools import chain

__all__ = ["add_parser", "run"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "fit-codec",
        help="fit the demo's linear codec on videos",
        description="Fits the linear codec of the demo (16 principal components of 4 frames x 8 x 8 pixels x 3 "
        "colours, whitened) on all frames of the videos given, and writes it with a record of how it was made.",
    )
    parser.add_argument("video", nargs="+", metavar="VIDEO", help="video file, or sample:NAME for a sample clip")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .npz to write")
    parser.add_argument(
        "--size", default="320x176", metavar="WxH", help="frame size, multiples of 16 (default %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..demo.clips import CLIPS, PREFIX, resolve
    from ..demo.codec import fit_codec
    from ..demo.settings import parse_size
    from ..demo.video import read_frames

    size = parse_size(args.size)
    # Only file names go into the record: a path says more about a machine than about the codec.
    names = [video if video.startswith(PREFIX) else video.replace("\\", "/").rsplit("/", 1)[-1] for video in args.video]
    sources = {
        name: {
            "requirement": CLIPS[name.removeprefix(PREFIX)].requirement,
            "sha256": CLIPS[name.removeprefix(PREFIX)].sha256,
        }
        for name in names
        if name.startswith(PREFIX)
    }
    command = f"longlive-rag fit-codec {' '.join(names)} --size {size[0]}x{size[1]} --out codec.npz"
    frames = chain.from_iterable(read_frames(resolve(video), size, argument="VIDEO") for video in args.video)
    codec = fit_codec(frames, {"command": command, "sources": sources, "method": "PCA, whitened; no random numbers"})
    codec.save(args.out)
    share, patches = codec.provenance["explained_variance"], codec.provenance["patches"]
    print(f"{args.out}: 16 of 768 components, {100 * share:.1f} % of the variance of {patches} patches")
    return 0
