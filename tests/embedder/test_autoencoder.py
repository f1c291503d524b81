"""The model: the released names and shapes, sizes that do not halve evenly, its files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_rag_ops.embedder import (
    AutoencoderConfig,
    AutoencoderEmbedder,
    LatentAutoencoder,
    average_pool,
    find_embedder,
    grid_pool,
    load_autoencoder,
    save_autoencoder,
)
from longlive_rag_ops.embedder.autoencoder import group_norm

LAYOUT = Path(__file__).parents[1] / "data" / "embedder" / "embedder_released_layout.json"
SMALL: dict[str, Any] = {"in_channels": 4, "spatial_h": 7, "spatial_w": 10, "latent_dim": 12, "hidden_dims": [8, 24]}


def small(seed: int = 0) -> LatentAutoencoder:
    torch.manual_seed(seed)
    model = LatentAutoencoder(AutoencoderConfig.from_mapping(SMALL))
    with torch.no_grad():  # new residual blocks are the identity, which would hide a wrong one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def released(path: Path, trained: LatentAutoencoder, **changes: Any) -> Path:
    """A checkpoint as LongLive-RAG's training writes it, optimizer and all."""
    data: dict[str, Any] = {
        "epoch": 3,
        "model": trained.state_dict(),
        "optimizer": torch.optim.AdamW(trained.parameters()).state_dict(),
        "scaler": {},
        "config": {"data_dir": "datasets", "lr": 3e-4, **trained.config.to_mapping()},
        "val_loss": 0.5,
    }
    torch.save({**data, **changes}, path)
    return path


def test_state_dict_is_the_released_one() -> None:
    layout = json.loads(LAYOUT.read_text())
    with torch.device("meta"):
        model = LatentAutoencoder()
    state = model.state_dict()
    assert list(state) == list(layout)
    assert {name: list(value.shape) for name, value in state.items()} == layout
    assert sum(p.numel() for p in model.encoder.parameters()) == 2_193_856


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (48, 16), (24, 8), (12, 4), (6, 1), (1, 1)])
def test_groups_of_a_norm(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize(("height", "width"), [(60, 104), (7, 10), (1, 1), (5, 3), (22, 40)])
def test_every_size_comes_back(height: int, width: int) -> None:
    model = LatentAutoencoder(AutoencoderConfig(3, height, width, 5, (4, 8, 12)))
    frames = torch.randn(2, 3, height, width)
    reconstruction, embeddings = model(frames)
    assert reconstruction.shape == frames.shape and embeddings.shape == (2, 5)
    assert model.encoder.conv_stack(frames).shape[1:] == model.config.feature_shape
    assert torch.equal(model.encode(frames, normalize=False), embeddings)
    assert torch.allclose(model.encode(frames).norm(dim=1), torch.ones(2))


def test_new_residual_blocks_change_nothing() -> None:
    block = LatentAutoencoder(AutoencoderConfig.from_mapping(SMALL)).encoder.conv_stack[3]
    x = torch.randn(2, 8, 4, 5)
    assert torch.equal(block(x), x)


def test_dtype_and_device_of_a_new_model() -> None:
    model = LatentAutoencoder(AutoencoderConfig.from_mapping(SMALL), device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be between 1 and 65536, got 0"),
        ({"spatial_h": 2.0}, TypeError, "spatial_h must be an int"),
        ({"latent_dim": 10**9}, ValueError, "latent_dim must be between"),
        ({"hidden_dims": ()}, ValueError, "hidden_dims must be a sequence of at least one size"),
        ({"hidden_dims": (8, 0)}, ValueError, "hidden_dims must be between"),
        ({"hidden_dims": 8}, ValueError, "hidden_dims must be a sequence"),
    ],
)
def test_sizes_that_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AutoencoderConfig(**changes)


def test_both_kinds_of_files(tmp_path: Path) -> None:
    model, frames = small(), torch.randn(5, 4, 7, 10)
    save_autoencoder(tmp_path / "a.safetensors", model, {"what": "a test"})
    released(tmp_path / "a.pt", model)
    with torch.no_grad():
        expected = model(frames)
    for name in ("a.safetensors", "a.pt"):
        loaded = load_autoencoder(tmp_path / name)
        assert loaded.config == model.config and not loaded.training
        assert all(map(torch.equal, loaded(frames), expected))
        assert not any(p.requires_grad for p in loaded.parameters())
        embedder = find_embedder(tmp_path / name)
        assert isinstance(embedder, AutoencoderEmbedder)
        assert torch.allclose(embedder(frames), torch.nn.functional.normalize(expected[1], dim=1), atol=1e-6)
    assert isinstance(find_embedder(str(tmp_path / "a.pt")), AutoencoderEmbedder)


def test_extra_entries_are_tolerated_and_halves_are_read(tmp_path: Path) -> None:
    model = small()
    state = {name: value.bfloat16() for name, value in model.state_dict().items()} | {"extra": torch.ones(2)}
    loaded = load_autoencoder(released(tmp_path / "a.pt", model, model=state))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encoder.fc.weight, model.encoder.fc.weight.bfloat16().float())


