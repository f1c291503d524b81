"""Files of the retrieval autoencoder: the released ``.pt`` layout, and safetensors.

A ``.pt`` holds a mapping with ``model``, the state dict, and ``config``, a mapping with the entries of
`AutoencoderConfig`. A safetensors file holds the state dict's tensors under the same names, and in its metadata
``config`` as JSON text. What else is there (an optimizer's state, the rest of a training's configuration) is ignored.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..safetensors_file import read_safetensors, write_safetensors
from .autoencoder import LatentAutoencoder
from .autoencoder_config import AutoencoderConfig

WHAT = "embedder"


def load_autoencoder(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> LatentAutoencoder:
    """Reads a checkpoint; nothing in it is executed.

    Args:
        path: a ``.safetensors`` file, or anything else that ``torch.load(weights_only=True)`` reads.
        device: where its parameters go; the CPU when not given.

    Returns:
        The model in evaluation mode, parameters float32 and without gradients.

    Raises:
        ValueError: the file cannot be read, is truncated, holds more than tensors and plain values, or something in it
            is missing or has another shape than its config says. The message names the file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        config, state = _read_safetensors(path)
    else:
        config, state = _read_pickle(path)
    return autoencoder_from(config, state, f"{WHAT} {path}").to(device or "cpu")


def autoencoder_from(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], name: str) -> LatentAutoencoder:
    """A model of these sizes and tensors, as `load_autoencoder` returns it; ``name`` is the file's, for errors."""
    try:
        sizes = AutoencoderConfig.from_mapping(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    with torch.device("meta"):  # a config that asks for more memory than its file has tensors gets none
        model = LatentAutoencoder(sizes)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(expected)} tensors are missing, such as {missing[0]}; it is no retrieval "
            "autoencoder, or not a whole one"
        )
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape or not state[key].is_floating_point():
            raise ValueError(
                f"{name}: tensor {key} must be floating point of shape {shape} for its config {sizes}; got "
                f"{state[key].dtype} of shape {tuple(state[key].shape)}"
            )
        if not state[key].isfinite().all():
            raise ValueError(f"{name}: tensor {key} must be finite, got NaN or infinity")
    # Copied: a state dict of the caller's stays the caller's.
    model.load_state_dict({key: state[key].float().clone() for key in expected}, assign=True)
    return model.eval().requires_grad_(False)


def save_autoencoder(
    path: str | os.PathLike[str], model: LatentAutoencoder, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors checkpoint in float32; the file is there whole or not at all.

    Args:
        path: the file, ending in ``.safetensors``; one that is there is replaced.
        model: what is written.
        metadata: texts that are kept with it.

    Raises:
        ValueError: another ending. OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    tensors = {key: value.detach().float().cpu().contiguous() for key, value in model.state_dict().items()}
    write_safetensors(path, tensors, {**(metadata or {}), "config": json.dumps(model.config.to_mapping())})


def read_pickle(path: Path, what: str, **options: Any) -> Any:
    """``torch.load`` of tensors and plain values alone, on the CPU.

    Raises:
        ValueError: the file cannot be read, is truncated, or asks for code to be run; the message names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{what} {path} is refused: it is damaged, or it is a pickle with more in it than tensors and plain "
            f"values, which could run code ({first})"
        ) from None
    # What a damaged file does to its reader has no end: the archive, its index, each pickle instruction may be cut.
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{what} {path} is damaged, truncated or no file of torch.save: {first}") from None
    except (zipfile.BadZipFile, MemoryError, RecursionError, AssertionError) as error:
        raise ValueError(f"{what} {path} is damaged: {type(error).__name__} {error}") from None


def _read_pickle(path: Path) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    data = read_pickle(path, WHAT)
    if not isinstance(data, Mapping) or not {"model", "config"} <= data.keys():
        got = f"keys {', '.join(map(str, data))}" if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"{WHAT} {path} must hold a mapping with model and config, got {got}")
    config, state = data["config"], data["model"]
    if not isinstance(config, Mapping):
        raise ValueError(f"{WHAT} {path}: config must be a mapping, got {type(config).__name__}")
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{WHAT} {path}: model must be a state dict, of tensors by name")
    return config, state


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    metadata, tensors = read_safetensors(path, WHAT)
    return json_object(metadata, "config", f"{WHAT} {path}"), tensors


def json_object(metadata: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    """The JSON object in a text of a safetensors file's metadata; ``name`` is the file's, for errors."""
    try:
        found = json.loads(metadata[key])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: metadata must have a JSON text {key}, got {error!r}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: metadata {key} must be a JSON object, got {type(found).__name__}")
    return found
