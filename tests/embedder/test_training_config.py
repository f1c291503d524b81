"""Settings of a training: types, ranges, files of LongLive-RAG, names that are not known."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from longlive_rag_ops.embedder.latent_file import LatentFile
from longlive_rag_ops.embedder.training_config import TrainingConfig, read_settings, settings_from

# The entries of ae_delta.yaml and base_ae.yaml, the numbers in the notation that they have there.
DELTA = """
data_dir: datasets   # somewhere
num_workers: 8
seq_len: 8
in_channels: 16
spatial_h: 60
spatial_w: 104
latent_dim: 1024
hidden_dims: [64, 128, 256]
batch_size: 128
lr: 3.0e-4
weight_decay: 1.0e-4
epochs: 400
grad_clip: 1.0
use_amp: true
delta_weight: 1.0
delta_margin: 0.85
delta_window: 3
smooth_weight: 1.0
wandb_run_name: ae_delta
gpu: 0
"""
BASE = """
data_dir: datasets
num_workers: 8
seq_len: 8
in_channels: 16
spatial_h: 60
spatial_w: 104
latent_dim: 1024
hidden_dims: [64, 128, 256]
batch_size: 128
lr: 3e-4
weight_decay: 1e-4
epochs: 400
use_amp: true
delta_weight: 0.0
gpu: 0
"""


def test_released_files_are_the_defaults(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "delta.yaml").write_text(DELTA)
    (tmp_path / "base.yml").write_text(BASE)
    settings, ignored = read_settings(tmp_path / "delta.yaml")
    sizes = {"in_channels": 16, "spatial_h": 60, "spatial_w": 104}
    assert TrainingConfig(**settings) == TrainingConfig(**sizes, num_workers=8)
    assert ignored == ["data_dir", "wandb_run_name", "gpu"]
    settings, ignored = read_settings(tmp_path / "base.yml")
    assert TrainingConfig(**settings) == TrainingConfig(**sizes, num_workers=8, delta_weight=0.0)
    assert ignored == ["data_dir", "gpu"]
    autoencoder = TrainingConfig(**settings).autoencoder
    assert autoencoder.frame_shape == (16, 60, 104) and autoencoder.hidden_dims == (64, 128, 256)


def test_all_the_released_names_are_known() -> None:
    ignored = ["wandb_project", "wandb_entity", "disable_wandb", "log_dir", "log_every", "tag", "config", "resume"]
    known = {"val_split": 0.2, "data_percentage": 0.5, "seed": 1, "save_every": 10}
    assert settings_from({**known, **dict.fromkeys(ignored)}, "file") == (known, ignored)


def test_json_needs_nothing_and_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    config = TrainingConfig(lr=1e-3, hidden_dims=(8, 16), patience=3, smooth_form="squared_norm", use_amp=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_mapping()))
    settings, ignored = read_settings(path)
    assert TrainingConfig(**settings) == config and not ignored
    (tmp_path / "config.yaml").write_text(BASE)
    with pytest.raises(RuntimeError, match=r"reading config\.yaml needs .*'yaml'.*longlive-rag-ops\[train\]"):
        read_settings(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"learning_rat": 1}', r"a\.json has the unknown setting 'learning_rat'; known are .*\blr\b"),
        ("a.json", '{"batchsize": 1}', r"unknown setting 'batchsize'; is it batch_size"),
        ("a.json", '{"hidden-dims": [1]}', r"unknown setting 'hidden-dims'; is it hidden_dims"),
        ("a.json", '{"lr": "fast"}', r"a\.json: lr must be a number, got 'fast'"),
        ("a.json", '{"epochs": "3"}', r"a\.json: epochs must be an int, got str"),
        ("a.json", "[1]", "must be a mapping of settings, got list"),
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "a: [", r"a\.yaml is not YAML"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", r"a\.yaml is not YAML"),
        ("a.yaml", "lr: 2001-99-99", r"a\.yaml has a value that YAML cannot read: month must be in 1\.\.12"),
        ("a.yaml", "epochs: 1" + "0" * 5000, r"a\.yaml has a value that YAML cannot read: .*4300 digits"),
        ("a.json", '{"epochs": 1' + "0" * 5000 + "}", r"a\.json is not JSON: .*4300 digits"),
        ("a.yaml", '!!int ""', r"a\.yaml has a value that YAML cannot read"),
        ("a.yaml", "!!timestamp x", r"a\.yaml has a value that YAML cannot read"),
        ("a.yaml", "7: 1", r"a\.yaml has a setting whose name is no text but int"),
        ("a.yaml", 'lr: "1_0"', r"a\.yaml: lr must be a number, got '1_0'"),
        ("a.json", "null", "must be a mapping of settings, got NoneType"),
        ("a.toml", "lr = 1", r"must end in \.json, \.yaml or \.yml"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_yaml_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(text)
    assert read_settings(tmp_path / "a.yaml") == ({}, [])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        read_settings(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"tag": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.json must be UTF-8"):
        read_settings(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0, got inf"),
        ({"grad_clip": 10**400}, "grad_clip must be at least 0, got inf"),
        ({"val_split": 1.0}, "val_split must be above 0 and below 1, got 1.0"),
        ({"data_percentage": 1.5}, "data_percentage must be above 0 and at most 1, got 1.5"),
        ({"delta_margin": -2}, "delta_margin must be at least -1 and at most 1"),
        ({"lr": True}, "lr must be a number, got bool"),
        ({"lr": "3e-4"}, "lr must be a number, got str"),
        ({"lr": None}, "lr must be a number, got NoneType"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 2.0}, "epochs must be an int, got float"),
        ({"epochs": True}, "epochs must be an int, got bool"),
        ({"use_amp": 1}, "use_amp must be a bool, got int"),
        ({"smooth_form": "cube"}, "smooth_form must be one of norm, squared_norm; got 'cube'"),
        ({"hidden_dims": 8}, "hidden_dims must be a sequence of at least one size, got 8"),
        ({"hidden_dims": []}, "hidden_dims must be a sequence of at least one size"),
        ({"hidden_dims": "64"}, "hidden_dims must be a sequence of at least one size, got '64'"),
        ({"hidden_dims": (8, 0)}, "hidden_dims must be between 1 and 65536, got 0"),
        ({"in_channels": "16"}, "in_channels must be an int, got str"),
        ({"seed": -1}, "seed must be between 0 and"),
    ],
)
def test_values_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        TrainingConfig(**settings)


def test_values_are_of_one_type() -> None:
    config = TrainingConfig(lr=1, hidden_dims=[4, 8])  # type: ignore[arg-type]
    assert isinstance(config.lr, float) and config.hidden_dims == (4, 8)
    assert settings_from({"lr": "3e-4", "seed": None}, "file") == ({"lr": 3e-4}, [])


def test_frame_sizes_come_from_the_data_or_agree_with_it() -> None:
    clip = LatentFile(Path("a.pt"), 9, (4, 6, 8))
    with pytest.raises(ValueError, match="in_channels, spatial_h, spatial_w must be given"):
        _ = TrainingConfig().autoencoder
    assert TrainingConfig(spatial_h=6).fitted(clip).autoencoder.frame_shape == (4, 6, 8)
    with pytest.raises(ValueError, match=r"a\.pt has \(4, 6, 8\), the configuration says \(16, 6, None\)"):
        TrainingConfig(in_channels=16, spatial_h=6).fitted(clip)


def test_differences_name_what_changes_a_step() -> None:
    one = TrainingConfig()
    assert one.differences(TrainingConfig(epochs=1, patience=2, num_workers=3, save_every=4)) == []
    assert one.differences(TrainingConfig(lr=1e-3, seed=1)) == ["lr is 0.001, was 0.0003", "seed is 1, was 42"]


def test_every_setting_is_described() -> None:
    for setting in fields(TrainingConfig):
        assert f" {setting.name}" in (TrainingConfig.__doc__ or "") and setting.metadata["meaning"]
