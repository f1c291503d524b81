"""A patched model whose history is searched by the keys of one of its layers, and by a checkpoint's embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulator import Rules, choose
from torch import Tensor
from toy_wan import CHANNELS, HEIGHT, STEPS, TOKENS, WIDTH, Pipeline, ToyWan
from window_pair import one_thread

from longlive_rag_ops import BankConfig, MemoryWindow, patched
from longlive_rag_ops.embedder import (
    AutoencoderConfig,
    AutoencoderEmbedder,
    LatentAutoencoder,
    MeanKeys,
    average_pool,
    save_autoencoder,
)
from longlive_rag_ops.patch import Call, Handle, patch, register_adapter, registry
from longlive_rag_ops.patch.wan import InPlaceWan

__all__ = ["one_thread"]
MEMORY: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1}
HEADS, HEAD_DIM = 2, 16


class Spread:
    """A user's own embedder over keys."""

    key_layer = 1

    def __call__(self, keys: Tensor) -> Tensor:
        assert keys.shape[1:] == (TOKENS, HEADS, HEAD_DIM)
        return torch.cat([keys.std(1), keys[:, 0] * 0.5], -1).flatten(1)


EMBEDDERS = [MeanKeys(0), MeanKeys(1), Spread()]
NAMES = ["first layer", "last layer", "own"]


class Recorder:
    """Keys of a layer before rotation, ``(B*F, T, H, D)``, by the video and the first frame; later forwards win."""

    def __init__(self, model: ToyWan, layer: int) -> None:
        self.keys: dict[tuple[int, int], Tensor] = {}
        self._now = (0, 0)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.blocks[layer].self_attn.norm_k.register_forward_hook(self._keep)

    def _begin(self, model: Any, args: Any, kwargs: Any) -> None:
        self._now = id(kwargs["kv_cache"]), kwargs["current_start"] // TOKENS

    def _keep(self, norm: Any, args: Any, keys: Tensor) -> None:
        self.keys[self._now] = keys.detach().reshape(-1, TOKENS, HEADS, HEAD_DIM).clone()

    def embeddings(self, embedder: Callable[[Tensor], Tensor], pipeline: Pipeline) -> Tensor:
        """``(F, E)`` of one video of one sample, from the keys of each block's last forward."""
        blocks = sorted((start, keys) for (cache, start), keys in self.keys.items() if cache == id(pipeline.cache))
        return torch.cat([embedder(keys) for _, keys in blocks])


def by_the_rules(embeddings: Tensor, ends: list[int]) -> list[list[int]]:
    """What is chosen after each block."""
    rules = Rules(6, 1, 2, 1)
    return [
        [frame for frame, _ in choose(embeddings[t - 1], {f: embeddings[f] for f in rules.candidates(t)}, 2)]
        for t in ends
    ]


def chosen(handle: Handle, clip: int = 1) -> list[list[int]]:
    entries = [entry for entry in handle.retrieval_log if entry["event"] == "retrieval" and entry["clip"] == clip]
    return [entry["frames"][0] for entry in entries]


def check_choices(handle: Handle, embeddings: Tensor, clip: int = 1) -> None:
    """They are by the rules, and there were some; another embedder would have chosen others."""
    found = chosen(handle, clip)
    assert found == by_the_rules(embeddings, [2 * (number + 1) for number in range(len(found))])
    assert len(found) >= 10 and any(found)


@pytest.fixture
def says_clean() -> Iterator[None]:
    """A family whose calls say which forward is a block's last."""

    class Saying(InPlaceWan):
        name = "saying"

        def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
            call = super().call(args, kwargs)
            assert call is not None and call.timestep is not None
            return replace(call, clean=not call.timestep.any())

    register_adapter(Saying)
    yield
    registry._registered.remove(Saying)