def without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def test_checkpoints_that_are_refused(tmp_path: Path) -> None:
    model = small()
    state, config = model.state_dict(), model.config.to_mapping()
    bad = {**state, "encoder.fc.bias": torch.full((12,), torch.nan)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": without(state, "decoder.fc.0.bias")}, r"1 of \d+ tensors are missing, such as decoder.fc.0.bias"),
        ({"model": {f"module.{name}": value for name, value in state.items()}}, r"(\d+) of \1 tensors are missing"),
        ({"config": without(config, "spatial_w")}, "config must have .*; spatial_w missing"),
        ({"config": {**config, "latent_dim": 13}}, r"encoder.fc.weight must be .*\(13, 24\).*got .*\(12, 24\)"),
        ({"config": {**config, "hidden_dims": [8, 65536], "spatial_h": 65536}}, "must be floating point of shape"),
        ({"config": {**config, "latent_dim": "12"}}, "latent_dim must be an int, got str"),
        ({"config": None}, "config must be a mapping, got NoneType"),
        ({"model": [1, 2]}, "model must be a state dict"),
        ({"model": {**state, "encoder.fc.bias": torch.zeros(12).long()}}, "encoder.fc.bias must be floating point"),
        ({"model": bad}, "encoder.fc.bias must be finite"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_autoencoder(released(tmp_path / "bad.pt", model, **changes))
        assert str(tmp_path / "bad.pt") in str(caught.value)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt must hold a mapping with model and config, got keys encoder"):
        load_autoencoder(tmp_path / "state.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"tensor.pt must hold a mapping with model and config, got Tensor"):
        load_autoencoder(tmp_path / "tensor.pt")


class Malicious:
    """Unpickled by anyone but torch's restricted reader, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("plain", [False, True], ids=["archive", "plain pickle"])
def test_a_malicious_pickle_does_nothing(tmp_path: Path, plain: bool) -> None:
    path, trap = tmp_path / "trap.pt", tmp_path / "sprung"
    if plain:
        path.write_bytes(pickle.dumps({"model": Malicious(trap), "config": {}}, protocol=2))
    else:
        torch.save({"model": Malicious(trap), "config": {}}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"trap.pt is refused: .*could run code"):
        load_autoencoder(path)
    assert not trap.exists() and path.read_bytes() == before


@pytest.mark.parametrize("kind", ["pt", "safetensors", "old"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    model, path = small(), tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_autoencoder(path, model)
    else:
        data = {"model": model.state_dict(), "config": model.config.to_mapping()}
        torch.save(data, path, _use_new_zipfile_serialization=kind == "pt")
    whole = path.read_bytes()
    for length in (0, 1, 2, 7, 8, 100, 1000, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            load_autoencoder(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:200])
    with pytest.raises(ValueError, match=path.name):
        load_autoencoder(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("missing.pt", "missing.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: No such file"):
            load_autoencoder(tmp_path / name)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match=r"must end in .safetensors, got .*a.pt"):
        save_autoencoder(tmp_path / "a.pt", small())


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_autoencoder(path, small())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_autoencoder(path, small(1))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_safetensors_package_reads_what_is_saved(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = small()
    save_autoencoder(tmp_path / "a.safetensors", model)
    loaded = safetensors.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_pooling() -> None:
    frames = torch.randn(3, 4, 8, 12)
    assert torch.allclose(average_pool(frames), torch.stack([f.flatten(1).mean(1) for f in frames]))
    cells = grid_pool(frames).view(3, 4, 4, 4)
    assert torch.allclose(cells[:, :, 1, 2], frames[:, :, 2:4, 6:9].mean((2, 3)), atol=1e-6)
    wrong: list[Tensor] = [torch.ones(4, 8, 12), torch.ones(1, 4, 8, 12).long()]
    for embedder in (average_pool, grid_pool):
        for bad in wrong:
            with pytest.raises(ValueError, match="frames must be floating point of shape"):
                embedder(bad)


def test_finding_an_embedder() -> None:
    assert find_embedder("average_pool") is average_pool and find_embedder("grid_pool") is grid_pool
    assert find_embedder(torch.flatten) is torch.flatten
    with pytest.raises(ValueError, match=r"one of average_pool, grid_pool, or a checkpoint .*; got 'autoencoder'"):
        find_embedder("autoencoder")
    with pytest.raises(TypeError, match="embedder must be a callable"):
        find_embedder(3)  # type: ignore[arg-type]


def test_tensors_that_are_not_what_they_seem(tmp_path: Path) -> None:
    """A small file must not ask for much memory, nor an odd tensor end in an error without a name."""
    model = small()
    state, config = model.state_dict(), model.config.to_mapping()
    name, shape = "encoder.fc.weight", (12, 24)
    odd = {
        "over 4 bytes": torch.zeros(1).expand(shape),
        "device meta": torch.empty(shape, device="meta"),
        "layout torch.sparse_coo": torch.ones(shape).to_sparse(),
        "float8": torch.ones(shape).to(torch.float8_e4m3fn),
        "finite in float32": torch.full(shape, 1e300, dtype=torch.float64),
    }
    for message, value in odd.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_autoencoder(released(tmp_path / "odd.pt", model, model={**state, name: value}))
        assert str(tmp_path / "odd.pt") in str(caught.value)
    long = {**config, "hidden_dims": [1] * 8000}
    with pytest.raises(ValueError, match="hidden_dims must have at most 16 sizes, got 8000"):
        load_autoencoder(released(tmp_path / "long.pt", model, config=long))
    with pytest.raises(ValueError, match="1 tensors are too few"):
        load_autoencoder(released(tmp_path / "few.pt", model, model={name: state[name]}))
    with torch.no_grad():
        model.encoder.fc.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"encoder.fc.bias has NaN"):
        save_autoencoder(tmp_path / "nan.safetensors", model)
    assert not (tmp_path / "nan.safetensors").exists()


def test_a_file_that_is_replaced_keeps_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_autoencoder(path, small())
    path.chmod(0o600)
    save_autoencoder(path, small(1))
    assert path.stat().st_mode & 0o777 == 0o600
