"""Whether a bank's limits can hold what is asked of it, checked before any memory is taken."""

from __future__ import annotations

from ..config import check_int
from .config import BankConfig, format_bytes
from .page_format import PageFormat


def slot_bytes(pages: PageFormat) -> int:
    """Bytes of a frame in a device slot: without the padding that plain pages have when they are stored."""
    return pages.slots(1, "meta").nbytes


def slots_within(pages: PageFormat, config: BankConfig, asked: int) -> int:
    """Device slots: as many as are asked for or, when 0 are, as ``device_bytes`` holds (none without it).

    ValueError when more are asked for than it holds.
    """
    if config.device_bytes is None:
        return asked
    held = config.device_bytes // slot_bytes(pages)
    if asked > held:
        raise ValueError(
            f"device_bytes must be at least {format_bytes(asked * slot_bytes(pages))}, {asked} slots of "
            f"{slot_bytes(pages)} bytes; got {format_bytes(config.device_bytes)}"
        )
    return asked or held


def fetch_slots(pages: PageFormat, config: BankConfig, asked: int | None, most_fetched: int, sets: int = 2) -> int:
    """Device slots beside a window: ``history_slots`` when it is given, else what ``device_bytes`` holds or, without
    that, ``sets`` times what one block can fetch: two, so that a fetch finds room while the last one is being placed.
    """
    if asked is not None:
        return check_int("history_slots", asked, most_fetched)
    return sets * most_fetched if config.device_bytes is None else slots_within(pages, config, 0)


def bounce_records(config: BankConfig, most_fetched: int, slots: int) -> int:
    """Frames for which host memory is kept on their way from disk to the device."""
    return max(1, most_fetched) if config.disk_bytes and slots else 0


def kept_back(config: BankConfig, most_fetched: int, slots: int, frames_per_commit: int) -> int:
    """Host memory, in frames, that is never filled with what is nowhere else: a full bank fetches and replaces any."""
    return max(bounce_records(config, most_fetched, slots), frames_per_commit) if config.disk_bytes else 0


def check_limits(
    pages: PageFormat, config: BankConfig, *, slots: int, most_fetched: int, sink: int, frames_per_commit: int
) -> None:
    """Raises `ValueError` when a tier cannot hold one commit and one fetch, beside the frames that are never forgotten.

    Args:
        slots: device slots.
        most_fetched, sink, frames_per_commit: as `MemoryBank` takes them.
    """
    record = pages.record_bytes
    if slots < most_fetched:
        name = "device_slots (or slots)" if config.device_bytes is None else "device_bytes"
        size = slot_bytes(pages)
        raise ValueError(
            f"{name} must hold at least {most_fetched} frames (most_fetched), which is "
            f"{format_bytes(most_fetched * size)}; got {slots} slots, which is {format_bytes(slots * size)}"
        )
    host, disk = config.host_bytes // record, config.disk_bytes // record
    kept = sink + frames_per_commit + most_fetched
    kept_text = f"sink {sink} + frames_per_commit {frames_per_commit} + most_fetched {most_fetched}"
    if not config.disk_bytes:
        if host < kept:
            raise _too_small("host_bytes", config.host_bytes, kept, record, kept_text)
        return
    bounce = bounce_records(config, most_fetched, slots)
    if host < bounce + frames_per_commit:
        text = f"frames_per_commit {frames_per_commit} + {bounce} on their way from disk to the device"
        raise _too_small("host_bytes", config.host_bytes, bounce + frames_per_commit, record, text)
    filled = host - kept_back(config, most_fetched, slots, frames_per_commit)
    if filled + disk < kept or disk < 1:
        needed = max(kept - filled, 1)
        text = f"{kept_text}, less the {filled} that host_bytes hold" if needed > 1 else "one frame"
        raise _too_small("disk_bytes", config.disk_bytes, needed, record, text)


def _too_small(name: str, given: int, frames: int, record: int, what: str) -> ValueError:
    return ValueError(
        f"{name} must be at least {format_bytes(frames * record)}, {frames} frames of {record} bytes ({what}); got "
        f"{format_bytes(given)}"
    )
