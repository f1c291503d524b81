"""The whole evaluation on clips whose answers are known, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from evaluation_cases import CONFIG, clip, named

from longlive_rag_ops.embedder import AutoencoderConfig, AutoencoderEmbedder, LatentAutoencoder, MeanKeys, average_pool
from longlive_rag_ops.evaluation.evaluate import Evaluation, edit_similarity, evaluate, make_plan
from longlive_rag_ops.evaluation.named_embedder import NamedEmbedder
from longlive_rag_ops.evaluation.report import build_report, json_text
from longlive_rag_ops.evaluation.table import summary_markdown, summary_text, tables

MEAN, SAME = named("mean", average_pool), named("same", lambda frames: torch.ones(len(frames), 2))


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return evaluate(make_plan([clip(0, 27), clip(1, 18), clip(2, 11)], [MEAN, SAME], CONFIG))


def test_orthogonal_scenes_are_all_found(found: Evaluation) -> None:
    assert [edit.name for edit in found.plan.edits] == ["c0+c1", "c0+c2", "c1+c0", "c1+c2"]
    for edit in found.plan.edits:
        assert found.recall["mean"][edit.name] == {1: 1, 3: 1}
        assert found.recall["newest"][edit.name] == {1: 0, 3: 0}
        assert 0 < (found.recall["random"][edit.name][3] or 0) < 1
        row, chance = found.overlap["mean"][edit.name], found.overlap["random"][edit.name]
        # The first block after a cut searches with a frame from before it, here one of a few blocks.
        assert row is not None and chance is not None and row.mass > 1.05 * chance.mass


def test_an_embedder_that_sees_nothing_takes_the_oldest(found: Evaluation) -> None:
    assert found.neighbours["same"]["c0"] == pytest.approx([1] * 8)
    assert found.spread["same"]["c0"] == pytest.approx((0, 1, 1, 1))
    for edit in found.plan.edits:  # the oldest frames are of A1
        assert found.recall["same"][edit.name] == {1: 1, 3: 1}
        assert (edit_similarity(found, "same", edit) == pytest.approx(1)) and found.overlap["same"][edit.name]


def test_what_is_too_short_is_noted(found: Evaluation) -> None:
    assert found.blocks["c0"] == 5 and found.blocks["c2"] == 0
    assert {row["c2"] for row in found.overlap.values()} == {None}
    notes = "\n".join(found.plan.notes)
    assert "no overlap on c2: fewer than 15 latent frames" in notes
    assert "no edit c2+c0: c2 has 11 latent frames, the outer scene needs 15" in notes


def test_ticks_are_counted_and_nothing_is_left_to_chance(found: Evaluation) -> None:
    ticks: list[None] = []
    again = evaluate(found.plan, lambda: ticks.append(None))
    assert len(ticks) == found.plan.steps > 30
    assert again.overlap == found.overlap and again.recall == found.recall and again.neighbours == found.neighbours


def test_the_report_is_json_and_has_every_number(found: Evaluation) -> None:
    report = json.loads(json_text(build_report(found, (320, 176))))
    assert report["schema"] == 1 and report["settings"]["recall_at"] == [1, 3]
    assert report["clips"][0] == {"name": "c0", "source": "latents", "frames": 27, "frame_shape": [16, 4, 6]}
    assert report["embedders"][1] == {"name": "same", "what": "made for a test", "embedding_dim": 2}
    edit = report["edits"][0]
    assert edit["scenes"] == [[0, 9], [9, 27], [27, 36]] and edit["frames"] == 36 and edit["left_out"] == 9
    for row in ("mean", "same", "random", "newest"):
        overlap, values = report["overlap"][row], found.overlap[row]
        there = [values[name] for name in ("c0", "c1")]
        assert overlap["clips"]["c2"] is None  # and the mean leaves it out
        assert overlap["mean_of_clips"]["mass"] == pytest.approx(sum(o.mass for o in there if o) / 2, abs=1e-5)
        assert set(overlap["edits"]) == {edit.name for edit in found.plan.edits}
        assert set(report["recall"][row]["mean"]) == {"1", "3"}
    assert report["neighbours"]["cosine"]["mean"]["clips"]["c2"][7] is not None
    assert report["spread"]["same"]["mean"]["deviation"] == pytest.approx(0, abs=1e-6)


def test_tables_show_it(found: Evaluation) -> None:
    report = build_report(found, (320, 176)) | {"pictures": ["recall.png"]}
    titles = [table.title for table in tables(report)]
    assert len(titles) == 6 and titles[-2:] == ["recall of a returning scene at 1", "recall of a returning scene at 3"]
    text, markdown = summary_text(report), summary_markdown(report)
    assert "toy's" in text and "a toy's" in markdown and "![recall](recall.png)" in markdown
    assert max(map(len, text[text.index("similarity to neighbours") :].splitlines())) <= 120
    for table in tables(report):
        assert all(len(row) == len(table.header) for row in table.rows)
        rows = [line for line in table.markdown().splitlines() if line.startswith("|")]
        assert len(rows) == 2 + len(table.rows) and len({row.count("|") for row in rows}) == 1
    by_title = {table.title: table for table in tables(report)}
    recalls = by_title["recall of a returning scene at 3"]
    assert recalls.header == ("", "c0+c1", "c0+c2", "c1+c0", "c1+c2", "mean")
    assert recalls.rows[0] == ("mean", *["100.0 %"] * 5) and recalls.rows[3][0] == "newest"
    overlaps = next(table for title, table in by_title.items() if title.startswith("overlap"))
    assert overlaps.header[:5] == ("", "c0", "c1", "c2", "mean of clips") and overlaps.rows[0][3] == "-"


def test_wide_tables_go_on_below() -> None:
    plan = make_plan([replace(clip(n, 27), name=f"a_clip_with_a_long_name{n}") for n in range(3)], [MEAN], CONFIG)
    report = build_report(evaluate(plan), (320, 176))
    text = tables(report)[2].text()
    assert max(map(len, text.splitlines())) <= 120
    for name in (*(edit["name"] for edit in report["edits"]), "mean of edits"):
        assert text.count(name) == 1
    assert text.count("newest") > 1


def test_one_clip_alone() -> None:
    found = evaluate(make_plan([clip(0, 18)], [MEAN], CONFIG))
    report = build_report(found, (320, 176))
    assert report["edits"] == [] and report["recall"]["mean"] == {"edits": {}, "mean": None}
    assert len(tables(report)) == 4 and "mean of" not in summary_text(report | {"pictures": []})
    single = evaluate(make_plan([clip(0, 1)], [MEAN], CONFIG))
    report = build_report(single, (320, 176))
    assert report["spread"]["mean"]["clips"]["c0"] is None and report["overlap"]["mean"]["mean_of_clips"] is None
    assert [table.rows[0][1] for table in tables(report)] == ["-", "-"]


@pytest.mark.parametrize("shape", [(16, 5, 6), (80, 4, 6)])
def test_frames_that_the_toy_does_not_take_have_no_overlap(shape: tuple[int, int, int]) -> None:
    plan = make_plan([clip(0, 27, shape=shape), clip(1, 27, shape=shape)], [MEAN], CONFIG)
    assert "no overlap with full-history attention: the toy transformer takes no such frames" in plan.notes[0]
    found = evaluate(plan)
    assert found.recall["mean"]["c0+c1"] == {1: 1, 3: 1}
    assert all(value is None for row in found.overlap.values() for value in row.values())


def test_edits_can_be_left_out() -> None:
    assert make_plan([clip(0, 27), clip(1, 27)], [MEAN], CONFIG, edits=False).edits == ()


def test_the_window_asks_for_blocks() -> None:
    sizes = []

    def embed(frames: torch.Tensor) -> torch.Tensor:
        sizes.append(len(frames))
        return average_pool(frames)

    assert named("e", embed).embeddings(clip(0, 11)).shape == (11, 16)
    assert sizes == [3, 3, 3, 2]


def refused(words: str, *clips: Any, embedders: Any = (MEAN,), **config: Any) -> None:
    with pytest.raises(ValueError, match=words):
        make_plan(clips, embedders, replace(CONFIG, **config))


def test_what_a_plan_refuses() -> None:
    refused("at least one clip")
    refused("at least one embedder", clip(0, 9), embedders=())
    refused(r"c1 has latent frames of \(16, 4, 8\), c0 of \(16, 4, 6\)", clip(0, 9), clip(1, 9, shape=(16, 4, 8)))
    refused("CLIP: 'c0' occurs twice", clip(0, 9), clip(0, 9))
    refused("'mean' occurs twice", clip(0, 9), embedders=(MEAN, MEAN))
    refused("'random' is the name of a rule", clip(0, 9), embedders=(named("random", average_pool),))
    refused("a name must have 1 to 24", replace(clip(0, 9), name="a|b"))
    refused("must be finite", replace(clip(0, 9), latents=torch.full((3, 16, 4, 6), torch.nan)))
    refused("must be float32 of shape", replace(clip(0, 9), latents=torch.zeros(3, 16, 4)))
    refused("must be float32 of shape", replace(clip(0, 9), latents=torch.zeros(3, 16, 4, 6).half()))
    refused("--top-k: got 0", clip(0, 9), top_k=0)
    refused("keys of a generator's layer", clip(0, 9), embedders=(named("keys", MeanKeys(0)),))
    model = AutoencoderEmbedder(LatentAutoencoder(AutoencoderConfig(16, 8, 8, 4, (8,))))
    other = NamedEmbedder("mine", "trained", model, model.config, "mine.safetensors")
    refused(
        r"mine.safetensors was made for latent frames of \(16, 8, 8\), those of c0 are", clip(0, 9), embedders=[other]
    )


@pytest.mark.parametrize(
    ("embed", "words"),
    [
        (lambda frames: frames, "must return floating point of shape"),
        (lambda frames: torch.ones(1, 4), r"of shape \(3, 4\), got torch.float32 of shape \(1, 4\)"),
        (lambda frames: torch.ones(len(frames), 0), r"of shape \(3, E\)"),
        (lambda frames: torch.ones(len(frames), 4).long(), "got torch.int64"),
        (lambda frames: [1.0], "got <class 'list'>"),
        (lambda frames: torch.full((len(frames), 4), torch.nan), "embeddings must be finite"),
        (lambda frames: torch.ones(len(frames), 4 if len(frames) == 3 else 5), r"frames from 9 of c0.*\(2, 4\)"),
    ],
)
def test_embedders_that_return_no_embeddings(embed: Callable[[torch.Tensor], Any], words: str) -> None:
    plan = make_plan([clip(0, 11)], [named("bad", embed)], CONFIG)
    with pytest.raises(ValueError, match=f"--embedder bad, frames from .*{words}" if "from" not in words else words):
        evaluate(plan)
