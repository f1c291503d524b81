"""The linear codec: shapes, round trip, determinism, provenance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import scene_frames

from longlive_rag_ops.demo.codec import PATCH, Codec, encode_stream, fit_codec, from_patches, to_patches


def test_shipped_codec_says_how_it_was_made() -> None:
    codec = Codec.shipped()
    assert codec.basis.shape == (16, PATCH) and codec.basis.dtype == torch.float32
    torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(16), atol=1e-5, rtol=0)
    assert codec.provenance["command"].startswith("longlive-rag fit-codec sample:bikes")
    assert 0.9 < codec.provenance["explained_variance"] < 1


def test_patches_round_trip_exactly() -> None:
    frames = scene_frames(1, 8)
    patches = to_patches(frames)
    assert patches.shape == (2, 6, 8, PATCH) and patches.abs().max() <= 1
    np.testing.assert_array_equal(from_patches(patches), frames)


def test_latents_have_the_shape_of_a_video_autoencoder() -> None:
    latents = Codec.shipped().encode(scene_frames(1, 12))
    assert latents.shape == (3, 16, 6, 8) and latents.dtype == torch.float32


def test_encoding_a_decoded_latent_gives_it_back() -> None:
    codec = Codec.shipped()
    latents = codec.encode(scene_frames(1, 8))
    patches = (latents.permute(0, 2, 3, 1) * codec.scale) @ codec.basis + codec.mean
    again = ((patches - codec.mean) @ codec.basis.T / codec.scale).permute(0, 3, 1, 2)
    torch.testing.assert_close(again, latents, atol=1e-4, rtol=1e-4)
    # Brightness of a smooth picture survives; its colours are wilder than the codec's street scene ever was.
    assert np.abs(codec.decode(latents).mean(-1) - scene_frames(1, 8).mean(-1)).mean() < 6


def test_channels_are_those_of_the_definition() -> None:
    codec, frames = Codec.shipped(), scene_frames(4, 4)
    corner = torch.from_numpy(frames[:, 8:16, 16:24]).float().reshape(-1) * 2 / 255 - 1
    expected = codec.basis.double() @ (corner - codec.mean).double() / codec.scale.double()
    torch.testing.assert_close(codec.encode(frames)[0, :, 1, 2].double(), expected, atol=1e-4, rtol=1e-4)


def test_streaming_drops_what_makes_no_latent_frame() -> None:
    frames = scene_frames(1, 11)
    pairs = list(encode_stream(Codec.shipped(), frames))
    assert len(pairs) == 2
    torch.testing.assert_close(torch.stack([latent for latent, _ in pairs]), Codec.shipped().encode(frames[:8]))
    np.testing.assert_array_equal(pairs[1][1], frames[5])


def noise_frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def test_a_fit_is_whitened_and_repeats_to_the_byte(tmp_path: Path) -> None:
    frames = noise_frames(64)
    codec = fit_codec(frames, {"command": "test"})
    latents = codec.encode(frames).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(16), atol=1e-3, rtol=0)
    assert codec.provenance["patches"] == 64 // 4 * 64 and codec.provenance["command"] == "test"
    codec.save(tmp_path / "a.npz")
    fit_codec(frames, {"command": "test"}).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = Codec.load(tmp_path / "a.npz")
    assert torch.equal(loaded.basis, codec.basis) and loaded.provenance == codec.provenance


def test_too_little_or_too_flat_to_fit() -> None:
    with pytest.raises(ValueError, match="at least 768 are needed"):
        fit_codec(noise_frames(4), {})
    with pytest.raises(ValueError, match="too flat"):
        fit_codec(np.zeros((64, 64, 64, 3), np.uint8), {})


def test_wrong_arguments(tmp_path: Path) -> None:
    codec = Codec.shipped()
    with pytest.raises(ValueError, match="positive multiple of 4"):
        codec.encode(scene_frames(1, 6))
    with pytest.raises(ValueError, match="must be uint8"):
        codec.encode(scene_frames(1, 4).astype(np.float32))
    with pytest.raises(ValueError, match="latents: got shape"):
        codec.decode(torch.zeros(1, 4, 2, 2))
    (tmp_path / "no.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a codec"):
        Codec.load(tmp_path / "no.npz")
