"""The memory bank: pages of finished frames, bounded, on the device, in host memory and on disk."""

from .config import BankConfig, parse_bytes
from .errors import BankFull, DamagedPage
from .memory_bank import Lost, MemoryBank
from .page_format import PageFormat

__all__ = ["BankConfig", "BankFull", "DamagedPage", "Lost", "MemoryBank", "PageFormat", "parse_bytes"]
