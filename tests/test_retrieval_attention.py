"""The attention module: what it computes over a whole clip is what it computes block by block with a memory window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from window_pair import TOLERANCE, error_of, one_thread, rejected  # noqa: F401 (a fixture)

from longlive_rag_ops import MemoryWindow, WindowConfig
from longlive_rag_ops.clip_windows import clip_windows
from longlive_rag_ops.config import POSITION_RULES
from longlive_rag_ops.retrieval_attention import RetrievalAttention, memory_for

GRID, TOKENS, DIM, WIDTH = (2, 3), 6, 64, 5
FRAMES = 23  # blocks of three, the last one of two


def config_of(**change: Any) -> WindowConfig:
    sizes: dict[str, Any] = {"window": 9, "sink": 1, "top_k": 3, "recent_exclude": 1, "frames_per_block": 3}
    return WindowConfig(**{**sizes, **change})


def module_of(config: WindowConfig, dtype: torch.dtype = torch.float64, **options: Any) -> RetrievalAttention:
    torch.manual_seed(0)
    module = RetrievalAttention(DIM, 4, **{"config": config, "layer": 0, "kv_heads": 2, "dtype": dtype, **options})
    for norm in (module.norm_q, module.norm_k):
        if norm is not None:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
    return module


def clip_of(
    frames: int = FRAMES, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Hidden states of a clip and an embedding a frame, different in every sample."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames * TOKENS, DIM, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(batch, frames, WIDTH, generator=generator)


def block_by_block(
    module: RetrievalAttention, x: Tensor, embeddings: Tensor, clean: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[list[list[int]]]]:
    """The clip through the generation path: two forwards of other input, that of x, and with `clean` that one's."""
    memory = memory_for(module, len(x), TOKENS, **options)
    n, outs, chosen = module.config.frames_per_block, [], []
    with torch.inference_mode():
        for start in range(0, embeddings.shape[1], n):
            rows = slice(start * TOKENS, (start + n) * TOKENS)
            for noise in (-x[:, rows], 2 * x[:, rows]):  # what a block's last forward overwrites
                module(noise, GRID, memory=memory, start_frame=start)
            outs.append(module(x[:, rows], GRID, memory=memory, start_frame=start))
            if clean is not None:
                module(clean[:, rows], GRID, memory=memory, start_frame=start)
            chosen.append(memory.selected)
            memory.finish(start, embeddings[:, start : start + n] if module.config.top_k else None)
    return torch.cat(outs, 1), chosen


WINDOWS = {
    "memory": {},
    "no memory": {"top_k": 0, "window": 6},
    "no sink": {"sink": 0, "window": 8},
    "sink longer than a block": {"sink": 4, "window": 12, "recent_exclude": 0},
    "least score": {"min_score": 0.2},
    "diverse": {"diversity": 0.5, "recent_exclude": 0},
    "one frame a block": {"frames_per_block": 1},
}


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("name", WINDOWS)
def test_a_clip_equals_its_blocks(name: str, rule: str) -> None:
    module = module_of(config_of(position_rule=rule, **WINDOWS[name]))
    x, embeddings = clip_of()
    expected, chosen = block_by_block(module, x, embeddings)
    assert error_of(module(x, GRID, embeddings=embeddings).detach(), expected) < TOLERANCE[torch.float64]
    if module.config.top_k:
        assert any(first != second for first, second in chosen), "samples should choose for themselves"


