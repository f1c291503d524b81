"""Saved banks with something wrong: an error, or exactly the damaged frames missing; never a wrong byte."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_cases import (
    Frame,
    config,
    data_file,
    edit_index,
    edit_manifest,
    filled,
    held,
    opened,
    page_format,
    write_manifest,
)

from longlive_rag_ops.bank import MemoryBank, NewerVersion, NoSavedBank, SavedBankError
from longlive_rag_ops.bank.saved_manifest import MANIFEST

RECORD = page_format().record_bytes
HEADER = 4096  # of the file of pages


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[int, Frame]]:
    """A saved bank and what it holds; frame 2 is missing, so that no frame is its own row."""
    with filled(page_format()) as bank:
        bank.forget([2])
        bank.save(tmp_path / "saved")
        return tmp_path / "saved", held(bank)


def check_without(folder: Path, have: dict[int, Frame], rows: set[int]) -> None:
    """Opens; the frames of these records, and only they, are missing, and a warning names them."""
    frames = list(have)
    found, warned = opened(folder)
    assert found == {frame: have[frame] for row, frame in enumerate(frames) if row not in rows}
    for row in rows:
        assert any(f"frame {frames[row]}, layer" in text for text in warned)
    assert bool(warned) or not rows


def test_a_flipped_byte_anywhere(saved: tuple[Path, dict[int, Frame]]) -> None:
    """300 random places over all files by their sizes, as many over the small ones, and the ends of every part."""
    folder, have = saved
    pages, index, manifest = data_file(folder, "pages"), data_file(folder, "index"), folder / MANIFEST
    sizes = {path: path.stat().st_size for path in (pages, index, manifest)}
    choose = random.Random(1)
    places = choose.choices(list(sizes), list(sizes.values()), k=300) + choose.choices([index, manifest], k=300)
    at = [(path, choose.randrange(sizes[path])) for path in places]
    at += [(path, place) for path, size in sizes.items() for place in (*range(32), size - 2, size - 1)]
    for begin in range(HEADER, sizes[pages], page_format().page_bytes):
        at += [(pages, begin - 1), (pages, begin), (pages, begin + 400)]  # the last: padding
    for path, place in at:
        raw = path.read_bytes()
        flipped = bytearray(raw)
        flipped[place] ^= choose.randrange(1, 256)
        path.write_bytes(flipped)
        if path == pages:
            row = (place - HEADER) // RECORD
            check_without(folder, have, {row} if row >= 0 else set())
            if row < 0:
                assert "damaged header" in opened(folder)[1][0]
        else:
            with pytest.raises(SavedBankError):
                opened(folder)
        path.write_bytes(raw)
    assert opened(folder) == (have, [])


def test_damage_is_counted(saved: tuple[Path, dict[int, Frame]]) -> None:
    folder, have = saved
    path = data_file(folder, "pages")
    raw = bytearray(path.read_bytes())
    for place in (0, 1, 3 * RECORD, 3 * RECORD + 4096, 4 * RECORD - 1):  # two bytes of one page; three pages of a frame
        raw[HEADER + place] ^= 1
    path.write_bytes(raw)
    with (
        pytest.warns(RuntimeWarning, match=r"pages 4, frames lost 2: frame 0, layer 0, sample 0: .*frame 4, layer 0"),
        MemoryBank.open(folder, config(page_format())) as bank,
    ):
        stats = bank.stats()
        assert stats["damaged_pages"] == 4 and stats["forgotten"]["damaged"] == 2 and stats["forgotten_frames"] == 0
        assert bank.frames() == [frame for frame in have if frame not in (0, 4)]


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, HEADER - 1, HEADER, HEADER + 1, HEADER + 2 * RECORD, -4096, -1])
def test_truncated_pages(saved: tuple[Path, dict[int, Frame]], kept: int) -> None:
    folder, have = saved
    path = data_file(folder, "pages")
    size = path.stat().st_size
    kept = kept % size
    os.truncate(path, kept)
    whole = max(0, kept - HEADER) // RECORD
    check_without(folder, have, set(range(whole, len(have))))
    assert f"must have {size} bytes, got {kept}" in opened(folder)[1][0]


def test_other_sizes(saved: tuple[Path, dict[int, Frame]]) -> None:
    folder, have = saved
    for kind in ("index", "pages"):
        with data_file(folder, kind).open("ab") as file:
            file.write(b"\0")
        if kind == "index":
            with pytest.raises(SavedBankError, match=r"must have \d+ bytes, got \d+"):
                opened(folder)
            os.truncate(data_file(folder, kind), data_file(folder, kind).stat().st_size - 1)
    found, warned = opened(folder)  # what is behind the last page is nobody's
    assert found == have and "must have" in warned[0]
    for path in (data_file(folder, "index"), folder / MANIFEST):
        raw = path.read_bytes()
        for kept in {0, 1, 8, 22, 23, 24, 60, len(raw) // 2, len(raw) - 2, len(raw) - 1}:
            path.write_bytes(raw[:kept])
            with pytest.raises(SavedBankError):
                opened(folder)
        path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["manifest", "pages", "index"])
def test_a_file_that_is_missing_or_no_file(saved: tuple[Path, dict[int, Frame]], kind: str) -> None:
    folder, have = saved
    path = folder / MANIFEST if kind == "manifest" else data_file(folder, kind)
    kept = path.rename(folder.parent / "elsewhere")
    with pytest.raises(NoSavedBank if kind == "manifest" else SavedBankError, match=r"has no manifest|is missing"):
        opened(folder)
    other: list[Callable[[], Any]] = [
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(kept),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/dev/zero"),
    ]
    for make in other:
        make()
        with pytest.raises((SavedBankError, OSError), match=r"must be a regular file"):
            opened(folder)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    kept.rename(path)
    assert opened(folder) == (have, [])


def test_a_page_that_cannot_be_read(saved: tuple[Path, dict[int, Frame]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system fails within the third record, and reads a little at a time elsewhere."""
    folder, have = saved
    preadv, bad = os.preadv, HEADER + 2 * RECORD + 5000

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        part = buffers[0][:1000]
        if offset <= bad < offset + len(part):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, [part], offset)

    monkeypatch.setattr(os, "preadv", failing)
    check_without(folder, have, {2})
    assert "layer 0, sample 1: it cannot be read: Input/output error" in opened(folder)[1][0]


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoSavedBank, match="No such file"):
        opened(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(NoSavedBank, match="Not a directory"):
        opened(tmp_path / "file")
    (tmp_path / MANIFEST).write_text("{}")

    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError):
        opened(tmp_path)


