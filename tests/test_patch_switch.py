"""A change of prompt in a patched model: frames that are encoded again, and the history before them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_wan import Pipeline, ToyWan
from window_pair import one_thread

from longlive_rag_ops import BankConfig, patched

__all__ = ["one_thread"]
MEMORY: dict[str, Any] = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 1}


def switching(model: ToyWan, frames: int, renew_sink: bool = False, blocks: tuple[int, int] = (6, 6)) -> Tensor:
    """A video whose prompt changes."""
    model.prompt = 0.0
    pipeline = Pipeline(model)
    pipeline.run(blocks[0])
    pipeline.switch(0.5, frames, renew_sink)
    return pipeline.run(blocks[1])


@pytest.mark.parametrize(
    ("frames", "renew_sink", "blocks"),
    [(5, False, (6, 6)), (6, True, (6, 6)), (4, False, (2, 6)), (6, False, (3, 6)), (5, False, (3, 6))],
)
def test_without_memory_it_is_the_model_itself(frames: int, renew_sink: bool, blocks: tuple[int, int]) -> None:
    """The toy's own cache overwrites what is encoded again: with all six frames its sink too."""
    model = ToyWan()
    expected = switching(model, frames, blocks=blocks)
    assert not torch.allclose(expected, Pipeline(model).run(sum(blocks)), atol=1e-3)
    with patched(model, top_k=0) as handle:
        assert float((switching(model, frames, renew_sink, blocks) - expected).abs().max()) < 1e-5
        assert handle.stats()["prompt_switches"] == 1
        assert handle.stats()["clips"][0]["window"]["recached_frames"] == frames


def test_a_sink_that_is_not_renewed_stays() -> None:
    model = ToyWan()
    with patched(model, top_k=0):
        videos = [switching(model, 6, renew) for renew in (False, True)]
    assert torch.equal(videos[0][:, :, :12], videos[1][:, :, :12])
    assert not torch.allclose(videos[0][:, :, 12:], videos[1][:, :, 12:], atol=1e-4)


def run(
    policy: str, model: ToyWan, **options: Any
) -> tuple[Tensor, list[dict[str, Any]], dict[str, Any], list[Tensor]]:
    """The video, the log, the last statistics, and the history's pages of frames 1 to 5 after the switch."""
    with patched(model, on_prompt_switch=policy, **{**MEMORY, **options}) as handle:
        model.prompt = 0.0
        pipeline = Pipeline(model)
        pipeline.run(9)
        pipeline.switch(0.5, 6)
        window = handle.clips[0].window
        assert window is not None
        pages = [window.history_page(frame) for frame in range(1, 6) if policy != "drop"]
        return pipeline.run(7), list(handle.retrieval_log), handle.stats(), pages


def test_policies(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = ToyWan()
    videos, pages = {}, {}
    for policy in ("keep", "drop", "recache"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "longlive_rag_ops"):
            videos[policy], log, stats, pages[policy] = run(policy, model)
        (switch,) = (entry for entry in log if entry["event"] == "prompt switch")
        assert switch | {"clip": 1, "at": 18, "policy": policy, "recached": [12, 18]} == switch
        assert (
            f"prompt switch at frame 18: frames 12 to 17 are cached again; history before them: {policy}" in caplog.text
        )
        assert ("pages of the old prompt" in caplog.text) == (policy == "keep")
        assert stats["prompt_switches"] == 1
        after = [entry for entry in log if entry["event"] == "retrieval" and entry["block"] > 18]
        old = {frame for entry in after for frame in entry["frames"][0] if frame < 12}
        assert bool(old) == (policy != "drop") and switch.get("dropped", 0) == (11 if policy == "drop" else 0)
        # Frames 1 to 11 in runs of a window's length: 6 and 5.
        assert stats["clips"][0]["window"]["recached_frames"] == (6 + 11 if policy == "recache" else 6)
        bank = BankConfig(host_bytes="1MiB", disk_bytes="4MiB", spill=tmp_path, slab_bytes=20_000)
        assert torch.equal(run(policy, model, bank=bank)[0], videos[policy])
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(pages["keep"], pages["recache"], strict=True))
    for one, other in (("keep", "drop"), ("keep", "recache"), ("drop", "recache")):
        assert torch.equal(videos[one][:, :, :18], videos[other][:, :, :18])
        assert not torch.allclose(videos[one][:, :, 18:], videos[other][:, :, 18:], atol=1e-4)


def test_history_that_is_encoded_again_is_what_the_new_prompt_makes_of_it() -> None:
    """In the first layer keys and values depend on a frame alone."""
    model = ToyWan()
    with patched(model, on_prompt_switch="recache", **MEMORY) as handle:
        pipeline = Pipeline(model)
        pipeline.run(9)
        pipeline.switch(0.5, 6)
        window = handle.clips[0].window
        assert window is not None
        again = [window.history_page(frame)[0] for frame in range(1, 18)]
        pipeline.run(1)
    with patched(model, **MEMORY) as handle:
        fresh = Pipeline(model)
        latents = torch.cat(pipeline.blocks, 2)
        for start in range(0, 18, 2):
            fresh.forward(latents[:, :, start : start + 2], 0.0, start)
        fresh.forward(latents[:, :, 18:], 0.0, 18)
        window = handle.clips[0].window
        assert window is not None
        expected = [window.history_page(frame)[0] for frame in range(1, 18)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("policy", ["keep", "drop", "recache"])
@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_switch_that_fails_can_be_made_again(policy: str, fails: int) -> None:
    model = ToyWan()
    expected, log, *_ = run(policy, model)
    with patched(model, on_prompt_switch=policy, **MEMORY) as handle:
        model.prompt = 0.0
        pipeline = Pipeline(model)
        pipeline.run(9)
        mlp, calls = model.blocks[1].mlp.forward, []

        def failing(x: Tensor) -> Tensor:
            calls.append(x)
            if len(calls) == fails:
                raise RuntimeError("out of memory")
            return mlp(x)

        model.blocks[1].mlp.forward = failing
        for _ in range(2):
            try:
                pipeline.switch(0.5, 6)
                break
            except RuntimeError as error:
                assert str(error) == "out of memory"
        del model.blocks[1].mlp.forward
        assert torch.equal(pipeline.run(7), expected)
        assert list(handle.retrieval_log) == log and handle.stats()["prompt_switches"] == 1


def test_without_memory_there_is_no_history_to_encode_again() -> None:
    model = ToyWan()
    with patched(model, top_k=0, on_prompt_switch="recache") as handle:
        video = switching(model, 5)
        assert handle.stats()["clips"][0]["window"]["recached_frames"] == 5
    with patched(model, top_k=0):
        assert torch.equal(switching(model, 5), video)
