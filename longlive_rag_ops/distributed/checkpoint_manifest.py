"""What a checkpoint of a bank says of itself: ``checkpoint.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..bank.checked_json import Fields, begins_checked, checked_json, is_number, read_checked_json, shortened
from ..bank.errors import NewerVersion, NoSavedBank, SavedBankError
from ..bank.page_format import PageFormat
from ..bank.saved_manifest import page_format_of
from ..version import __version__

MANIFEST = "checkpoint.json"
WHAT = "longlive-rag-ops memory bank, checkpoint of ranks"
VERSION = 1
DATA_NAME = re.compile(r"data-[0-9a-f]{32}", re.ASCII)


class Part(NamedTuple):
    """What a rank of the frames holds beside pages: bytes of the entry ``frames.N``, and their checksum."""

    bytes: int
    crc32c: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint without its data.

    Attributes:
        format: of the pages, with the heads of all ranks.
        sink: frames below it are sinks.
        data: name of the folder of a checkpoint of ``torch.distributed.checkpoint``.
        metadata: of that folder's ``.metadata``.
        parts: the entries ``frames.0``, ``frames.1`` and so on.
        left_out: frames that are among the data, and damaged, with the reason.
        settings: as given to `save`.
        mesh: ``frame_ranks`` and ``head_ranks`` that saved it; says nothing to who opens it.
        written_by: name and version of the program.
    """

    format: PageFormat
    sink: int
    data: str
    metadata: Part
    parts: list[Part]
    left_out: dict[int, str]
    settings: dict[str, Any]
    mesh: dict[str, int]
    written_by: str = f"longlive-rag-ops {__version__}"

    def to_bytes(self) -> bytes:
        """The file, a line an entry."""
        return checked_json(
            {
                "what": WHAT,
                "version": VERSION,
                "written_by": self.written_by,
                "page_format": self.format.to_dict(),
                "sink": self.sink,
                "settings": self.settings,
                "mesh": self.mesh,
                "data": self.data,
                "metadata": list(self.metadata),
                "parts": [list(part) for part in self.parts],
                "left_out": [[frame, reason] for frame, reason in self.left_out.items()],
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes, name: str) -> Manifest:
        """The manifest that a file's bytes are.

        Args:
            raw: the bytes.
            name: of the file, for errors.

        Raises:
            NoSavedBank: it is no manifest of a checkpoint.
            NewerVersion: this program is too old for it.
            SavedBankError: it is damaged, or says what cannot be.
        """
        if not is_manifest(raw):
            raise NoSavedBank(f"{name} is no checkpoint of a bank")
        fields = read_checked_json(raw, name)
        if fields.text("what") != WHAT:
            raise NoSavedBank(f"{name} is no checkpoint of a bank, but says it is {fields.text('what')!r}")
        version = fields.number("version", 1)
        if version > VERSION:
            raise NewerVersion(
                f"{name} has version {version}, written by {fields.entries.get('written_by')!r}; this is "
                f"longlive-rag-ops {__version__}, which reads versions up to {VERSION}"
            )
        data = fields.text("data")
        if not DATA_NAME.fullmatch(data):
            raise SavedBankError(f"{name}: data must be named data-(32 hex digits), got {data!r}")
        mesh = fields.fields("mesh")
        return cls(
            format=page_format_of(fields),
            sink=fields.number("sink"),
            data=data,
            metadata=_part(fields, "metadata", fields.list("metadata")),
            parts=[_part(fields, "parts", entry) for entry in fields.list("parts")],
            left_out=_left_out(fields),
            settings=dict(fields.fields("settings").entries),
            mesh={key: mesh.number(key, 1) for key in ("frame_ranks", "head_ranks")},
            written_by=fields.text("written_by"),
        )


def is_manifest(raw: bytes) -> bool:
    """Whether bytes are a checkpoint's manifest, perhaps a damaged or a newer one."""
    return begins_checked(raw) or WHAT.encode() in raw[:256]


def check_settings(name: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError that names what differs in the settings that are wanted."""
    differ = [
        f"{key} {value!r}, saved with {saved[key]!r}" if key in saved else f"{key} {value!r}, saved without it"
        for key, value in wanted.items()
        if key not in saved or saved[key] != value
    ]
    if differ:
        raise ValueError(f"settings must be those of the checkpoint {name}, got {'; '.join(differ)}")


def _part(fields: Fields, key: str, entry: Any) -> Part:
    if not isinstance(entry, list) or len(entry) != 2 or not all(is_number(number, 0) for number in entry):
        raise SavedBankError(f"{fields.name}: {key} must be pairs (bytes, crc32c), got {shortened(entry)}")
    return Part(*entry)


def _left_out(fields: Fields) -> dict[int, str]:
    found = {}
    for entry in fields.list("left_out"):
        pair = isinstance(entry, list) and len(entry) == 2
        if not pair or not is_number(entry[0], 0) or not isinstance(entry[1], str):
            raise SavedBankError(f"{fields.name}: left_out must be pairs (frame, reason), got {shortened(entry)}")
        found[entry[0]] = entry[1]
    return found
