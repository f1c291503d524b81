"""The history over many processes, on `torch.distributed`: heads or frames of the pages spread over ranks, or both."""

from typing import Any

from .agreement import RanksDisagree
from .failure import RankFailure
from .mesh import MemoryMesh

__all__ = ["MemoryMesh", "RankFailure", "RanksDisagree", "load", "save"]


def __getattr__(name: str) -> Any:
    """``save`` and ``load``, which import distributed checkpoints, when they are asked for."""
    if name not in ("load", "save"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import checkpoint

    return getattr(checkpoint, name)
