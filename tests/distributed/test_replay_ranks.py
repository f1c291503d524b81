"""Recorded traces through processes that the command starts by itself, and what it says when one of them fails."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest

from longlive_rag_ops.cli import main
from longlive_rag_ops.distributed import RankFailure
from longlive_rag_ops.distributed.local_ranks import run_on_local_ranks
from longlive_rag_ops.distributed.trace_replay import worst_of
from longlive_rag_ops.replay import BlockResult

DATA = Path(__file__).parents[1] / "data"
TRACES = sorted((DATA / "traces").glob("trace_*.safetensors"))


@pytest.mark.parametrize(("ranks", "transfer"), [(2, "auto"), (2, "merge"), (4, "pages"), (4, "merge")])
def test_the_command_replays_every_trace(ranks: int, transfer: str, capsys: pytest.CaptureFixture[str]) -> None:
    traces = TRACES if transfer == "auto" else TRACES[ranks // 2 - 1 : ranks // 2]
    assert main(["replay", *map(str, traces), "--ranks", str(ranks), "--transfer", transfer]) == 0
    printed = capsys.readouterr().out
    assert printed.count("agrees with the recording") == len(traces)
    assert printed.count(f"{ranks} ranks that share the history by frame") == len(traces)


def test_a_difference_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output in one block, a choice in another."""
    raw = bytearray(TRACES[0].read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    at = header["block03.forward2.out"]["data_offsets"][0]
    data[at : at + 4] = struct.pack("<f", struct.unpack("<f", data[at : at + 4])[0] + 1e-3)
    log = json.loads(header["__metadata__"]["log"])
    log[-1]["memory_frames"][0].reverse()
    header["__metadata__"]["log"] = json.dumps(log)
    text = json.dumps(header).encode()
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert main(["replay", str(path), "--ranks", "2"]) == 1
    printed = capsys.readouterr().out
    assert "2 of 10 blocks DIFFER" in printed and "DIFFERS, recorded" in printed


def test_what_ranks_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--ranks", "0"], "--ranks must be"),
        (["--ranks", "65"], "--ranks must be"),
        (["--ranks", "2", "--engine", "warp"], "engine must be one of"),
    ):
        assert main(["replay", str(TRACES[0]), *arguments]) == 2
        assert message in capsys.readouterr().err
    recordings = sorted((DATA / "embedder").glob("*.safetensors"))
    assert main(["replay", str(recordings[0]), "--ranks", "2"]) == 2
    assert "is an embedder, which one process runs" in capsys.readouterr().err


def test_the_worst_of_ranks() -> None:
    good, off = BlockResult(1, 3, [[4]], [[4]], 1e-7), BlockResult(1, 3, [[4]], [[4]], 1e-6)
    other, not_a_number = BlockResult(1, 3, [[5]], [[4]], 0.0), BlockResult(1, 3, [[4]], [[4]], float("nan"))
    assert worst_of([good, off]) == off
    assert worst_of([good, other]).chosen == [[5]]
    assert not worst_of([not_a_number, off]).passed and not worst_of([off, not_a_number]).passed


def _fails_on_one(how: str) -> int:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(9)
        if how == "raises":
            raise ValueError("rank 1 alone")
        time.sleep(600)
    dist.barrier()
    return dist.get_rank()


@pytest.mark.parametrize(
    ("how", "error", "message", "limit"),
    [
        ("raises", ValueError, "rank 1 alone", 60),
        ("dies", RuntimeError, None, 60),
        ("stalls", RankFailure, r"a test: ranks \[0, 1\] did not end within 6 s", 6),
    ],
    ids=["raises", "dies", "stalls"],
)
def test_no_process_is_left(how: str, error: type[Exception], message: str | None, limit: float) -> None:
    import multiprocessing

    with pytest.raises(error, match=message):
        run_on_local_ranks(2, _fails_on_one, how, limit=limit, what="a test")
    assert not multiprocessing.active_children()
