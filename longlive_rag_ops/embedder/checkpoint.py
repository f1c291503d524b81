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
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    if len(state) < 6 * len(sizes.hidden_dims):  # a short file that asks for a long model is not worth building it
        raise ValueError(f"{name}: {len(state)} tensors are too few for {sizes}; it is no retrieval autoencoder")
    with torch.device("meta"):
        model = LatentAutoencoder(sizes)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(expected)} tensors are missing, such as {missing[0]}; it is no retrieval "
            "autoencoder, or not a whole one"
        )
    for key, shape in expected.items():
        problem = unusable(state[key])
        if problem or tuple(state[key].shape) != shape:
            got = problem or f"{state[key].dtype} of shape {tuple(state[key].shape)}"
            raise ValueError(
                f"{name}: tensor {key} must be floating point of shape {shape} for its config {sizes}; got {got}"
            )
    # Copied: a state dict of the caller's stays the caller's.
    wanted = {key: state[key].detach().to(torch.float32, copy=True) for key in expected}
    for key, value in wanted.items():
        if not value.isfinite().all():
            raise ValueError(f"{name}: tensor {key} must be finite in float32, got NaN or infinity")
    model.load_state_dict(wanted, assign=True)
    return model.eval().requires_grad_(False)


def unusable(value: torch.Tensor) -> str:
    """Why a tensor of a file is not taken: empty where it is floating point numbers that are all there.

    A file may hold tensors without numbers (of the meta device), of other layouts, or one number that strides make a
    gigabyte of.
    """
    if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
        return f"a tensor of layout {value.layout}, device {value.device}"
    if value.dtype not in FLOATS:
        return f"{value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"shape {tuple(value.shape)} over {value.untyped_storage().nbytes()} bytes"
    return ""


def save_autoencoder(
    path: str | os.PathLike[str], model: LatentAutoencoder, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors checkpoint in float32; the file is there whole or not at all.

    Args:
        path: the file, ending in ``.safetensors``; one that is there is replaced.
        model: what is written.
        metadata: texts that are kept with it.

    Raises:
        ValueError: another ending, or weights that are not finite. OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    tensors = {key: value.detach().float().cpu().contiguous() for key, value in model.state_dict().items()}
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"model must have finite weights to be written to {path}, {key} has NaN or infinity")
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
    except (RuntimeError, EOFError, ValueError, ArithmeticError, TypeError, LookupError, AttributeError) as error:
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
