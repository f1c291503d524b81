"""The memory bank: pages of finished frames, bounded, on the device, in host memory and on disk."""

from .config import BankConfig, parse_bytes
from .contents import Lost
from .errors import BankFull, DamagedPage, NewerVersion, NoSavedBank, SavedBankError
from .memory_bank import MemoryBank
from .page_format import PageFormat

__all__ = [
    "BankConfig",
    "BankFull",
    "DamagedPage",
    "Lost",
    "MemoryBank",
    "NewerVersion",
    "NoSavedBank",
    "PageFormat",
    "SavedBankError",
    "parse_bytes",
]
