"""Attention with a searchable memory for long autoregressive video generation.

Importing the package registers ``torch.ops.longlive`` and imports nothing but torch and numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import ops
from .config import WindowConfig
from .version import __version__
from .window import MemoryWindow

if TYPE_CHECKING:
    from .bank import BankConfig, BankFull, DamagedPage, MemoryBank, PageFormat
    from .patch import patched, register_adapter
    from .retrieval_attention import RetrievalAttention

__all__ = [
    "BankConfig",
    "BankFull",
    "DamagedPage",
    "MemoryBank",
    "MemoryWindow",
    "PageFormat",
    "RetrievalAttention",
    "WindowConfig",
    "__version__",
    "ops",
    "patch",
    "patched",
    "register_adapter",
]

_LATER = {
    **dict.fromkeys(("BankConfig", "BankFull", "DamagedPage", "MemoryBank", "PageFormat"), ".bank"),
    **dict.fromkeys(("patched", "register_adapter"), ".patch"),
    "RetrievalAttention": ".retrieval_attention",
}


def __getattr__(name: str) -> Any:
    """Names whose modules are imported when they are asked for."""
    if name in ("bank", "distributed", "embedder", "patch"):  # the last package can be called
        return import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "bank", "distributed", "embedder"})
