"""FastVideo's own causal Wan, patched: without memory as it was, with memory as the simulator has it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from fastvideo_model import (
    CHANNELS,
    FRAMES,
    GRID,
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LAYERS,
    TIMESTEPS,
    TOKENS,
    WIDTH,
    Video,
    make_cache,
    make_model,
    noise,
)
from simulator import Rules, Simulator
from torch import Tensor
from window_pair import error_of, one_thread, rejected  # noqa: F401 (a fixture)

from longlive_rag_ops.bank import BankConfig
from longlive_rag_ops.patch import Handle, patch, patched

# Looked for, not imported: FastVideo's __init__ wants all that its pipelines need.
MISSING = [name for name in ("diffusers", "fastvideo") if find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {' and '.join(MISSING)}, which make test-backbones installs", allow_module_level=True)

pytestmark = pytest.mark.backbones

SAME = 1e-5  # largest difference of a latent: all of a video's forwards round otherwise, one after the other
EXACT = 2e-5  # of one attention, as a fraction of its root mean square
MEMORY: dict[str, Any] = {"window": 12, "sink": 1, "top_k": 6, "recent_exclude": 5}
POLICIES = ("absolute", "relativistic")
PAGE_BYTES = LAYERS * 2 * TOKENS * HEADS * HEAD_DIM * 4  # of a frame: keys and values of every layer


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    """Both of FastVideo's ways to rotate keys: before they are cached, or anew with every forward."""
    return str(request.param)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def embeddings(latents: Tensor) -> Tensor:
    """Average-pooled frames ``(B, n, C)`` of latents ``(B, C, n, H, W)``, written once more."""
    return latents.permute(0, 2, 1, 3, 4).mean(dim=(-2, -1))


def retrieved(handle: Handle, clip: int = 1) -> dict[int, list[list[int]]]:
    """Frames chosen for each block of a video, as the handle's log has them."""
    return {entry["block"]: entry["frames"] for entry in handle.retrieval_log if entry["clip"] == clip}


# Without memory.


@pytest.mark.parametrize(
    ("local", "sink", "buffer"),
    # Of a buffer that is longer than the window the model attends to the newest frames, without the sink; a shorter one
    # is the window.
    [(6, 1, 6), (6, 0, 6), (9, 2, 9), (6, 1, 9), (9, 1, 6)],
)
def test_without_memory_the_video_is_as_it_was(policy: str, local: int, sink: int, buffer: int) -> None:
    model = make_model(policy, local=local, sink=sink)
    expected = Video(model, make_cache(frames=buffer)).extend(6)
    with patched(model, top_k=0) as handle:
        video = Video(model, make_cache(frames=buffer))
        actual = video.extend(6)
        config = handle.clips[0].config
    assert config.window == min(local, buffer)
    assert config.position_rule == ("slot" if policy == "relativistic" else "absolute")
    assert expected.std() > 0.1
    assert difference(actual, expected) < SAME


def test_a_first_block_of_one_frame(policy: str) -> None:
    # As when an image is the first frame: one forward finishes it.
    model = make_model(policy)

    def generate() -> Tensor:
        video = Video(model)
        video.finish(noise((1, CHANNELS, 1, HEIGHT, WIDTH), 1))
        return video.extend(5)

    expected = generate()
    with patched(model, top_k=0):
        assert difference(generate(), expected) < SAME


def test_a_model_without_a_window_keeps_21_frames(policy: str) -> None:
    model = make_model(policy, local=-1, sink=0)
    expected = Video(model, make_cache(frames=21)).extend(7)
    with patched(model, top_k=0) as handle:
        assert difference(Video(model, make_cache(frames=21)).extend(7), expected) < SAME
        assert handle.clips[0].config.window == 21


# With memory.


