"""What a saved bank says of itself: ``manifest.json``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..ops.checks import LARGEST_FRAME
from ..safetensors_file import DTYPES, MAX_HEADER
from ..version import __version__
from .checked_json import LARGEST, Fields, begins_checked, checked_json, is_number, read_checked_json, shortened
from .errors import NewerVersion, NoSavedBank, SavedBankError
from .page_format import ALIGNMENT, PageFormat

MANIFEST = "manifest.json"
WHAT = "longlive-rag-ops memory bank"
VERSION = 1
MAX_BYTES = 64 * 2**20  # of a manifest
MAX_EMBEDDING = 2**20
MAX_INDEX_HEADER = 2**16
DATA_NAME = re.compile(r"(pages|index)-[0-9a-f]{32}\.safetensors", re.ASCII)
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
        return checked_json(entries)

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
        fields = read_checked_json(raw, MANIFEST)
        if fields.text("what") != WHAT:
            raise NoSavedBank(f"{MANIFEST} is no saved bank's")
        version = fields.number("version", 1)
        if version > VERSION:
            raise NewerVersion(
                f"{MANIFEST} has version {version}, written by {fields.entries.get('written_by')!r}; this is "
                f"longlive-rag-ops {__version__}, which reads versions up to {VERSION}"
            )
        manifest = cls(
            format=page_format_of(fields),
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


def is_manifest(raw: bytes) -> bool:
    """Whether bytes are a saved bank's manifest, perhaps a damaged or a newer one."""
    return begins_checked(raw) or WHAT.encode() in raw[:256]


def page_format_of(fields: Fields) -> PageFormat:
    """The entry ``page_format``; SavedBankError when it describes none."""
    described = fields.fields("page_format")
    numbers = {key: described.number(key, 1) for key, value in described.entries.items() if not isinstance(value, str)}
    if math.prod(numbers.values()) > LARGEST // 64:  # what bounds every size that follows from it
        raise SavedBankError(f"{described.name} describes frames that are too large: {numbers}")
    try:
        return PageFormat.from_dict(described.entries)
    except (KeyError, TypeError, ValueError) as error:
        raise SavedBankError(f"{described.name} is not allowed: {error}") from None


def _frames(fields: Fields) -> dict[int, int]:
    frames: dict[int, int] = {}
    last = -1
    for entry in fields.list("frames"):
        pair = isinstance(entry, list) and len(entry) == 2 and all(is_number(number, 0) for number in entry)
        if not pair or entry[0] > LARGEST_FRAME:
            raise SavedBankError(f"{MANIFEST}: frames must be pairs (frame, generation), got {shortened(entry)}")
        if entry[0] <= last:
            raise SavedBankError(f"{MANIFEST}: frames must ascend, got {entry[0]} after {last}")
        last = entry[0]
        frames[last] = entry[1]
    return frames


def _data_file(fields: Fields, key: str, numbers: tuple[str, ...], *texts: str) -> dict[str, Any]:
    described = fields.fields(key)
    file = described.text("file")
    if not DATA_NAME.fullmatch(file) or not file.startswith(f"{key}-"):
        raise SavedBankError(f"{described.name}: file must be named {key}-(32 hex digits).safetensors, got {file!r}")
    found = {name: described.number(name) for name in numbers}
    return {"file": file, **found, **{name: described.text(name) for name in texts}}