@pytest.mark.parametrize("embedder", EMBEDDERS, ids=NAMES)
def test_choices_are_those_of_the_recorded_keys(embedder: Any, tmp_path: Path) -> None:
    model = ToyWan()
    recorder = Recorder(model, embedder.key_layer)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipeline = Pipeline(model)
        video = pipeline.run(12)
        check_choices(handle, recorder.embeddings(embedder, pipeline))
        assert chosen(handle) != by_the_rules(average_pool(video[0].transpose(0, 1)), [*range(2, 25, 2)])
        log = list(handle.retrieval_log)
        assert handle.stats()["embedder"] == type(embedder).__name__
    bank = BankConfig(host_bytes="2MiB", disk_bytes="8MiB", spill=tmp_path, slab_bytes=20_000)
    with patched(model, embedder=embedder, bank=bank, **MEMORY) as handle:
        assert torch.equal(Pipeline(model).run(12), video)
        assert list(handle.retrieval_log) == log
        json.dumps(log)


@pytest.mark.parametrize("embedder", EMBEDDERS, ids=NAMES)
@pytest.mark.parametrize(
    "steps",
    [
        [(1000.0, 500.0)] * 3 + [(1000.0, 900.0, 500.0)] * 3 + [(500.0,)] * 6,
        [(0.0,)] * 2 + [(1000.0, 500.0)] * 10,
        [()] * 12,
    ],
    ids=["changing", "given frames first", "one forward"],
)
def test_any_number_of_forwards(embedder: Any, steps: list[tuple[float, ...]]) -> None:
    model = ToyWan()
    recorder = Recorder(model, embedder.key_layer)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipeline = Pipeline(model)
        for block in steps:
            pipeline.block(steps=block)
        check_choices(handle, recorder.embeddings(embedder, pipeline))


@pytest.mark.parametrize("embedder", EMBEDDERS, ids=NAMES)
def test_a_backbone_without_a_clean_forward(embedder: Any) -> None:
    """A block is final when the next one begins; its keys are its last forward's."""
    model = ToyWan()
    recorder = Recorder(model, embedder.key_layer)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipeline = Pipeline(model)
        for _ in range(12):
            pipeline.block(clean=False)
        check_choices(handle, recorder.embeddings(embedder, pipeline))


@pytest.mark.parametrize("embedder", EMBEDDERS, ids=NAMES)
@pytest.mark.parametrize("steps", [STEPS, ()], ids=["denoised", "one forward"])
@pytest.mark.usefixtures("says_clean")
def test_calls_that_say_which_forward_is_clean(embedder: Any, steps: tuple[float, ...]) -> None:
    model = ToyWan()
    recorder = Recorder(model, embedder.key_layer)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        assert handle.stats()["family"] == "saying"
        pipeline = Pipeline(model)
        for _ in range(12):
            pipeline.block(steps=steps)
        check_choices(handle, recorder.embeddings(embedder, pipeline))


