"""Options of ``topk_retrieve``: a least score, diversity, an int8 index; and how `WindowConfig` passes them on."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_rag_ops import MemoryWindow, WindowConfig, dense

ENGINES = ("reference", "dense")


def greedy(rows: np.ndarray, query: np.ndarray, k: int, diversity: float, min_score: float | None) -> list[int]:
    """Maximal marginal relevance from its definition; rows are frames in ascending order."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    relevance = unit @ (query / np.linalg.norm(query))
    left = [row for row in range(len(rows)) if min_score is None or relevance[row] >= min_score]
    chosen: list[int] = []
    while left and len(chosen) < k:
        best = max(
            left,
            key=lambda row: (
                (1 - diversity) * relevance[row] - diversity * max((unit[row] @ unit[s] for s in chosen), default=0.0),
                -row,
            ),
        )
        chosen.append(best)
        left.remove(best)
    return chosen


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 30), k=st.integers(0, 8), diversity=st.sampled_from([0.0, 0.3, 0.9])
)
def test_choice_is_maximal_marginal_relevance(engine: str, seed: int, rows: int, k: int, diversity: float) -> None:
    rng = cases.generator(seed)
    index = torch.randn(1, rows, 6, generator=rng, dtype=torch.float64)
    query = torch.randn(1, 6, generator=rng, dtype=torch.float64)
    for gate in (None, 0.2):
        want = greedy(index[0].numpy(), query[0].numpy(), k, diversity, gate)
        ids, scores = torch.ops.longlive.topk_retrieve(
            query,
            index,
            torch.arange(rows)[None],
            torch.tensor([rows]),
            torch.tensor([rows]),
            k,
            diversity=diversity,
            min_score=gate,
            engine=engine,
        )
        assert ids[0].tolist() == want + [-1] * (k - len(want))
        cosines = torch.nn.functional.cosine_similarity(index[0, want], query, dim=1)
        torch.testing.assert_close(scores[0, : len(want)], cosines)
        assert (scores[0, len(want) :] == -torch.inf).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_diversity_passes_over_copies_of_a_chosen_frame(engine: str) -> None:
    index = torch.tensor([[[1.0, 0.1], [1.0, 0.1], [1.0, 0.1], [0.6, -0.8]]])
    arguments = (torch.tensor([[1.0, 0.0]]), index, torch.arange(4)[None], torch.tensor([4]), torch.tensor([4]), 2)
    assert torch.ops.longlive.topk_retrieve(*arguments, engine=engine)[0].tolist() == [[0, 1]]
    assert torch.ops.longlive.topk_retrieve(*arguments, diversity=0.5, engine=engine)[0].tolist() == [[0, 3]]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("normalized", [False, True])
def test_an_int8_index_is_its_rows_times_their_scale(engine: str, normalized: bool) -> None:
    case = cases.topk(rows=40, options="int8") | {"normalized": normalized}
    plain = case | {"index": case["index"].float() * case["index_scale"][..., None]}
    del plain["index_scale"]
    for got, want in zip(
        torch.ops.longlive.topk_retrieve(**case, engine=engine),
        torch.ops.longlive.topk_retrieve(**plain, engine="reference"),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", ["int8", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dense_engine_converts_an_index_in_chunks(
    options: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle's frames and scores to the last bit, however rows fall into chunks; the last one is short."""
    case = cases.topk(rows=40, options=options, dtype=dtype)
    want = torch.ops.longlive.topk_retrieve(**case, engine="reference")
    for rows in (1, 3, 7, 64):
        monkeypatch.setattr(dense, "CHUNK", rows * case["index"].shape[2])
        for got, oracle in zip(torch.ops.longlive.topk_retrieve(**case, engine="dense"), want, strict=True):
            assert torch.equal(got, oracle), rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"diversity": 1.0}, "diversity must be at least 0 and less than 1, got 1.0"),
        ({"diversity": -0.1}, "diversity must be"),
        ({"diversity": float("nan")}, "diversity must be"),
        ({"min_score": float("inf")}, "min_score must be finite or None, got inf"),
        ({"index_scale": torch.ones(2, 20)}, "index of dtype torch.float32 takes no index_scale"),
        ({"index": torch.ones(2, 20, 8, dtype=torch.int8)}, "index of dtype torch.int8 needs index_scale"),
        ({"index_ids": torch.full((2, 20), 2**31)}, "index_ids must lie between .* and 2147483647, got 2147483648"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        torch.ops.longlive.topk_retrieve(**(cases.topk() | change))


def test_a_window_chooses_by_its_options() -> None:
    """Candidates are frames 1 to 5; 4 looks different from the others: diversity wants it. None equals the query."""
    looks = {1: [1.0, 0.1], 2: [1.0, 0.1], 3: [1.0, 0.1], 5: [1.0, 0.1], 4: [0.3, -1.0]}
    chosen = {}
    for name, options in {"plain": {}, "diverse": {"diversity": 0.5}, "gate": {"min_score": 0.999}}.items():
        config = WindowConfig(window=4, sink=1, top_k=2, recent_exclude=0, frames_per_block=1, **options)
        memory = MemoryWindow(config, layers=1, batch=1, tokens_per_frame=1, kv_heads=1, head_dim=6)
        for frame in range(9):
            memory.attend(0, *(torch.ones(1, 1, 1, 6),) * 3, frame, (1, 1))
            memory.finish(frame, embeddings=torch.tensor([[looks.get(frame, [1.0, 0.0])]]))
        chosen[name] = memory.selected
    assert chosen == {"plain": [[1, 2]], "diverse": [[1, 4]], "gate": [[]]}


@pytest.mark.parametrize("name", ["min_score", "diversity"])
def test_a_config_refuses_what_is_not_a_number(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
        WindowConfig(**{name: "0.5"})
