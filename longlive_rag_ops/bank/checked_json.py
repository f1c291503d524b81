"""JSON files that carry a checksum, and objects of them whose entries are read with their types and bounds checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy

from ..build_info import extension
from .errors import SavedBankError

LARGEST = 2**62  # numbers that fit into 64 bits, sums of two included
# The checksum is that of every byte after this, so that any byte that differs shows.
_BEGINNING = re.compile(rb'\{"crc32c": "([0-9a-f]{8})",\n')


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a buffer; ``crc`` is that of what comes before it."""
    if not len(data):
        return crc
    view = numpy.frombuffer(data, numpy.uint8)
    return int(extension().crc32c(view.ctypes.data, view.nbytes, crc))


def checked_json(entries: Mapping[str, Any]) -> bytes:
    """The bytes of a file with these entries, a line an entry, the checksum first."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
    rest = (",\n".join(lines) + "}\n").encode()
    return b'{"crc32c": "%08x",\n' % crc32c(rest) + rest


def read_checked_json(raw: bytes, name: str) -> Fields:
    """The entries of a file that `checked_json` made.

    Args:
        raw: its bytes.
        name: its name, for errors.

    Raises:
        SavedBankError: it is damaged.
    """
    beginning = _BEGINNING.match(raw)
    if beginning is None or int(beginning[1], 16) != crc32c(raw[beginning.end() :]):
        raise SavedBankError(f"{name} is damaged: its checksum does not match")
    try:
        entries = json.loads(raw, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SavedBankError(f"{name} is damaged: {error}") from None
    if not isinstance(entries, dict):
        raise SavedBankError(f"{name} is damaged: it is not an object")
    return Fields(name, entries)


def begins_checked(raw: bytes) -> bool:
    """Whether bytes begin as a file that `checked_json` made, perhaps a damaged one."""
    return raw.startswith(b'{"crc32c": "')


class Fields:
    """An object whose entries are read with their types and bounds checked.

    Args:
        name: of the object, for errors, which are all `SavedBankError`.
        entries: its entries.
    """

    def __init__(self, name: str, entries: Mapping[str, Any]) -> None:
        self.name, self.entries = name, entries

    def number(self, key: str, low: int = 0) -> int:
        """An int."""
        return self._get(key, lambda x: is_number(x, low), f"an int from {low} to 2^62")

    def text(self, key: str) -> str:
        """A short text."""
        return self._get(key, lambda x: isinstance(x, str) and len(x) <= 200, "a text of at most 200 characters")

    def fields(self, key: str) -> Fields:
        """An object."""
        return Fields(f"{self.name}: {key}", self._get(key, lambda x: isinstance(x, dict), "an object"))

    def list(self, key: str) -> list[Any]:
        """A list."""
        return self._get(key, lambda x: isinstance(x, list), "a list")

    def _get(self, key: str, allowed: Callable[[Any], bool], expected: str) -> Any:
        if key not in self.entries:
            raise SavedBankError(f"{self.name} lacks {key}")
        value = self.entries[key]
        if not allowed(value):
            raise SavedBankError(f"{self.name}: {key} must be {expected}, got {shortened(value)}")
        return value


def is_number(value: Any, low: int) -> bool:
    """Whether it is an int from ``low`` to 2^62."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= LARGEST


def shortened(value: Any) -> str:
    """What errors show of it."""
    try:
        text = repr(value)
    except RecursionError:
        return "something deeply nested"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object names an entry twice, of {sorted(name for name, _ in pairs)[:20]}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