def events_of(window: MemoryWindow, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []

    def watch(name: str) -> None:
        original = getattr(window, name)
        monkeypatch.setattr(window, name, lambda *args, **options: (events.append(name), original(*args, **options))[1])

    for name in ("retrieve", "finish", "attend"):
        watch(name)
    return events


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_search_begins_with_the_layer_s_keys(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the clean forward, known by its number and timestep from the second block on."""
    model = ToyWan(layers=3)
    with patched(model, embedder=MeanKeys(layer), **MEMORY) as handle:
        pipeline = Pipeline(model)
        pipeline.block()
        window = handle.clips[0].window
        assert window is not None
        events = events_of(window, monkeypatch)
        pipeline.run(2)
    clean = ["attend"] * layer + ["retrieve"] + ["attend"] * (3 - layer)
    block = ["attend"] * 6 + clean + ["finish"]
    assert events == ["finish", *block, *block]


@pytest.mark.usefixtures("says_clean")
def test_a_block_of_one_forward_is_searched_for_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, its layers have not all attended."""
    model = ToyWan()
    with patched(model, embedder=MeanKeys(1), **MEMORY) as handle:
        pipeline = Pipeline(model)
        pipeline.block(steps=())
        window = handle.clips[0].window
        assert window is not None
        events = events_of(window, monkeypatch)
        pipeline.block(steps=())
    assert events == ["attend", "attend", "finish"]


def test_two_clips_and_two_samples() -> None:
    embedder = MeanKeys(1)
    model = ToyWan()
    recorder = Recorder(model, 1)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipelines = [Pipeline(model, seed=seed) for seed in (0, 1)]
        for _ in range(12):
            # As guided sampling does: the forwards of both alternate.
            noise = [torch.randn(1, CHANNELS, 2, HEIGHT, WIDTH, generator=one.random) for one in pipelines]
            for step in (*STEPS, 0.0):
                for number, pipeline in enumerate(pipelines):
                    change = pipeline.forward(noise[number], step)
                    noise[number] = noise[number] - 0.5 * change if step else noise[number]
            for pipeline, x in zip(pipelines, noise, strict=True):
                pipeline.blocks.append(x)
        for clip, pipeline in enumerate(pipelines, 1):
            check_choices(handle, recorder.embeddings(embedder, pipeline), clip)
        assert chosen(handle, 1) != chosen(handle, 2)
    recorder.keys.clear()
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipeline = Pipeline(model, batch=2)
        pipeline.run(12)
        embeddings = recorder.embeddings(embedder, pipeline).unflatten(0, (12, 2, 2)).transpose(0, 1).flatten(1, 2)
        for sample in range(2):
            found = [entry["frames"][sample] for entry in handle.retrieval_log]
            assert found == by_the_rules(embeddings[sample], [*range(2, 25, 2)]) and any(found)


LATENTS = pytest.param(average_pool, id="latents")


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("embedder", [*(pytest.param(e, id=n) for e, n in zip(EMBEDDERS, NAMES, strict=True)), LATENTS])
def test_a_forward_that_fails_is_made_again_with_other_latents(embedder: Any, where: str) -> None:
    """What the block is searched by is the last forward's, whether the one that failed had begun the search or not."""
    model, layer = ToyWan(), getattr(embedder, "key_layer", 0)
    recorder = Recorder(model, layer)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipeline = Pipeline(model)
        original, failed = pipeline.forward, []
        broken = model.blocks[layer].norm if where == "before" else model.blocks[layer].mlp

        def failing(x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

        def insisting(x: Tensor, timestep: float) -> Tensor:
            if timestep == 0.0 and len(pipeline.blocks) % 2:
                broken.forward = failing
                with pytest.raises(RuntimeError, match="out of memory"):
                    original(torch.randn(x.shape, generator=pipeline.random), timestep)
                del broken.forward
                failed.append(x)
            return original(x, timestep)

        pipeline.forward = insisting  # type: ignore[method-assign, assignment]
        video = pipeline.run(12)
        pipeline.forward = original  # type: ignore[method-assign]
        pipeline.forward(torch.zeros(1, CHANNELS, 2, HEIGHT, WIDTH), 1000.0)  # the last block is final
        assert len(failed) == 6
        expected = average_pool(video[0].transpose(0, 1)) if embedder is average_pool else None
        if expected is None:
            expected = recorder.embeddings(embedder, pipeline)
        check_choices(handle, expected[:24])


@pytest.mark.parametrize("layer", [0, 1])
def test_frames_that_are_encoded_again_keep_their_embeddings(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, embedder = ToyWan(), MeanKeys(layer)
    recorder = Recorder(model, layer)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipeline = Pipeline(model)
        pipeline.run(9)
        before = recorder.embeddings(embedder, pipeline)
        kept = dict(recorder.keys)
        with monkeypatch.context() as patching:
            patching.setattr(MeanKeys, "__call__", lambda self, keys: pytest.fail("keys of finished frames"))
            pipeline.switch(0.5, 5)
        recorder.keys = kept  # without those of the frames that were encoded again
        pipeline.run(5)
        embeddings = recorder.embeddings(embedder, pipeline)
        assert torch.equal(embeddings[:18], before)
        check_choices(handle, embeddings)


def test_a_block_that_never_came_as_far_as_the_layer() -> None:
    model = ToyWan()
    with patched(model, embedder=MeanKeys(1), **MEMORY):
        pipeline = Pipeline(model)
        pipeline.block()
        model.blocks[1].norm.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            pipeline.block()
        del model.blocks[1].norm.forward
        with pytest.raises(RuntimeError, match=r"layer 1 has passed no keys of frames 2 .. 3.*block has come as far"):
            pipeline.forward(torch.zeros(1, CHANNELS, 2, HEIGHT, WIDTH), 0.0, 4)
        pipeline.block()


def run_changing(pipeline: Pipeline, blocks: int) -> None:
    """Each block takes another number of forwards than the last, so that it is final only when the next one begins."""
    for _ in range(blocks):
        pipeline.block(steps=STEPS[len(pipeline.blocks) % 2 :])


def test_a_switch_before_anyone_knew_that_the_block_was_final() -> None:
    """The open block is finished by the prompt re-cache, with its own keys."""
    model, embedder = ToyWan(), MeanKeys(1)
    recorder = Recorder(model, 1)
    with patched(model, embedder=embedder, **MEMORY) as handle:
        pipeline = Pipeline(model)
        run_changing(pipeline, 9)
        kept = dict(recorder.keys)
        pipeline.switch(0.5, 5)
        recorder.keys = kept
        run_changing(pipeline, 5)
        check_choices(handle, recorder.embeddings(embedder, pipeline))


def test_latents_are_kept_for_a_switch_though_not_for_retrieval() -> None:
    """Policy recache encodes frames again from latents; pipelines may use the buffer of these again."""
    model = ToyWan()
    buffer = torch.empty(1, CHANNELS, 2, HEIGHT, WIDTH)

    class Reusing(Pipeline):
        @torch.no_grad()
        def forward(self, x: Tensor, timestep: float, start: int | None = None) -> Tensor:
            return super().forward(buffer.copy_(x), timestep, start)

    videos = []
    for make in (Pipeline, Reusing):
        with patched(model, embedder=MeanKeys(1), on_prompt_switch="recache", **MEMORY):
            model.prompt = 0.0
            pipeline = make(model)
            run_changing(pipeline, 9)
            pipeline.switch(0.5, 5)
            videos.append(pipeline.run(5))
    assert torch.equal(*videos)


def test_without_memory_nothing_is_embedded() -> None:
    class Refusing:
        key_layer = 0

        def __call__(self, keys: Tensor) -> Tensor:
            raise AssertionError("it was called")

    model = ToyWan()
    expected = Pipeline(model).run(4)
    for embedder in (Refusing(), Refusing().__call__):
        with patched(model, embedder=embedder, top_k=0):
            assert float((Pipeline(model).run(4) - expected).abs().max()) < 1e-5


@pytest.mark.usefixtures("says_clean")
def test_without_memory_nothing_is_embedded_where_calls_say_which_forward_is_clean() -> None:
    def refusing(frames: Tensor) -> Tensor:
        raise AssertionError("it was called")

    model = ToyWan()
    with patched(model, embedder=refusing, top_k=0):
        Pipeline(model).run(4)


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (2, ValueError, "key_layer of embedder Own, for a model of 2 layers, must be between 0 and 1, got 2"),
        (-1, ValueError, "must be between 0 and 1, got -1"),
        (1.0, TypeError, r"key_layer of embedder Own, for a model of 2 layers, must be an int, got float \(1.0\)"),
        (True, TypeError, "must be an int, got bool"),
        ("last", TypeError, "must be an int, got str"),
    ],
)
def test_a_layer_that_the_model_has_not(layer: Any, error: type, words: str) -> None:
    class Own:
        key_layer = layer

        def __call__(self, keys: Tensor) -> Tensor:
            return keys.flatten(1)

    model = ToyWan()
    before = [sorted(vars(module)) for module in model.modules()]
    with pytest.raises(error, match=words):
        patch(model, embedder=Own(), **MEMORY)
    assert [sorted(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda keys: keys.mean(), ValueError, r"embedder must return \(2, E\) for keys \(2, 6, 2, 16\), got \(\)"),
        (lambda keys: [1], ValueError, "got list"),
        (lambda keys: keys.flatten(1)[:1], ValueError, r"got \(1, 192\)"),
        (lambda keys: keys.flatten(1).long(), TypeError, "embeddings must have dtype"),
    ],
)
def test_embedders_that_return_something_else(function: Any, error: type, words: str) -> None:
    def embedder(keys: Tensor) -> Tensor:
        return function(keys)

    embedder.key_layer = 0  # type: ignore[attr-defined]
    model = ToyWan()
    with patched(model, embedder=embedder, **MEMORY) as handle:
        with pytest.raises(error, match=words):
            Pipeline(model).run(2)
        window = handle.clips[0].window
        assert window is not None and window.stats()["blocks"] == 0


def test_an_embedding_does_not_keep_the_keys() -> None:
    """A view would, and a compiled embedder writes its next result over the last."""
    model, result = ToyWan(), torch.empty(2, HEADS * HEAD_DIM)

    def reusing(keys: Tensor) -> Tensor:
        return result.copy_(keys.mean(1).flatten(1))

    reusing.key_layer = 1  # type: ignore[attr-defined]
    recorder = Recorder(model, 1)
    with patched(model, embedder=reusing, max_clips=2, **MEMORY) as handle:
        pipelines = [Pipeline(model, seed=seed) for seed in (0, 1)]
        for _ in range(12):
            for pipeline in pipelines:
                run_changing(pipeline, 1)
        for clip, pipeline in enumerate(pipelines, 1):
            check_choices(handle, recorder.embeddings(MeanKeys(1), pipeline), clip)


def test_an_adapter_that_passes_no_keys_is_told() -> None:
    class First(InPlaceWan):
        """Prepares once and attends by itself."""

        name = "first"

        def attend(self, forward: Any, layer: int, original: Any, args: Any, kwargs: Any) -> Any:
            module, x = self.modules[layer], args[0]
            shape = (*x.shape[:2], HEADS, HEAD_DIM)
            q, k, v = (part.view(shape) for part in (module.q(x), module.k(x), module.v(x)))
            window = forward.prepare(layer, k, v) if layer == 0 else forward.window
            out = window.attend(layer, q, k, v, forward.call.start_frame, forward.call.grid)
            return module.o(out.flatten(2))

    register_adapter(First)
    try:
        with patched(ToyWan(), embedder=MeanKeys(0), **MEMORY) as handle:
            Pipeline(handle.model).run(3)  # type: ignore[arg-type]
        words = (
            r"layer 1 has passed no keys of frames 0 .. 1 to embedder MeanKeys.*prepare\(layer, k, v\) in each layer"
        )
        with (
            patched(ToyWan(), embedder=MeanKeys(1), **MEMORY) as handle,
            pytest.raises(RuntimeError, match=words),
        ):
            Pipeline(handle.model).run(3)  # type: ignore[arg-type]
    finally:
        registry._registered.remove(First)


def toy_autoencoder(height: int = HEIGHT) -> LatentAutoencoder:
    torch.manual_seed(0)
    return LatentAutoencoder(AutoencoderConfig(CHANNELS, height, WIDTH, 8, (6,)))


@pytest.mark.parametrize("kind", ["safetensors", "pt", "path"])
def test_a_checkpoint(kind: str, tmp_path: Path) -> None:
    autoencoder = toy_autoencoder()
    file = tmp_path / f"embedder.{'pt' if kind == 'pt' else 'safetensors'}"
    if kind == "pt":
        torch.save({"model": autoencoder.state_dict(), "config": autoencoder.config.to_mapping()}, file)
    else:
        save_autoencoder(file, autoencoder)
    model = ToyWan()
    with patched(model, embedder=file if kind == "path" else str(file), **MEMORY) as handle:
        video = Pipeline(model).run(12)
        check_choices(handle, AutoencoderEmbedder(autoencoder)(video[0].transpose(0, 1)))
        assert handle.stats()["embedder"] == "AutoencoderEmbedder"
        log = list(handle.retrieval_log)
    with patched(model, embedder=AutoencoderEmbedder(autoencoder), **MEMORY) as handle:
        assert torch.equal(Pipeline(model).run(12), video) and list(handle.retrieval_log) == log


def test_a_checkpoint_for_other_latents(tmp_path: Path) -> None:
    file = tmp_path / "embedder.safetensors"
    save_autoencoder(file, toy_autoencoder(HEIGHT + 2))
    model = ToyWan()
    expected = Pipeline(model).run(4)
    with patched(model, embedder=file, **MEMORY) as handle:
        words = r"frames must be \(N, 4, 6, 6\), what this embedder was trained for; got \(2, 4, 4, 6\)"
        with pytest.raises(ValueError, match=words):
            Pipeline(model).run(2)
        (clip,) = handle.stats()["clips"]
        assert clip["frames"] == 0 and clip["window"]["blocks"] == clip["window"]["history_frames"] == 0
    assert torch.equal(Pipeline(model).run(4), expected)
    with pytest.raises(ValueError, match=r"no\.safetensors cannot be read: No such file"):
        patch(model, embedder=tmp_path / "no.safetensors", **MEMORY)
