"""``longlive-rag inspect``: what it says of saved banks, whole and damaged, and its exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bank"))
from saved_cases import data_file, edit_manifest, filled, names, page_format

from longlive_rag_ops.bank.saved_manifest import MANIFEST
from longlive_rag_ops.cli import main
from longlive_rag_ops.cli.inspect import runs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with filled(page_format("int8"), 9) as bank:
        bank.forget([6])
        bank.save(tmp_path / "saved")
    return tmp_path / "saved"


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_whole_bank(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(saved)
    assert main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert "version 1" in text and "8: 0-5, 7-8; sink 2" in text and "pages not (--verify): whole" in text
    assert "int8, 2 layers x 2 samples; pages of 3 tokens x 2 heads x 8, float16, 4096 bytes" in text
    assert "6 of generation 0, 1 of generation 1, 1 of generation 2" in text
    assert "index     6 frames, embeddings of 6 F32, 1 not finite" in text
    assert main(["inspect", str(saved), "--verify"]) == 0
    assert "manifest, index, sizes, 32 pages: whole" in capsys.readouterr().out
    assert names(saved) == before


def report(folder: Path, *options: str, status: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--json", *options]) == status
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict) and found["whole"] == (status == 0)
    return found


def test_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(saved, "--verify", status=0, capsys=capsys)
    assert found["format"] == page_format("int8").to_dict() and found["frame_bytes"] == 16384
    assert found["frames"] == "0-5, 7-8" and found["frame_count"] == 8 and found["sink"] == 2
    assert found["generations"] == {"0": 6, "1": 1, "2": 1}
    assert found["index"] == {"frames": 6, "embedding_dim": 6, "dtype": "F32", "never_found": 1}
    assert found["files"] == {
        data_file(saved, kind).name: data_file(saved, kind).stat().st_size for kind in ("pages", "index")
    }
    assert found["verified_pages"] == 32 and found["damaged_pages"] == [] and found["left_over"] == {}


def test_damaged_pages(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (4096 + 5, 4096 + 7 * 16384 + 3 * 4096 + 4000):
        flip(data_file(saved, "pages"), place)
    assert main(["inspect", str(saved)]) == 0  # it has not looked
    capsys.readouterr()
    assert main(["inspect", str(saved), "--verify"]) == 1
    text = capsys.readouterr().out
    assert "DAMAGED: frame 0, layer 0, sample 0: its checksum does not match" in text
    assert "DAMAGED: frame 8, layer 1, sample 1" in text and "damaged pages 2, frames lost 2" in text
    found = report(saved, "--verify", status=1, capsys=capsys)
    assert [(page["frame"], page["layer"], page["sample"]) for page in found["damaged_pages"]] == [(0, 0, 0), (8, 1, 1)]


def test_a_truncated_file_of_pages(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_file(saved, "pages")
    path.write_bytes(path.read_bytes()[:-1])
    assert "must have" in report(saved, status=1, capsys=capsys)["problems"][0]
    found = report(saved, "--verify", status=1, capsys=capsys)
    assert [page["reason"] for page in found["damaged_pages"]] == ["the file ends before it does"]
    path.write_bytes(b"")
    found = report(saved, "--verify", status=1, capsys=capsys)
    assert len(found["damaged_pages"]) == 32
    main(["inspect", str(saved), "--verify"])
    assert "DAMAGED: 12 more pages" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["manifest", "index"])
def test_a_bank_that_cannot_be_opened(saved: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(saved / MANIFEST if kind == "manifest" else data_file(saved, kind), 300)
    assert main(["inspect", str(saved)]) == 1
    assert "cannot be opened\nDAMAGED: " in capsys.readouterr().out
    assert "checksum" in report(saved, status=1, capsys=capsys)["problems"][0]


def test_what_is_no_saved_bank(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        assert main(["inspect", str(path)]) == 2
        output = capsys.readouterr()
        assert output.err.startswith("error: ") and "is no saved bank" in output.err and not output.out
    edit_manifest(saved, lambda entries: entries.update(version=2))
    assert main(["inspect", str(saved), "--json"]) == 2
    assert "reads versions up to 1" in capsys.readouterr().err


def test_what_is_left_over_is_shown(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"pages-{'0' * 32}.safetensors"
    (saved / name).write_bytes(b"killed")
    assert report(saved, status=0, capsys=capsys)["left_over"] == {name: 6}
    assert main(["inspect", str(saved)]) == 0
    assert f"left over {name}, 6 bytes" in capsys.readouterr().out


def test_pages_larger_than_a_piece(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checksums are made piece by piece."""
    monkeypatch.setattr("longlive_rag_ops.bank.saved_reader.PIECE", 1000)
    report(saved, "--verify", status=0, capsys=capsys)
    flip(data_file(saved, "pages"), 4096 + 2 * 4096 + 4095)
    found = report(saved, "--verify", status=1, capsys=capsys)
    assert [(page["frame"], page["layer"], page["sample"]) for page in found["damaged_pages"]] == [(0, 1, 0)]


def test_runs() -> None:
    assert runs([]) == "" and runs([3]) == "3" and runs([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
