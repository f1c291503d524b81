"""What the attention window refuses, in which words, and that a refusal leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulator import Simulator
from window_pair import MISUSE, Pair, one_thread, rejected  # noqa: F401 (a fixture)

from longlive_rag_ops import MemoryWindow, WindowConfig

# A window with two samples, two layers, three frames a block, six tokens a frame, two query heads and one kv head.
SHAPE: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 0, "frames_per_block": 3}
TENSORS: dict[str, Any] = {"layers": 2, "batch": 2, "grid": (2, 3), "heads": 2, "kv_heads": 1, "head_dim": 16}


def pair_at(blocks: int) -> Pair:
    pair = Pair(**SHAPE, **TENSORS)
    for _ in range(blocks):
        pair.block()
    return pair


def attend(
    pair: Pair, layer: Any = 0, *, start: Any = None, grid: Any = None, n: int = 3, **change: Any
) -> torch.Tensor:
    """A forward of one layer with one thing wrong: `change` maps q, k or v to what becomes of it."""
    tensors = dict(zip("qkv", pair.qkv(n), strict=True))
    for name, wrong in change.items():
        tensors[name] = wrong(tensors[name])
    start = pair.start if start is None else start
    out = pair.window.attend(layer, *tensors.values(), start, pair.grid if grid is None else grid)
    assert isinstance(out, torch.Tensor)
    return out


def narrower(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1)


def wider(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.cat([x, x], dim=dim)


# Each entry: what is called, in the middle of a video, and words that the message must have.
WRONG_ATTEND: dict[str, tuple[Callable[[Pair], Any], tuple[str, ...]]] = {
    "later start": (lambda p: attend(p, start=p.start + 3), ("start_frame", "12")),
    "much later start": (lambda p: attend(p, start=p.start + 300), ("start_frame", "309")),
    "start inside the block": (lambda p: attend(p, start=p.start + 1), ("start_frame", "10")),
    "earlier start": (lambda p: attend(p, start=p.start - 3), ("start_frame", "6")),
    "start 0 again": (lambda p: attend(p, start=0), ("start_frame", "0")),
    "negative start": (lambda p: attend(p, start=-3), ("start_frame", "-3")),
    "start not an int": (lambda p: attend(p, start=float(p.start)), ("start_frame", "float")),
    "layer too large": (lambda p: attend(p, 2), ("layer", "2")),
    "layer negative": (lambda p: attend(p, -1), ("layer", "-1")),
    "layer not an int": (lambda p: attend(p, 0.5), ("layer", "float")),
    "grid of another size": (lambda p: attend(p, grid=(2, 4)), ("grid", "2, 4")),
    "grid with no row": (lambda p: attend(p, grid=(0, 3)), ("grid", "0, 3")),
    "grid with negative sides": (lambda p: attend(p, grid=(-2, -3)), ("grid", "-2, -3")),
    "grid of three": (lambda p: attend(p, grid=(1, 2, 3)), ("grid", "1, 2, 3")),
    "grid not ints": (lambda p: attend(p, grid=(2.0, 3.0)), ("grid", "2.0, 3.0")),
    "too many frames": (lambda p: attend(p, n=4), ("q", "3", "4")),
    "half a frame": (lambda p: attend(p, q=narrower(1), k=narrower(1), v=narrower(1)), ("q", "17")),
    "no token": (lambda p: attend(p, n=0), ("q", "0")),
    "q of one sample": (lambda p: attend(p, q=narrower(0)), ("q", "1, 18, 2, 16")),
    "k of one sample": (lambda p: attend(p, k=narrower(0)), ("k", "1, 18, 1, 16")),
    "v of four samples": (lambda p: attend(p, v=wider(0)), ("v", "4, 18, 1, 16")),
    "k shorter than q": (lambda p: attend(p, k=narrower(1)), ("k", "2, 17, 1, 16")),
    "v shorter than q": (lambda p: attend(p, v=narrower(1)), ("v", "2, 17, 1, 16")),
    "k with other heads": (lambda p: attend(p, k=wider(2)), ("k", "2, 18, 2, 16")),
    "v with other heads": (lambda p: attend(p, v=wider(2)), ("v", "2, 18, 2, 16")),
    "q with no head": (lambda p: attend(p, q=lambda x: x[:, :, :0]), ("q", "2, 18, 0, 16")),
    "q with another head size": (lambda p: attend(p, q=narrower(3)), ("q", "2, 18, 2, 15")),
    "k with another head size": (lambda p: attend(p, k=wider(3)), ("k", "2, 18, 1, 32")),
    "v with another head size": (lambda p: attend(p, v=wider(3)), ("v", "2, 18, 1, 32")),
    "q without heads": (lambda p: attend(p, q=lambda x: x.flatten(2)), ("q", "2, 18, 32")),
    "q of another type": (lambda p: attend(p, q=lambda x: x.double()), ("q", "float64")),
    "k of another type": (lambda p: attend(p, k=lambda x: x.bfloat16()), ("k", "bfloat16")),
    "v of another type": (lambda p: attend(p, v=lambda x: x.half()), ("v", "float16")),
    "everything of another type": (
        lambda p: attend(p, **dict.fromkeys("qkv", lambda x: x.double())),
        ("q", "float64"),
    ),
    "q of integers": (lambda p: attend(p, q=lambda x: x.long()), ("q", "int64")),
    "q elsewhere": (lambda p: attend(p, q=lambda x: x.to("meta")), ("q", "meta")),
    "k elsewhere": (lambda p: attend(p, k=lambda x: x.to("meta")), ("k", "meta")),
    "v elsewhere": (lambda p: attend(p, v=lambda x: x.to("meta")), ("v", "meta")),
    "q an array": (lambda p: attend(p, q=lambda x: x.numpy()), ("q", "ndarray")),
    "v missing": (lambda p: attend(p, v=lambda x: None), ("v", "None")),
    "q requires grad": (lambda p: attend(p, q=lambda x: x.requires_grad_()), ("grad",)),
    "k requires grad": (lambda p: attend(p, k=lambda x: x.requires_grad_()), ("grad",)),
    "v requires grad": (lambda p: attend(p, v=lambda x: x.requires_grad_()), ("grad",)),
}


def finish(pair: Pair, embeddings: Any = "right", *, start: Any = None) -> None:
    embeddings = pair.embeddings() if isinstance(embeddings, str) else embeddings
    pair.window.finish(pair.start if start is None else start, embeddings)


WRONG_FINISH: dict[str, tuple[Callable[[Pair], Any], tuple[str, ...]]] = {
    "another start": (lambda p: finish(p, start=p.start + 3), ("start_frame", "12")),
    "the start before": (lambda p: finish(p, start=p.start - 3), ("start_frame", "6")),
    "start not an int": (lambda p: finish(p, start="9"), ("start_frame", "str")),
    "no embeddings": (lambda p: finish(p, None), ("embeddings", "None")),
    "embeddings of one sample": (lambda p: finish(p, torch.zeros(1, 3, 4)), ("embeddings", "1, 3, 4")),
    "embeddings of two frames": (lambda p: finish(p, torch.zeros(2, 2, 4)), ("embeddings", "2, 2, 4")),
    "embeddings of four frames": (lambda p: finish(p, torch.zeros(2, 4, 4)), ("embeddings", "2, 4, 4")),
    "embeddings of another width": (lambda p: finish(p, torch.zeros(2, 3, 5)), ("embeddings", "5")),
    "embeddings without frames": (lambda p: finish(p, torch.zeros(2, 4)), ("embeddings", "2, 4")),
    "embeddings with tokens": (lambda p: finish(p, torch.zeros(2, 3, 4, 1)), ("embeddings", "2, 3, 4, 1")),
    "embeddings without width": (lambda p: finish(p, torch.zeros(2, 3, 0)), ("embeddings", "2, 3, 0")),
    "embeddings of integers": (lambda p: finish(p, torch.ones(2, 3, 4, dtype=torch.int64)), ("embeddings", "int64")),
    "embeddings of complex numbers": (
        lambda p: finish(p, torch.ones(2, 3, 4, dtype=torch.complex64)),
        ("embeddings", "complex64"),
    ),
    "embeddings elsewhere": (lambda p: finish(p, torch.ones(2, 3, 4, device="meta")), ("embeddings", "meta")),
    "embeddings a list": (lambda p: finish(p, [[[0.0] * 4] * 3] * 2), ("embeddings", "list")),
}


def unchanged(pair: Pair, call: Callable[[Pair], Any], words: tuple[str, ...]) -> None:
    pool, stats = pair.window.pool.clone(), dict(pair.window.stats())
    choices = [list(s) for s in pair.window.selected], [list(f) for f in pair.window.window_frames]
    with rejected(*words):
        call(pair)
    assert torch.equal(pool, pair.window.pool), "a refused call wrote to the pool"
    assert choices == ([list(s) for s in pair.window.selected], [list(f) for f in pair.window.window_frames])
    now = dict(pair.window.stats())
    assert {k: v for k, v in stats.items() if k != "seconds"} == {k: v for k, v in now.items() if k != "seconds"}


def carry_on(pair: Pair) -> None:
    """The window still agrees with the simulator."""
    for _ in range(3):
        pair.block()
    pair.compare_history()


@pytest.mark.parametrize("name", WRONG_ATTEND)
def test_attend_refuses_between_blocks(name: str) -> None:
    pair = pair_at(3)
    unchanged(pair, *WRONG_ATTEND[name])
    carry_on(pair)


@pytest.mark.parametrize("name", WRONG_ATTEND)
def test_attend_refuses_inside_a_block(name: str) -> None:
    pair = pair_at(3)
    pair.layer(0, *pair.qkv())
    unchanged(pair, *WRONG_ATTEND[name])
    pair.layer(1, *pair.qkv())
    pair.finish()
    carry_on(pair)


@pytest.mark.parametrize("name", WRONG_FINISH)
def test_finish_refuses(name: str) -> None:
    pair = pair_at(3)
    pair.forward()
    unchanged(pair, *WRONG_FINISH[name])
    pair.finish()
    carry_on(pair)


def test_a_wrong_grid_costs_no_memory() -> None:
    pair = pair_at(3)
    rows = pair.window.rope.shape[0]
    unchanged(pair, lambda p: attend(p, grid=(1, 1_000_000)), ("grid", "1, 1000000"))
    assert pair.window.rope.shape[0] == rows


@pytest.mark.parametrize("start", [3, 1, -1, 12])
def test_a_video_begins_at_frame_0(start: int) -> None:
    pair = pair_at(0)
    unchanged(pair, lambda p: attend(p, start=start), ("start_frame", str(start)))
    carry_on(pair)


def test_finish_needs_every_layer() -> None:
    for blocks in (0, 3):
        pair = pair_at(blocks)
        pair.layer(1, *pair.qkv())
        unchanged(pair, finish, ("layers", "0"))
        pair.layer(0, *pair.qkv())
        pair.finish()
        carry_on(pair)


def test_finish_needs_a_forward() -> None:
    for blocks in (0, 3):
        pair = pair_at(blocks)
        unchanged(pair, finish, ("start_frame", str(pair.start)))
        carry_on(pair)


def test_a_block_is_finished_once() -> None:
    pair = pair_at(3)
    unchanged(pair, lambda p: finish(p, start=p.start - 3), ("start_frame", "6"))
    carry_on(pair)


def test_a_block_has_as_many_frames_in_every_forward() -> None:
    pair = pair_at(3)
    pair.layer(0, *pair.qkv())
    unchanged(pair, lambda p: attend(p, 1, n=2), ("q",))
    unchanged(pair, lambda p: attend(p, 0, n=2), ("q",))
    pair.forward()
    pair.finish()
    pair.block(n=2)
    pair.forward(2)
    unchanged(pair, lambda p: attend(p, 0, n=3), ("q",))
    pair.finish(n=2)
    carry_on(pair)


def test_the_first_block_fixes_the_width_of_embeddings() -> None:
    pair = pair_at(1)
    pair.forward()
    unchanged(pair, lambda p: finish(p, torch.zeros(2, 3, 3)), ("embeddings", "3"))
    pair.finish()
    carry_on(pair)


def test_embeddings_that_require_grad_leave_no_graph_behind() -> None:
    # Either is fine, refusing or detaching; a bank that holds on to a graph for ever is not.
    pair = pair_at(3)
    pair.forward()
    embeddings = pair.embeddings().requires_grad_()
    try:
        pair.window.finish(pair.start, embeddings)
    except MISUSE:
        pair.window.finish(pair.start, embeddings.detach())
    pair.sim.finish(3, embeddings.detach())
    carry_on(pair)
    assert not pair.window.pool.requires_grad


def test_a_bounded_history_is_full() -> None:
    pair = Pair(**SHAPE, history_slots=12, on_full="error")
    with pytest.raises(RuntimeError, match=r"history_slots.*12"):
        for _ in range(20):
            pair.block()
    # Sink frames need no history: 13 frames fit, four blocks of three.
    assert pair.start == 12
    # What had been accepted is still served, however often one asks.
    pair.forward()
    unchanged(pair, finish, ("history_slots", "12"))
    pair.forward()
    pair.window.reset()
    pair.sim = Simulator(pair.rules, pair.batch)
    carry_on(pair)


WRONG_CONFIG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no room for a block": ({"window": 12, "sink": 4, "top_k": 6}, ("frames_per_block", "2")),
    "no room at all": ({"window": 4, "sink": 4, "top_k": 4}, ("frames_per_block", "-4")),
    "no window": ({"window": 0, "sink": 0, "top_k": 0}, ("window", "0")),
    "negative sink": ({"sink": -1}, ("sink", "-1")),
    "negative top_k": ({"top_k": -1}, ("top_k", "-1")),
    "negative guard": ({"recent_exclude": -1}, ("recent_exclude", "-1")),
    "empty blocks": ({"frames_per_block": 0}, ("frames_per_block", "0")),
    "float": ({"window": 12.0}, ("window", "float")),
    "bool": ({"sink": True}, ("sink", "bool")),
    "string": ({"top_k": "6"}, ("top_k", "str")),
    "position rule": ({"position_rule": "middle"}, ("position_rule", "middle", "slot")),
}


@pytest.mark.parametrize("name", WRONG_CONFIG)
def test_config_refuses(name: str) -> None:
    change, words = WRONG_CONFIG[name]
    with rejected(*words):
        WindowConfig(**change)


def test_config_is_frozen() -> None:
    config = WindowConfig()
    with pytest.raises(AttributeError):
        config.window = 13  # type: ignore[misc]
    assert config.local == 5


WRONG_WINDOW: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no layer": ({"layers": 0}, ("layers", "0")),
    "layers not an int": ({"layers": 1.5}, ("layers", "float")),
    "no sample": ({"batch": 0}, ("batch", "0")),
    "negative batch": ({"batch": -2}, ("batch", "-2")),
    "no token": ({"tokens_per_frame": 0}, ("tokens_per_frame", "0")),
    "no head": ({"kv_heads": 0}, ("kv_heads", "0")),
    "odd head": ({"head_dim": 15}, ("head_dim", "15")),
    "no head dim": ({"head_dim": 0}, ("head_dim", "0")),
    "integers": ({"dtype": torch.int8}, ("dtype", "int8")),
    "not a type": ({"dtype": "fp32"}, ("dtype", "fp32")),
    "negative history": ({"history_slots": -1}, ("history_slots", "-1")),
    "history not an int": ({"history_slots": 2.5}, ("history_slots", "float")),
    "when full": ({"on_full": "drop"}, ("on_full", "drop")),
    "engine": ({"engine": "warp"}, ("engine", "warp")),
}


@pytest.mark.parametrize("name", WRONG_WINDOW)
def test_window_refuses(name: str) -> None:
    change, words = WRONG_WINDOW[name]
    right = {"layers": 1, "batch": 1, "tokens_per_frame": 2, "kv_heads": 1, "head_dim": 16}
    with rejected(*words):
        MemoryWindow(WindowConfig(), **{**right, **change})


def test_window_needs_a_config() -> None:
    with rejected("config", "dict"):
        MemoryWindow({"window": 12}, layers=1, batch=1, tokens_per_frame=2, kv_heads=1, head_dim=16)  # type: ignore
