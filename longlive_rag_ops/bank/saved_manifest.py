"""What a saved bank says of itself: ``manifest.json``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from ..build_info import extension
from ..ops.checks import LARGEST_FRAME
from ..safetensors_file import DTYPES, MAX_HEADER
from ..version import __version__
from .errors import NewerVersion, NoSavedBank, SavedBankError
from .page_format import ALIGNMENT, PageFormat

MANIFEST = "manifest.json"
WHAT = "longlive-rag-ops memory bank"
VERSION = 1
MAX_BYTES = 64 * 2**20  # of a manifest
MAX_EMBEDDING = 2**20
MAX_INDEX_HEADER = 2**16
LARGEST = 2**62  # numbers that fit into 64 bits, sums of two included
DATA_NAME = re.compile(r"(pages|index)-[0-9a-f]{32}\.safetensors", re.ASCII)
# The checksum is that of every byte after this, so that any byte that differs shows.
_BEGINNING = re.compile(rb'\{"crc32c": "([0-9a-f]{8})",\n')
_EMBEDDINGS = ("F32", "F64")


@dataclass(frozen=True)
class PagesFile:
    """Records one after another from ``begins`` on, in the order of the manifest's frames; before them a header."""

    file: str
    bytes: int
    begins: int
    header_crc32c: int


@dataclass(frozen=True)
class IndexFile:
    """Checksums of pages, retrieval counts and the index; see `saved_contents`. ``crc32c`` is of all its bytes."""

    file: str
    bytes: int
    crc32c: int
    frames: int
    embedding_dim: int
    dtype: str

    def data_bytes(self, pages: PageFormat, frames: int) -> int:
        """Bytes of the tensors of a bank of so many frames, without the file's header."""
        embedding = self.embedding_dim * DTYPES[self.dtype].itemsize
        return frames * (4 * pages.layers * pages.samples + 8) + self.frames * (8 + pages.samples * embedding)


