"""A block's attention in one layer, timed at several lengths of history in the same rounds: it must cost the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.contenders import AsPublished, RollingWindow, Shape, SlidingWindow
from benchmarks.figures import Section, attention_flops
from benchmarks.gpu_contenders import exact_attention
from benchmarks.harness import Bench, Entrant, compared
from benchmarks.history_stream import FORWARDS, OursVideo, StreamedVideo, Video
from benchmarks.micro_cases import dtype_name
from benchmarks.preset import Preset
from benchmarks.record import Record, section_records

SUITE, NAME = "scaling", "attention against history"
# What stands behind the point of history in a contender's name.
OURS, WHOLE, PUBLISHED = "ours", "ours, with choice and commit", "as published, with choice and commit"
ALL = "attention to all of history"
NATIVES = {f"{kind.name}, which has no history": kind for kind in (RollingWindow, SlidingWindow)}
ROLES = {OURS: "ours", WHOLE: "ours", PUBLISHED: "published", ceilings.MATMUL: "ceiling"}
ROLES |= dict.fromkeys(NATIVES, "native")
SPARE = 16  # blocks of room beside those of the rounds
SEEN = 8  # queries of attention to all of history that are held against float64


def attention(
    bench: Bench,
    preset: Preset,
    histories: Sequence[int],
    *,
    shape: Shape,
    embedding: int,
    published_up_to: int,
    all_up_to: int,
    engine: str = "auto",
    matmul: int = ceilings.SQUARE,
) -> list[Record]:
    """One group; its contenders are ways to do a block at each length of history.

    Args:
        histories: frames finished before the block, multiples of the frames of a block.
        shape: of the layer.
        embedding: numbers in an embedding.
        published_up_to, all_up_to: longest history for what is published, and for attention to all of it.
        matmul: size of the ceiling's product.
    """
    config = shape.config
    n, tokens = config.frames_per_block, shape.tokens
    section = Section(
        f"{NAME}, one layer, a block of {FORWARDS} forwards: {config.window} frames of {tokens} tokens, "
        f"{shape.heads} heads x {shape.head_dim}, {dtype_name(shape.dtype)}",
        yardstick=ceilings.MATMUL,
    )
    spare = SPARE + 4 * bench.timer.rounds
    entrants: list[Entrant] = []
    facts: dict[str, dict[str, Any]] = {}
    for history in histories:
        video, point = Video(shape, history, embedding), f"history of {history} frames: "
        mine = OursVideo(video, engine, spare)
        flops = _flops(shape, config.window)
        made = [
            Entrant(point + OURS, [mine.attend], _checked(mine.attend, mine), flops=flops),
            Entrant(point + WHOLE, [mine.block], _checked(mine.block, mine), flops=flops),
        ]
        if history <= published_up_to:
            other = StreamedVideo(video, AsPublished(shape))
            made.append(Entrant(point + PUBLISHED, [other.block], _checked(other.block, other), flops=flops))
        if history <= all_up_to:
            calls = [mine.attend_to_all]
            made.append(Entrant(point + ALL, calls, lambda mine=mine: _wrong_all(mine), flops=_flops(shape, history)))  # type: ignore[misc]
        facts |= {entrant.name: {"history": history} for entrant in made}
        entrants += made
    for name, kind in NATIVES.items():
        native = StreamedVideo(Video(shape, min(histories), embedding), kind(shape))
        entrants.append(Entrant(name, [native.block], flops=_flops(shape, config.window)))
    for entrant in entrants:
        entrant.launched = True  # a block changes the state that the next one starts from: no graph can hold it
    bench.run(section, [ceilings.product(bench.device, shape.dtype, matmul), *entrants])
    for row in section.rows:
        row.shape = facts.get(row.name, {})
    roles = {row.name: ROLES.get(row.name.rpartition(": ")[2], "peer") for row in section.rows}
    known = {"window": config.window, "tokens": tokens, "heads": shape.heads, "head_dim": shape.head_dim}
    known |= {"forwards": FORWARDS, "block": n, "new_pages": config.top_k, "embedding": embedding, "layers": 1}
    return section_records(section, SUITE, roles, known | {"dtype": dtype_name(shape.dtype)}, preset.facts)


def _flops(shape: Shape, frames: int) -> int:
    queries = shape.config.frames_per_block * shape.tokens
    return FORWARDS * attention_flops(queries, frames * shape.tokens, shape.heads, shape.head_dim)


def _checked(call: Callable[[], torch.Tensor], stream: OursVideo | StreamedVideo) -> Callable[[], str]:
    def check() -> str:
        wrong, start = stream.wrong(), stream.start
        return wrong or compared((call(), stream.video.exact(start)))

    return check


def _wrong_all(stream: OursVideo) -> str:
    """Some queries' attention to all pages, held against float64."""
    got = stream.attend_to_all()[:, :SEEN]
    q = stream.video.forwards[-1][0][:, :SEEN]
    return compared((got, exact_attention(q, stream.window.pool[0], run=stream.video.first)))
