"""The trained encoder as an embedder: whatever frames it gets, compiled or not, on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longlive_rag_ops.embedder import AutoencoderConfig, AutoencoderEmbedder, LatentAutoencoder
from longlive_rag_ops.embedder.autoencoder_embedder import ieee_convolutions

CONFIG = AutoencoderConfig(in_channels=4, spatial_h=7, spatial_w=10, latent_dim=12, hidden_dims=(8, 24))


def autoencoder() -> LatentAutoencoder:
    torch.manual_seed(0)
    model = LatentAutoencoder(CONFIG)
    with torch.no_grad():  # new residual blocks are the identity, which would hide a wrong one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def latents(count: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, *CONFIG.frame_shape, generator=torch.Generator().manual_seed(seed))


def exact(frames: Tensor) -> Tensor:
    """The encoder in float64, frame by frame."""
    encoder = autoencoder().double().encoder
    with torch.no_grad():
        return F.normalize(torch.cat([encoder(frame[None].double()) for frame in frames]), dim=-1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max())


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_every_dtype(dtype: torch.dtype, allowed: float) -> None:
    found = AutoencoderEmbedder(autoencoder(), dtype=dtype)(latents())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == (5, 12) and error(found, exact(latents())) < allowed
    assert error(found.norm(dim=1), torch.ones(5)) < 1e-6


@pytest.mark.parametrize("form", ["channels last", "strided", "expanded", "bfloat16", "float64"])
def test_every_form_of_frames(form: str) -> None:
    frames = latents()
    given = {
        "channels last": lambda: frames.to(memory_format=torch.channels_last),
        "strided": lambda: torch.stack([frames, frames]).permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4)[1],
        "expanded": lambda: frames[:1].expand(5, -1, -1, -1),
        "bfloat16": lambda: frames.bfloat16(),
        "float64": lambda: frames.double(),
    }[form]()
    before = given.clone()
    found = AutoencoderEmbedder(autoencoder())(given)
    assert found.dtype == torch.float32 and error(found, exact(before)) < 1e-6
    assert torch.equal(given, before)


@pytest.mark.parametrize("parts", [(7,), (1,) * 7, (3, 4), (2, 0, 5)], ids=str)
def test_a_frame_s_embedding_does_not_depend_on_the_others(parts: tuple[int, ...]) -> None:
    embedder, frames = AutoencoderEmbedder(autoencoder()), latents(7)
    found = torch.cat([embedder(part) for part in frames.split(parts)])
    assert error(found, exact(frames)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_frames(dtype: torch.dtype) -> None:
    found = AutoencoderEmbedder(autoencoder(), dtype=dtype)(latents(0))
    assert found.shape == (0, 12) and found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_frames_that_are_not_finite(number: float) -> None:
    embedder, frames = AutoencoderEmbedder(autoencoder()), latents()
    expected = embedder(frames)
    frames[1, 2, 3, 4] = frames[4, 0, 0, 0] = number
    found = embedder(frames)
    assert found[[1, 4]].isnan().all()
    assert error(found[[0, 2, 3]], expected[[0, 2, 3]]) < 1e-6


def test_no_gradient_flows() -> None:
    embedder = AutoencoderEmbedder(autoencoder())
    found = embedder(latents().requires_grad_())
    assert not found.requires_grad and not any(parameter.requires_grad for parameter in embedder.parameters())
    found += 1  # an ordinary tensor
    weight = torch.ones(12, requires_grad=True)
    (embedder(latents()) @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("compiled", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_the_autoencoder_passed_in_is_not_changed(compiled: Any) -> None:
    model, frames = autoencoder(), latents()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    embedder = AutoencoderEmbedder(model, dtype=torch.bfloat16, compile=compiled)
    found = embedder(frames)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(value.is_contiguous() for value in after.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(embedder(frames), found), "its encoder is a copy"
    assert not any("decoder" in name for name, _ in embedder.named_modules())


@pytest.mark.parametrize(
    ("frames", "kind", "words"),
    [
        ([1], TypeError, "frames must be a floating point tensor, got list"),
        (latents().long(), TypeError, "frames must be a floating point tensor, got torch.int64"),
        (latents()[0], ValueError, r"frames must be \(N, 4, 7, 10\), what .* trained for; got \(4, 7, 10\)"),
        (latents()[None], ValueError, r"got \(1, 5, 4, 7, 10\)"),
        (latents().mT, ValueError, r"got \(5, 4, 10, 7\)"),
        (latents()[:, :3], ValueError, r"got \(5, 3, 7, 10\)"),
        (latents(0)[..., :3], ValueError, r"got \(0, 4, 7, 3\)"),
    ],
)
def test_frames_that_are_refused(frames: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        AutoencoderEmbedder(autoencoder())(frames)


def test_arguments_that_are_refused() -> None:
    with pytest.raises(TypeError, match="autoencoder must be a LatentAutoencoder, got Linear"):
        AutoencoderEmbedder(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    for dtype in (torch.int64, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ValueError, match="dtype must be float32, float16, bfloat16 or float64, got"):
            AutoencoderEmbedder(autoencoder(), dtype=dtype)


SLOW = pytest.param({}, marks=pytest.mark.slow, id="inductor")  # some seconds of a C++ compiler
BACKENDS = [pytest.param({"backend": "aot_eager"}, id="aot_eager"), SLOW]


@pytest.mark.parametrize("options", BACKENDS)
def test_compiled_by_itself(options: dict[str, Any]) -> None:
    eager = AutoencoderEmbedder(autoencoder())
    embedder = AutoencoderEmbedder(autoencoder(), compile=options or True)
    for count in (3, 3, 5):  # another number of frames compiles anew
        assert error(embedder(latents(count, count)), eager(latents(count, count))) < 1e-6


@pytest.mark.parametrize("options", BACKENDS)
def test_compiled_by_somebody_else(options: dict[str, Any]) -> None:
    embedder = AutoencoderEmbedder(autoencoder())

    def step(x: Tensor) -> Tensor:
        return embedder(x * 2) @ torch.ones(12)

    frames = latents(3)
    compiled = torch.compile(embedder, fullgraph=True, **options)
    assert error(compiled(frames), embedder(frames)) < 1e-6
    assert error(torch.compile(step, fullgraph=True, **options)(frames), step(frames)) < 1e-5


CUDNN: Any = torch.backends.cudnn
MATMUL: Any = torch.backends.cuda.matmul


def precisions() -> dict[str, Any]:
    """Every setting of the precision of float32 that can be asked for, under old names and new."""
    found: dict[str, Any] = {}
    asked: dict[str, Callable[[], Any]] = {
        "conv": lambda: CUDNN.conv.fp32_precision,
        "rnn": lambda: CUDNN.rnn.fp32_precision,
        "matmul": lambda: MATMUL.fp32_precision,
        "cudnn.allow_tf32": lambda: CUDNN.allow_tf32,
        "matmul.allow_tf32": lambda: MATMUL.allow_tf32,
    }
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except RuntimeError:  # old and new differ
            found[name] = None
    return found


@pytest.fixture
def settings() -> Iterator[None]:
    """torch's own settings before and after."""
    CUDNN.allow_tf32, MATMUL.allow_tf32 = True, False
    yield
    CUDNN.allow_tf32, MATMUL.allow_tf32 = True, False


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("chosen", "readable"),
    [
        ({}, True),
        ({"cudnn.allow_tf32": False}, True),
        ({"matmul.allow_tf32": True}, True),
        ({"cudnn.allow_tf32": False, "matmul.allow_tf32": True}, True),
        ({"cudnn.conv.fp32_precision": "ieee"}, False),
        ({"cudnn.conv.fp32_precision": "ieee", "cudnn.rnn.fp32_precision": "ieee"}, False),
    ],
    ids=str,
)
def test_the_process_s_precision_is_put_back(chosen: dict[str, Any], readable: bool) -> None:
    """The settings are there without a device; so is what torch raises when its two names of one differ."""
    for name, value in chosen.items():
        *owners, attribute = name.split(".")
        owner = {"cudnn": CUDNN, "matmul": MATMUL}[owners[0]]
        setattr(getattr(owner, owners[1]) if len(owners) > 1 else owner, attribute, value)
    before = precisions()
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    with contextlib.suppress(ZeroDivisionError), ieee_convolutions(on_gpu):
        within = precisions()
        assert [within[name] for name in ("conv", "rnn")] == ["ieee"] * 2 and within["matmul"] in ("ieee", "none")
        assert within["matmul.allow_tf32"] is False and (within["cudnn.allow_tf32"] is False or not readable)
        raise ZeroDivisionError
    assert precisions() == before
    on_cpu: Any = SimpleNamespace(is_cuda=False)
    with ieee_convolutions(on_cpu):
        assert precisions() == before


def test_the_caller_s_autocast_is_not_the_embedder_s() -> None:
    torch.manual_seed(0)
    embedder = AutoencoderEmbedder(LatentAutoencoder(AutoencoderConfig(4, 6, 8, 12, (8, 16))))
    frames = torch.randn(3, 4, 6, 8)
    expected = embedder(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder(frames), expected)
