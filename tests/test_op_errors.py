"""Bad input to the ops: an error that names the argument, what was got and what is allowed; nothing changed."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

import longlive_rag_ops  # noqa: F401  registers the ops

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("topk_retrieve", {"query": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "query must have dtype .*int64"),
    ("topk_retrieve", {"query": torch.zeros(8)}, ValueError, r"query must have shape \(any, any\), got \(8,\)"),
    ("topk_retrieve", {"index": torch.zeros(2, 20, 9)}, ValueError, r"index must have shape .*8\), got \(2, 20, 9\)"),
    ("topk_retrieve", {"index_ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "index_ids must have shape"),
    ("topk_retrieve", {"index_ids": torch.zeros(2, 20)}, TypeError, "index_ids must have dtype torch.int64"),
    (
        "topk_retrieve",
        {"index_length": torch.tensor([21])},
        ValueError,
        "index_length must lie between 0 and 20, got 21",
    ),
    (
        "topk_retrieve",
        {"index_length": torch.tensor([1, 2])},
        TypeError,
        "index_length must be an int64 tensor with one",
    ),
    ("topk_retrieve", {"end_frame": torch.tensor([1.0])}, TypeError, "end_frame must be an int64 tensor"),
    ("topk_retrieve", {"k": -1}, ValueError, "k must be at least 0, got -1"),
    ("topk_retrieve", {"recent_exclude": -2}, ValueError, "recent_exclude must be at least 0, got -2"),
    ("topk_retrieve", {"exclude": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, "exclude must have shape"),
    (
        "topk_retrieve",
        {"engine": "warp"},
        ValueError,
        "engine must be one of auto, reference, dense, triton; got 'warp'",
    ),
    ("write_frames", {"q": torch.zeros(2, 12, 4, 15)}, ValueError, "pool_layer must have shape .* 15"),
    ("write_frames", {"q": torch.zeros(2, 12, 3, 16)}, ValueError, "q must have a multiple of the pool's 2 key-value"),
    (
        "write_frames",
        {"k": torch.zeros(2, 12, 2, 16, dtype=torch.float64)},
        TypeError,
        "k must have dtype torch.float32",
    ),
    ("write_frames", {"v": torch.zeros(2, 11, 2, 16)}, ValueError, r"v must have shape \(2, 12, 2, 16\), got \(2, 11"),
    ("write_frames", {"slots": torch.tensor([9, 1])}, ValueError, "slots must lie between -1 and 8, got 9"),
    ("write_frames", {"slots": torch.tensor([1])}, ValueError, r"slots must have shape \(2\), got \(1,\)"),
    (
        "write_frames",
        {"staging_rows": torch.tensor([0, 7])},
        ValueError,
        "staging_rows must lie between -1 and 6, got 7",
    ),
    ("write_frames", {"positions": torch.tensor([0, 64])}, ValueError, "positions must lie between 0 and 63, got 64"),
    ("write_frames", {"positions": torch.tensor([-1, 0])}, ValueError, "positions must lie between 0 and 63, got -1"),
    (
        "write_frames",
        {"grid": [2, 4]},
        ValueError,
        r"grid must be \(h, w\) with h \* w = tokens_per_frame \(6\), got \[2, 4\]",
    ),
    ("write_frames", {"grid": [-2, -3]}, ValueError, "grid must be"),
    (
        "write_frames",
        {"rope_split": [16, 0]},
        ValueError,
        r"rope_split must be three even numbers .* \(16\), got \[16, 0\]",
    ),
    ("write_frames", {"rope": torch.zeros(64, 8, 2, dtype=torch.float16)}, TypeError, "rope must have dtype"),
    ("write_frames", {"q_weight": torch.ones(64)}, ValueError, "k_weight must be given together with q_weight"),
    (
        "place_frames",
        {"slots": torch.tensor([[9, 2, 1], [1, 0, 3]])},
        ValueError,
        "slots must lie between -1 and 8, got 9",
    ),
    ("place_frames", {"slots": torch.tensor([[2, 2, 1], [1, 0, 3]])}, ValueError, "slots must name each place once"),
    ("place_frames", {"source": torch.tensor([[2, 6, 5], [6, -1, 4]])}, ValueError, "source must not name a slot that"),
    (
        "place_frames",
        {"positions": torch.tensor([[0, 64, 1], [0, 3, 3]])},
        ValueError,
        "positions must lie between 0 and 63",
    ),
    (
        "place_frames",
        {"v_pages": torch.zeros(2, 7, 6, 2, 16)},
        ValueError,
        "v_pages must be given together with k_pages",
    ),
    (
        "place_frames",
        {"k_pages": torch.zeros(2, 7, 6, 2, 16, dtype=torch.int8)},
        ValueError,
        "k_pages of dtype torch.int8 needs k_scale",
    ),
    (
        "place_frames",
        {"k_pages": torch.zeros(2, 7, 6, 2, 16), "k_scale": torch.ones(2, 7, 6, 2)},
        ValueError,
        "k_pages of dtype torch.float32 takes no k_scale",
    ),
    ("window_attend", {"slots": torch.tensor([[0, 9], [0, 0]])}, ValueError, "slots must lie between -1 and 8, got 9"),
    ("window_attend", {"run": 3}, ValueError, "exactly one of slots and run must be given, got both"),
    ("window_attend", {"slots": None}, ValueError, "exactly one of slots and run must be given, got none"),
    ("window_attend", {"slots": None, "run": 10}, ValueError, "run must be between 0 and 9, got 10"),
    (
        "window_attend",
        {"q": torch.zeros(2, 12, 64)},
        ValueError,
        r"q must have shape \(samples, tokens, heads, head_dim\)",
    ),
    ("window_attend", {"q": torch.zeros(3, 12, 4, 16)}, ValueError, "pool_layer must have shape"),
    ("window_attend", {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ("window_attend", {"shifts": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "got none of rope, rope_split"),
    ("window_attend", cases.attend(table="shifts") | {"run": 2, "slots": None}, ValueError, "with slots, got run"),
    (
        "window_attend",
        cases.attend(table="shifts") | {"shifts": torch.full((2, 4), -64)},
        ValueError,
        "shifts must lie between -63 and 63, got -64",
    ),
    ("window_attend", {"k_scale": torch.ones(2, 9, 6, 2)}, ValueError, "dtype torch.float32 takes no k_scale"),
    ("window_attend", cases.attend(table="int8") | {"v_scale": None}, ValueError, "torch.int8 needs v_scale"),
    (
        "window_attend",
        cases.attend(table="int8") | {"k_scale": torch.full((2, 9, 6, 2), torch.inf)},
        ValueError,
        "k_scale must be finite, got inf",
    ),
    (
        "place_frames",
        cases.place(pages="int8") | {"v_scale": torch.full((2, 7, 6, 2), -torch.inf)},
        ValueError,
        "v_scale must be finite or NaN, got -inf",
    ),
    ("retrieve_attend", {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ("retrieve_attend", {"diversity": 2.0}, ValueError, "diversity must be at least 0 and less than 1, got 2.0"),
    (
        "retrieve_attend",
        {"top_k": 4},
        ValueError,
        r"window - sink - top_k must be at least the 2 frames .* 6 - 1 - 4 = 1",
    ),
    ("retrieve_attend", {"sink": -1}, ValueError, "sink must be at least 0, got -1"),
    (
        "retrieve_attend",
        {"start_frame": torch.tensor([-3])},
        ValueError,
        "start_frame must lie between 0 and .*, got -3",
    ),
    ("retrieve_attend", {"start_frame": torch.tensor([2])}, RuntimeError, "window_state must hold frame 0 in slot 0"),
    ("retrieve_attend", {"select": False}, RuntimeError, r"window_state must hold the block's frames \[0, 1\]"),
    ("retrieve_attend", {"count": 7}, ValueError, "count must be between 1 and 6, got 7"),
    (
        "retrieve_attend",
        {"position_rule": "newest"},
        ValueError,
        "position_rule must be one of slot, absolute, before_window; got 'newest'",
    ),
    (
        "retrieve_attend",
        {"staging": torch.zeros(2, 4, 6, 2, 16)},
        ValueError,
        "staging must have at least .* = 5 rows, got 4",
    ),
    (
        "retrieve_attend",
        {"frame_slot": torch.full((2, 8), 9)},
        ValueError,
        "frame_slot .* must lie between 6 and 8, got 9",
    ),
    (
        "retrieve_attend",
        {"window_state": torch.zeros(2, 3, 6, dtype=torch.int64)},
        ValueError,
        "window_state must have shape",
    ),
    (
        "merge_attention",
        {"lses": torch.zeros(3, 2, 5, 4)},
        ValueError,
        r"lses must have shape \(3, 2, 4, 5\), got \(3, 2, 5, 4\)",
    ),
    (
        "merge_attention",
        {"outs": torch.zeros(0, 2, 5, 4, 8)},
        ValueError,
        "outs' number of parts must be at least 1, got 0",
    ),
]


@pytest.mark.parametrize(
    ("op", "change", "error", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_argument_is_named_and_changes_nothing(
    op: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = cases.ALL[op]() | change
    before = cases.clone(case)
    with pytest.raises(error, match=message):
        getattr(torch.ops.longlive, op)(**case)
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("op", sorted(cases.ALL))
def test_tensors_on_another_device_are_named(op: str) -> None:
    case = cases.ALL[op]()
    name = [n for n, v in case.items() if isinstance(v, torch.Tensor)][-1]
    case[name] = case[name].to("meta")
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=r"must be on|meta"):
        getattr(torch.ops.longlive, op)(**case)


def test_fake_tensors_meet_the_same_checks() -> None:
    case = cases.attend() | {"run": 3}
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match="exactly one of slots and run"),
    ):
        torch.ops.longlive.window_attend(**case)


def bad_states() -> list[Any]:
    """Window states that a caller of ``select=False`` may get wrong: (sample, row, slot, number, message)."""
    return [
        pytest.param(1, 0, 3, 8, r"window_state must hold the block's frames", id="one sample holds another frame"),
        pytest.param(
            1, 1, 0, -1, "window_state of sample 1, slot 0: position must lie between 0 and 63", id="position"
        ),
        pytest.param(0, 1, 0, 64, "rope must reach temporal position 64, got a table of 64", id="high position"),
        pytest.param(0, 2, 4, 99, "slot 4: source must be -1 or lie between 6 and", id="source"),
        pytest.param(0, 2, 4, 3, "slot 4: source must be -1 or lie between 6 and", id="source in the window"),
        pytest.param(1, 3, 2, 99, "slot 2: staging row must lie between -1 and", id="staging row"),
    ]


@pytest.mark.parametrize(("sample", "row", "slot", "number", "message"), bad_states())
def test_a_wrong_window_state_is_named_before_anything_is_written(
    sample: int, row: int, slot: int, number: int, message: str
) -> None:
    case = cases.retrieve_later(select=False)
    block_slot = case["window_state"][0, 0].tolist().index(int(case["start_frame"]))
    case["window_state"][sample, row, block_slot if row == 0 else slot] = number
    before = cases.clone(case)
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.longlive.retrieve_attend(**case)
    assert all(torch.equal(case[n], before[n]) for n in ("pool_layer", "staging", "window_state"))


def test_a_window_state_with_a_hole_is_refused_whether_or_not_count_is_given() -> None:
    """What is attended to is one run of slots: every engine may rely on that."""
    for engine in ("reference", "dense"):
        case = cases.retrieve_later(select=False) | {"count": None}
        case["window_state"][1, :, 4] = -1
        before = cases.clone(case)
        with pytest.raises(ValueError, match=r"sample 1: the occupied slots must be the first ones, got frames \["):
            torch.ops.longlive.retrieve_attend(**case, engine=engine)
        assert all(torch.equal(case[n], v) for n, v in before.items() if isinstance(v, torch.Tensor))