@pytest.mark.parametrize("engine", ["reference", "dense", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_engine_and_precision(engine: str, dtype: torch.dtype) -> None:
    module = module_of(config_of(), dtype)
    x, embeddings = clip_of(dtype=dtype)
    expected, _ = block_by_block(module, x, embeddings, engine=engine)
    assert error_of(module(x, GRID, embeddings=embeddings).detach(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": None},
        {"kv_heads": 1, "bias": True},
        {"qk_norm": False},
        {"rope_theta": 100.0},
        {"rope_split": (6, 4, 6)},
        {"rope_split": (0, 8, 8), "eps": 1e-2},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["slot", "absolute"])
def test_options(options: dict[str, Any], rule: str) -> None:
    module = module_of(config_of(position_rule=rule), **options)
    x, embeddings = clip_of()
    expected, _ = block_by_block(module, x, embeddings)
    assert error_of(module(x, GRID, embeddings=embeddings).detach(), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_teacher_forcing_equals_noisy_forwards_and_a_clean_one(rule: str) -> None:
    module = module_of(config_of(position_rule=rule))
    (x, embeddings), (clean, _) = clip_of(), clip_of(seed=2)
    expected, _ = block_by_block(module, x, embeddings, clean)
    out = module(x, GRID, embeddings=embeddings, clean=clean).detach()
    assert error_of(out, expected) < TOLERANCE[torch.float64]
    assert error_of(module(x, GRID, embeddings=embeddings).detach(), expected) > 0.1, "the context should matter"


def test_layers_share_a_window_and_the_windows_of_a_clip() -> None:
    config = config_of()
    model = nn.ModuleList(module_of(config, layer=layer) for layer in range(3))
    x, embeddings = clip_of()
    windows = clip_windows(config, FRAMES, 2, embeddings)
    y = x
    for layer in model:
        y = y + layer(y, GRID, windows=windows)
    memory = memory_for(model, 2, TOKENS)
    assert (memory.layers, memory.pool.dtype) == (3, torch.float64)
    outs = []
    with torch.no_grad():
        for start in range(0, FRAMES, 3):
            z = x[:, start * TOKENS : (start + 3) * TOKENS]
            for layer in model:
                z = z + layer(z, GRID, memory=memory, start_frame=start)
            outs.append(z)
            memory.finish(start, embeddings[:, start : start + 3])
    assert error_of(y.detach(), torch.cat(outs, 1)) < TOLERANCE[torch.float64]


def test_not_finite_embeddings_are_never_chosen() -> None:
    module = module_of(config_of())
    x, embeddings = clip_of()
    embeddings[0, 4] = torch.nan
    embeddings[1, 17] = torch.inf  # as a query it retrieves nothing: samples differ in how many frames they hold
    expected, chosen = block_by_block(module, x, embeddings)
    assert chosen[6][1] == [] and chosen[6][0]
    assert error_of(module(x, GRID, embeddings=embeddings).detach(), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("teacher", [False, True])
def test_gradients_are_right(teacher: bool) -> None:
    config = config_of(window=3, sink=1, top_k=1, recent_exclude=0, frames_per_block=1)
    torch.manual_seed(0)
    module = RetrievalAttention(4, 2, config=config, layer=0, kv_heads=1, dtype=torch.float64)
    x, clean = (torch.randn(2, 5 * 2, 4, dtype=torch.float64, requires_grad=True) for _ in "xc")
    windows = clip_windows(config, 5, 2, torch.randn(2, 5, 3))
    assert any(1 in row for row in windows[-1].table), "the last block should retrieve"

    def clip(x: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
        streams = {"windows": windows, "clean": clean if teacher else None}
        return torch.func.functional_call(module, {"k.weight": weight}, (x, (1, 2)), streams)

    inputs = (x, clean if teacher else clean.detach(), module.k.weight)
    assert torch.autograd.gradcheck(clip, inputs)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_gradient_reaches_the_window_and_nothing_else(teacher: bool) -> None:
    config = config_of()
    module = module_of(config)
    (x, embeddings), (clean, _) = clip_of(), clip_of(seed=2)
    x.requires_grad_()
    clean.requires_grad_()
    start, n = 18, 3
    window = clip_windows(config, FRAMES, 2, embeddings)[start // n]
    out = module(x, GRID, embeddings=embeddings.requires_grad_(), clean=clean if teacher else None)
    out.unflatten(1, (FRAMES, -1))[:, start : start + n].square().sum().backward()
    past = (clean if teacher else x).grad
    assert past is not None and x.grad is not None and embeddings.grad is None
    for sample, row in enumerate(window.table):
        memory = sorted(frame for frame in row if 0 < frame < start - 2)
        assert len(memory) == config.top_k
        reached = past[sample].unflatten(0, (FRAMES, -1)).abs().amax((1, 2)) > 0
        wanted = [frame for frame in row if frame < start or not teacher]
        assert reached.nonzero().flatten().tolist() == sorted(wanted)
        own = x.grad[sample].unflatten(0, (FRAMES, -1)).abs().amax((1, 2)) > 0
        assert own[start : start + n].all()


def test_what_a_block_keeps_for_its_backward_follows_the_window() -> None:
    """Twice as long a clip keeps twice as much: no block keeps, or fills, anything of the clip's size."""

    def kept(frames: int) -> int:
        module, sizes = module_of(config_of()), {}
        x, embeddings = clip_of(frames, batch=1)

        def pack(saved: Tensor) -> Tensor:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            out = module(x.requires_grad_(), GRID, embeddings=embeddings)
        del out
        return sum(sizes.values())

    short, long = kept(60), kept(120)
    assert long < 2.2 * short


def test_a_layer_computed_again_in_the_backward() -> None:
    module = module_of(config_of())
    x, embeddings = clip_of()
    windows = clip_windows(module.config, FRAMES, 2, embeddings)
    gradients = []
    for call in (module, lambda *args, **streams: checkpoint(module, *args, use_reentrant=False, **streams)):
        out = call(x.requires_grad_(), GRID, windows=windows)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast() -> None:
    module = module_of(config_of(), torch.float32)
    x, embeddings = clip_of(dtype=torch.float32)
    exact = module(x, GRID, embeddings=embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, GRID, embeddings=embeddings)
        expected, _ = block_by_block(module, x, embeddings, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert error_of(out.detach(), exact.detach()) < TOLERANCE[torch.bfloat16]
    assert error_of(out.detach(), expected) < TOLERANCE[torch.bfloat16]
    out.float().square().mean().backward()
    assert module.k.weight.grad is not None and module.k.weight.grad.isfinite().all()


CONFIG = config_of()
WRONG: dict[str, tuple[Callable[[RetrievalAttention, Tensor, Tensor], Any], tuple[str, ...]]] = {
    "embeddings missing": (lambda m, x, e: m(x, GRID), ("embeddings", "None", "3")),
    "embeddings of other frames": (lambda m, x, e: m(x, GRID, embeddings=e[:, :-1]), ("embeddings", "23", "22")),
    "embeddings of one sample": (lambda m, x, e: m(x, GRID, embeddings=e[:1]), ("embeddings", "2", "1")),
    "embeddings that are ints": (lambda m, x, e: m(x, GRID, embeddings=e.long()), ("embeddings", "torch.int64")),
    "embeddings without a channel": (lambda m, x, e: m(x, GRID, embeddings=e[..., :0]), ("embeddings", "0")),
    "half a frame": (lambda m, x, e: m(x[:, 1:], GRID, embeddings=e), ("x", "6", "137")),
    "no frame": (lambda m, x, e: m(x[:, :0], GRID, embeddings=e), ("x", "0")),
    "x of another width": (lambda m, x, e: m(x[..., 1:], GRID, embeddings=e), ("x", "64", "63")),
    "x with heads": (lambda m, x, e: m(x[None], GRID, embeddings=e), ("x", "64")),
    "grid of three": (lambda m, x, e: m(x, (1, 2, 3), embeddings=e), ("grid", "1, 2, 3")),
    "empty grid": (lambda m, x, e: m(x, (0, 3), embeddings=e), ("grid", "0, 3")),
    "start_frame while training": (lambda m, x, e: m(x, GRID, embeddings=e, start_frame=0), ("start_frame", "0")),
    "clean of another size": (lambda m, x, e: m(x, GRID, embeddings=e, clean=x[:, 6:]), ("clean", "138", "132")),
    "windows and embeddings": (
        lambda m, x, e: m(x, GRID, embeddings=e, windows=clip_windows(CONFIG, FRAMES, 2, e)),
        ("embeddings", "windows"),
    ),
    "windows of another clip": (
        lambda m, x, e: m(x, GRID, windows=clip_windows(CONFIG, 22, 2, e[:, :22])),
        ("windows", "23", "22"),
    ),
    "no windows": (lambda m, x, e: m(x, GRID, windows=[]), ("windows", "23", "0")),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_training_refuses(name: str) -> None:
    call, words = WRONG[name]
    with rejected(*words):
        call(module_of(CONFIG), *clip_of())


def window_of(config: WindowConfig = CONFIG, **change: Any) -> MemoryWindow:
    sizes = {"layers": 1, "batch": 2, "tokens_per_frame": TOKENS, "kv_heads": 2, "head_dim": 16, "dtype": torch.float64}
    return MemoryWindow(config, **{**sizes, **change})


WRONG_MEMORY: dict[str, tuple[Callable[[], Any], dict[str, Any], tuple[str, ...]]] = {
    "another config": (lambda: window_of(config_of(recent_exclude=2)), {}, ("memory", "config", "recent_exclude")),
    "other heads": (lambda: window_of(kv_heads=4), {}, ("memory", "kv_heads", "4")),
    "another head size": (lambda: window_of(head_dim=32), {}, ("memory", "head_dim", "32")),
    "another split": (lambda: window_of(rope_split=(4, 6, 6)), {}, ("memory", "rope_split", "4, 6, 6")),
    "no window": (lambda: "window", {}, ("memory", "MemoryWindow", "str")),
    "no start": (window_of, {"start_frame": None}, ("start_frame", "None")),
    "later start": (window_of, {"start_frame": 3}, ("start_frame", "3")),
    "embeddings": (window_of, {"embeddings": torch.zeros(2, 3, 5)}, ("embeddings", "memory", "2, 3, 5")),
    "clean": (window_of, {"clean": torch.zeros(2, 18, 64)}, ("clean", "memory", "2, 18, 64")),
    "windows": (window_of, {"windows": []}, ("windows", "memory")),
}


@pytest.mark.parametrize("name", WRONG_MEMORY)
def test_what_generation_refuses(name: str) -> None:
    make, change, words = WRONG_MEMORY[name]
    x, _ = clip_of(3)
    memory = make()
    with torch.no_grad(), rejected(*words):
        module_of(CONFIG)(x, GRID, **{"memory": memory, "start_frame": 0, **change})
    if isinstance(memory, MemoryWindow):
        assert memory.window_frames == [[], []], "a refused call left a trace"


def test_generation_refuses_layers_tables_and_gradients() -> None:
    x, _ = clip_of(3)
    with torch.no_grad(), rejected("memory", "layers", "1"):
        module_of(CONFIG, layer=1)(x, GRID, memory=window_of(), start_frame=0)
    with torch.no_grad(), rejected("memory", "rope_theta", "100.0"):
        module_of(CONFIG, rope_theta=100.0)(x, GRID, memory=window_of(), start_frame=0)
    with rejected("memory", "no_grad"):
        module_of(CONFIG)(x, GRID, memory=window_of(), start_frame=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 66}, ("dim", "66", "4")),
        ({"dim": 60}, ("head_dim", "15")),
        ({"heads": 0}, ("heads", "0")),
        ({"kv_heads": 3}, ("kv_heads", "3", "4")),
        ({"kv_heads": 8}, ("kv_heads", "8", "4")),
        ({"layer": -1}, ("layer", "-1")),
        ({"config": None}, ("config", "NoneType")),
        ({"rope_split": (8, 4, 2)}, ("rope_split", "16")),
    ],
    ids=str,
)
def test_what_the_module_refuses(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with rejected(*words):
        RetrievalAttention(**{"dim": DIM, "heads": 4, "config": CONFIG, "layer": 0, **change})


def test_what_memory_for_refuses() -> None:
    with rejected("model", "layers"):
        memory_for(nn.Linear(2, 2), 1, TOKENS)
    with rejected("model", "layers", "0, 0"):
        memory_for(nn.ModuleList([module_of(CONFIG), module_of(CONFIG)]), 1, TOKENS)
    with rejected("model", "config"):
        memory_for(nn.ModuleList([module_of(CONFIG), module_of(config_of(top_k=2), layer=1)]), 1, TOKENS)
