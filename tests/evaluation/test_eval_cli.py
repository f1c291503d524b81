"""The command on small files: what it prints and writes, and every error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation_cases import OPTIONS, scene, write_video

from longlive_rag_ops import extras
from longlive_rag_ops.cli import main
from longlive_rag_ops.demo import embedding
from longlive_rag_ops.embedder import AutoencoderConfig, LatentAutoencoder, save_autoencoder
from longlive_rag_ops.embedder.latent_file import save_latents
from longlive_rag_ops.evaluation import full_attention
from longlive_rag_ops.evaluation.named_embedder import load_embedder
from longlive_rag_ops.evaluation.names import name_of


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    (tmp_path / "secret").mkdir()
    paths = [tmp_path / "secret" / f"clip {number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_latents(path, scene(number, 24))
    return list(map(str, paths))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return save_checkpoint(tmp_path / "mine.safetensors", 4, 6)


def save_checkpoint(path: Path, height: int, width: int) -> str:
    torch.manual_seed(0)
    save_autoencoder(path, LatentAutoencoder(AutoencoderConfig(16, height, width, 12, (8, 8))))
    return str(path)


def evaluated(*arguments: str) -> None:
    assert main(["eval-embedder", *arguments, *OPTIONS]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["eval-embedder", "--quiet", *arguments]) == 2
    printed, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and printed == ""
    return error


def test_end_to_end(clips: list[str], checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the demo extra)")
    out = tmp_path / "made" / "out"
    evaluated(*clips, "--embedder", "average_pool", checkpoint, f"other={checkpoint}", "--out", str(out))
    printed, progress = capsys.readouterr()
    assert progress == ""
    report = json.loads((out / "evaluation.json").read_text())
    assert [entry["name"] for entry in report["embedders"]] == ["average_pool", "mine", "other"]
    assert [entry["name"] for entry in report["clips"]] == ["clip_0", "clip_1"]
    assert report["settings"]["window"] == 7 and report["device"]["threads"] == 1
    assert report["recall"]["average_pool"]["mean"] == {"1": 1, "3": 1}
    assert report["overlap"]["mine"] == report["overlap"]["other"]
    pictures = ["neighbours.png", "spread.png", "overlap.png", "recall.png"]
    pictures += ["similarity_1_clip_0_clip_1.png", "similarity_2_clip_1_clip_0.png"]
    assert report["pictures"] == pictures
    assert sorted(path.name for path in out.iterdir()) == sorted(["evaluation.json", "evaluation.md", *pictures])
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and name in printed
    markdown = (out / "evaluation.md").read_text()
    assert "### Recall of a returning scene at 3" in markdown and "a toy's" in markdown
    for text in (json.dumps(report), markdown):
        assert "secret" not in text and str(tmp_path) not in text
    before = {name: (out / name).read_bytes() for name in pictures}
    evaluated(*clips, "--embedder", "average_pool", checkpoint, f"other={checkpoint}", "--out", str(out))
    assert before == {name: (out / name).read_bytes() for name in pictures}


def test_json_alone_needs_no_extras(
    clips: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras.importlib, "import_module", fail)
    evaluated(*clips, "--json", "--edit-pairs", "none")
    report = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in report["embedders"]] == ["average_pool", "grid_pool"]
    assert report["edits"] == report["pictures"] == []
    assert 'pip install "longlive-rag-ops[demo]"' in refused(capsys, *clips, "--out", "never_made")
    assert not Path("never_made").exists()
    assert main(["eval-embedder", *clips]) == 2 and "'tqdm'" in capsys.readouterr().err


def test_a_video_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed (the demo extra)")
    video = write_video(tmp_path / "wave.mp4", 84)
    save_latents(tmp_path / "a.safetensors", scene(0, 24, shape=(16, 6, 8)))
    arguments = (f"moving={video}", str(tmp_path / "a.safetensors"), "--size", "64x48", "--edit-pairs", "none")
    assert main(["eval-embedder", *arguments, *OPTIONS[:-1]]) == 0
    printed, progress = capsys.readouterr()
    assert "moving: 21 latent frames 16x6x8, from a video by the demo's linear codec" in printed
    assert "a: 24 latent frames 16x6x8, from a latent file" in printed
    assert "reading" in progress and "evaluating: 100%" in progress


def test_the_packages_own_embedder(
    clips: list[str], checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "SHIPPED", Path(checkpoint))
    evaluated(*clips, "--embedder", "trained", "--json", "--edit-pairs", "none")
    (row,) = json.loads(capsys.readouterr().out)["embedders"]
    assert row["name"] == "trained" and row["embedding_dim"] == 12 and "8, 8 channels" in row["what"]
    assert load_embedder("ours=trained").name == "ours"


def test_errors_of_clips(clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    missing = str(tmp_path / "none.safetensors")
    assert f"{missing} cannot be read" in refused(capsys, missing, "--out", out)
    assert not Path(out).exists()
    nan = scene(0, 9)
    nan[4] = torch.nan
    save_latents(tmp_path / "nan.safetensors", nan)
    assert "nan.safetensors: latents must be finite, frame 4" in refused(capsys, str(tmp_path / "nan.safetensors"))
    save_latents(tmp_path / "wide.safetensors", scene(0, 9, shape=(16, 4, 8)))
    words = refused(capsys, clips[0], str(tmp_path / "wide.safetensors"))
    assert "wide has latent frames of (16, 4, 8), clip_0 of (16, 4, 6)" in words
    assert "CLIP: 'clip_0' occurs twice" in refused(capsys, clips[0], clips[0], "--out", out)
    assert not Path(out).exists()
    assert "NAME=FILE must have a name" in refused(capsys, f"a b={clips[0]}")
    assert "NAME=FILE must have a name" in refused(capsys, "name=")


def test_errors_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")
    assert "CLIP: got" in refused(capsys, str(tmp_path / "none.mp4"))
    assert "sample clip: got 'none'" in refused(capsys, "sample:none")
    (tmp_path / "text.mp4").write_text("no video")
    assert "cannot be opened as a video" in refused(capsys, str(tmp_path / "text.mp4"))
    short = write_video(tmp_path / "short.mp4", 3)
    assert "fewer frames than the 4 of a latent frame" in refused(capsys, str(short), "--size", "64x48")


def test_errors_of_embedders(
    clips: list[str], checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--embedder: got 'best'; must be average_pool" in refused(capsys, *clips, "--embedder", "best")
    missing = str(tmp_path / "none.pt")
    assert missing in refused(capsys, *clips, "--embedder", missing)
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    damaged = str(tmp_path / "damaged.safetensors")
    assert damaged in refused(capsys, *clips, "--embedder", damaged)
    wide = save_checkpoint(tmp_path / "wide.safetensors", 8, 8)
    words = refused(capsys, *clips, "--embedder", f"w={wide}")
    assert f"{wide} was made for latent frames of (16, 8, 8), those of clip_0 are (16, 4, 6)" in words
    assert "'mine' occurs twice" in refused(capsys, *clips, "--embedder", checkpoint, checkpoint)
    assert "'newest' is the name of a rule" in refused(capsys, *clips, "--embedder", f"newest={checkpoint}")


def test_errors_of_options(clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--size: got 'big'" in refused(capsys, *clips, "--size", "big")
    assert "--threads: got -1" in refused(capsys, *clips, "--threads", "-1")
    assert "--top-k: got 0" in refused(capsys, *clips, "--top-k", "0")
    assert "frames_per_block" in refused(capsys, *clips, "--window", "8")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the demo extra)")
    (tmp_path / "file").touch()
    assert "--out: got" in refused(capsys, *clips, "--out", str(tmp_path / "file"))


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the demo extra)")

    def work(*_: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(full_attention.FullAttention, "project", work)
    (tmp_path / "file").touch()
    assert "--out: got" in refused(capsys, *clips, "--out", str(tmp_path / "file"))


def test_names_are_made_of_files() -> None:
    assert name_of("some/where/a clip (1).mp4") == "a_clip_1_"
    assert name_of("x" * 40 + ".pt") == "x" * 24
