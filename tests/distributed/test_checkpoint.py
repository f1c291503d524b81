"""What one process saves opens in one process; what cannot be opened says why; what a failed save leaves."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    FRAMES,
    SINK,
    flip,
    flip_pages,
    held,
    limits,
    one_bank,
    page_file,
    page_format,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from longlive_rag_ops import MemoryWindow, WindowConfig
from longlive_rag_ops.bank import BankFull, MemoryBank, NewerVersion, NoSavedBank, SavedBankError
from longlive_rag_ops.bank.checked_json import checked_json, crc32c, read_checked_json
from longlive_rag_ops.distributed import load, save
from longlive_rag_ops.distributed.checkpoint_folder import CheckpointFolder
from longlive_rag_ops.distributed.checkpoint_metadata import read_metadata
from longlive_rag_ops.distributed.checkpoint_plans import BankSavePlanner

NAMES = [".lock", ".readers", "checkpoint.json", "data"]


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def opened(folder: Path, storage: str = "plain", **options: Any) -> tuple[dict[int, Any], list[str]]:
    form = page_format(storage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with load(folder, limits(form), format=form, **options) as bank:
            assert bank.sink == SINK
            return held(bank), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("storage", ["plain", "int8", "fp8"])
def test_round_trip(tmp_path: Path, storage: str) -> None:
    folder = tmp_path / "deep" / "saved"
    with one_bank(storage) as bank:
        assert save(bank, folder) == []
        want = held(bank)
        assert opened(folder, storage) == (want, [])
        assert max(generation for _, generation, _, _ in want.values()) == 2
        assert any(count for _, _, _, count in want.values())
    assert names(folder) == NAMES


def test_saving_again_replaces(tmp_path: Path) -> None:
    with one_bank() as first, one_bank(seed=1, frames=7) as second:
        save(first, tmp_path)
        save(second, tmp_path)
        assert opened(tmp_path) == (held(second), [])
    assert names(tmp_path) == NAMES


def test_a_bank_on_disk_and_one_without_frames(tmp_path: Path) -> None:
    form = page_format()
    with one_bank() as bank:
        save(bank, tmp_path)
        config = limits(form, 3, disk_bytes=20 * form.record_bytes, spill=tmp_path)
        with load(tmp_path, config, frames_per_commit=1) as other:
            assert held(other) == held(bank)
            save(other, tmp_path)  # the folder it was opened from
        assert opened(tmp_path)[0] == held(bank)
    with MemoryBank(form, limits(form), sink=SINK) as bank:
        save(bank, tmp_path)
    assert opened(tmp_path) == ({}, [])


@pytest.mark.parametrize("policy", ["oldest", "least_retrieved"])
def test_a_smaller_bank_forgets_by_its_policy(tmp_path: Path, policy: str) -> None:
    form = page_format()
    with one_bank() as bank:
        save(bank, tmp_path)
        have = held(bank)
    with load(tmp_path, limits(form, 7, policy=policy), frames_per_commit=1) as small:
        left = held(small)
        assert len(left) == 7 and {0, 1} <= left.keys()
        assert left == {frame: have[frame] for frame in left}
        assert small.stats()["forgotten"] == {policy: FRAMES - 7, "asked": 0, "damaged": 0}
    with pytest.raises(BankFull, match="has 11 frames, and the limits hold 7"):
        load(tmp_path, limits(form, 7))


def test_a_window(tmp_path: Path) -> None:
    config = WindowConfig(window=6, sink=1, top_k=2, recent_exclude=0, frames_per_block=1)
    form = page_format()
    sizes: dict[str, Any] = {"layers": 2, "batch": 2, "tokens_per_frame": 3, "kv_heads": 4, "head_dim": 8}
    window = MemoryWindow(config, **sizes, dtype=torch.float16, bank=limits(form))
    random = torch.Generator().manual_seed(0)
    for start in range(8):
        q, k, v = (torch.randn(2, 3, 4, 8, generator=random).half() for _ in range(3))
        for layer in range(2):
            window.attend(layer, q, k, v, start, (1, 3))
        window.finish(start, torch.randn(2, 1, 5, generator=random))
    assert window.bank is not None
    save(window, tmp_path, settings={"top_k": 2})
    with window.bank, load(tmp_path, limits(form), format=form, settings={"top_k": 2}) as bank:
        assert held(bank) == held(window.bank) and bank.sink == 1
    with pytest.raises(ValueError, match="a window without"):
        save(MemoryWindow(config, **sizes), tmp_path)


# What does not fit or is damaged


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    form = page_format()
    with one_bank() as bank:
        save(bank, tmp_path, settings={"backbone": "wan", "top_k": 6})
    with pytest.raises(ValueError, match=r"config's storage must be .*'plain'.*got 'int8'"):
        load(tmp_path, limits(page_format("int8")))
    with pytest.raises(ValueError, match="got kv_heads 8, not 4"):
        load(tmp_path, limits(form), format=replace(form, kv_heads=8))
    with pytest.raises(ValueError, match="top_k 3, saved with 6; window 12, saved without it"):
        load(tmp_path, limits(form), settings={"backbone": "wan", "top_k": 3, "window": 12})
    with pytest.raises(ValueError, match="host_bytes must be at least"):
        load(tmp_path, limits(form, 1))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    form = page_format()
    with pytest.raises(NoSavedBank, match="there is no such folder"):
        load(tmp_path / "absent", limits(form))
    with pytest.raises(NoSavedBank, match=r"it has no checkpoint\.json"):
        load(tmp_path, limits(form))
    with one_bank() as bank:
        bank.save(tmp_path)
        with pytest.raises(NoSavedBank, match=r"MemoryBank\.open"):
            load(tmp_path, limits(form))
        with pytest.raises(FileExistsError, match=r"manifest\.json"):
            save(bank, tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        (other / "checkpoint.json").write_text("{}")
        with pytest.raises(FileExistsError, match=r"checkpoint\.json"):
            save(bank, other)
        with pytest.raises(NoSavedBank, match="is no checkpoint of a bank"):
            load(other, limits(form))
        assert (other / "checkpoint.json").read_text() == "{}"
        save(bank, tmp_path / "ours")
    with pytest.raises(NoSavedBank, match=r"has no manifest\.json"):
        MemoryBank.open(tmp_path / "ours", limits(form))


def test_another_version(tmp_path: Path) -> None:
    with one_bank() as bank:
        save(bank, tmp_path)
    path = tmp_path / "checkpoint.json"
    entries = dict(read_checked_json(path.read_bytes(), "it").entries)
    del entries["crc32c"]
    path.write_bytes(checked_json(entries | {"version": 2}))
    with pytest.raises(NewerVersion, match=r"has version 2, .* reads versions up to 1"):
        load(tmp_path, limits(page_format()))
    path.write_bytes(checked_json(entries | {"what": "something else"}))
    with pytest.raises(NoSavedBank, match="says it is 'something else'"):
        load(tmp_path, limits(page_format()))
    path.write_bytes(checked_json(entries | {"data": "../data"}))
    with pytest.raises(SavedBankError, match="data must be named"):
        load(tmp_path, limits(page_format()))


@pytest.mark.parametrize("file", ["checkpoint.json", "data-*/.metadata", "data-*/__0_0.distcp"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_damage_beyond_frames_is_named(tmp_path: Path, file: str, damage: str) -> None:
    with one_bank() as bank:
        save(bank, tmp_path)
    (path,) = tmp_path.glob(file)
    if damage == "flipped":
        flip(path, path.stat().st_size // 2)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises((SavedBankError, FileNotFoundError), match=r"damaged|no checkpoint|missing|No such file"):
        load(tmp_path, limits(page_format()))


@pytest.mark.parametrize("what", ["pages", "part"])
def test_links_are_not_followed(tmp_path: Path, what: str) -> None:
    folder, elsewhere = tmp_path / "saved", tmp_path / "elsewhere"
    with one_bank() as bank:
        save(bank, folder)
        frames = set(held(bank))
    (file,) = [page_file(folder, 3)] if what == "pages" else folder.glob("data-*/__0_0.distcp")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    if what == "part":
        with pytest.raises(SavedBankError, match=r"__0_0.distcp must be a regular file, got a link"):
            load(folder, limits(page_format()))
        return
    found, (message,) = opened(folder)
    assert set(found) == frames - {3} and "must be a regular file, got a link" in message


def test_a_damaged_frame_is_left_out(tmp_path: Path) -> None:
    with one_bank() as bank:
        save(bank, tmp_path)
        have = held(bank)
    flip_pages(page_file(tmp_path, 3))
    page_file(tmp_path, 6).unlink()
    truncated = page_file(tmp_path, 8)
    truncated.write_bytes(truncated.read_bytes()[:100])
    found, messages = opened(tmp_path)
    assert found == {frame: have[frame] for frame in have if frame not in (3, 6, 8)}
    (message,) = messages
    assert (
        "damaged frames lost 3: frame 3: heads 0: their checksums do not match; frame 6: it cannot be read" in message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with load(tmp_path, limits(page_format())) as bank:
            assert bank.stats()["forgotten"]["damaged"] == 3


def test_frames_of_other_numbers_do_not_pass(tmp_path: Path) -> None:
    """Files of the right size in each other's place."""
    with one_bank() as bank:
        save(bank, tmp_path)
    first, second = page_file(tmp_path, 3), page_file(tmp_path, 4)
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)
    found, messages = opened(tmp_path)
    assert not {3, 4} & found.keys() and "frame 3" in messages[0] and "frame 4" in messages[0]


