"""Settings of a bank, and limits that cannot work, refused when the bank is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longlive_rag_ops import BankConfig, MemoryBank, PageFormat
from longlive_rag_ops.bank.config import format_bytes, parse_bytes
from longlive_rag_ops.bank.limits import bounce_records, check_limits, kept_back

FORMAT = PageFormat("plain", 2, 1, 4, 2, 8, torch.float32)  # 512 bytes of a page are used
RECORD = 2 * 4096


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("7B", 7),
        ("64MiB", 64 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("2KiB", 2048),
        ("3TiB", 3 * 2**40),
        ("2KB", 2000),
        ("2mb", 2_000_000),
        ("0.25GB", 250_000_000),
        ("1TB", 10**12),
        ("0.3B", 0),
        ("0.1KiB", 102),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "-1MiB", "1e3", "12 parsecs", "1.MiB", "1..5KB", "nan", "inf", "1_000"]
)
def test_text_that_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"host_bytes must be a number of bytes, .* B, KiB, MiB, .*; got"):
        parse_bytes(text, "host_bytes")


@pytest.mark.parametrize("value", [1.5, None, True, b"1MiB"])
def test_what_is_neither_int_nor_text(value: Any) -> None:
    with pytest.raises(TypeError, match="host_bytes must be an int"):
        parse_bytes(value, "host_bytes")


def test_sizes_out_of_range() -> None:
    with pytest.raises(ValueError, match="size must be between 0 and"):
        parse_bytes(-1)
    with pytest.raises(ValueError, match="size must be between 0 and"):
        parse_bytes("9999999999TiB")
    with pytest.raises(ValueError, match="host_bytes must be between 1 and"):
        BankConfig(host_bytes="0MiB")


def test_sizes_for_people() -> None:
    assert format_bytes(512) == "512 bytes"
    assert format_bytes(3 * 2**29) == "1.5 GiB (1610612736 bytes)"


def test_what_is_kept_of_a_configuration(tmp_path: Path) -> None:
    config = BankConfig(
        host_bytes="1GiB", disk_bytes="2GB", spill=str(tmp_path), slab_bytes="4KiB", log=tmp_path / "log"
    )
    assert (config.host_bytes, config.disk_bytes, config.slab_bytes) == (2**30, 2 * 10**9, 4096)
    assert config.spill == tmp_path and config.log == tmp_path / "log"
    assert config.to_dict()["spill"] == str(tmp_path) and config.to_dict()["policy"] == "error"
    assert config == BankConfig(**config.to_dict())  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        config.host_bytes = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        BankConfig(2**30)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"storage": "int4"}, ValueError, ("storage", "plain, int8, fp8", "int4")),
        ({"policy": "newest"}, ValueError, ("policy", "oldest", "newest")),
        ({"lock_memory": 1}, TypeError, ("lock_memory", "1")),
        ({"direct_io": "yes"}, TypeError, ("direct_io", "yes")),
        ({"io_threads": 0}, ValueError, ("io_threads", "64", "0")),
        ({"io_threads": 65}, ValueError, ("io_threads", "64", "65")),
        ({"slab_bytes": 0}, ValueError, ("slab_bytes", "0")),
        ({"shard_bytes": "some"}, ValueError, ("shard_bytes", "some")),
        ({"spill": 3}, TypeError, ("spill", "int")),
        ({"log": 3}, TypeError, ("log", "int")),
        ({"disk_bytes": "1GiB"}, ValueError, ("spill", "disk_bytes", "1073741824")),
        ({"spill": "/tmp"}, ValueError, ("spill", "/tmp", "disk_bytes=0")),
        ({"disk_bytes": -1}, ValueError, ("disk_bytes", "-1")),
    ],
)
def test_settings_that_are_not_allowed(options: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        BankConfig(host_bytes=2**30, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def limits(host: int, disk: int = 0, spare: int = 0, **options: int) -> None:
    """Limits in records, ``spare`` bytes short of the next."""
    sizes = {"slots": 6, "most_fetched": 6, "sink": 1, "frames_per_commit": 3} | options
    config = BankConfig(
        host_bytes=host * RECORD + spare, disk_bytes=disk * RECORD, spill="/somewhere" if disk else None
    )
    check_limits(FORMAT, config, **sizes)


def test_host_memory_alone_must_hold_sink_a_commit_and_a_fetch() -> None:
    limits(10)
    with pytest.raises(ValueError) as caught:
        limits(9, spare=RECORD - 1)
    message = str(caught.value)
    assert "host_bytes must be at least 80 KiB (81920 bytes), 10 frames of 8192 bytes" in message
    assert "sink 1 + frames_per_commit 3 + most_fetched 6" in message and "81919 bytes" in message


def test_with_disk_host_memory_must_hold_what_passes_through() -> None:
    limits(9, 7)
    with pytest.raises(ValueError, match=r"host_bytes must be at least 72 KiB .*9 frames .*6 on their way from disk"):
        limits(8, 100)
    with pytest.raises(ValueError, match=r"disk_bytes must be at least 56 KiB .*7 frames .*less the 3 that host_bytes"):
        limits(9, 6)
    limits(20, 1)
    with pytest.raises(ValueError, match=r"disk_bytes must be at least 8 KiB .*one frame"):
        check_limits(
            FORMAT,
            BankConfig(host_bytes="1MiB", disk_bytes=RECORD - 1, spill="/somewhere"),
            slots=0,
            most_fetched=0,
            sink=0,
            frames_per_commit=1,
        )


def test_with_disk_host_memory_is_kept_for_a_commit_of_new_generations() -> None:
    few = {"most_fetched": 1, "sink": 0}
    limits(4, 3, **few)
    with pytest.raises(ValueError, match=r"disk_bytes must be at least 24 KiB .*3 frames .*less the 1 that host_bytes"):
        limits(4, 2, **few)
    config = BankConfig(host_bytes=1, disk_bytes=1, spill="/somewhere")
    assert kept_back(config, 6, 8, 3) == 6 and kept_back(config, 1, 8, 3) == 3 and kept_back(config, 0, 0, 2) == 2
    assert kept_back(BankConfig(host_bytes=1), 6, 8, 3) == 0


def test_slots_must_hold_a_fetch() -> None:
    with pytest.raises(ValueError, match=r"device_slots .*at least 6 frames \(most_fetched\).* 6 KiB.*got 5 slots"):
        limits(100, slots=5)


def test_host_memory_kept_for_frames_on_their_way_from_disk() -> None:
    with_disk = BankConfig(host_bytes=1, disk_bytes=1, spill="/somewhere")
    assert bounce_records(with_disk, 6, 8) == 6
    assert bounce_records(with_disk, 0, 8) == 1
    assert bounce_records(with_disk, 0, 0) == 0  # nothing can be fetched
    assert bounce_records(BankConfig(host_bytes=1), 6, 8) == 0


def test_device_bytes_say_how_many_slots() -> None:
    form = PageFormat("int8", 2, 1, 4, 2, 8, torch.float32)  # 8192 bytes a frame in a slot
    options: dict[str, Any] = {"host_bytes": "1MiB", "storage": "int8", "device_bytes": "36KiB"}
    with MemoryBank(form, BankConfig(**options), most_fetched=4) as bank:
        assert bank.slots.shape[2] == 4 and bank.stats()["device"]["limit_bytes"] == 36 * 1024
    with MemoryBank(form, BankConfig(**options), device_slots=3) as bank:
        assert bank.slots.shape[2] == 3 and bank.stats()["device"]["reserved_bytes"] == 3 * 8192
    with pytest.raises(ValueError, match=r"device_bytes must be at least 40 KiB.*5 slots.*got 36 KiB"):
        MemoryBank(form, BankConfig(**options), device_slots=5)
    with pytest.raises(ValueError, match=r"device_bytes must be at least"):
        MemoryBank(form, BankConfig(**options), slots=form.slots(8, "cpu"))
    with pytest.raises(ValueError, match=r"device_bytes must hold at least 5 frames.*got 4 slots"):
        MemoryBank(form, BankConfig(**options), most_fetched=5)
    with pytest.raises(ValueError, match="device_bytes must be"):
        BankConfig(host_bytes=1, device_bytes="much")
