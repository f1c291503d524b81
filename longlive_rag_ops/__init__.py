"""Attention with a searchable memory for long autoregressive video generation.

Importing the package registers ``torch.ops.longlive`` and imports nothing but torch and numpy.
"""

from . import ops
from .bank import BankConfig, BankFull, DamagedPage, MemoryBank, PageFormat
from .config import WindowConfig
from .version import __version__
from .window import MemoryWindow

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
