"""Whether ranks have room for what one block of a window needs at once."""

from __future__ import annotations

from ..bank import MemoryBank
from ..config import WindowConfig
from ..history import least_history
from .mesh import MemoryMesh


def check_room(bank: MemoryBank, most_fetched: int, config: WindowConfig, mesh: MemoryMesh, *, at_once: bool) -> None:
    """Refuses limits with which a video would end in the middle.

    Args:
        bank: this rank's, empty.
        most_fetched: frames that one block can retrieve, of all samples.
        config, mesh: of the window.
        at_once: whether fetched pages are released before the next choice is pinned; not where pages are placed from
            their slots, or may be lost until they are.

    Raises:
        ValueError: the ranks together could not hold what is needed; or this one could not, should all that is chosen
            be its own, beside what its policy must not give up.
    """
    room, frame_bytes = bank.room(), bank.format.record_bytes
    least = config.sink + least_history(config, bank.samples)
    if room * mesh.frame_ranks < least:
        raise ValueError(
            f"host_bytes and disk_bytes of {mesh.frame_ranks} ranks must hold at least {least} frames (window + "
            f"recent_exclude + frames_per_block + batch * top_k) of {frame_bytes} bytes each, got room for "
            f"{room * mesh.frame_ranks}"
        )
    if bank.config.policy == "error":  # full is full, whoever holds what
        return
    sinks = sum(mesh.owner(frame, config.sink) == mesh.frame_rank for frame in range(config.sink))
    recent, block = config.local + config.top_k + config.recent_exclude, config.frames_per_block
    if mesh.deals_in_turn:
        recent, block = -(-recent // mesh.frame_ranks), -(-block // mesh.frame_ranks)
    beside = block if at_once else max(block, most_fetched)
    least = sinks + recent + most_fetched + beside
    if room < least:
        raise ValueError(
            f"host_bytes and disk_bytes of every rank must hold at least {least} frames with policy "
            f"{bank.config.policy} (its part of sink, window and recent_exclude: {sinks + recent}; batch * top_k that "
            f"are chosen, which may all be its own: {most_fetched}; beside them {beside}) of {frame_bytes} bytes each, "
            f"got room for {room}"
        )
