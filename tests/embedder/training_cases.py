"""Synthetic clips and a tiny model for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longlive_rag_ops.embedder.latent_file import save_latents
from longlive_rag_ops.embedder.training_config import TrainingConfig
from longlive_rag_ops.safetensors_file import read_safetensors

SHAPE = (4, 6, 8)
TINY: dict[str, Any] = {"hidden_dims": (8, 16), "latent_dim": 8, "seq_len": 4, "batch_size": 3, "epochs": 3, "lr": 3e-3}
OPTIONS = ("--hidden-dims", "8", "16", "--latent-dim", "8", "--seq-len", "4", "--batch-size", "3", "--lr", "3e-3")


def tiny(**settings: Any) -> TrainingConfig:
    """A configuration of small sizes."""
    return TrainingConfig(**{**TINY, **settings})


def write_clips(folder: Path, count: int = 8, frames: int = 9) -> Path:
    """Clips that mix four pictures, common to all, with weights that change slowly: something can be learned.

    The pictures differ in their mean colours, as the encoder sees little of where something is.
    """
    folder.mkdir(parents=True)
    source = torch.Generator().manual_seed(7)
    pictures = 0.3 * torch.randn(4, *SHAPE, generator=source) + torch.randn(4, SHAPE[0], 1, 1, generator=source)
    for number in range(count):
        phase, speed = torch.rand(2, 4, generator=source)
        times = torch.arange(frames + number)[:, None]
        weights = torch.sin(6.3 * phase + (0.2 + 0.3 * speed) * times)
        save_latents(folder / f"clip{number}.safetensors", torch.einsum("tp,pchw->tchw", weights, pictures))
    return folder


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def read_last(out: Path) -> dict[str, Any]:
    """last.pt without its times and without what may differ when a run goes on."""
    content = torch.load(out / "last.pt", weights_only=True)
    del content["progress"]["seconds"], content["config"]["epochs"], content["config"]["num_workers"]
    for line in content["progress"]["history"]:
        del line["seconds"]
    return content


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal in all, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{number}]")
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path) -> None:
    """Two folders hold the same training."""
    assert_same(read_last(one), read_last(other))
    assert read_metrics(one) == read_metrics(other)
    assert_same(read_safetensors(one / "best.safetensors")[1], read_safetensors(other / "best.safetensors")[1])


def files_of(folder: Path) -> dict[str, bytes]:
    """All files in a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
