"""Finished frames that are encoded once more, held against the simulator: what they attend to, what blocks then see."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from simulator import Rules, Simulator, rotate, softmax_attention
from torch import Tensor
from window_pair import TOLERANCE, Pair, error_of, one_thread, rejected  # noqa: F401 (a fixture)

from longlive_rag_ops.config import POSITION_RULES

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
except ImportError:
    st = None  # type: ignore[assignment]


@dataclass(frozen=True)
class SinkRules(Rules):
    """A frame that became a sink frame sits where sink frames do; under `absolute` it keeps its own number."""

    became: dict[int, int] = field(default_factory=dict)

    def position(self, frame: int, start: int, n: int) -> int:
        at = super().position(frame, start, n)
        return self.became.get(frame, at) if self.position_rule == "absolute" else at


class RecacheSimulator(Simulator):
    """Pages of frames below `sink` are those of the window's sink: a renewed one has other frames' pages for ever."""

    def recache(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int, grid: tuple[int, int], renew: bool
    ) -> Tensor:
        rules, tokens = self.rules, grid[0] * grid[1]
        n = q.shape[1] // tokens
        as_sink = {f: f for f in range(min(rules.sink, start + n))}
        first = start if renew and start > 0 else 0
        as_sink |= {first + i: i for i in range(rules.sink) if start <= first + i < start + n}
        rules.became.update({i: f for f, i in as_sink.items() if f >= start})  # type: ignore[attr-defined]
        alone = replace(rules, top_k=0)  # without memory

        def position(frame: int) -> int:
            return alone.position(as_sink.get(frame, frame), start, n)

        outs = []
        for sample in range(self.samples):
            for i in range(n):
                page = tuple(x[sample, i * tokens : (i + 1) * tokens].double() for x in (k, v))
                self.pages[layer, sample, start + i] = page  # type: ignore[assignment]
                if start + i in as_sink:
                    self.pages[layer, sample, as_sink[start + i]] = page  # type: ignore[assignment]
            others = [f for f in range(start, start + n) if f not in as_sink][-(rules.window - rules.sink) :]
            where = [(f, position(f)) for f in sorted(set(as_sink.values())) + others]
            keys = torch.cat([rotate(self.pages[layer, sample, f][0], at, grid) for f, at in where])
            values = torch.cat([self.pages[layer, sample, f][1] for f, _ in where])
            own = q[sample].double().split(tokens)
            queries = torch.cat([rotate(own[i], position(start + i), grid) for i in range(n)])
            outs.append(softmax_attention(queries, keys, values)[0])
        return torch.stack(outs)

    def recached(self, start: int, n: int, renew: bool) -> None:
        """The order of the memory part: no page stays behind one that is lost."""
        first = self.rules.sink if not renew or start == 0 else start + self.rules.sink
        crowded = n - max(0, first - start) > self.rules.local
        for frames in self.memory:
            lost = [at for at, frame in enumerate(frames) if crowded or start <= frame < start + n]
            del frames[lost[0] if lost else len(frames) :]


class RecachePair(Pair):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rules = SinkRules(**vars(self.rules))
        self.sim = RecacheSimulator(self.rules, self.batch)

    def recache(self, start: int, n: int, renew: bool = False) -> list[Tensor]:
        outs = []
        for layer in range(self.layers):
            q, k, v = self.qkv(n)
            outs.append(self.window.recache(layer, q, k, v, start, self.grid, renew_sink=renew))
            expected = self.sim.recache(layer, q, k, v, start, self.grid, renew)
            assert outs[-1].shape == q.shape and outs[-1].dtype == q.dtype
            assert error_of(outs[-1], expected) <= TOLERANCE[self.dtype]
        self.window.finish_recache(start)
        self.sim.recached(start, n, renew)
        return outs

    def newest(self, n: int, renew: bool = False) -> list[Tensor]:
        return self.recache(self.start - n, n, renew)

    def forget(self, before: int) -> list[int]:
        """The next block's choice is made already: it loses frames and gets no others for them."""
        choices = [self.sim.choices(sample) for sample in range(self.batch)]
        gone = self.window.forget(before)
        self.sim.forgotten |= set(gone)
        for sample, kept in enumerate(choices):
            key = sample, self.sim.frames, len(self.sim.forgotten)
            self.sim.decided[key] = [(f, score) for f, score in kept if f not in gone]
        return gone

    def compare_kept(self) -> None:
        """The history's canonical pages, from whichever tier has them."""
        for frame in range(self.config.sink, self.start):
            if frame in self.sim.forgotten or self.config.top_k == 0:
                with pytest.raises(KeyError):
                    self.window.history_page(frame)
                continue
            pages = self.window.history_page(frame)
            for layer, sample in ((layer, sample) for layer in range(self.layers) for sample in range(self.batch)):
                k, v = self.sim.pages[layer, sample, frame]
                assert error_of(pages[layer, 0, sample], rotate(k, 0, self.grid)) <= TOLERANCE[self.dtype]
                assert torch.equal(pages[layer, 1, sample].double(), v)