# Metadata that somebody made


def saved_metadata(folder: Path) -> tuple[Path, Metadata]:
    """The file with them of a checkpoint that is saved here, and what torch reads from it."""
    with one_bank() as bank:
        save(bank, folder)
    (path,) = folder.glob("data-*/.metadata")
    return path, pickle.loads(path.read_bytes())


def refuses(folder: Path, raw: bytes, message: str) -> None:
    """Other metadata are refused, for that reason, although the manifest has their checksum."""
    (path,) = folder.glob("data-*/.metadata")
    path.write_bytes(raw)
    manifest = folder / "checkpoint.json"
    entries = dict(read_checked_json(manifest.read_bytes(), "it").entries)
    del entries["crc32c"]
    manifest.write_bytes(checked_json(entries | {"metadata": [len(raw), crc32c(raw)]}))
    with pytest.raises(SavedBankError, match=message) as caught:
        load(folder, limits(page_format()))
    assert str(path) in str(caught.value)


class Malicious:
    """A pickle of it makes a file when it is read."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trap}",)


def test_metadata_are_what_torch_reads(tmp_path: Path) -> None:
    path, metadata = saved_metadata(tmp_path)
    found = read_metadata(path.read_bytes(), "it")
    assert found.state_dict_metadata == metadata.state_dict_metadata
    assert found.storage_data == metadata.storage_data and len(found.storage_data) == 1 + FRAMES


def test_malicious_metadata_do_nothing(tmp_path: Path) -> None:
    folder, trap = tmp_path / "saved", tmp_path / "trap"
    path, metadata = saved_metadata(folder)
    good = path.read_bytes()
    path.write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(SavedBankError, match="checksum does not match"):
        load(folder, limits(page_format()))
    refuses(folder, pickle.dumps(Malicious(trap)), r"got '(posix|nt)\.system")
    metadata.planner_data = {"one": Malicious(trap)}
    refuses(folder, pickle.dumps(metadata, protocol=2), r"got '(posix|nt)\.system")
    # By way of a module that is allowed
    texts = ["torch.distributed.checkpoint.metadata", "os.system", f"touch {trap}"]
    module, name, command = (b"X" + len(text).to_bytes(4, "little") + text.encode() for text in texts)
    refuses(folder, b"\x80\x04" + module + name + b"\x93" + command + b"\x85R.", r"metadata\.os\.system")
    assert not trap.exists()
    os.system(f"touch {trap}")
    assert trap.exists()  # or the above says nothing
    refuses(folder, good[:-20], "is damaged: ")
    refuses(folder, pickle.dumps({"state_dict_metadata": {}}), "must have a Metadata in its place, got {'state")


def test_metadata_leave_torch_as_it_is(tmp_path: Path) -> None:
    """A pickle can set attributes of what it can name: here of a class that every checkpoint needs."""
    saved_metadata(tmp_path)
    before = dict(vars(TensorProperties))
    named = b"\x80\x02ctorch.distributed.checkpoint.metadata\nTensorProperties\n"
    refuses(tmp_path, named + b"N}X\x0c\x00\x00\x00__setstate__Ns\x86b.", "is damaged: TypeError")
    assert dict(vars(TensorProperties)) == before


def test_classes_of_other_metadata_are_named(tmp_path: Path) -> None:
    _, metadata = saved_metadata(tmp_path)
    metadata.planner_data = torch.float32
    refuses(tmp_path, pickle.dumps(metadata), r"got 'torch\.float32.* or by a version of torch")


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "/etc/hostname", "sub/x", "sub\\x", "x\0", "x" * 201, 7])
def test_files_that_are_not_in_the_folder(tmp_path: Path, name: Any) -> None:
    _, metadata = saved_metadata(tmp_path)
    index = next(index for index in metadata.storage_data if index.fqn == "pages.3")
    metadata.storage_data[index].relative_path = name
    refuses(tmp_path, pickle.dumps(metadata), "relative_path must be a (plain file name|text of at most 200)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pages, info: setattr(info, "offset", -1), "offset must be an int from 0"),
        (lambda pages, info: setattr(info, "length", 2**63), "length must be an int from 0"),
        (lambda pages, info: setattr(pages, "size", (4, "x")), "size must be a tuple of ints"),
        (lambda pages, info: setattr(pages, "chunks", [info]), "must have a ChunkStorageMetadata in its place"),
        (lambda pages, info: setattr(pages.chunks[0], "sizes", torch.Size((4,))), "chunks must have the dimensions"),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, change: Any, message: str) -> None:
    _, metadata = saved_metadata(tmp_path)
    index = next(index for index in metadata.storage_data if index.fqn == "pages.3")
    change(metadata.state_dict_metadata["pages.3"], metadata.storage_data[index])
    refuses(tmp_path, pickle.dumps(metadata), message)


# Saves that fail


def failing(number: int, error: BaseException) -> Any:
    """`resolve_data` that raises instead of its so-manyth return."""
    original, calls = BankSavePlanner.resolve_data, iter(range(1000))

    def resolve_data(self: Any, write_item: Any) -> Any:
        if next(calls) == number:
            raise error
        return original(self, write_item)

    return resolve_data


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
@pytest.mark.parametrize("number", [0, 5])
def test_a_save_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    with one_bank() as first, one_bank(seed=1) as second:
        save(first, tmp_path)
        want = held(first)
        with monkeypatch.context() as patch:
            patch.setattr(BankSavePlanner, "resolve_data", failing(number, error))
            with pytest.raises(type(error)):
                save(second, tmp_path)
        assert names(tmp_path) == NAMES and opened(tmp_path) == (want, [])
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointFolder, "publish", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
            with pytest.raises(OSError, match="I/O error"):
                save(second, tmp_path)
        assert names(tmp_path) == NAMES and opened(tmp_path) == (want, [])
        save(second, tmp_path)
        assert opened(tmp_path) == (held(second), [])


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from checkpoint_cases import one_bank
from longlive_rag_ops.distributed import save
from longlive_rag_ops.distributed.checkpoint_folder import CheckpointFolder
from longlive_rag_ops.distributed.checkpoint_metadata import read_metadata
from longlive_rag_ops.distributed.checkpoint_plans import BankSavePlanner

original, calls = BankSavePlanner.resolve_data, iter(range(100))

def die(self, item):
    if next(calls) == int(sys.argv[3]):
        os._exit(7)
    return original(self, item)

BankSavePlanner.resolve_data = die
if sys.argv[3] == "-1":
    CheckpointFolder.publish = lambda *_: os._exit(7)
save(one_bank(seed=1), sys.argv[2])
"""


