"""Latents by diffusers' AutoencoderKLWan, a tiny random one: against calling it by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from window_pair import one_thread  # noqa: F401 (a fixture)

pytest.importorskip("diffusers")

from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from longlive_rag_ops.cli import main
from longlive_rag_ops.demo import video_latents
from longlive_rag_ops.demo.video import VideoFacts
from longlive_rag_ops.demo.wan_encoder import WanEncoder
from longlive_rag_ops.safetensors_file import read_safetensors

pytestmark = [pytest.mark.backbones]

FRAMES = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), np.uint8)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    mean, std = torch.linspace(-1, 1, 16).tolist(), torch.linspace(0.5, 3, 16).tolist()
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1, latents_mean=mean, latents_std=std
    )
    vae.save_pretrained(tmp_path / "wan-vae")
    return tmp_path / "wan-vae"


@torch.no_grad()
def by_hand(folder: Path, frames: NDArray[np.uint8], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(n, 16, h, w) as Wan's pipelines turn a video into latents."""
    vae = AutoencoderKLWan.from_pretrained(folder, local_files_only=True).to(dtype)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
    mode = vae.encode(video.to(dtype)).latent_dist.mode().float()
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    return ((mode - mean) / std)[0].transpose(0, 1)


@pytest.mark.parametrize("frames, latents, dropped", [(1, 1, 0), (4, 1, 3), (9, 3, 0), (12, 3, 3)])
def test_latents_are_those_of_the_pipelines(folder: Path, frames: int, latents: int, dropped: int) -> None:
    encoder, ticks = WanEncoder(folder), []
    found = encoder.encode(iter(FRAMES[:frames]), lambda: ticks.append(1))
    assert found.dropped == dropped and len(ticks) == latents == encoder.latent_frames(frames)
    assert found.latents.shape == (latents, 16, 4, 6) and found.latents.is_contiguous()
    torch.testing.assert_close(found.latents, by_hand(folder, FRAMES[: frames - dropped]), atol=1e-5, rtol=1e-5)
    assert found.latents.std() > 0.01  # a constant would compare equal as well


def test_other_dtypes(folder: Path) -> None:
    found = WanEncoder(folder, dtype=torch.bfloat16).encode(FRAMES[:5], lambda: None).latents
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(folder, FRAMES[:5], torch.bfloat16), atol=2e-2, rtol=2e-2)


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []

    def read(path: Path, size: tuple[int, int], *, argument: str) -> Iterator[NDArray[np.uint8]]:
        sizes.append(size)
        return iter(FRAMES)

    # PyAV is none of the packages that these tests have.
    monkeypatch.setattr(video_latents, "read_frames", read)
    monkeypatch.setattr(video_latents, "probe_video", lambda path, argument: VideoFacts(path.name, 48, 32, 24.0, 12))
    command = ["latents", "clip.mp4", "--vae", str(folder), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*command, "--frames", "2", "--dtype", "bfloat16"]) == 0
    printed, progress = capsys.readouterr()
    assert "clip_001.safetensors: latent frames 2-2, (1, 16, 4, 6) bfloat16" in printed
    assert "no whole latent frame: 3" in printed and "clip.mp4" in progress
    assert sizes == [(832, 480)]
    files = [read_safetensors(tmp_path / "out" / f"clip_00{i}.safetensors") for i in range(2)]
    found = torch.cat([tensors["latents"] for _, tensors in files])
    torch.testing.assert_close(found.float(), by_hand(folder, FRAMES[:9]), atol=1e-2, rtol=1e-2)
    facts = {"codec": "AutoencoderKLWan", "codec_folder": "wan-vae", "video": "clip.mp4", "size": "832x480"}
    assert files[1][0] == {**facts, "fps": "24", "first_frame": "2"}


def test_latents_that_are_not_finite_are_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latents_std": [1e-30] * 16}))
    monkeypatch.setattr(video_latents, "read_frames", lambda *_, **__: iter(FRAMES[:1]))
    monkeypatch.setattr(video_latents, "probe_video", lambda path, argument: VideoFacts(path.name, 48, 32, 24.0, 1))
    command = ["latents", "clip.mp4", "--vae", str(folder), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*command, "--quiet", "--dtype", "float16"]) == 2
    assert "VIDEO: got 'clip.mp4', whose latents have NaN or infinity" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_what_is_refused(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in weights.items() if name != "quant_conv.bias"}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"--vae: got .*, which lacks tensors \(1\), such as quant_conv.bias"):
        WanEncoder(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"--vae: got .*, which cannot be loaded: "):
        WanEncoder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"--vae: got .*, which cannot be loaded: "):
        WanEncoder(folder)
    save_file(weights, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    for name, value in (("latents_std", [1.0] * 15), ("latents_std", [1.0] * 15 + [0.0]), ("latents_mean", None)):
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=rf"whose {name} is .* must be 16 finite numbers"):
            WanEncoder(folder)
