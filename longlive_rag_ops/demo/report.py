"""``report.json`` and the table that is printed.

``report.json`` (schema 1) is one object:

================ =====================================================================================================
``schema``       1
``what``         one paragraph: what was run and what it does not show
``caveats``      list of sentences to read before quoting a number
``device``       CPU model, cores, threads, load, machine, versions of Python, torch and this package
``settings``     what was asked for
``codec``        what the codec is, its provenance, its PSNR on each clip streamed (dB, second frame of each four)
``embedding``    what retrieval searches
``embedder``     what makes it: ``name`` (a file's is without its folder), ``embedding_dim``, and of an autoencoder
                 ``frame_shape`` (C, h, w) and ``hidden_dims``, else null
``model``        shapes, timesteps, and what each kind of weights is
``clips``        sample clips: package, licence of the package, what they show
``bank``         null without one; ``limits``, ``statistics`` of each run (`MemoryBank.stats`), ``bit_for_bit``:
                 ``blocks`` streamed in bfloat16, how many of them came out ``equal``, ``compared_with`` what
``ranks``        null without; ``frame_ranks``, ``head_ranks``, ``transfer`` (of the chosen pages), and ``compared``
                 with one process, each output of each block: ``blocks``, how many of them had ``same_selections``,
                 ``largest_error`` and ``allowed_error`` (relative to the outputs' root mean square). Sizes and times
                 are the first rank's
``runs``         one object per footage and kind of weights, below
``pictures``     file names, relative to the report
``seconds``      wall time of the whole demo
================ =====================================================================================================

A run holds ``footage``, ``title``, ``weights``, ``frames``, ``note``, ``scenes`` (name, shot, start, stop),
``sources`` (clip and video frame of each latent frame), ``blocks`` and ``summary``. Frames are latent frames counted
from 0 unless called video frames; shares are 0..1; times are milliseconds of wall time; sizes are bytes.

A block holds ``start``, ``scene``, ``query_frame``, ``eligible`` ([first, stop)), ``retrieved`` and ``cosines`` (most
similar first), ``retrieved_scenes``, ``coverage`` and ``coverage_sliding_positions`` (see ``measures.coverage`` and
``probe``), ``milliseconds`` (see ``stream.BlockRecord``) and ``bytes_held``.

A summary holds ``return`` (null where no scene returns): ``earlier``, ``later``, ``all_blocks`` and
``after_the_first_block`` (see ``measures.return_shares``: the first block of the later scene searches with the last
frame *before* the cut); ``retrieved_from`` (see ``measures.scene_shares``); ``best_cosine`` per scene (mean over its
blocks of the highest cosine); ``coverage`` and ``coverage_sliding_positions``, each with means over
``full_window_blocks`` and, where a scene returns, ``later_scene_blocks`` and ``later_scene_after_the_first_block``;
``milliseconds`` (medians over blocks with a full window) and ``bytes_held`` after the last block.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..version import __version__
from .codec import FRAMES_PER_LATENT, Codec
from .footage import Footage, clip_sources
from .measures import WindowRule, coverage, middle, return_shares, scene_shares, summarise
from .model import TIMESTEPS, ToyTransformer
from .settings import DemoSettings
from .stream import BlockRecord, Streamed
from .tiers import TierCheck

if TYPE_CHECKING:
    from .rank_check import RankCheck

__all__ = ["build_report", "describe_device", "write_report"]

WHAT = (
    "A real video is coded into latents by a fixed linear codec and streamed block by block through a small frozen, "
    "untrained transformer whose self-attention is torch.ops.longlive.retrieve_attend: four noisy forwards and one "
    "clean forward a block. It shows what the memory window retrieves and what that does to attention. The model is "
    "teacher-forced and generates nothing, so nothing here speaks of video quality."
)
WEIGHTS = {
    "content": (
        "queries and keys are the same random rotation of the normalised residual stream, in which the token's latents "
        "stay readable: a pair of tokens scores by how alike it is (no temperature was tuned)"
    ),
    "random": "every matrix is Gaussian, queries and keys apart: attention knows nothing of content",
}
CAVEATS = (
    "Retrieval does not depend on the weights: embeddings come from the latents alone.",
    "The query is the last finished frame, so the first block after a cut still searches for the scene before it.",
    "The sample clips are steady shots: a scene returns with the same framing, which is easy to find. {limits}",
    "The codec was fitted on one clip (see its provenance; none of the default clips) and is no video autoencoder: see "
    "its PSNR.",
    "Coverage compares windows by one full-history softmax in which old frames sit at temporal position 0; "
    "coverage_sliding_positions repeats it with the newest frames where a sliding window would hold them.",
    "Within a shot the newest frames are at least as alike as old ones, so a plain sliding window of equal size can "
    "hold more attention than retrieval does; what retrieval is for is the time just after an earlier scene returns.",
    "The content weights were made so that similar tokens attend to each other. Coverage with them shows that the "
    "retrieved frames hold what such attention looks for, not that a trained model looks for it.",
    "Times are of this machine with whatever else ran on it, in float32, with a model thousands of times smaller than "
    "a video generator.",
)


def describe_device() -> dict[str, str | int | float | None]:
    """The machine that measured, without its name; ``load_average`` (last minute) tells whether it was busy."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "longlive_rag_ops": __version__,
    }


