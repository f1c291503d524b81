"""What is saved is what is opened: every storage, every tier, limits, and who may do what meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from saved_cases import SINK, config, data_file, fill, filled, held, names, opened, page_format

from longlive_rag_ops.bank import BankFull, DamagedPage, MemoryBank, SavedBankError
from longlive_rag_ops.bank.saved_folder import SavedFolder

ONE = ["index", "lock", "manifest", "pages"]


def bank_on_disk(storage: str, folder: Path) -> MemoryBank:
    """Most frames are on disk alone."""
    form = page_format(storage)
    return MemoryBank(form, config(form, 3, 20, folder), sink=SINK, frames_per_commit=1)


@pytest.mark.parametrize("to_disk", [False, True], ids=["to_host", "to_disk"])
@pytest.mark.parametrize("from_disk", [False, True], ids=["from_host", "from_disk"])
@pytest.mark.parametrize("storage", ["plain", "int8", "fp8"])
def test_round_trip(tmp_path: Path, storage: str, from_disk: bool, to_disk: bool) -> None:
    folder, form = tmp_path / "deep" / "saved", page_format(storage)
    bank = fill(bank_on_disk(storage, tmp_path), 9) if from_disk else filled(form, 9)
    with bank:
        assert bank.save(folder) == []
        limits = config(form, 3, 20, tmp_path) if to_disk else config(form)
        with MemoryBank.open(folder, limits, frames_per_commit=1) as other:
            assert held(other) == held(bank)
            assert other.format == form and other.sink == SINK
            assert max(other.generation(frame) for frame in other.frames()) == 2
            query = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))
            for mine, theirs in zip(
                bank.search(query, 4, end_frame=9), other.search(query, 4, end_frame=9), strict=True
            ):
                assert torch.equal(mine, theirs)
            for frame in other.frames():
                for mine, theirs in zip(bank.read(frame), other.read(frame), strict=True):
                    assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
            fill_more = torch.zeros(2, 2, 1, 3, 2, 8, dtype=torch.float16)
            other.commit([9], fill_more, fill_more, torch.ones(2, 1, 6))  # it goes on as any other bank
    assert names(folder) == ONE


def test_a_fetch_of_an_opened_bank_brings_the_pages(tmp_path: Path) -> None:
    form = page_format()
    with filled(form) as bank:
        bank.save(tmp_path)
        want = {frame: bank.read(frame) for frame in (3, 6)}
    with MemoryBank.open(tmp_path, config(form), device_slots=2, most_fetched=2) as bank:
        bank.prefetch([3, 6])
        assert bank.settle() == []
        for layer in range(2):
            bank.wait(layer)
        for frame, (keys, values) in want.items():
            slot = bank.slots[:, :, :, bank.slot(frame)]
            assert torch.equal(slot[:, 0], keys) and torch.equal(slot[:, 1], values)


def test_saving_into_the_folder_it_was_opened_from(tmp_path: Path) -> None:
    form = page_format()
    with filled(form) as bank:
        bank.save(tmp_path)
        want = held(bank)
    first = data_file(tmp_path, "pages").name
    for _ in range(2):
        with MemoryBank.open(tmp_path, config(form)) as bank:
            bank.save(tmp_path)
            assert held(bank) == want
    assert opened(tmp_path) == (want, [])
    assert names(tmp_path) == ONE and data_file(tmp_path, "pages").name != first


def test_banks_without_frames_or_embeddings(tmp_path: Path) -> None:
    form = page_format()
    with MemoryBank(form, config(form), sink=SINK) as bank:
        bank.save(tmp_path)
    assert opened(tmp_path) == ({}, [])
    with filled(form, SINK) as bank:  # sink frames have no embeddings
        bank.save(tmp_path)
        assert bank.index is None
        assert opened(tmp_path) == (held(bank), [])


def test_float64_embeddings_stay_so(tmp_path: Path) -> None:
    form = page_format()
    pages = torch.zeros(2, 2, 1, 3, 2, 8, dtype=form.dtype)
    with MemoryBank(form, config(form), sink=SINK) as bank:
        bank.commit([7], pages, pages, torch.full((2, 1, 6), 1 / 3, dtype=torch.float64))
        bank.save(tmp_path)
        with MemoryBank.open(tmp_path, config(form)) as other:
            assert other.index.embeddings.dtype == torch.float64 and held(other) == held(bank)


def test_the_safetensors_package_reads_the_data(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    form = page_format("int8")
    with filled(form) as bank:
        bank.save(tmp_path)
        pages = safetensors.load_file(data_file(tmp_path, "pages"))
        assert sorted(pages) == sorted(f"frame.{frame}" for frame in bank.frames())
        for frame in bank.frames():
            assert torch.equal(pages[f"frame.{frame}"], bank.record(frame))
    index = safetensors.load_file(data_file(tmp_path, "index"))
    assert index["index.frames"].tolist() == list(range(SINK, 8))
    assert index["index.embeddings"].shape == (2, 6, 6) and index["checksums"].shape == (8, 2, 2)
    with data_file(tmp_path, "pages").open("rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % 4096 == 0


def test_what_does_not_fit_the_saved_bank_is_refused(tmp_path: Path) -> None:
    form = page_format()
    with filled(form) as bank:
        bank.save(tmp_path)
    with pytest.raises(ValueError, match=r"config's storage must be .*'plain'.*got 'int8'"):
        MemoryBank.open(tmp_path, config(page_format("int8")))
    with pytest.raises(ValueError, match=r"format must be .*got storage 'int8', not 'plain'"):
        MemoryBank.open(tmp_path, config(page_format("int8")), format=page_format("int8"))
    with pytest.raises(ValueError, match="host_bytes must be at least"):
        MemoryBank.open(tmp_path, config(form, 1))
    with pytest.raises(SavedBankError, match=r"has no manifest.json"):
        MemoryBank.open(tmp_path.parent, config(form))


@pytest.mark.parametrize("policy", ["oldest", "least_retrieved", "most_redundant"])
def test_a_smaller_bank_forgets_by_its_policy(tmp_path: Path, policy: str) -> None:
    form = page_format()
    with filled(form, 12) as bank:
        bank.save(tmp_path)
        have = held(bank)
    with MemoryBank.open(tmp_path, config(form, 7, policy=policy), frames_per_commit=1) as small:
        left = held(small)
        assert len(left) == 7 and {0, 1} <= left.keys()
        assert left == {frame: have[frame] for frame in left}
        assert small.index.frames() == [frame for frame in left if frame >= SINK]
        assert small.stats()["forgotten"] == {policy: 5, "asked": 0, "damaged": 0}
    gone = [frame for frame in have if frame not in left]
    if policy == "oldest":
        assert gone == [2, 3, 4, 5, 6]
    if policy == "least_retrieved":
        assert max(have[frame].retrievals for frame in gone) <= min(
            have[frame].retrievals for frame in left if frame >= SINK
        )
    if policy == "most_redundant":
        assert 4 in gone  # not finite in a sample: the first to go


def test_a_smaller_bank_that_may_forget_nothing(tmp_path: Path) -> None:
    form = page_format()
    with filled(form, 8) as bank:
        bank.save(tmp_path)
    with pytest.raises(BankFull, match="has 8 frames, and the limits hold 7"):
        MemoryBank.open(tmp_path, config(form, 7))


def open_files() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def test_open_leaves_no_file_open(tmp_path: Path) -> None:
    form = page_format()
    with filled(form) as bank:
        bank.save(tmp_path)
        before = open_files()
        for _ in range(3):
            MemoryBank.open(tmp_path, config(form)).close()
            with pytest.raises(BankFull):
                MemoryBank.open(tmp_path, config(form, 7))
            bank.save(tmp_path)
        assert open_files() == before


def test_a_frame_damaged_in_the_bank_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = page_format()
    with filled(form) as bank:
        have, read = held(bank), bank.record

        def damaged(frame: int, out: torch.Tensor) -> torch.Tensor:
            if frame in (0, 5):
                raise DamagedPage("damaged: layer 1, sample 0: checksum")
            if frame == 7:
                raise KeyError("frame 7 is not in the bank")
            return read(frame, out)

        monkeypatch.setattr(bank, "record", damaged)
        with pytest.warns(RuntimeWarning, match=r"left out 3: frame 0: damaged: layer 1, sample 0"):
            left_out = bank.save(tmp_path)
    assert [frame for frame, _ in left_out] == [0, 5, 7]
    assert opened(tmp_path) == ({frame: have[frame] for frame in (1, 2, 3, 4, 6)}, [])
    safetensors = pytest.importorskip("safetensors.torch")
    assert len(safetensors.load_file(data_file(tmp_path, "pages"))) == 5


def test_a_closed_bank_cannot_be_saved(tmp_path: Path) -> None:
    bank = filled(page_format())
    bank.close()
    with pytest.raises(RuntimeError, match="is closed"):
        bank.save(tmp_path)


def test_commits_wait_for_a_save_and_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = page_format()
    options = {"device_slots": 2, "most_fetched": 2, "sink": SINK, "frames_per_commit": 1}
    with fill(MemoryBank(form, config(form), **options), 8) as bank:
        have, read = held(bank), bank.record
        reading, go_on = threading.Event(), threading.Event()

        def slow(frame: int, out: torch.Tensor) -> torch.Tensor:
            reading.set()
            assert go_on.wait(20)
            return read(frame, out)

        monkeypatch.setattr(bank, "record", slow)
        pages = torch.ones(2, 2, 1, 3, 2, 8, dtype=form.dtype)
        saving = threading.Thread(target=bank.save, args=(tmp_path,))
        changing = threading.Thread(
            target=lambda: (bank.commit([3], pages, pages, replace=True), bank.commit([8], pages, pages))
        )
        saving.start()
        assert reading.wait(20)
        changing.start()
        bank.search(torch.ones(2, 6), 2, end_frame=8)
        bank.prefetch([3, 4])
        assert bank.settle() == []
        bank.wait(0)
        bank.release([3, 4])
        assert bank.stats()["frames"] == 8
        changing.join(0.2)
        assert changing.is_alive() and 8 not in bank
        go_on.set()
        saving.join(20)
        changing.join(20)
        assert 8 in bank and bank.generation(3) == have[3].generation + 1
    assert opened(tmp_path)[0] == have


@pytest.mark.parametrize("kind", ["pages", "index"])
def test_a_save_between_the_manifest_and_its_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(page_format(), 3, 1) as old, filled(page_format(), 4, 2) as new:
        old.save(tmp_path)
        have, open_file = held(new), SavedFolder.open
        saved = []

        def late(folder: SavedFolder, name: str) -> int:
            if name.startswith(kind) and not saved:
                saved.append(new.save(tmp_path))
            return open_file(folder, name)

        monkeypatch.setattr(SavedFolder, "open", late)
        assert opened(tmp_path) == (have, []) and saved == [[]]


def test_opening_while_it_is_saved_again_and_again(tmp_path: Path) -> None:
    """Every open finds one of the states whole, though the files it began with may be gone."""
    form = page_format()
    banks = [filled(form, 3 + seed, seed) for seed in range(3)]
    states = [held(bank) for bank in banks]
    banks[0].save(tmp_path)
    stop = threading.Event()

    def save() -> None:
        while not stop.is_set():
            for bank in banks:
                bank.save(tmp_path)

    saving = threading.Thread(target=save)
    saving.start()
    try:
        for _ in range(40):
            found, warned = opened(tmp_path)
            assert found in states and warned == []
    finally:
        stop.set()
        saving.join(20)
