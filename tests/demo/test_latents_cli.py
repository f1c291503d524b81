"""The command that makes latent files of videos: what is in them, how they are cut and named, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import scene_frames, write_video

from longlive_rag_ops.cli import main
from longlive_rag_ops.demo import clips
from longlive_rag_ops.demo.codec import Codec
from longlive_rag_ops.demo.footage import encode_video
from longlive_rag_ops.embedder.latent_file import latent_files, open_latents
from longlive_rag_ops.safetensors_file import read_safetensors

pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")
pytest.importorskip("tqdm", reason="tqdm is not installed (the demo extra)")

SIZE = ("--size", "64x48")


def expected(video: Path) -> torch.Tensor:
    return encode_video(video, Codec.shipped(), (64, 48), "VIDEO", None, lambda: None)[0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["latents", "--quiet", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_one_file_a_video(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_video(tmp_path / "b.mkv", scene_frames(4, 10))
    out = tmp_path / "made" / "out"
    assert main(["latents", str(video), str(other), "--out", str(out), *SIZE]) == 0
    printed, progress = capsys.readouterr()
    assert printed.splitlines() == [
        f"{out / 'aba.safetensors'}: latent frames 0-29, (30, 16, 6, 8) float32",
        f"{out / 'b.safetensors'}: latent frames 0-1, (2, 16, 6, 8) float32",
        "b.mkv: frames dropped at the end, which make no whole latent frame: 2",
    ]
    assert "aba.mp4" in progress and "latent frames" in progress
    made = latent_files(out)
    assert [(clip.path.name, clip.frames) for clip in made] == [("aba.safetensors", 30), ("b.safetensors", 2)]
    assert torch.equal(made[0].read(), expected(video)) and torch.equal(made[1].read(), expected(other))
    metadata, tensors = read_safetensors(out / "aba.safetensors")
    assert list(tensors) == ["latents"]
    assert len(metadata.pop("codec_provenance_sha256")) == 64
    assert metadata == {"codec": "linear", "video": "aba.mp4", "size": "64x48", "fps": "25", "first_frame": "0"}
    assert sorted(path.name for path in out.iterdir()) == ["aba.safetensors", "b.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cut_into_files(dtype: torch.dtype, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(dtype).removeprefix("torch.")
    out, more = tmp_path / "out", ["--frames", "13", "--dtype", name, "--quiet"]
    assert main(["latents", str(video), "--out", str(out), *SIZE, *more]) == 0
    printed, progress = capsys.readouterr()
    assert progress == "" and len(printed.splitlines()) == 3
    assert f"aba_002.safetensors: latent frames 20-29, (10, 16, 6, 8) {name}" in printed
    files = [read_safetensors(out / f"aba_00{i}.safetensors") for i in range(3)]
    assert [metadata["first_frame"] for metadata, _ in files] == ["0", "10", "20"]
    latents = [tensors["latents"] for _, tensors in files]
    assert [len(part) for part in latents] == [10, 10, 10] and latents[0].dtype == dtype
    assert torch.equal(torch.cat(latents), expected(video).to(dtype))


def test_a_sample_clip(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "clip_path", lambda name: video if name == "aba" else None)
    assert main(["latents", "sample:aba", "--out", str(tmp_path), "--quiet", *SIZE]) == 0
    assert open_latents(tmp_path / "aba.safetensors").frames == 30


def test_the_default_size(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", scene_frames(1, 4))
    assert main(["latents", str(path), "--out", str(tmp_path), "--quiet"]) == 0
    assert open_latents(tmp_path / "a.safetensors").frame_shape == (16, 22, 40)


def test_nothing_is_overwritten_unasked(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    whole, cut = ("--out", out, *SIZE), ("--out", out, *SIZE, "--frames", "8")
    assert main(["latents", "--quiet", str(video), *map(str, cut)]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    other = write_video(tmp_path / "b.mp4", scene_frames(4, 40))
    message = refused(capsys, other, video, *cut)
    assert f"--out: got '{out}', which holds aba_000.safetensors already and 3 more; --overwrite" in message
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    # Other names are no obstacle, and a shorter cut leaves files behind that are named.
    assert main(["latents", "--quiet", str(video), *map(str, whole)]) == 0
    assert "holds aba.safetensors already;" in refused(capsys, video, *whole)
    again = ["--overwrite", "--frames", "16", "--out", str(out), *SIZE]
    assert main(["latents", "--quiet", str(video), *again]) == 0
    note = capsys.readouterr().err
    assert "still holds aba_002.safetensors, aba_003.safetensors of an earlier, longer cut of aba.mp4" in note
    assert torch.equal(open_latents(out / "aba_001.safetensors").read(), expected(video)[15:])
    assert (out / "aba_002.safetensors").read_bytes() == before[out / "aba_002.safetensors"]


def test_a_damaged_video_leaves_nothing_of_its_own(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    broken = write_video(tmp_path / "broken.mkv", noise)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    out = tmp_path / "out"
    message = refused(capsys, video, broken, "--out", out, *SIZE, "--frames", "4")
    assert f"VIDEO: got '{broken}'" in message and "damaged or cut off" in message
    assert {path.name for path in out.iterdir()} == {f"aba_00{i}.safetensors" for i in range(8)}


def test_what_is_refused_before_anything_is_written(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    to = ("--out", out)
    (tmp_path / "more").mkdir()
    twin = write_video(tmp_path / "more" / "aba.mkv", scene_frames(1, 8))
    message = refused(capsys, video, twin, *to)
    assert f"VIDEO: got '{video}' and '{twin}', whose latents would both be written to aba.safetensors" in message
    assert "aba_000.safetensors" in refused(capsys, video, video, *to, "--frames", "4")
    assert "--frames: got 0" in refused(capsys, video, *to, "--frames", "0")
    assert "--size: got 'big'" in refused(capsys, video, *to, "--size", "big")
    assert "VIDEO: got" in refused(capsys, video, tmp_path / "none.mp4", *to)
    assert "--device: got 'cpu' without --vae" in refused(capsys, video, *to, "--device", "cpu")
    assert "--vae-dtype: got 'float16' without --vae" in refused(capsys, video, *to, "--vae-dtype", "float16")
    assert "config.json cannot be read" in refused(capsys, video, *to, "--vae", tmp_path / "none")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "which holds AutoencoderKL; it must hold" in refused(capsys, video, *to, "--vae", tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused(capsys, video, *to, "--vae", tmp_path)
    assert not out.exists()
    assert "--out: got" in refused(capsys, video, "--out", video / "in")


def test_a_video_too_short_for_a_latent_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = write_video(tmp_path / "short.mp4", scene_frames(1, 3))
    assert f"'{short}', which is too short" in refused(capsys, short, "--out", tmp_path / "out", *SIZE)