@pytest.mark.parametrize("at", [4, -1], ids=["while_writing", "before_publishing"])
def test_a_process_that_is_killed_leaves_the_earlier_one(tmp_path: Path, at: int) -> None:
    with one_bank() as bank:
        save(bank, tmp_path)
        command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), str(at)]
        assert subprocess.run(command, timeout=120).returncode == 7
        assert names(tmp_path) == [*NAMES, "data"]
        assert opened(tmp_path) == (held(bank), [])
        save(bank, tmp_path)
    assert names(tmp_path) == NAMES


def test_nothing_is_removed_while_somebody_reads(tmp_path: Path) -> None:
    with one_bank() as bank:
        save(bank, tmp_path)
        with CheckpointFolder(tmp_path).reading():
            save(bank, tmp_path)
            assert names(tmp_path) == [*NAMES, "data"]
        save(bank, tmp_path)
    assert names(tmp_path) == NAMES


def test_one_save_at_a_time(tmp_path: Path) -> None:
    with one_bank() as bank, CheckpointFolder(tmp_path).saving(), pytest.raises(BlockingIOError):
        save(bank, tmp_path)


def test_a_frame_that_is_damaged_in_the_bank_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MemoryBank.record

    def record(self: MemoryBank, frame: int, out: torch.Tensor | None = None) -> torch.Tensor:
        if frame == 5:
            raise KeyError("frame 5 is not in the bank")
        return original(self, frame, out)

    with one_bank() as bank:
        have = held(bank)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryBank, "record", record)
            with pytest.warns(RuntimeWarning, match="frames left out 1: frame 5"):
                assert save(bank, tmp_path) == [(5, "frame 5 is not in the bank")]
    assert opened(tmp_path) == ({frame: have[frame] for frame in have if frame != 5}, [])