def held_against_simulator(
    model: Any, rules: Rules, blocks: list[int], batch: int = 1, **options: Any
) -> list[list[int]]:
    """Generates a video of blocks of so many frames, checks each attention and choice; returns the last block's."""
    simulator = Simulator(rules, batch)
    errors: list[float] = []

    def compare(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
            q, k, v = args[:3]
            errors.append(error_of(out, simulator.attend(layer, q, k, v, GRID)[0]))

        return hook

    with patched(model, **options) as handle:
        hooks = [block.attn1.register_forward_hook(compare(layer)) for layer, block in enumerate(model.blocks)]
        video, chosen = Video(model, batch=batch), {}
        for frames in blocks:
            used = video.frames
            video.extend(1, frames)
            simulator.finish(frames, embeddings(video.blocks[-1]))
            chosen[video.frames] = [simulator.selected(sample) for sample in range(batch)]
        for hook in hooks:
            hook.remove()
        assert retrieved(handle) == chosen
    assert len(errors) == len(blocks) * (len(TIMESTEPS) + 1) * LAYERS
    assert max(errors) < EXACT
    return chosen[used]


# Positions go by the published rule for memory unless another is asked for, whatever the model's own.
@pytest.mark.parametrize("rule", [None, "absolute", "before_window"])
def test_memory_is_as_the_simulator_has_it(policy: str, rule: str | None) -> None:
    rules = Rules(12, 1, 6, 5, rule or "slot")
    (last,) = held_against_simulator(make_model(policy), rules, 10 * [FRAMES], **MEMORY, position_rule=rule)
    assert len(last) == 6
    assert max(last) <= 27 - 12 - 5  # before the block at 27, of the frames 1 to 15 that were evicted


def test_samples_of_a_batch_choose_for_themselves(policy: str) -> None:
    first, second = held_against_simulator(make_model(policy), Rules(12, 1, 6, 5), 10 * [FRAMES], batch=2, **MEMORY)
    assert set(first) != set(second)


def test_blocks_of_other_lengths(policy: str) -> None:
    blocks = [1, *(8 * [FRAMES]), 2]
    (last,) = held_against_simulator(make_model(policy), Rules(12, 1, 6, 5), blocks, **MEMORY)
    assert len(last) == 6


def test_memory_changes_the_video() -> None:
    model = make_model()
    plain = Video(model).extend(8)
    with patched(model, **MEMORY):
        found = Video(model).extend(8)
    assert difference(plain[:, :, :FRAMES], found[:, :, :FRAMES]) < SAME  # nothing is in history yet
    assert difference(plain[:, :, -FRAMES:], found[:, :, -FRAMES:]) > 0.01


@pytest.mark.parametrize("limits", ["host", "disk"])
def test_a_bank_makes_no_difference(policy: str, limits: str, tmp_path: Path) -> None:
    bank = {
        "host": BankConfig(host_bytes=32 * PAGE_BYTES, slab_bytes=4 * PAGE_BYTES, lock_memory=False),
        # As little memory as there may be: most frames are on disk alone.
        "disk": BankConfig(
            host_bytes=9 * PAGE_BYTES,
            slab_bytes=PAGE_BYTES,
            disk_bytes=64 * PAGE_BYTES,
            shard_bytes=8 * PAGE_BYTES,
            spill=tmp_path,
            lock_memory=False,
        ),
    }[limits]
    model = make_model(policy)
    with patched(model, **MEMORY) as handle:
        expected, chosen = Video(model).extend(10), retrieved(handle)
    with patched(model, **MEMORY, bank=bank) as handle:
        assert torch.equal(Video(model).extend(10), expected)
        assert retrieved(handle) == chosen
        (clip,) = handle.stats()["clips"]
        assert clip["bank"][limits]["frames"] > 6


# Taking it back.


def test_unpatch_takes_everything_back(policy: str) -> None:
    model = make_model(policy)
    expected, methods = Video(model).extend(6), [block.attn1.forward for block in model.blocks]
    with patched(model, **MEMORY) as handle:
        with_memory = Video(model).extend(6)
        assert handle.patched
    assert not handle.patched
    assert [block.attn1.forward for block in model.blocks] == methods
    assert torch.equal(Video(model).extend(6), expected)
    with patched(model, **MEMORY) as handle:
        assert torch.equal(Video(model).extend(6), with_memory)
    handle.unpatch()  # a second time: nothing
    assert torch.equal(Video(model).extend(6), expected)


def test_buffers_are_freed_and_come_back(policy: str) -> None:
    model = make_model(policy)
    expected = Video(model).extend(4)
    own = sum(layer[name].nbytes for layer in make_cache() for name in "kv")
    handle = patch(model, top_k=0)
    video = Video(model)
    video.extend(2)
    assert {layer[name].shape for layer in video.cache for name in "kv"} == {(1, 0, HEADS, HEAD_DIM)}
    held = handle.stats()["clips"][0]["window"]["bytes"]
    # The window is what the model's own buffers were. Beside it the window keeps unrotated keys of the local part and
    # of a block (one buffer, not two), and a page of a history that there is none of: more than the model had.
    assert held["window"] == own == 6 * PAGE_BYTES
    assert held["staging"] == (6 - 1 + FRAMES) * PAGE_BYTES / 2
    assert held["history_reserved"] == PAGE_BYTES
    assert held["history"] == held["index"] == 0
    handle.unpatch()
    assert {layer[name].shape for layer in video.cache for name in "kv"} == {(1, 6 * TOKENS, HEADS, HEAD_DIM)}
    # The cache begins again, with whatever was in the middle of it when the model was unpatched forgotten.
    assert torch.equal(Video(model, video.cache).extend(4), expected)


# Caches and videos.


def test_counters_are_kept_as_tensors_or_numbers(policy: str) -> None:
    model = make_model(policy)

    def counters(video: Video) -> Iterator[list[int]]:
        for _ in range(5):
            video.extend(1)
            yield [int(layer[name]) for layer in video.cache for name in ("global_end_index", "local_end_index")]

    own = list(counters(Video(model)))
    with patched(model, top_k=0):
        assert list(counters(Video(model))) == own
    results = []
    for whole_numbers in (False, True):
        with patched(model, **MEMORY):
            video = Video(model, make_cache(whole_numbers=whole_numbers))
            results.append(video.extend(8))
            kinds = {type(layer[name]) for layer in video.cache for name in ("global_end_index", "local_end_index")}
            assert kinds == {int if whole_numbers else Tensor}
    assert torch.equal(*results)


def test_videos_of_one_block_do_not_pile_up() -> None:
    model = make_model()
    with patched(model, **MEMORY) as handle:
        for seed in range(4):
            Video(model, seed=seed).extend(1)
        assert len(handle.clips) <= 2


def test_inference_mode_makes_no_difference() -> None:
    model = make_model()
    with patched(model, **MEMORY):
        expected = Video(model).extend(8)
        with torch.inference_mode():
            inside = Video(model).extend(8)
        assert torch.equal(inside, expected)
        assert torch.equal(Video(model).extend(8), expected)  # in memory that was taken in inference mode


def test_a_second_video_starts_from_nothing(policy: str) -> None:
    model = make_model(policy)
    with patched(model, **MEMORY) as handle:
        first = Video(model).extend(9)
        Video(model, seed=1).extend(8)
        assert torch.equal(Video(model).extend(9), first)
        assert handle.stats()["videos"] == 3
        assert len(handle.clips) == 1
        assert retrieved(handle, 3) == retrieved(handle, 1) != {}


def test_two_patched_models_at_once() -> None:
    models = [make_model("absolute"), make_model("relativistic", seed=1)]
    options: list[dict[str, Any]] = [MEMORY, {**MEMORY, "window": 10, "top_k": 3}]
    alone = []
    for model, option in zip(models, options, strict=True):
        with patched(model, **option):
            alone.append(Video(model).extend(9))
    with patched(models[0], **options[0]), patched(models[1], **options[1]):
        videos = [Video(model) for model in models]
        for _ in range(9):
            for video in videos:
                video.extend(1)
        for video, expected in zip(videos, alone, strict=True):
            assert torch.equal(torch.cat(video.blocks, dim=2), expected)


def test_guided_sampling_has_two_caches(policy: str) -> None:
    model = make_model(policy)

    def guided(positive: Video, negative: Video) -> list[tuple[Tensor, int, int, Tensor, Tensor]]:
        """Every pair of forwards: latents, timestep, first frame, and what came out."""
        pairs = []
        for _ in range(9):
            x = positive.noise()
            for step, timestep in enumerate((*TIMESTEPS, 0)):
                flows = [video.forward(x, timestep) for video in (positive, negative)]
                pairs.append((x, timestep, positive.frames, *flows))
                if timestep:
                    x = positive.denoised(x, flows[1] + 3 * (flows[0] - flows[1]), step)
            positive.frames += FRAMES
            negative.frames += FRAMES
        return pairs

    with patched(model, **MEMORY) as handle:
        pairs = guided(Video(model, prompt=1), Video(model, prompt=2))
        assert [clip.finished_frames for clip in handle.clips] == [27, 27]
        assert retrieved(handle, 1) == retrieved(handle, 2)  # both find by the same latents
    assert difference(pairs[-1][3], pairs[-1][4]) > 0.01
    for prompt in (1, 2):
        with patched(model, **MEMORY):
            video = Video(model, prompt=prompt)
            for x, timestep, start, *flows in pairs:
                assert torch.equal(video.forward(x, timestep, start), flows[prompt - 1])


# What is refused.


def test_refused_calls_leave_the_video_as_it_was(policy: str) -> None:
    model = make_model(policy)
    two = noise((2, CHANNELS, FRAMES, HEIGHT, WIDTH))
    wide = noise((1, CHANNELS, FRAMES, HEIGHT, WIDTH + 2))
    long = noise((1, CHANNELS, 6, HEIGHT, WIDTH))

    def refused(video: Video) -> None:
        with rejected("batch", "1", "2"):
            video.forward(two, 1000)
        with rejected("grid", "(4, 6)", "(4, 7)"):
            video.forward(wide, 1000)
        with rejected("frames", f"{video.frames - 1} .. {video.frames + 1}"):
            video.forward(two[:1], 1000, video.frames - 1)

    with patched(model, **MEMORY):
        expected = Video(model).extend(9)
        video = Video(model)
        video.extend(1)
        for _ in range(8):
            refused(video)  # between two blocks
            with rejected("frames", f"{video.frames + 3} .. {video.frames + 5}"):
                video.forward(two[:1], 1000, video.frames + 3)
            with rejected("window - sink - top_k = 12 - 1 - 6 = 5", "6"):
                video.forward(long, 1000)
            x = video.denoise()
            refused(video)  # in the middle of one
            video.finish(x)
        assert torch.equal(torch.cat(video.blocks, dim=2), expected)


def test_a_gap_in_the_middle_of_a_block_leaves_it_open(policy: str) -> None:
    model = make_model(policy)
    with patched(model, **MEMORY):
        expected = Video(model).extend(2)
        video = Video(model)
        x = video.denoise()
        with rejected("frames", "6 .. 8"):
            video.forward(x, 1000, 6)
        video.finish(x)
        assert torch.equal(video.extend(1), expected)


def test_a_first_forward_longer_than_the_local_part_is_refused() -> None:
    model = make_model()
    with patched(model, **MEMORY), pytest.raises(ValueError, match=r"frames_per_block"):
        Video(model).forward(noise((1, CHANNELS, 6, HEIGHT, WIDTH)), 1000)


def test_a_video_begins_at_frame_0() -> None:
    model = make_model()
    video = Video(model)
    video.extend(2)
    with patched(model, **MEMORY), rejected("frame 0", "frame 6"):
        video.extend(1)


def test_a_model_is_patched_once() -> None:
    model = make_model()
    with patched(model, **MEMORY):
        expected = Video(model).extend(4)
        with pytest.raises(RuntimeError, match=r"patched already.*unpatch\(\)"):
            patch(model)
        assert torch.equal(Video(model).extend(4), expected)


def test_a_changed_counter_is_noticed() -> None:
    model = make_model()
    for whole_numbers in (False, True):
        with patched(model, **MEMORY):
            video = Video(model, make_cache(whole_numbers=whole_numbers))
            video.extend(2)
            for layer in video.cache:
                layer["local_end_index"] = layer["local_end_index"] - TOKENS
            with rejected("local_end_index", str(6 * TOKENS - TOKENS)):
                video.extend(1)


@pytest.mark.parametrize("change", [{"interpolation_factor": 0.5}, {"theta_rescale_factor": [2.0, 1.0, 1.0]}])
def test_another_rotation_is_refused(policy: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # The second is one of time alone, which no token of the first frame shows.
    model = make_model(policy)
    module = sys.modules[type(model).__module__]
    original = module.get_rotary_pos_embed
    monkeypatch.setattr(module, "get_rotary_pos_embed", lambda *args, **options: original(*args, **options, **change))
    with patched(model, **MEMORY), pytest.raises(ValueError, match="freqs_cis must be the angles of Wan's"):
        Video(model).extend(1)


def test_training_is_left_alone() -> None:
    # A cache is given by name; the fifth argument by position is another one in training.
    model = make_model()
    x, text, timestep = noise((1, CHANNELS, 3, HEIGHT, WIDTH)), noise((1, 16, 32)), torch.zeros(1, 3)
    with patched(model, **MEMORY) as handle:
        assert handle.adapter.call((x, text, timestep, None, 3), {}) is None
        assert handle.adapter.call((x, text, timestep), {"clean_x": x}) is None
