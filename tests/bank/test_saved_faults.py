"""Saves that cannot end well: the folder keeps its old state, and nothing is left lying about."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from saved_cases import data_file, filled, held, names, opened, page_format

from longlive_rag_ops.bank import MemoryBank
from longlive_rag_ops.bank.saved_manifest import MANIFEST

ONE = ["index", "lock", "manifest", "pages"]
CALLS = ("open", "posix_fallocate", "pwrite", "ftruncate", "fdatasync", "fsync", "rename", "unlink")


@pytest.fixture
def banks() -> Iterator[tuple[MemoryBank, MemoryBank]]:
    """Two banks that differ in every frame and in size."""
    with filled(page_format(), 4, 1) as old, filled(page_format(), 6, 2) as new:
        yield old, new


class Failing:
    """Makes a system call fail at its nth use, or counts uses. Not for calls outside the test's folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._fail_at, self._code = -1, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def arm(self, at: int, code: int) -> None:
        self.calls, self._fail_at, self._code = [], at, code

    def _wrapped(self, name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._fail_at:
                raise OSError(self._code, os.strerror(self._code))
            return call(*args, **kwargs)

        return wrapper


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_every_system_call_fails_once(
    tmp_path: Path, banks: tuple[MemoryBank, MemoryBank], before: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = banks
    failing = Failing(monkeypatch)
    folder = tmp_path / "count"
    for bank in (old, new) if before else (new,):
        failing.arm(-1, 0)
        bank.save(folder)
    calls = list(failing.calls)
    renamed = calls.index("rename")
    assert calls[renamed - 1] == "fdatasync" and calls[renamed + 1] == "fsync"
    for at, name in enumerate(calls):
        folder = tmp_path / f"{at}"
        failing.arm(-1, 0)
        if before:
            old.save(folder)
        failing.arm(at, code)
        if at > renamed + 1 and name == "unlink":  # it is saved; what cannot be removed is
            with pytest.warns(RuntimeWarning, match="old files could not be removed"):
                new.save(folder)
        else:
            with pytest.raises(OSError, match=os.strerror(code)):
                new.save(folder)
        failing.arm(-1, 0)
        if at > renamed:
            assert opened(folder) == (held(new), []), (at, name)
        elif before:
            assert opened(folder) == (held(old), []), (at, name)
        else:
            assert not (folder / MANIFEST).exists(), (at, name)
        if at < renamed:
            left = set(names(folder)) if folder.exists() else set()
            assert left - {"lock"} == ({"index", "manifest", "pages"} if before else set()), (at, name)
        new.save(folder)
        assert names(folder) == ONE and opened(folder) == (held(new), [])


def test_what_is_on_disk_when(
    tmp_path: Path, banks: tuple[MemoryBank, MemoryBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte written is synced, and so are the names, before the rename; old files go after it is on disk."""
    banks[0].save(tmp_path)
    log: list[tuple[str, Any]] = []

    def logged(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            target = Path(f"/proc/self/fd/{args[0]}").readlink() if isinstance(args[0], int) else tmp_path / args[0]
            log.append((name, target))
            return call(*args, **kwargs)

        return wrapper

    for name in ("pwrite", "ftruncate", "fdatasync", "fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, logged(name, getattr(os, name)))
    banks[1].save(tmp_path)
    renamed = [name for name, _ in log].index("rename")
    written = {target for name, target in log if name in ("pwrite", "ftruncate")}
    assert len(written) == 3
    for target in written:
        touched = [at for at, (name, file) in enumerate(log) if file == target and name in ("pwrite", "ftruncate")]
        synced = [at for at, (name, file) in enumerate(log) if file == target and name == "fdatasync"]
        assert touched[-1] < synced[-1] < renamed
    folder_synced = [at for at, (name, file) in enumerate(log) if (name, file) == ("fsync", tmp_path)]
    data = [at for at, (name, file) in enumerate(log) if name == "fdatasync" and file.suffix == ".safetensors"]
    unlinked = [at for at, (name, _) in enumerate(log) if name == "unlink"]
    assert max(data) < folder_synced[0] < renamed < folder_synced[1] < min(unlinked)


def test_short_writes(tmp_path: Path, banks: tuple[MemoryBank, MemoryBank], monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, memoryview(data)[:777], offset))
    banks[1].save(tmp_path)
    assert opened(tmp_path) == (held(banks[1]), [])


def test_an_interrupt_around_the_rename(
    tmp_path: Path, banks: tuple[MemoryBank, MemoryBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised when the manifest is in place: what it names stays."""
    banks[0].save(tmp_path)
    rename = os.rename

    def interrupted(*args: Any, **kwargs: Any) -> None:
        rename(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", interrupted)
        banks[1].save(tmp_path)
    assert opened(tmp_path) == (held(banks[1]), [])
    banks[1].save(tmp_path)
    assert names(tmp_path) == ONE


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from saved_cases import filled, names, opened, held, page_format
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, old, new = Path({folder!r}), filled(page_format(), 2, 1), filled(page_format(), 12, 2)
old.save(folder)
want = held(old)
for limit in (0, 1, 4096, 5000, 40_000, 100_000, 196_608, 200_703):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        new.save(folder)
    except OSError as error:
        assert error.errno == 27, error  # EFBIG
    else:
        raise AssertionError(f"saved within {{limit}} bytes")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert opened(folder) == (want, []), limit
    assert names(folder) == ["index", "lock", "manifest", "pages"], names(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_704, resource.RLIM_INFINITY))
new.save(folder)
assert opened(folder) == (held(new), [])
print("all limits held")
"""


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """The system's own refusal to write on, at several sizes, within a process of its own."""
    code = LIMITED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "saved"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0 and "all limits held" in result.stdout, result.stderr


def test_a_full_file_system(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        folder = small / "saved"
        with filled(page_format(), 6, 1) as old, filled(page_format(), 12, 2) as new:
            old.save(folder)
            with pytest.raises(OSError, match="No space left"):
                new.save(folder)  # 100 KiB are taken, 200 more are needed
            assert opened(folder) == (held(old), []) and names(folder) == ONE
            (small / "filler").write_bytes(bytes(90_000))
            with pytest.raises(OSError, match="No space left"):
                old.save(folder)
            assert opened(folder) == (held(old), []) and names(folder) == ONE
            (small / "filler").unlink()
            (folder / f"pages-{'0' * 32}.safetensors").write_bytes(bytes(90_000))  # of a save that was killed
            old.save(folder)
            assert opened(folder) == (held(old), []) and names(folder) == ONE
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_lack_of_space_shows_before_anything_is_written(
    tmp_path: Path, banks: tuple[MemoryBank, MemoryBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the file system can tell; one that cannot set space aside is written to all the same."""

    def refused(code: int) -> Any:
        def allocate(fd: int, offset: int, size: int) -> None:
            raise OSError(code, os.strerror(code))

        return allocate

    bank, read = banks[0], banks[0].record
    records: list[int] = []
    monkeypatch.setattr(bank, "record", lambda frame, out: (records.append(frame), read(frame, out)))
    monkeypatch.setattr(os, "posix_fallocate", refused(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        bank.save(tmp_path)
    assert not records and names(tmp_path) == ["lock"]
    monkeypatch.setattr(os, "posix_fallocate", refused(errno.EOPNOTSUPP))
    bank.save(tmp_path)
    monkeypatch.undo()
    assert records == bank.frames() and opened(tmp_path) == (held(bank), [])


def test_one_save_at_a_time(tmp_path: Path, banks: tuple[MemoryBank, MemoryBank], monkeypatch: Any) -> None:
    old, new = banks
    reading, go_on, record = threading.Event(), threading.Event(), old.record

    def slow(*args: Any) -> Any:
        reading.set()
        assert go_on.wait(20)
        return record(*args)

    monkeypatch.setattr(old, "record", slow)
    saving = threading.Thread(target=old.save, args=(tmp_path,))
    saving.start()
    assert reading.wait(20)
    with pytest.raises(BlockingIOError, match="another save into this folder is under way"):
        new.save(tmp_path)
    go_on.set()
    saving.join(20)
    assert opened(tmp_path) == (held(banks[0]), [])
    with (tmp_path / ".lock").open("rb") as lock:  # as another process holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            new.save(tmp_path)
    new.save(tmp_path)
    assert opened(tmp_path) == (held(new), [])


def test_files_of_others_stay(tmp_path: Path, banks: tuple[MemoryBank, MemoryBank]) -> None:
    kept = [
        "notes.txt",
        "pages-1.safetensors",
        "index.safetensors",
        "manifest.tmp",
        f"pages-{'0' * 32}.safetensors.bak",
    ]
    for name in kept:
        (tmp_path / name).write_text(name)
    left_over = [f"pages-{'0' * 32}.safetensors", f"index-{'a' * 32}.safetensors", f"manifest-{'b' * 32}.tmp"]
    for name in left_over:
        (tmp_path / name).write_text("a save that was killed")
    banks[0].save(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert set(kept) < found and not found & set(left_over) and len(found) == len(kept) + 4
    for name in kept:
        assert (tmp_path / name).read_text() == name


def test_a_folder_that_is_something_else(tmp_path: Path, banks: tuple[MemoryBank, MemoryBank]) -> None:
    (tmp_path / MANIFEST).write_text('{"name": "my web application"}')
    with pytest.raises(FileExistsError, match="no saved bank's manifest"):
        banks[0].save(tmp_path)
    assert (tmp_path / MANIFEST).read_text() == '{"name": "my web application"}'
    with pytest.raises(NotADirectoryError, match="this is none"):
        banks[0].save(tmp_path / MANIFEST)


def test_a_damaged_saved_bank_is_replaced_at_the_end(
    tmp_path: Path, banks: tuple[MemoryBank, MemoryBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data stay until the new state is in place: someone may want to look at them."""
    old, new = banks
    old.save(tmp_path)
    data = data_file(tmp_path, "pages")
    raw = bytearray((tmp_path / MANIFEST).read_bytes())
    raw[100] ^= 1
    (tmp_path / MANIFEST).write_bytes(raw)
    failing = Failing(monkeypatch)
    failing.arm(8, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        new.save(tmp_path)
    assert data.exists() and (tmp_path / MANIFEST).read_bytes() == raw
    failing.arm(-1, 0)
    new.save(tmp_path)
    assert names(tmp_path) == ONE and opened(tmp_path) == (held(new), [])