def _psnr(footage: Footage, codec: Codec) -> dict[str, float]:
    """PSNR in dB of the codec on the thumbnails of each clip."""
    decoded = codec.decode(footage.latents)[1::FRAMES_PER_LATENT].astype(np.float64)
    error = np.square(decoded - footage.thumbnails).mean(axis=(1, 2, 3))
    result = {}
    for clip in dict.fromkeys(name for name, _ in footage.sources):
        mean = float(np.mean([e for e, (name, _) in zip(error, footage.sources, strict=True) if name == clip]))
        result[clip] = round(10 * float(np.log10(255.0**2 / max(mean, 1e-12))), 2)
    return result


def _rounded(values: dict[str, float], digits: int = 6) -> dict[str, float]:
    return {key: round(value, digits) for key, value in values.items()}


def _scene_name(footage: Footage, frame: int) -> str | None:
    scene = footage.scene_of(frame)
    return scene.name if scene else None


def _coverages(record: BlockRecord, rule: WindowRule) -> tuple[dict[str, float], dict[str, float]]:
    return coverage(record.masses.placed, record.choice, rule), coverage(record.masses.sliding, record.choice, rule)


def _block(run: Streamed, record: BlockRecord, rule: WindowRule) -> dict[str, Any]:
    footage, choice = run.footage, record.choice
    placed, sliding = _coverages(record, rule)
    return {
        "start": choice.start,
        "scene": _scene_name(footage, choice.start),
        "query_frame": choice.start - 1 if choice.start else None,
        "eligible": [choice.eligible.start, choice.eligible.stop],
        "retrieved": list(choice.retrieved),
        "cosines": [round(c, 6) for c in record.cosines],
        "retrieved_scenes": [_scene_name(footage, frame) for frame in choice.retrieved] if footage.scenes else None,
        "coverage": _rounded(placed),
        "coverage_sliding_positions": _rounded(sliding),
        "milliseconds": {name: round(1000 * value, 3) for name, value in record.seconds.items()},
        "bytes_held": record.bytes_held,
    }


def _summary(run: Streamed, rule: WindowRule) -> dict[str, Any]:
    footage, records = run.footage, run.records
    full = [record for record in records if len(record.choice.retrieved) == rule.top_k]
    groups: dict[str, Sequence[BlockRecord]] = {"full_window_blocks": full}
    returned: dict[str, Any] | None = None
    pair = footage.returning()
    if pair:
        earlier, later = pair
        span = range(earlier.start, earlier.stop)
        inside = [record for record in records if record.choice.start in later]
        after = [record for record in inside if record.choice.start > later.start]
        groups |= {"later_scene_blocks": inside, "later_scene_after_the_first_block": after}
        returned = {
            "earlier": earlier.name,
            "later": later.name,
            "all_blocks": return_shares([record.choice for record in inside], span),
            "after_the_first_block": return_shares([record.choice for record in after], span),
        }
    both = {name: [_coverages(record, rule) for record in group] for name, group in groups.items()}
    choices = [record.choice for record in records]
    return {
        "return": returned,
        "retrieved_from": scene_shares(choices, {s.name: range(s.start, s.stop) for s in footage.scenes}),
        "best_cosine": {
            scene.name: round(float(np.mean(best)), 6)
            for scene in footage.scenes
            if (best := [max(r.cosines) for r in records if r.cosines and r.choice.start in scene])
        },
        "coverage": {name: _rounded(summarise([p for p, _ in rows])) for name, rows in both.items()},
        "coverage_sliding_positions": {name: _rounded(summarise([s for _, s in rows])) for name, rows in both.items()},
        "milliseconds": {
            name: round(1000 * (middle([record.seconds[name] for record in full]) or 0.0), 3)
            for name in ("total", "retrieval", "embedding", "attention", "rest")
        },
        "bytes_held": records[-1].bytes_held,
    }


