"""The examples run, learn, and write what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from window_pair import one_thread, rejected  # noqa: F401 (a fixture)

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--steps", "40", "--dim", "32", "--blocks", "10", "--clips", "4", "--forwards", "2", "--lr", "1e-2"]

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not beside the tests")


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return pytest.importorskip("toy_scenes")


def test_a_scene_returns_as_it_was(scenes: ModuleType) -> None:
    clips = scenes.make_clips(3, 12, torch.Generator().manual_seed(0), 2, 3)
    assert clips.latents.shape == (3, 24, 3, 8, 8) and clips.labels.shape == (3, 12) and clips.returns == 9
    error = scenes.backdrop_error(clips.latents, clips.backdrop)
    of_a = (clips.labels == clips.labels[:, -1:]).repeat_interleave(2, 1)
    assert of_a.sum(1).tolist() == [10] * 3
    assert (error[of_a] == 0).all() and (error[~of_a] > 0.05).all()
    assert sorted(clips.labels[0].unique().tolist()) == [0, 1, 2]
    assert scenes.embed_frames(clips.latents).shape == (3, 24, 12)


def test_clips_are_cut_where_they_can_be(scenes: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        clips = scenes.make_clips(1, 9, generator)
        runs = torch.unique_consecutive(clips.labels[0], return_counts=True)[1].tolist()
        assert len(runs) == 4 and runs[0] == 1 and runs[1] >= 2 and runs[2] >= 4
        assert clips.returns == 9 - runs[3]
    with rejected("blocks", "8", "7"):
        scenes.make_clips(1, 7, generator)
    with rejected("blocks", "11", "10"):
        scenes.make_clips(1, 10, generator, 3, 3)


@pytest.mark.slow
def test_the_video_transformer_learns_and_generates(
    scenes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package)
    import causal_video_transformer

    result: dict[str, Any] = causal_video_transformer.main([*TINY, "--out", str(tmp_path / "new" / "folder")])
    assert result["steps"] == 40
    assert result["loss_last"] < 0.9 * result["loss_first"]
    groups = result["backdrop_error"]
    assert list(groups) == ["2 blocks of A, 4 of B"]
    for name, blocks in groups["2 blocks of A, 4 of B"].items():
        assert len(blocks) == 3 and all(0 < error < 10 for error in blocks), name
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text()) == result
    assert (tmp_path / "new" / "folder" / "scenes.png").read_bytes().startswith(b"\x89PNG")
    assert "40 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_blocks_that_are_too_few(scenes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    import causal_video_transformer

    with pytest.raises(SystemExit):
        causal_video_transformer.main(["--blocks", "9"])
    assert "--blocks" in capsys.readouterr().err
