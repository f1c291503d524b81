"""What a window and a patch check of a mesh's options, without importing what a mesh needs."""

from __future__ import annotations

TRANSFERS = ("auto", "pages", "merge")


def missing_bank(frame_ranks: int) -> ValueError:
    """The error where ranks share frames, and have no bank to keep them in."""
    return ValueError(
        f"bank must be given where {frame_ranks} ranks share the frames of the history: BankConfig(host_bytes=...) "
        "says how much of its memory each rank keeps its share in"
    )
