"""The embedder that the demo searches by: names and files, what the report says, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longlive_rag_ops.bank import BankConfig
from longlive_rag_ops.cli import main
from longlive_rag_ops.demo import embedding, footage, show
from longlive_rag_ops.demo.codec import Codec
from longlive_rag_ops.demo.embedding import GRID_POOL, find_demo_embedder, shipped_embedder
from longlive_rag_ops.demo.report import build_report
from longlive_rag_ops.demo.settings import DemoSettings
from longlive_rag_ops.demo.stream import stream
from longlive_rag_ops.demo.tiers import check_tiers
from longlive_rag_ops.embedder import (
    AutoencoderConfig,
    AutoencoderEmbedder,
    LatentAutoencoder,
    average_pool,
    grid_pool,
    save_autoencoder,
)

SMALL = ("--quiet", "--size", "64x48", "--window", "7", "--top-k", "3", "--recent-exclude", "1")


def save_small(path: Path, height: int = 6, width: int = 8) -> Path:
    """An untrained autoencoder for latents of videos of 64 x 48."""
    torch.manual_seed(0)
    save_autoencoder(path, LatentAutoencoder(AutoencoderConfig(16, height, width, 24, (8, 12))))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "secret").mkdir()
    return save_small(tmp_path / "secret" / "mine.safetensors")


def settings(embedder: str) -> DemoSettings:
    found = find_demo_embedder(embedder)
    return DemoSettings(window=7, top_k=3, recent_exclude=1, size=(64, 48), embedder=found)


def run_demo(video: Path, out: Path, *arguments: str) -> dict[str, Any]:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the demo extra)")
    pytest.importorskip("tqdm", reason="tqdm is not installed (the demo extra)")
    assert main(["demo", "--video", str(video), "--out", str(out), *SMALL, *arguments]) == 0
    return json.loads((out / "report.json").read_text())


def chosen(report: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    return [(block["retrieved"], block["cosines"]) for block in report["runs"][0]["blocks"]]


def expected(video: Path, embed: Any) -> list[tuple[list[int], list[float]]]:
    """Frames and cosines as the rule has them: the query is the newest finished frame."""
    latents = footage.encode_video(video, Codec.shipped(), (64, 48), "VIDEO", None, lambda: None)[0]
    unit = torch.nn.functional.normalize(embed(latents).double(), dim=1)
    found = []
    for start in range(0, len(latents), 3):
        eligible = range(1, max(1, start - 7))
        cosines = unit[eligible.start : eligible.stop] @ unit[start - 1]
        best = cosines.topk(min(3, len(eligible)))
        found.append(((best.indices + 1).tolist(), best.values.tolist()))
    return found


def agree(report: dict[str, Any], rule: list[tuple[list[int], list[float]]]) -> None:
    assert any(frames for frames, _ in rule)
    for (frames, cosines), (right, values) in zip(chosen(report), rule, strict=True):
        assert frames == right and cosines == pytest.approx(values, abs=1e-5)


def test_the_default_and_the_pools(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default, grid, average = (
        run_demo(video, tmp_path / name, *arguments)
        for name, arguments in (
            ("a", ()),
            ("b", ("--embedder", "grid_pool")),
            ("c", ("--embedder", "average_pool")),
        )
    )
    assert default["embedder"] == grid["embedder"]
    assert default["embedder"] == {
        "name": "grid_pool", "embedding_dim": 256, "frame_shape": None, "hidden_dims": None
    }  # fmt: skip
    assert default["embedding"].startswith("mean of each of the 16 latent channels over a 4 x 4 grid")
    assert chosen(default) == chosen(grid) != chosen(average)
    agree(default, expected(video, grid_pool))
    agree(average, expected(video, average_pool))
    assert average["embedder"]["name"] == "average_pool" and average["embedder"]["embedding_dim"] == 16
    assert "frames are found by average_pool: mean of each of the 16 latent channels" in capsys.readouterr().out


@pytest.mark.parametrize("trained", [True, False])
def test_an_autoencoder(
    trained: bool, video: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trained:
        monkeypatch.setattr(embedding, "SHIPPED", checkpoint)
    report = run_demo(video, tmp_path / "out", "--embedder", "trained" if trained else str(checkpoint))
    agree(report, expected(video, AutoencoderEmbedder.load(checkpoint)))
    assert report["embedder"] == {
        "name": "trained" if trained else "mine.safetensors",
        "embedding_dim": 24,
        "frame_shape": [16, 6, 8],
        "hidden_dims": [8, 12],
    }
    assert "retrieval autoencoder" in report["embedding"] and "24 numbers" in report["embedding"]
    assert "secret" not in json.dumps(report)


def small_footage() -> footage.Footage:
    latents = torch.randn(30, 16, 6, 8, generator=torch.Generator().manual_seed(3))
    pictures = torch.zeros(30, 48, 64, 3, dtype=torch.uint8).numpy()
    return footage.Footage("video", "noise", latents, pictures, tuple(("noise", i) for i in range(30)), (), {})


def test_embeddings_are_recorded_and_the_tiers_use_them(checkpoint: Path) -> None:
    made = settings(str(checkpoint))
    run = stream(small_footage(), "content", made)
    assert run.embeddings.shape == (30, 24)
    blocks = [made.embedder.embed(part) for part in small_footage().latents.split(3)]
    assert torch.equal(run.embeddings, torch.cat(blocks))
    seen = []
    spy = replace(made.embedder, embed=lambda frames: seen.append(len(frames)) or grid_pool(frames))
    check = check_tiers(small_footage(), replace(made, embedder=spy, bank=BankConfig(host_bytes="64MiB")))
    assert check.equal == check.blocks == 10 and seen == [3] * 20


def test_what_the_embedder_may_miss_is_said_of_it(checkpoint: Path) -> None:
    for name, words in (
        ("grid_pool", "keeps the layout"),
        ("average_pool", "knows nothing"),
        (str(checkpoint), "seen"),
    ):
        made = settings(name)
        run = stream(small_footage(), "random", made)
        known = replace(run, footage=replace(run.footage, facts={"bunny": None}))
        report = build_report([known], Codec.shipped(), made)
        (caveat,) = (text for text in report["caveats"] if text.startswith("The sample clips"))
        assert words in caveat and made.embedder.limits in caveat


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_what_is_refused_before_a_video_is_opened(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "probe_video", lambda *_: pytest.fail("a video was opened"))
    out = ("--out", str(tmp_path / "out"), "--video", "any.mp4")
    message = refused(capsys, *out, "--embedder", str(checkpoint))
    assert "--embedder: mine.safetensors was made for latent frames of (16, 6, 8), which --size 64x48 gives" in message
    assert "the demo's are (16, 22, 40), from --size 320x176" in message
    odd = save_small(tmp_path / "odd.safetensors", 5, 7)
    assert "of (16, 5, 7); the demo's" in refused(capsys, *out, "--embedder", str(odd))
    words = (
        "--embedder: got 'best'; must be trained, average_pool, grid_pool, or a checkpoint that ends in .safetensors"
    )
    assert words in refused(capsys, *out, "--embedder", "best")
    assert "none.pt cannot be read" in refused(capsys, *out, "--embedder", str(tmp_path / "none.pt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4])
    assert "mine.safetensors is truncated" in refused(capsys, *out, "--embedder", str(checkpoint))
    monkeypatch.setattr(embedding, "SHIPPED", tmp_path / "embedder.safetensors")
    assert "embedder.safetensors, is missing from this installation" in refused(capsys, *out, "--embedder", "trained")
    assert not (tmp_path / "out").exists()


def test_the_shipped_embedder_is_loaded_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "SHIPPED", tmp_path / "embedder.safetensors")
    with pytest.raises(RuntimeError, match="install it anew"):
        shipped_embedder()
    save_small(tmp_path / "embedder.safetensors")
    assert shipped_embedder().config.frame_shape == (16, 6, 8)
    assert DemoSettings().embedder is GRID_POOL is find_demo_embedder("grid_pool")
