"""The recorded autoencoder, by the command and in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longlive_rag_ops.cli import main
from longlive_rag_ops.embedder import AutoencoderEmbedder
from longlive_rag_ops.embedder.recording import LOSSES, OUTPUTS, load_recording
from longlive_rag_ops.safetensors_file import read_safetensors, write_safetensors

RECORDED = Path(__file__).parents[1] / "data" / "embedder" / "embedder_small.safetensors"


def changed(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]) -> Path:
    metadata, tensors = read_safetensors(RECORDED)
    change(metadata, tensors)
    write_safetensors(path, tensors, metadata)
    return path


def test_command_replays_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(RECORDED)]) == 0
    printed = capsys.readouterr().out
    assert "3 clips of 8 frames" in printed and "agrees with the recording" in printed
    assert all(name in printed for name in (*OUTPUTS, *(f"loss.{name}" for name in LOSSES)))


@pytest.mark.gpu
def test_command_replays_it_on_cuda() -> None:
    assert main(["replay", str(RECORDED), "--device", "cuda"]) == 0


def test_float32_agrees_too() -> None:
    """Losses and embeddings to 1e-5; the reconstruction to what the order of float32 sums leaves."""
    recording = load_recording(RECORDED)
    clips = recording.tensors["input"]
    reconstruction, embedding = recording.model(clips.flatten(0, 1))
    assert torch.allclose(embedding, recording.tensors["embedding"], atol=1e-5, rtol=0)
    assert torch.allclose(reconstruction, recording.tensors["reconstruction"], atol=5e-5, rtol=0)
    terms = recording.loss(reconstruction.unflatten(0, (3, 8)), clips, embedding.unflatten(0, (3, 8)))
    for name in LOSSES:
        assert float(getattr(terms, name)) == pytest.approx(float(recording.tensors[f"loss.{name}"]), rel=1e-5)
    unit = AutoencoderEmbedder(recording.model)(clips.flatten(0, 1))
    assert torch.allclose(unit, recording.tensors["embedding_normalised"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["input", "embedding", "reconstruction", "loss.smoothness", "state.encoder.fc.bias"])
def test_a_difference_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] += 2e-3

    assert main(["replay", str(changed(tmp_path / "changed.safetensors", change))]) == 1
    printed = capsys.readouterr().out
    assert "DIFFER" in printed and "<- fails" in printed


@pytest.mark.parametrize("name", ["embedding", "loss.total"])
def test_nan_never_agrees(name: str, tmp_path: Path) -> None:
    def change(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        tensors[name].fill_(torch.nan)

    assert main(["replay", str(changed(tmp_path / "changed.safetensors", change))]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta, tensors: tensors.pop("state.encoder.fc.bias"), "1 of .* missing, such as encoder.fc.bias"),
        (lambda meta, tensors: tensors.pop("embedding"), "tensor embedding must be floating point .*, got nothing"),
        (lambda meta, tensors: tensors.update(input=tensors["input"][0]), "tensor input must be"),
        (lambda meta, tensors: tensors.update({"loss.total": torch.ones(2)}), "tensor loss.total must be"),
        (lambda meta, tensors: meta.pop("config"), "metadata must have a JSON text config"),
        (lambda meta, tensors: meta.update(config="[1]"), "metadata config must be a JSON object, got list"),
        (
            lambda meta, tensors: meta.update(
                config=json.dumps({k: v for k, v in json.loads(meta["config"]).items() if k != "delta_window"})
            ),
            "an int delta_window, at least 1; got KeyError",
        ),
    ],
)
def test_files_that_are_no_recording(
    change: Callable[[dict[str, str], dict[str, Tensor]], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = changed(tmp_path / "changed.safetensors", change)
    assert main(["replay", str(path)]) == 2
    assert str(path) in (text := capsys.readouterr().err)
    with pytest.raises(ValueError, match=message):
        load_recording(path)
    assert text.startswith("error: ")


def test_truncated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(RECORDED.read_bytes()[:-100])
    assert main(["replay", str(path)]) == 2
    assert "cut.safetensors is truncated" in capsys.readouterr().err
