"""Ranks that die, stall or are set up differently: clear errors on the others, within the time-out."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Ended, device_type, run_all, run_ranks
from shard_cases import GRID, LAYERS, Blocks, make_mesh, make_window, own_heads

from longlive_rag_ops import BankConfig
from longlive_rag_ops.distributed import MemoryMesh, RankFailure, RanksDisagree
from longlive_rag_ops.distributed.embedding_digest import embedding_mark
from longlive_rag_ops.distributed.rank_share import check_device

LONG = 60.0  # until something is to fail: a machine that is busy with other tests holds a rank up for seconds
TIMEOUT = 3.0  # of what is to fail
BAD = 1  # the rank that does


def blocks(window: Any, mesh: Any, count: int, at: dict[int, Any]) -> None:
    """Runs blocks; ``at`` maps a block to what is called in its middle."""
    stream = Blocks()
    for block in range(count):
        for layer in range(LAYERS):
            if layer == 1 and block in at:
                at[block]()
            window.attend(layer, *own_heads(mesh, *stream.qkv()), 2 * block, GRID)
        window.finish(2 * block, stream.embeddings())


def stall(folder: str) -> None:
    """Until another rank has given this one up."""
    while not list(Path(folder).iterdir()):
        time.sleep(0.05)


def failing(
    rank: int, sizes: list[int], names: list[str], options: dict[str, Any], how: str, folder: str
) -> dict[str, Any]:
    mesh = make_mesh(sizes, names, timeout=LONG)
    window = make_window(mesh, **options)
    began = time.monotonic()

    def fail() -> None:
        nonlocal began
        mesh.collectives.timeout = TIMEOUT
        if rank == BAD and how == "dies":
            os._exit(3)
        if rank == BAD:
            stall(folder)
        began = time.monotonic()

    try:
        blocks(window, mesh, 12, {8: fail})
    except RankFailure as error:
        seconds = time.monotonic() - began
        (Path(folder) / f"failed on {rank}").touch()
        with pytest.raises(RankFailure, match="cannot be used any more"):  # it refuses to go on
            blocks(window, mesh, 12, {})
        saved = None
        if window.bank is not None:
            saved = len(window.bank.frames())
            window.bank.close()
        return {"message": str(error), "suspects": error.suspects, "seconds": seconds, "frames": saved}
    return {"message": "went on"}


CASES: dict[str, tuple[list[int], list[str], dict[str, Any]]] = {
    "pages": ([2], ["frames"], {"transfer": "pages"}),
    "merge": ([2], ["frames"], {"transfer": "merge"}),
    "heads": ([2], ["heads"], {"bank": None}),
    "both": ([2, 2], ["frames", "heads"], {"transfer": "pages"}),
    "diversity": ([2], ["frames"], {"transfer": "pages", "diversity": 0.5}),
}


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *((case, "dies") for case in ("pages", "merge", "both", "diversity")),
        *((case, "stalls") for case in ("pages", "merge", "heads", "both")),
    ],
)
def test_a_rank_that_is_gone(case: str, how: str, tmp_path: Path, device: str) -> None:
    sizes, names, options = CASES[case]
    ranks = 4 if len(sizes) == 2 else 2
    outcomes = run_all(ranks, failing, sizes, names, options, how, str(tmp_path), device=device)
    for rank, (worked, found) in enumerate(outcomes):
        if rank == BAD and how == "dies":
            assert isinstance(found, Ended)
        else:
            assert worked, found
    for rank in set(range(ranks)) - {BAD}:
        found = outcomes[rank][1]
        assert f"failed on rank {rank}" in found["message"], found
        assert "block at" in found["message"] or "parts of attention" in found["message"], found
        assert found["seconds"] < 3 * TIMEOUT, found
        if ranks == 2:
            assert found["suspects"] == [BAD], found
        if found["frames"] is not None:
            assert found["frames"] >= 6


def mismatched(rank: int) -> list[str]:
    messages = []
    with pytest.raises(ValueError, match=r'deal \("'):
        make_window(make_mesh([2], ["frames"], ["in turn", "uneven"][rank]))
    with pytest.raises(ValueError, match=r'mesh \({"frame_ranks": 2'):
        make_window(make_mesh([2], [["frames", "heads"][rank]]))
    for mesh in (make_mesh([2], ["frames"]), make_mesh([2], ["heads"])):
        for name, values in {
            "top_k": (4, 3),
            "layers": (2, 3),
            "kv_heads": (2, 3),
            "dtype": (torch.float32, torch.bfloat16),
            "min_score": (None, 0.5),
            "transfer": ("pages", "merge"),
            "agreement": (True, False),
            "bank_options": ({}, {"storage": "int8"}),
        }.items():
            with pytest.raises(ValueError, match="all ranks of the mesh must be given the same settings") as caught:
                make_window(mesh, **{name: values[rank]})
            messages.append(f"{name}: {caught.value}")
        make_window(mesh)  # it can be used still
    return messages


def failing_deal(frame: int) -> int:
    raise LookupError(f"no rank for {frame}")


def wrong_on_one(rank: int) -> list[list[str]]:
    """Errors about arguments that one rank alone can see."""
    messages = []
    mesh = make_mesh([2], ["frames"], timeout=LONG)
    deals = MemoryMesh(mesh.mesh, timeout=LONG, deal=failing_deal if rank == BAD else None)
    cases: list[tuple[Any, dict[str, tuple[Any, Any]]]] = [
        (mesh, {"engine": ("auto", "warp")}),
        (mesh, {"layers": (2, 0)}),
        (mesh, {"batch": (1, "one")}),
        (mesh, {"dtype": (torch.float32, torch.int8)}),
        (mesh, {"device": (device_type(), "meta")}),
        (deals, {}),
    ]
    for on, options in cases:
        with pytest.raises((ValueError, TypeError, LookupError)) as caught:
            make_window(on, **{name: values[rank] for name, values in options.items()})
        messages.append([type(caught.value).__name__, str(caught.value)])
    make_window(mesh)
    return messages


def test_errors_of_one_rank_are_errors_of_all(device: str) -> None:
    first, second = run_ranks(2, wrong_on_one, device=device)
    assert len(first) == len(second) == 6
    for (kind, message), (of_own, own) in zip(first, second, strict=True):
        assert kind == "ValueError" and message == f"arguments are not allowed on rank {BAD}: {of_own}: {own}"


def test_a_window_on_another_device_than_the_mesh() -> None:
    gpu = torch.device("cuda", 1)
    for allowed in ("cuda", "cuda:1"):
        check_device(torch.device(allowed), gpu)
    check_device(torch.device("cpu", 0), torch.device("cpu"))
    for other, message in (("cuda:0", "current one, cuda:1, which the mesh uses; got cuda:0"), ("cpu", "mesh's type")):
        with pytest.raises(ValueError, match=message):
            check_device(torch.device(other), gpu)


def test_different_settings_are_named_on_every_rank(device: str) -> None:
    first, second = run_ranks(2, mismatched, device=device)
    assert first == second
    for message in first:
        name = message.partition(":")[0].replace("bank_options", "bank's storage")
        assert f"{name} (" in message and "on rank 0" in message and "on rank 1" in message, message


def disagreeing(rank: int, sizes: list[int], names: list[str], options: dict[str, Any]) -> str:
    mesh = make_mesh(sizes, names, timeout=LONG)
    window, stream = make_window(mesh, **options), Blocks()
    with pytest.raises(RanksDisagree) as caught:
        for block in range(12):
            for layer in range(LAYERS):
                window.attend(layer, *own_heads(mesh, *stream.qkv()), 2 * block, GRID)
            embeddings = stream.embeddings()
            window.finish(2 * block, embeddings if block < 6 or rank != BAD else -embeddings)
    with pytest.raises(RanksDisagree):
        window.attend(0, *own_heads(mesh, *stream.qkv()), 2 * block, GRID)
    window.reset()
    with pytest.raises(RanksDisagree):
        window.attend(0, *own_heads(mesh, *stream.qkv()), 0, GRID)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["heads"], {"bank": None}),
        (["frames"], {"transfer": "pages"}),  # where the choice is the same on all ranks whatever they were given
        (["frames"], {"transfer": "merge"}),
    ],
)
def test_ranks_that_are_given_different_embeddings(names: list[str], options: dict[str, Any], device: str) -> None:
    for message in run_ranks(2, disagreeing, [2], names, options, device=device):
        assert "of one mind are rank 0; rank 1" in message, message
        assert names == ["heads"] or "block at 14, or were given different embeddings" in message, message


def agreeing(rank: int) -> None:
    """Embeddings that were replaced before they counted may differ; an answer nobody asked for is a warning."""
    mesh = make_mesh([2], ["frames"], timeout=LONG)
    window, stream = make_window(mesh, transfer="pages"), Blocks()

    def attend(start: int) -> None:
        for layer in range(LAYERS):
            window.attend(layer, *stream.qkv(), start, GRID)

    for block in range(6):
        embeddings = stream.embeddings()
        attend(2 * block)
        window.retrieve(2 * block, embeddings * (1 + rank))
        window.retrieve(2 * block, embeddings)
        window.finish(2 * block)
    attend(12)
    window.finish(12, stream.embeddings() * (1 + rank))
    attend(14)
    with pytest.warns(RuntimeWarning, match=r"video before reset, .*block at 14.*of one mind are rank 0; rank 1"):
        window.reset()
    for block in range(3):
        attend(2 * block)
        window.finish(2 * block, stream.embeddings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window.reset()


def test_embeddings_that_were_replaced_and_an_answer_at_the_end_of_a_video(device: str) -> None:
    run_ranks(2, agreeing, device=device)


def test_marks_of_embeddings() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        rows = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
        marks = embedding_mark(rows)
        assert marks.shape == (2, 3) and marks.dtype == torch.int64 and len(set(marks.flatten().tolist())) == 6
        assert torch.equal(embedding_mark(rows[:, 1:2]), marks[:, 1:2])
        for other in (-rows, rows.flip(-1), torch.nextafter(rows, rows + 1) if dtype == torch.float32 else 2 * rows):
            assert not (embedding_mark(other) == marks).any()


def full_bank(rank: int) -> list[str]:
    mesh = make_mesh([2], ["frames"], "all on one", timeout=LONG)
    record = LAYERS * 4096
    window = make_window(mesh, transfer="pages", bank=BankConfig(host_bytes=12 * record, slab_bytes=record))

    def shorten() -> None:
        mesh.collectives.timeout = TIMEOUT

    with pytest.raises(RuntimeError) as first:
        blocks(window, mesh, 12, {4: shorten})
    with pytest.raises(RankFailure) as second:
        window.finish(0, torch.zeros(1, 2, 6, device=device_type()))
    assert "cannot be used any more" in str(second.value)
    window.bank.close()
    return [type(first.value).__name__, str(second.value)]


def test_a_bank_that_is_full_on_one_rank(device: str) -> None:
    (others, message), (own, of_own) = run_ranks(2, full_bank, device=device)
    assert (others, own) == ("RankFailure", "BankFull")
    assert "this rank has failed alone: BankFull: " in of_own and "failed alone" not in message


def lonely(rank: int) -> None:
    """What fails before this rank has begun anything with others leaves it in step."""
    mesh = make_mesh([2], ["frames"], timeout=LONG)
    window, stream = make_window(mesh, transfer="pages"), Blocks()
    for block in range(6):
        for layer in range(LAYERS):
            window.attend(layer, *stream.qkv(), 2 * block, GRID)
        embeddings = stream.embeddings()
        if rank == BAD:
            with pytest.raises(ValueError, match="embeddings must be given"):
                window.finish(2 * block)
            if block == 3:
                search, window._history.search = window._history.search, None
                with pytest.raises(TypeError):
                    window.retrieve(2 * block, embeddings)
                window._history.search = search
        window.finish(2 * block, embeddings)
    assert mesh.collectives.failure is None


def test_an_error_before_anything_is_exchanged(device: str) -> None:
    run_ranks(2, lonely, device=device)
