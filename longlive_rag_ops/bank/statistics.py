"""What a bank has done and holds, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .catalogue import Catalogue
from .config import BankConfig
from .page_format import PageFormat

COUNTERS = (
    "stored_bytes",
    "fetched_bytes",
    "stall_us",
    "late_layers",
    "evictions",
    "host_drops",
    "spilled",
    "failed_spills",
    "replaced",
    "dropped_fetches",
)


def bank_stats(
    core: Mapping[str, Any],
    pages: PageFormat,
    config: BankConfig,
    *,
    slot_bytes: int,
    staging_bytes: int,
    catalogue: Catalogue,
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """The dictionary that `MemoryBank.stats` returns.

    - ``frames`` in the bank, ``indexed_frames`` of them with an embedding, ``pinned_frames`` pinned or fetched.
    - ``device``, ``host``, ``disk``: for each tier ``frames`` (one in several tiers counts in each), ``bytes`` in use,
      ``reserved_bytes`` taken from the system, ``limit_bytes``; host also ``locked_bytes``; disk also ``read_bytes``
      and ``written_bytes``. Bytes in use may exceed the frames' while copies of forgotten ones end.
    - ``index_bytes``, and ``staging_bytes`` of the buffer in which pages are quantised, both on the device.
    - ``hits_device``, ``hits_host``, ``hits_disk``, ``misses``: prefetched frames by the best tier that had them.
    - ``stored_bytes`` from the device to host memory, ``fetched_bytes`` the other way; ``spilled`` frames written to
      disk; ``stall_us`` microseconds for which the host waited for the disk or for memory to come free; ``late_layers``
      waits that found a layer's copies unfinished.
    - ``evictions``: frames that lost their device slot to another; ``host_drops``: host memory given up for a frame
      that disk has.
    - ``searches``; ``non_finite_embeddings``.
    - ``forgotten``: frames by what made them go: a policy's name, ``asked`` (`MemoryBank.forget`), ``damaged``;
      ``forgotten_frames``: all of these but the damaged ones.
    - ``replaced`` frames; ``dropped_fetches`` of pages that were replaced, forgotten or damaged meanwhile.
    - ``damaged_pages``, those of the saved bank that this one was opened from included; ``failed_spills``: frames that
      could not be written to disk and stayed in host memory.
    - ``fallbacks``: how often the slower way was taken: ``pageable_slabs`` of host memory, ``buffered_shards`` of disk,
      ``copy_loops`` instead of one call; ``reasons`` for those that were, and for memory or space that was refused.
    - ``copies`` as they were handed to the device, ``copy_batches`` of them in one call.
    """
    host, disk, device = core["host"], core["disk"], core["device"]
    record = pages.record_bytes
    index = catalogue.index
    slot_record = pages.slots(1, "meta").nbytes  # without the padding that pages have when they are stored
    reasons = {
        "pageable_slabs": host["pageable_reason"],
        "buffered_shards": disk["buffered_reason"],
        "copy_loops": device["copy_loop_reason"],
        "host_refused": host["refusal"],
        "disk_refused": disk["refusal"],
    }
    forgotten = {name: counts.get(name, 0) for name in (config.policy, "asked", "damaged") if name != "error"}
    return {
        "frames": core["frames"],
        "indexed_frames": 0 if index is None else len(index),
        "pinned_frames": len(catalogue.pinned()),
        "device": {
            "frames": core["device_frames"],
            "bytes": core["device_frames"] * slot_record,
            "reserved_bytes": slot_bytes,
            "limit_bytes": slot_bytes if config.device_bytes is None else config.device_bytes,
        },
        "host": {
            "frames": core["host_frames"],
            "bytes": host["used"] * record,
            "reserved_bytes": host["reserved_bytes"],
            "limit_bytes": config.host_bytes,
            "locked_bytes": host["locked_bytes"],
        },
        "disk": {
            "frames": core["disk_frames"],
            "bytes": disk["used"] * record,
            "reserved_bytes": disk["reserved_bytes"],
            "limit_bytes": config.disk_bytes,
            "read_bytes": disk["read_bytes"],
            "written_bytes": disk["written_bytes"],
        },
        "index_bytes": 0 if index is None else index.nbytes,
        "staging_bytes": staging_bytes,
        **{f"hits_{tier}": core[f"hits_{tier}"] for tier in ("device", "host", "disk")},
        "misses": core["misses"],
        **{name: core[name] for name in COUNTERS},
        "damaged_pages": core["damaged_pages"] + counts.get("damaged_pages", 0),
        "searches": counts.get("searches", 0),
        "non_finite_embeddings": int(catalogue.non_finite),
        "forgotten": forgotten,
        "forgotten_frames": sum(forgotten.values()) - forgotten["damaged"],
        "fallbacks": {
            "pageable_slabs": host["pageable_slabs"],
            "buffered_shards": disk["buffered_shards"],
            "copy_loops": device["copy_loops"],
            "reasons": {name: reason for name, reason in reasons.items() if reason},
        },
        "copies": device["copies"],
        "copy_batches": device["batches"],
    }
