"""Files of latents in three formats: read in parts, checked, refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longlive_rag_ops.embedder.latent_file import latent_files, open_latents, same_shape, save_latents
from longlive_rag_ops.safetensors_file import write_safetensors

SHAPE = (3, 4, 5)


def write_all(folder: Path, latents: torch.Tensor) -> list[Path]:
    """One clip in every form that is read."""
    save_latents(folder / "a.safetensors", latents, {"what": "a test"})
    write_safetensors(folder / "b.safetensors", {"x": latents[None].contiguous()}, {})
    torch.save(latents, folder / "c.pt")
    torch.save({"latents": latents, "prompt": "a cat"}, folder / "d.pt")
    torch.save(latents, folder / "e.pth", _use_new_zipfile_serialization=False)
    np.save(folder / "f.npy", latents.numpy())
    return sorted(folder.iterdir())


def test_every_form_is_read(tmp_path: Path) -> None:
    latents = torch.randn(7, *SHAPE)
    paths = write_all(tmp_path, latents)
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / ".hidden.pt").write_text("nor this")
    clips = latent_files(tmp_path)
    assert [clip.path for clip in clips] == paths and len(paths) == 6
    for clip in clips:
        assert (clip.frames, clip.frame_shape) == (7, SHAPE)
        assert torch.equal(clip.read(), latents)
        assert torch.equal(clip.read(2, 5), latents[2:5]) and clip.read(3, 3).shape == (0, *SHAPE)
        clip.read().zero_()  # the caller's own
        assert torch.equal(clip.read(), latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    latents = torch.randn(2, *SHAPE).to(dtype)
    save_latents(tmp_path / "a.safetensors", latents)
    torch.save(latents, tmp_path / "b.pt")
    for clip in latent_files(tmp_path):
        assert clip.read().dtype == torch.float32 and torch.equal(clip.read(), latents.float())


def test_many_files_do_not_stay_open(tmp_path: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no /proc here")
    write_all(tmp_path, torch.randn(7, *SHAPE))
    before = len(list(folder.iterdir()))
    clips = latent_files(tmp_path)
    kept = [clip.read(1, 2) for clip in clips]
    assert len(list(folder.iterdir())) == before and len(kept) == 6


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        latents = torch.randn(6, *SHAPE)
        latents[4, 1, 2, 3] = value
        write_all(tmp_path, latents)
        for clip in latent_files(tmp_path):
            assert clip.read(0, 4).isfinite().all()
            with pytest.raises(ValueError, match=rf"{clip.path.name}: latents must be finite, frame 4 has NaN or inf"):
                clip.read(3, 6)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_files_that_are_refused(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            open_latents(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)

    for name in ("a.pt", "a.npy", "a.safetensors"):
        refused(name, "cannot be read: No such file")
        for content in (b"", b"\x93 is no magic number" * 20):
            (tmp_path / name).write_bytes(content)
            refused(name, "damaged|truncated|cannot be read|refused")
    refused("a.mp4", "must end in .safetensors, .pt, .pth, .npy")
    torch.save({"latents": Trap(tmp_path / "sprung")}, tmp_path / "a.pt")
    refused("a.pt", "could run code")
    np.save(tmp_path / "a.npy", np.array([Trap(tmp_path / "sprung")], dtype=object))
    refused("a.npy", "damaged or no array of numbers")
    assert not (tmp_path / "sprung").exists()
    for bad, message in (
        (torch.ones(3, 4, 5), r"\(frames, C, H, W\), got torch.float32 of shape \(3, 4, 5\)"),
        (torch.ones(2, 7, 3, 4, 5), r"\(2, 7, 3, 4, 5\)"),
        (torch.ones(2, 3, 4, 5).int(), "must be floating point"),
        (torch.ones(0, 3, 4, 5), "must be floating point of shape"),
        ({"x": torch.ones(1), "y": torch.ones(1)}, "must hold latents, or one tensor alone; got x, y"),
        ([1, 2], "must hold a tensor, got list"),
    ):
        torch.save(bad, tmp_path / "a.pt")
        refused("a.pt", message)
    np.save(tmp_path / "a.npy", np.array(["text"]))
    refused("a.npy", "damaged or no array of numbers")


@pytest.mark.parametrize("name", ["a.safetensors", "c.pt", "e.pth", "f.npy"])
def test_truncated(name: str, tmp_path: Path) -> None:
    write_all(tmp_path, torch.randn(7, *SHAPE))
    path = tmp_path / name
    whole = path.read_bytes()
    for length in (1, 20, 100, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            open_latents(path).read()


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data must be a folder of latent files .*, got .*missing"):
        latent_files(tmp_path / "missing")
    with pytest.raises(ValueError, match="there is none in"):
        latent_files(tmp_path)
    save_latents(tmp_path / "a.safetensors", torch.randn(3, *SHAPE))
    save_latents(tmp_path / "b.safetensors", torch.randn(3, 3, 4, 6))
    with pytest.raises(ValueError, match=r"b.safetensors has frames of \(3, 4, 6\), .*a.safetensors of \(3, 4, 5\)"):
        latent_files(tmp_path)
    assert same_shape([]) == []


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_latents(path, torch.randn(7, *SHAPE))
    clip = open_latents(path)
    save_latents(path, torch.randn(5, *SHAPE))
    with pytest.raises(ValueError, match=r"has changed: it was \(7, 3, 4, 5\), it is \(5, 3, 4, 5\)"):
        clip.read(0, 2)
    with pytest.raises(ValueError, match=r"must be within 0 .. 7, got 5 .. 9"):
        clip.read(5, 9)


def test_saving_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        save_latents(tmp_path / "a.npy", torch.ones(2, *SHAPE))
    with pytest.raises(ValueError, match="must be floating point of shape"):
        save_latents(tmp_path / "a.safetensors", torch.ones(*SHAPE))
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_not_what_they_seem(tmp_path: Path) -> None:
    shape = (6, *SHAPE)
    odd = {
        "over 4 bytes": torch.zeros(1).expand(shape),
        "device meta": torch.empty(shape, device="meta"),
        "layout torch.sparse_coo": torch.ones(shape).to_sparse(),
        "float8": torch.ones(shape).to(torch.float8_e4m3fn),
    }
    for message, value in odd.items():
        torch.save(value, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=rf"odd.pt must be floating point.*{message}"):
            open_latents(tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="float8"):
        save_latents(tmp_path / "a.safetensors", odd["float8"])
    parameter = torch.nn.Parameter(torch.randn(shape))
    torch.save(parameter, tmp_path / "parameter.pt")
    read = open_latents(tmp_path / "parameter.pt").read()
    assert not read.requires_grad and torch.equal(read, parameter)


@pytest.mark.parametrize(
    "shape", ["(-1, 4, 6, 8)", "(0, 18446744073709551616, 6, 8)", "(9223372036854775808, 1, 1, 1)"]
)
def test_arrays_of_impossible_shapes(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npy (is damaged|must be floating point)"):
        open_latents(tmp_path / "a.npy")