@dataclass(frozen=True)
class Story:
    """A window and what happens to it: numbers for `play` to make of them what is possible at the time."""

    sizes: dict[str, Any]
    tensors: dict[str, Any]
    events: tuple[tuple[str, int, int], ...]
    seed: int


def story(draw: Callable[[int, int], int]) -> Story:
    n, sink, top_k = draw(1, 3), draw(0, 4), draw(0, 4)
    kv_heads = draw(1, 2)
    window = sink + top_k + n + draw(0, 4)
    switches = draw(1, 4)
    events = []
    for switch in range(switches):
        blocks = draw(1, 1 + (2 if switch else 1) * window // n)
        events += [("block", draw(1, n) if draw(0, 3) == 0 else n, draw(1, 2)) for _ in range(blocks)]
        kind = ("newest", "newest", "renew", "all", "old", "forget")[draw(0, 5)]
        events.append((kind, draw(0, 99), draw(0, 1)))
        if draw(0, 3) == 0:
            events.append(("newest", draw(0, 99), 0))
    return Story(
        sizes={
            "window": window,
            "sink": sink,
            "top_k": top_k,
            "recent_exclude": draw(0, 4),
            "frames_per_block": n,
            "position_rule": POSITION_RULES[draw(0, 2)],
        },
        tensors={
            "batch": draw(1, 2),
            "layers": draw(1, 2),
            "grid": ((1, 1), (1, 2), (2, 2))[draw(0, 2)],
            "kv_heads": kv_heads,
            "heads": kv_heads * draw(1, 2),
            "dtype": (torch.float32, torch.float64)[draw(0, 1)],
        },
        events=(*events, *((("block", n, 1),) * 7)),
        seed=draw(0, 9999),
    )


def play(told: Story, **options: Any) -> tuple[RecachePair, list[Tensor]]:
    """Every output is compared with the reference; returns them."""
    pair = RecachePair(**told.sizes, **told.tensors, seed=told.seed, **options)
    window, sink, local = pair.config.window, pair.config.sink, pair.config.local
    outs: list[Tensor] = []
    for kind, number, times in told.events:
        start = pair.start
        if kind == "block":
            outs += [out for forward in pair.block(n=number, forwards=times) for out in forward]
            continue
        if kind == "forget":
            pair.forget(number % (start + 1))
        if kind == "old":  # a few frames of the history, which may leave a hole in the window
            at = number % start
            outs += pair.recache(at, min(1 + number % window, start - at))
            try:
                outs += [out for forward in pair.block(n=1) for out in forward]
                continue
            except RuntimeError as error:
                assert re.search(rf"recache must encode frames \d+ .. {start - 1} again", str(error))
        if kind == "all":  # the whole history, in forwards of a window's length
            for at in range(min(sink, start), start, window):
                outs += pair.recache(at, min(window, start - at))
        most = min(window, start)
        fewest = min(sink + local - 1, most) if kind in ("renew", "all", "old") else 1
        m = max(1, fewest) + number % (most - max(1, fewest) + 1)
        renew = kind == "renew" and not 0 < start - m < sink
        outs += pair.newest(m, renew)
    pair.compare_kept()
    return pair, outs


@pytest.mark.parametrize("seed", range(60))
def test_a_sweep_agrees_with_the_reference(seed: int) -> None:
    play(story(random.Random(seed).randint))


if st is not None:

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def test_drawn_stories_agree_with_the_reference(data: Any) -> None:
        play(story(lambda low, high: data.draw(st.integers(low, high))))


SIZES = {"layers": 2, "batch": 2, "heads": 2, "grid": (1, 2)}


def after(blocks: int, *args: Any, **options: Any) -> RecachePair:
    pair = RecachePair(*args, **SIZES, **options)
    for _ in range(blocks):
        pair.block()
    return pair


def test_an_old_frame_writes_nothing_that_a_local_one_needs() -> None:
    # Frame 2 has the row of the staging buffer of frame 8, and the window slot of frame 6.
    pair = after(5, 6, 0, 2, 0, 2)
    pair.recache(2, 1)
    pair.block(n=1)
    assert 6 not in pair.window.window_frames[0]


def test_positions_change_with_memory() -> None:
    # Memory has position 0 to itself in a block, and no part in the forward that caches again.
    pair = after(1, 8, 0, 3, 0, 2, position_rule="before_window")
    pair.newest(2)
    for _ in range(3):
        pair.block()
        pair.newest(1)
    pair.block()


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("blocks", [5, 12])  # while the window fills, and long after
@pytest.mark.parametrize("local_only", [False, True])
def test_a_new_sink_stays(rule: str, blocks: int, local_only: bool) -> None:
    pair = after(blocks, 12, 2, 4, 1, 2, position_rule=rule)
    m = 2 + 6 - 1 if local_only else min(12, pair.start - 2)
    first = pair.start - m
    pair.newest(m, renew=True)
    became = [pair.sim.pages[1, 0, first + i][1] for i in range(2)]
    for block in range(10):
        pair.block()
        if block == 4:  # without renew_sink it is left alone, also when its frames are cached again
            pair.newest(min(12, pair.start - 2))
        assert all(torch.equal(pair.window.pool[1, 1, 0, i].double(), became[i]) for i in range(2))
    pair.newest(12, renew=True)
    assert not torch.equal(pair.window.pool[1, 1, 0, 0].double(), became[0])
    for _ in range(6):
        pair.block()
    pair.compare_kept()


@pytest.mark.parametrize(("m", "others"), [(1, [17]), (3, [15, 16, 17]), (10, [*range(8, 18)]), (12, [*range(8, 18)])])
def test_what_is_attended_to_by_hand(m: int, others: list[int]) -> None:
    pair = after(0, 12, 2, 4, 0, 2)
    window = pair.window

    def mean_of(start: int, n: int, call: Any) -> float:
        """With keys of zero and a frame's number as its values, the mean number of what is attended to."""
        q, k, _ = pair.qkv(n)
        v = torch.arange(start, start + n).float().repeat_interleave(2)[None, :, None, None].expand_as(k).contiguous()
        return float([call(layer, q, torch.zeros_like(k), v, start, pair.grid) for layer in range(2)][1][0, -1, 0, 0])

    for start in range(0, 18, 2):
        mean_of(start, 2, window.attend)
        if start == 6:  # sink frames stay sink frames
            window.finish(start, pair.embeddings())
            assert mean_of(0, 8, window.recache) == pytest.approx(3.5)
            window.finish_recache(0)
        else:
            window.finish(start, pair.embeddings())
    frames = [0, 1, *others]
    assert mean_of(18 - m, m, window.recache) == pytest.approx(sum(frames) / len(frames))


def test_errors_leave_no_trace() -> None:
    pair = after(8, 9, 2, 3, 1, 2)
    window, grid = pair.window, pair.grid
    q, k, v = pair.qkv(4)

    def refused(*words: str, layer: int = 0, start: Any = 12, **options: Any) -> None:
        given = {"q": q, "k": k, "v": v, "grid": grid} | options
        with rejected(*words):
            window.recache(layer, given.pop("q"), given.pop("k"), given.pop("v"), start, given.pop("grid"), **given)

    def refuse_all() -> None:
        refused("start_frame", "13", "16", start=13)
        refused("start_frame", "-1", start=-1)
        refused("start_frame", "str", start="12")
        refused("layer", "2", layer=2)
        refused("grid", "2", grid=(2, 1))
        refused("k", k=k[:, :6])
        refused("v", v=v.double())
        refused("q", q=q[:, :7])
        refused("scale", "inf", scale=float("inf"))
        refused("window", "9", "10", **dict(zip("qkv", pair.qkv(10), strict=True)), start=6)
        refused("renew_sink", "1", start=1, renew_sink=True)
        refused("renew_sink", "2", start=14, renew_sink=True, **dict(zip("qkv", pair.qkv(1), strict=True)))
        # Frames 12 and 13 are local ones still: their pages would be in the window twice, of two generations.
        refused("renew_sink", "11", "12", start=12, renew_sink=True)
        with rejected("finish_recache" if window._recache else "start_frame", "12"):
            window.finish_recache(12)

    refuse_all()
    pair.block()
    pair.forward()
    refused("finish", "18")
    pair.finish()
    window.recache(0, q, k, v, 16, grid)
    pair.sim.recache(0, q, k, v, 16, grid, False)
    refused("start_frame", "16", "4", "12")
    with rejected("finish_recache", "16"):
        pair.forward()
    with rejected("finish_recache", "16"):
        window.rewrite(0, k, v, 16, grid)
    with rejected("layers", "1"):
        window.finish_recache(16)
    with rejected("start_frame", "12"):
        window.finish_recache(12)
    window.recache(1, q, k, v, 16, grid)
    pair.sim.recache(1, q, k, v, 16, grid, False)
    window.finish_recache(16)
    pair.sim.recached(16, 4, False)
    for _ in range(6):
        pair.block()
    assert window.stats()["recached_frames"] == 4


def test_reset_in_the_middle() -> None:
    pair = after(8, 9, 2, 3, 1, 2)
    q, k, v = pair.qkv(4)
    pair.window.recache(0, q, k, v, 12, pair.grid)
    pair.window.reset()
    fresh = RecachePair(9, 2, 3, 1, 2, **SIZES)
    fresh.window = pair.window
    for _ in range(8):
        fresh.block()
