"""The demo on ranks, started as users start it: the report of one process, and how ranks and one process compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="PyAV is not installed (the demo extra)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (the demo extra)")
pytest.importorskip("tqdm", reason="tqdm is not installed (the demo extra)")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "torchrun_demo.py"
LIMIT = 240  # seconds
# What depends on the machine, or is one rank's.
OTHERS = {"device", "seconds", "milliseconds", "bytes_held", "ranks"}

pytestmark = pytest.mark.skipif(not EXAMPLE.is_file(), reason="examples are not beside the tests")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small video of three scenes, and a window for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "demo")
        from synthetic import scene_frames, write_video

    parts = [scene_frames(1, 40), scene_frames(2, 40), scene_frames(1, 40, first=60)]
    video = write_video(tmp_path_factory.mktemp("video") / "aba.mp4", np.concatenate(parts))
    sizes = ["--size", "64x48", "--window", "7", "--top-k", "3", "--recent-exclude", "1"]
    return ["--video", str(video), "--quiet", *sizes]


@pytest.fixture(scope="module")
def one(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of one process."""
    folder = tmp_path_factory.mktemp("one")
    return report_of([sys.executable, "-m", "longlive_rag_ops", "demo", *options], folder)[0]


def report_of(command: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    process = subprocess.Popen(
        [*command, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        printed, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks then
        raise
    assert process.returncode == 0, errors
    for picture in ("contact_sheet", "similarity_map", "coverage"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "report.json").read_text()), printed


def differences(one: Any, other: Any, tolerance: float, path: str = "") -> list[str]:
    """Where two reports differ, numbers by more than a tolerance."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in one | other if name not in OTHERS]
        return [x for name in names for x in differences(one.get(name), other.get(name), tolerance, f"{path}.{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            x
            for at, pair in enumerate(zip(one, other, strict=True))
            for x in differences(*pair, tolerance, f"{path}.{at}")
        ]
    if isinstance(one, float) and isinstance(other, float):
        return [] if abs(one - other) <= tolerance else [f"{path}: {one} and {other}"]
    return [] if one == other else [f"{path}: {one} and {other}"]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(EXAMPLE),
        *arguments,
    ]


@pytest.mark.parametrize(
    ("ranks", "arguments", "shape"),
    [
        (2, [], (2, 1, "pages")),
        pytest.param(4, ["--head-ranks", "2", "--transfer", "merge"], (2, 2, "merge"), marks=pytest.mark.slow),
    ],
    ids=["2_by_frame", "4_by_frame_and_head"],
)
def test_the_report_is_one_processes(
    options: list[str],
    one: dict[str, Any],
    tmp_path: Path,
    ranks: int,
    arguments: list[str],
    shape: tuple[int, int, str],
) -> None:
    shared, printed = report_of(torchrun(ranks, *options, *arguments), tmp_path / "ranks")
    # Shares are rounded to six digits.
    assert differences(one, shared, 0.0 if shape[2] == "pages" else 2e-6) == []
    assert one["ranks"] is None
    found = shared["ranks"]
    assert (found["frame_ranks"], found["head_ranks"], found["transfer"]) == shape
    compared = found["compared"]
    assert compared["same_selections"] == compared["blocks"] == 10
    assert compared["largest_error"] <= compared["allowed_error"]
    assert f"{ranks} ranks: frames over {shape[0]}, heads over {shape[1]}" in printed


def test_it_says_how_to_start_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and "torchrun --nproc-per-node 2" in done.stderr
    assert not any(tmp_path.iterdir())