def test_a_newer_version_is_refused(saved: tuple[Path, dict[int, Frame]]) -> None:
    folder, _ = saved
    edit_manifest(folder, lambda entries: entries.update(version=2, written_by="longlive-rag-ops 9.0", extra=[{}]))
    with pytest.raises(NewerVersion, match=r"version 2, written by 'longlive-rag-ops 9.0'; .* reads versions up to 1"):
        opened(folder)


def entry(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets an entry of a manifest."""

    def edit(entries: Any) -> None:
        for key in path[:-1]:
            entries = entries[key]
        entries[path[-1]] = value

    return edit


HUGE, TOKEN = 2**62, "0" * 32
NAMES = [
    "../x",
    "/etc/passwd",
    "",
    ".",
    "..",
    "a/b",
    MANIFEST,
    f"../pages-{TOKEN}.safetensors",
    f"pages-{TOKEN}.safetensors\0",
]
NAMES += [f"pages-{TOKEN}.safetensors\n", f"index-{TOKEN}.safetensors", f"pages-{'0' * 31}g.safetensors", "x" * 10**6]
WRONG = [None, True, -1, 1.5, 1e300, HUGE + 1, 10**30, "1", [], {}, [[]]]
HOSTILE: list[Callable[[dict[str, Any]], Any]] = [
    *(entry("pages", "file", value=name) for name in NAMES),
    *(entry("sink", value=value) for value in WRONG),
    *(entry("version", value=value) for value in (*WRONG, 0)),
    *(entry("frames", value=value) for value in (*WRONG[:8], {}, [None], [[0]], [[0, 0, 0]], ["00"])),
    *(entry("frames", 0, 0, value=value) for value in (*WRONG, 2**31)),
    *(entry("frames", 0, 1, value=value) for value in WRONG),
    entry("frames", 1, value=[0, 0]),  # twice
    entry("frames", 1, value=[9, 0]),  # not ascending
    entry("frames", value=[]),
    entry("frames", value=[[frame, 0] for frame in range(100_000)]),
    *(entry("page_format", "layers", value=value) for value in (*WRONG, 0, 1, 3, HUGE, 2**31)),
    *(entry("page_format", "tokens_per_frame", value=value) for value in (0, 4000, HUGE, 2**40)),
    *(
        entry("page_format", name, value=value)
        for name in ("storage", "dtype")
        for value in (*WRONG, "float16 ", "int9")
    ),
    *(entry("page_format", value=value) for value in (*WRONG, {"storage": "plain"})),
    entry("page_format", "more", value=1),
    *(entry("page_bytes", value=value) for value in (*WRONG, 0, 8192, HUGE)),
    *(entry("pages", "bytes", value=value) for value in (*WRONG, 0, HUGE)),
    *(entry("pages", "begins", value=value) for value in (*WRONG, 0, 1, 8192, HUGE, 2**40)),
    *(entry("pages", "header_crc32c", value=value) for value in (*WRONG, 2**32)),
    *(entry("index", "bytes", value=value) for value in (*WRONG, 0, HUGE, 1000)),
    *(entry("index", "crc32c", value=value) for value in (*WRONG, 2**32, 0)),
    *(entry("index", "frames", value=value) for value in (*WRONG, 0, 1, 100, HUGE)),
    *(entry("index", "embedding_dim", value=value) for value in (*WRONG, 0, 1, HUGE)),
    *(entry("index", "dtype", value=value) for value in (*WRONG, "F16", "U8", "")),
    *(entry(part, value=value) for part in ("pages", "index") for value in WRONG),
    *(entry("written_by", value=value) for value in (*WRONG[:7], "x" * 201)),
    *(lambda entries, name=name: entries.pop(name) for name in ("version", "frames", "pages", "index", "page_format")),
    lambda entries: entries["pages"].pop("begins"),
    lambda entries: entries["index"].pop("dtype"),
]


def test_hostile_manifests(saved: tuple[Path, dict[int, Frame]]) -> None:
    """Every checksum is right; what is said is not. Nothing but the error, and no time for large numbers."""
    folder, have = saved
    raw = (folder / MANIFEST).read_bytes()
    for number, edit in enumerate(HOSTILE):
        edit_manifest(folder, edit)
        with pytest.raises(SavedBankError):
            opened(folder)
            pytest.fail(f"case {number} was opened: {(folder / MANIFEST).read_bytes()[:3000]!r}")
        (folder / MANIFEST).write_bytes(raw)
    assert opened(folder) == (have, [])


def test_hostile_texts(saved: tuple[Path, dict[int, Frame]]) -> None:
    """What is no JSON, or more than JSON."""
    folder, _ = saved
    rest = json.dumps(
        {key: value for key, value in json.loads((folder / MANIFEST).read_bytes()).items() if key != "crc32c"}
    )[1:]
    texts: list[str | bytes] = [
        "",
        "}",
        "null",
        rest.replace('"sink": 2', '"sink": NaN'),
        rest.replace('"sink": 2', '"sink": Infinity'),
        rest.replace('"sink": 2', '"sink": -Infinity'),
        rest.replace('"sink": 2', '"sink": 2, "sink": 2'),
        rest.replace('"sink": 2', '"sink": ' + "9" * 100_000),
        rest.replace('"sink": 2', '"sink": ' + "[" * 100_000 + "]" * 100_000),
        rest.replace('"sink": 2', '"sink": ' + '{"a": ' * 100_000),
        *(rest.replace('"sink": 2', '"sink": ' + "[" * deep + "]" * deep) for deep in (100, 900, 950, 990)),
        rest.encode() + b"\xff",
        rest.encode("utf-16"),
        rest + "{}",
        rest.replace("longlive-rag-ops memory bank", "another memory bank"),
    ]
    for text in texts:
        write_manifest(folder, text)
        with pytest.raises(SavedBankError):
            opened(folder)
    for text in (b"", b"{}", b"[]", b"\x00" * 100, b"x" * (64 * 2**20 + 1)):
        (folder / MANIFEST).write_bytes(text)
        with pytest.raises(NoSavedBank):
            opened(folder)


def set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return edit


def put(value: Any, *at: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_tensor("index.frames", put(2, 0)), r"must be frames of the bank, got \[2\]"),
        (set_tensor("index.frames", put(-1, 0)), "must be frames of the bank"),
        (set_tensor("index.frames", lambda x: x.flip(0)), "must ascend"),
        (set_tensor("index.frames", put(4, 0)), "must ascend"),
        (set_tensor("index.frames", lambda x: x.float()), "must hold|index bytes"),
        (set_tensor("index.frames", lambda x: x.double()), "I64|has no usable|must hold"),
        (set_tensor("index.embeddings", put(torch.nan, 0, 0, 0)), "must be of unit length"),
        (set_tensor("index.embeddings", put(torch.inf, 0, 0, 0)), "must be of unit length"),
        (set_tensor("index.embeddings", lambda x: 2 * x), "must be of unit length"),
        (set_tensor("index.embeddings", lambda x: x.flatten(0, 1)), "must hold"),
        (set_tensor("retrievals", put(-1, 0)), "retrievals must be from 0"),
        (set_tensor("retrievals", put(2**63 - 1, 0)), "retrievals must be from 0"),
        (set_tensor("checksums", lambda x: x.reshape(-1)), "must hold"),
        (lambda tensors: tensors.pop("retrievals"), "must hold"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "must hold"),
    ],
)
def test_hostile_index(
    saved: tuple[Path, dict[int, Frame]], edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    """Its checksum is right."""
    pytest.importorskip("safetensors")
    folder, have = saved
    edit_index(folder, lambda tensors: None)
    assert opened(folder) == (have, [])
    edit_index(folder, edit)
    with pytest.raises(SavedBankError, match=message):
        opened(folder)
