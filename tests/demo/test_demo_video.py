"""Decoding: shapes, cropping, and every way a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import scene_frames, write_video

from longlive_rag_ops.demo.video import probe_video, read_frames

av = pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")


def test_frames_come_small_and_in_order(video: Path) -> None:
    frames = list(read_frames(video, (64, 48)))
    assert len(frames) == 120
    assert {frame.shape for frame in frames} == {(48, 64, 3)} and frames[0].dtype == np.uint8
    expected = scene_frames(1, 40)
    assert np.abs(frames[0].astype(int) - expected[0]).mean() < 6  # lossy, but the picture that went in


def test_a_wide_picture_is_cropped_about_its_centre(tmp_path: Path) -> None:
    picture = np.zeros((4, 32, 96, 3), np.uint8)
    picture[:, :, 32:64] = 255
    path = write_video(tmp_path / "wide.mp4", picture)
    frame = next(read_frames(path, (32, 32)))
    assert frame.shape == (32, 32, 3) and frame[:, 4:-4].mean() > 230


def test_facts(video: Path) -> None:
    facts = probe_video(video)
    assert (facts.name, facts.width, facts.height, facts.fps, facts.declared_frames) == ("aba.mp4", 64, 48, 25.0, 120)


def test_limit_reads_no_further(video: Path) -> None:
    assert sum(1 for _ in read_frames(video, (64, 48), limit=7)) == 7


@pytest.mark.parametrize("size", [(0, 16), (20, 16), (16, -16), (8192, 16)])
def test_sizes_that_are_not_allowed(video: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"size: got .* multiples of 16"):
        next(read_frames(video, size))


def fails(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match="--video: got") as caught:
        list(read_frames(path, (64, 48)))
    assert words in str(caught.value) and path.name in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    fails(tmp_path / "none.mp4", "does not exist")


def test_a_folder(tmp_path: Path) -> None:
    fails(tmp_path, "not a file")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    fails(tmp_path / "empty.mp4", "an empty file")


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    fails(tmp_path / "text.mp4", "cannot be opened as a video")


def test_sound_alone(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    fails(path, "no video stream")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_before_its_header(video: Path, share: float) -> None:
    data = video.read_bytes()
    video.write_bytes(data[: int(share * len(data))])
    fails(video, "cut off")


@pytest.mark.parametrize("share", [0.4, 0.7, 0.9])
@pytest.mark.parametrize("name, options", [("fast.mp4", {"movflags": "faststart"}), ("cut.mkv", {})])
def test_truncated_after_its_header(tmp_path: Path, name: str, options: dict[str, str], share: float) -> None:
    path = write_video(tmp_path / name, scene_frames(3, 90), **options)
    assert sum(1 for _ in read_frames(path, (64, 48))) == 90
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"--video: got .*(damaged|cut off)"):
        list(read_frames(path, (64, 48)))
