"""What a memory bank raises, importable without the compiled core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..build_info import extension


class BankFull(RuntimeError):
    """No room for what was asked, and nothing may be given up for it."""


class DamagedPage(RuntimeError):
    """A stored page failed its checksum or could not be read. The frame is gone from the bank."""


class SavedBankError(ValueError):
    """A saved bank that cannot be opened; the message says why."""


class NoSavedBank(SavedBankError):
    """There is no saved bank."""


class NewerVersion(SavedBankError):
    """A saved bank of a version that is not known here."""


@contextmanager
def core_errors() -> Iterator[None]:
    """Raises the core's own exceptions as those of this module."""
    core = extension()
    try:
        yield
    except core.BankFull as error:
        raise BankFull(str(error)) from None
    except core.Damaged as error:
        raise DamagedPage(str(error)) from None