@dataclass(frozen=True)
class Manifest:
    """A saved bank without its pages and index.

    Attributes:
        format: of the pages.
        sink: frames below it are sinks.
        frames: generation of each frame, in the order of their records, which ascends.
        pages, index: the data files.
        written_by: name and version of the program.
    """

    format: PageFormat
    sink: int
    frames: dict[int, int]
    pages: PagesFile
    index: IndexFile
    written_by: str = f"longlive-rag-ops {__version__}"

    def to_bytes(self) -> bytes:
        """The file, a line an entry."""
        entries: dict[str, Any] = {
            "what": WHAT,
            "version": VERSION,
            "written_by": self.written_by,
            "page_format": self.format.to_dict(),
            "page_bytes": self.format.page_bytes,
            "sink": self.sink,
            "pages": vars(self.pages),
            "index": vars(self.index),
            "frames": [[frame, generation] for frame, generation in self.frames.items()],
        }
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
        rest = (",\n".join(lines) + "}\n").encode()
        return b'{"crc32c": "%08x",\n' % crc32c(rest) + rest

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """The manifest that a file's bytes are, every number in bounds and agreeing with the others.

        Raises:
            NoSavedBank: it is no manifest of a saved bank.
            NewerVersion: this program is too old for it.
            SavedBankError: it is damaged, or says what cannot be.
        """
        if not is_manifest(raw):
            raise NoSavedBank(f"{MANIFEST} is no saved bank's")
        beginning = _BEGINNING.match(raw)
        if beginning is None or int(beginning[1], 16) != crc32c(raw[beginning.end() :]):
            raise SavedBankError(f"{MANIFEST} is damaged: its checksum does not match")
        try:
            entries = json.loads(raw, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise SavedBankError(f"{MANIFEST} is damaged: {error}") from None
        if not isinstance(entries, dict):
            raise SavedBankError(f"{MANIFEST} is damaged: it is not an object")
        fields = _Fields(MANIFEST, entries)
        if fields.text("what") != WHAT:
            raise NoSavedBank(f"{MANIFEST} is no saved bank's")
        version = fields.number("version", 1)
        if version > VERSION:
            raise NewerVersion(
                f"{MANIFEST} has version {version}, written by {entries.get('written_by')!r}; this is longlive-rag-ops "
                f"{__version__}, which reads versions up to {VERSION}"
            )
        manifest = cls(
            format=_page_format(fields),
            sink=fields.number("sink"),
            frames=_frames(fields),
            pages=PagesFile(**_data_file(fields, "pages", ("bytes", "begins", "header_crc32c"))),
            index=IndexFile(**_data_file(fields, "index", ("bytes", "crc32c", "frames", "embedding_dim"), "dtype")),
            written_by=fields.text("written_by"),
        )
        manifest._check(fields.number("page_bytes"))
        return manifest

    def _check(self, page_bytes: int) -> None:
        form, pages, index = self.format, self.pages, self.index
        if page_bytes != form.page_bytes:
            raise SavedBankError(f"{MANIFEST}: page_bytes must be {form.page_bytes} (page_format), got {page_bytes}")
        if pages.begins % ALIGNMENT or not 0 < pages.begins <= MAX_HEADER + ALIGNMENT:
            raise SavedBankError(f"{MANIFEST}: pages begins must be a multiple of {ALIGNMENT}, got {pages.begins}")
        expected = pages.begins + len(self.frames) * form.record_bytes
        if pages.bytes != expected:
            raise SavedBankError(f"{MANIFEST}: pages bytes must be {expected} (page_format, frames), got {pages.bytes}")
        if index.frames > len(self.frames):
            raise SavedBankError(f"{MANIFEST}: index frames must be at most {len(self.frames)}, got {index.frames}")
        if index.dtype not in _EMBEDDINGS:
            raise SavedBankError(f"{MANIFEST}: index dtype must be {' or '.join(_EMBEDDINGS)}, got {index.dtype!r}")
        if index.frames and not 1 <= index.embedding_dim <= MAX_EMBEDDING:
            raise SavedBankError(
                f"{MANIFEST}: index embedding_dim must be from 1 to {MAX_EMBEDDING}, got {index.embedding_dim}"
            )
        data = index.data_bytes(form, len(self.frames))
        if not data <= index.bytes <= data + MAX_INDEX_HEADER:
            raise SavedBankError(
                f"{MANIFEST}: index bytes must be {data} (page_format, frames, index) and a header of at most "
                f"{MAX_INDEX_HEADER}, got {index.bytes}"
            )
        for name, value in (("pages header_crc32c", pages.header_crc32c), ("index crc32c", index.crc32c)):
            if value >= 2**32:
                raise SavedBankError(f"{MANIFEST}: {name} must fit into 32 bits, got {value}")


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a buffer; ``crc`` is that of what comes before it."""
    if not len(data):
        return crc
    view = numpy.frombuffer(data, numpy.uint8)
    return int(extension().crc32c(view.ctypes.data, view.nbytes, crc))


def is_manifest(raw: bytes) -> bool:
    """Whether bytes are a saved bank's manifest, perhaps a damaged or a newer one."""
    return raw.startswith(b'{"crc32c": "') or WHAT.encode() in raw[:256]


class _Fields:
    """An object of the manifest, whose entries are read with their types and bounds checked."""

    def __init__(self, name: str, entries: Mapping[str, Any]) -> None:
        self.name, self.entries = name, entries

    def number(self, key: str, low: int = 0) -> int:
        return self._get(key, lambda x: _is_number(x, low), f"an int from {low} to 2^62")

    def text(self, key: str) -> str:
        return self._get(key, lambda x: isinstance(x, str) and len(x) <= 200, "a text of at most 200 characters")

    def fields(self, key: str) -> _Fields:
        return _Fields(f"{self.name}: {key}", self._get(key, lambda x: isinstance(x, dict), "an object"))

    def list(self, key: str) -> list[Any]:
        return self._get(key, lambda x: isinstance(x, list), "a list")

    def _get(self, key: str, allowed: Callable[[Any], bool], expected: str) -> Any:
        if key not in self.entries:
            raise SavedBankError(f"{self.name} lacks {key}")
        value = self.entries[key]
        if not allowed(value):
            raise SavedBankError(f"{self.name}: {key} must be {expected}, got {_short(value)}")
        return value


def _is_number(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= LARGEST


def _page_format(fields: _Fields) -> PageFormat:
    described = fields.fields("page_format")
    numbers = {key: described.number(key, 1) for key, value in described.entries.items() if not isinstance(value, str)}
    if math.prod(numbers.values()) > LARGEST // 64:  # what bounds every size that follows from it
        raise SavedBankError(f"{described.name} describes frames that are too large: {numbers}")
    try:
        return PageFormat.from_dict(described.entries)
    except (KeyError, TypeError, ValueError) as error:
        raise SavedBankError(f"{described.name} is not allowed: {error}") from None


def _frames(fields: _Fields) -> dict[int, int]:
    frames: dict[int, int] = {}
    last = -1
    for entry in fields.list("frames"):
        pair = isinstance(entry, list) and len(entry) == 2 and all(_is_number(number, 0) for number in entry)
        if not pair or entry[0] > LARGEST_FRAME:
            raise SavedBankError(f"{MANIFEST}: frames must be pairs (frame, generation), got {_short(entry)}")
        if entry[0] <= last:
            raise SavedBankError(f"{MANIFEST}: frames must ascend, got {entry[0]} after {last}")
        last = entry[0]
        frames[last] = entry[1]
    return frames


def _data_file(fields: _Fields, key: str, numbers: tuple[str, ...], *texts: str) -> dict[str, Any]:
    described = fields.fields(key)
    file = described.text("file")
    if not DATA_NAME.fullmatch(file) or not file.startswith(f"{key}-"):
        raise SavedBankError(f"{described.name}: file must be named {key}-(32 hex digits).safetensors, got {file!r}")
    found = {name: described.number(name) for name in numbers}
    return {"file": file, **found, **{name: described.text(name) for name in texts}}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object names an entry twice, of {sorted(name for name, _ in pairs)[:20]}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "something deeply nested"
    return text if len(text) <= 80 else f"{text[:77]}..."
