"""Forks children that save a bank again and again, and kills them. Run as a program, by `test_kill`.

Reads a JSON object a line: ``folder``, ``spill`` (folder of a disk tier, "" for none), ``first`` (number of the first
state), and either ``saves`` and ``share`` (the child is killed after so many saves and that share of another one's
duration), or ``die_at`` (the child kills itself before its nth system call of the second save). Answers with a JSON
object: ``saved``, the states whose saves returned, ``ended`` (the child was through before it was killed), ``failed``.

The child is forked, because starting Python and importing torch takes longer than all it does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from longlive_rag_ops.bank import BankConfig, MemoryBank, PageFormat

FORM = PageFormat("plain", 2, 1, 1, 1, 2, torch.float32)
CALLS = ("open", "posix_fallocate", "pwrite", "ftruncate", "fdatasync", "fsync", "rename", "unlink", "close")
ROUNDS = 400


def frames_of(state: int, spill: bool) -> range:
    return range((6 if spill else 2) + state % 3)


def embedding_of(state: int) -> torch.Tensor:
    return torch.eye(6)[state % 6]


def set_state(bank: MemoryBank, state: int, spill: bool) -> None:
    """Every frame of the state, its number in every entry of its pages."""
    frames, present = frames_of(state, spill), bank.frames()
    pages = torch.full((FORM.layers, FORM.samples, 1, *FORM.page_shape), float(state))
    bank.forget([frame for frame in present if frame not in frames])
    for frame in frames:
        bank.commit([frame], pages, pages, embedding_of(state).expand(1, 1, 6), replace=frame in present)


def die_at(count: int) -> None:
    """Has this process killed just before its nth system call of saving."""
    left = count

    def wrapped(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


def child(job: dict[str, Any], out: int) -> None:
    spill = bool(job["spill"])
    limits = {"disk_bytes": 12 * FORM.record_bytes, "spill": job["spill"]} if spill else {}
    host = 2 * FORM.record_bytes if spill else 12 * FORM.record_bytes
    bank = MemoryBank(
        FORM,
        BankConfig(
            host_bytes=host, slab_bytes=FORM.record_bytes, shard_bytes=2 * FORM.record_bytes, io_threads=2, **limits
        ),
        frames_per_commit=1,
    )
    os.write(out, b"ready\n")
    for state in range(job["first"], job["first"] + ROUNDS):
        set_state(bank, state, spill)
        if "die_at" in job and state == job["first"] + 1:
            die_at(job["die_at"])
        bank.save(job["folder"])
        os.write(out, b"%d\n" % state)
        if "die_at" in job and state == job["first"] + 1:
            return


def run(job: dict[str, Any], lasts: float) -> tuple[dict[str, Any], float]:
    """Does one job. ``lasts`` is how long a round of the child is expected to take, and returned anew."""
    there, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(there)
            child(job, out)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(out)
    said = b""
    if "saves" in job:
        times = []
        while said.count(b"\n") <= job["saves"] and (more := os.read(there, 65536)):  # one line says that it is ready
            said += more
            times.append(time.monotonic())
        if len(times) > 1:
            lasts = (times[-1] - times[0]) / (len(times) - 1)
        time.sleep(job["share"] * lasts)
        os.kill(pid, signal.SIGKILL)
    while more := os.read(there, 65536):
        said += more
    os.close(there)
    status = os.waitpid(pid, 0)[1]
    # A line is written by one call, so that none is cut off.
    saved = [int(line) for line in said.split()[1:]]
    return {"saved": saved, "ended": status == 0, "failed": os.WIFEXITED(status) and status != 0}, lasts


def main() -> None:
    torch.set_num_threads(1)  # no threads that a fork would lose
    with tempfile.TemporaryDirectory() as folder:  # imports what is imported late, once
        MemoryBank(FORM, BankConfig(host_bytes=12 * FORM.record_bytes, io_threads=1)).save(folder)
    lasts = 0.02
    for line in sys.stdin:
        answer, lasts = run(json.loads(line), lasts)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
