"""Processes killed at any instant while they save and spill: what they had acknowledged is there, whole."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_server import FORM, embedding_of, frames_of
from saved_cases import names

from longlive_rag_ops.bank import BankConfig, MemoryBank, NoSavedBank

KILLS = 150  # random instants, of each of two kinds
LIMITS = BankConfig(host_bytes=12 * FORM.record_bytes, slab_bytes=12 * FORM.record_bytes, io_threads=1)


class Server:
    """A process that runs and kills children."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("kill_server.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert not answer["failed"]
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    assert started.process.wait(20) == 0


def state_of(folder: Path, spill: bool) -> int | None:
    """The number of the state that a folder has, every byte checked; None when it has none."""
    try:
        bank = MemoryBank.open(folder, LIMITS, frames_per_commit=1)
    except NoSavedBank:
        return None
    with bank:
        state = int(bank.read(0)[0].flatten()[0])
        assert bank.frames() == list(frames_of(state, spill)) == bank.index.frames()
        pages = torch.full((FORM.layers, FORM.samples, *FORM.page_shape), float(state))
        for frame in bank.frames():
            assert torch.equal(bank.record(frame), FORM.encode(pages, pages))
            assert torch.equal(bank.embedding(frame), embedding_of(state)[None])
        return state


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where a kill rarely finds a process waiting for a disk; an ordinary one if need be."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::RuntimeWarning")  # nothing is damaged
@pytest.mark.parametrize("spill", [False, True], ids=["save", "save_and_spill"])
def test_killed_at_random_instants(tmp_path: Path, memory_folder: Path, server: Server, spill: bool) -> None:
    choose = random.Random(spill)
    pages, folders = tmp_path / "spill", tmp_path / "saved" if spill else memory_folder
    pages.mkdir()
    folder, before, number, seen, unfinished = folders, None, 0, 0, 0
    for kill in range(KILLS):
        if kill % 5 == 0:  # a folder that is not there yet, every now and then
            folder, before = folders / f"{kill}", None
        job = {"folder": str(folder), "spill": str(pages) if spill else "", "first": number}
        answer = server.run(**job, saves=choose.choice((0, 0, 1, 2)), share=1.3 * choose.random())
        assert not answer["ended"]
        last = answer["saved"][-1] if answer["saved"] else before
        under_way = last + 1 if answer["saved"] else number
        before = state_of(folder, spill)
        assert before in (last, under_way), f"kill {kill}: {answer}"
        seen += len(answer["saved"])
        unfinished += folder.exists() and names(folder) != ["index", "lock", "manifest", "pages"]
        assert not list(pages.iterdir())
        number += 1000
    assert seen > KILLS / 4 and unfinished > KILLS / 10, (seen, unfinished)  # killed between saves and within
    with MemoryBank(FORM, LIMITS) as bank:
        bank.save(folder)
    assert names(folder) == ["index", "lock", "manifest", "pages"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_killed_before_each_system_call(tmp_path: Path, server: Server) -> None:
    """Of a save over an older one: the old state up to the rename, the new one from there on."""
    states = []
    for at in range(100):
        folder = tmp_path / f"{at}"
        answer = server.run(folder=str(folder), spill="", first=10, die_at=at)
        states.append(state_of(folder, spill=False))
        if answer["ended"]:
            break
        assert answer["saved"] == [10]
    assert len(states) > 20 and states == sorted(states) and set(states) == {10, 11}