def _run(run: Streamed, rule: WindowRule) -> dict[str, Any]:
    footage = run.footage
    return {
        "footage": footage.name,
        "title": footage.title,
        "weights": run.weights,
        "frames": footage.frames,
        "note": footage.note,
        "scenes": [{"name": s.name, "shot": s.shot, "start": s.start, "stop": s.stop} for s in footage.scenes],
        "sources": [{"clip": clip, "video_frame": frame} for clip, frame in footage.sources],
        "blocks": [_block(run, record, rule) for record in run.records],
        "summary": _summary(run, rule),
    }


def _bank(runs: Sequence[Streamed], settings: DemoSettings, check: TierCheck | None) -> dict[str, Any] | None:
    if settings.bank is None:
        return None
    bank = {
        "limits": settings.bank.to_dict(),
        "statistics": {f"{run.footage.name}, {run.weights}": run.stats["bank"] for run in runs},
        "bit_for_bit": None if check is None else asdict(check),
    }
    # Where the folder lies is nobody's business, also not in the reasons that statistics give.
    folder = json.dumps(str(settings.bank.spill))[1:-1]
    named: dict[str, Any] = json.loads(json.dumps(bank).replace(folder, "DIR"))
    return named


def _ranks(runs: Sequence[Streamed], settings: DemoSettings, compared: RankCheck | None) -> dict[str, Any] | None:
    if settings.mesh is None:
        return None
    return {
        **settings.mesh.shape(),
        "transfer": runs[0].transfer,
        "compared": None if compared is None else asdict(compared),
    }


def build_report(
    runs: Sequence[Streamed],
    codec: Codec,
    settings: DemoSettings,
    check: TierCheck | None = None,
    compared: RankCheck | None = None,
) -> dict[str, Any]:
    """The report without ``pictures`` and ``seconds``, which are known last; ``runs`` is not empty."""
    rule = WindowRule(settings.window, settings.sink, settings.top_k)
    footages = {run.footage.name: run.footage for run in runs}
    latents = runs[0].footage.latents
    model = ToyTransformer("random", (int(latents.shape[2]), int(latents.shape[3])), seed=settings.seed)
    clips = {entry["clip"]: entry for footage in footages.values() for entry in clip_sources(footage)}
    caveats = [
        text.format(limits=settings.embedder.limits)
        for text in CAVEATS
        if clips or not text.startswith("The sample clips")
    ]
    return {
        "schema": 1,
        "what": WHAT,
        "caveats": caveats,
        "device": describe_device(),
        "settings": {
            "window": settings.window,
            "sink": settings.sink,
            "top_k": settings.top_k,
            "recent_exclude": settings.recent_exclude,
            "local": settings.window_config().local,
            "size": list(settings.size),
            "blocks": settings.blocks,
            "seed": settings.seed,
            "threads": settings.threads,
        },
        "codec": {
            "what": "linear: 16 whitened principal components of patches of 4 frames x 8 x 8 pixels x 3 colours",
            "provenance": codec.provenance,
            "psnr_db": {name: _psnr(footage, codec) for name, footage in footages.items()},
        },
        "embedding": settings.embedder.what,
        "embedder": settings.embedder.describe(),
        "model": {
            "layers": model.layers,
            "heads": model.heads,
            "head_dim": model.head_dim,
            "tokens_per_frame": model.tokens_per_frame,
            "grid": list(model.grid),
            "timesteps": [round(t, 3) for t in TIMESTEPS] + [0.0],
            "weights": WEIGHTS,
        },
        "clips": list(clips.values()),
        "bank": _bank(runs, settings, check),
        "ranks": _ranks(runs, settings, compared),
        "runs": [_run(run, rule) for run in runs],
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes ``report`` as JSON (no NaN: a share that does not exist is null)."""
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
