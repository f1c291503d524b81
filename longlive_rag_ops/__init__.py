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

__all__ = [
    "BankConfig",
    "BankFull",
    "DamagedPage",
    "MemoryBank",
    "MemoryWindow",
    "PageFormat",
    "WindowConfig",
    "__version__",
    "ops",
]


def __getattr__(name: str) -> Any:
    """The memory bank's names, which are imported when they are asked for."""
    if name != "bank" and name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bank = import_module(".bank", __name__)
    return bank if name == "bank" else getattr(bank, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "bank"})
