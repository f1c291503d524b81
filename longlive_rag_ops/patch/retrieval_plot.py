"""A picture of what was retrieved when."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_retrieval(log: list[dict[str, Any]], path: Path, clip: int | None, sample: int) -> None:
    """Draws a retrieval log: a dot for each retrieved frame, over the block it was retrieved for.

    Args:
        log: entries as of `Handle.retrieval_log`.
        path: of the picture.
        clip: number of the video; None: the newest.
        sample: of the batch.

    Raises:
        ValueError: there is nothing to draw. ImportError: matplotlib is missing.
    """
    found = [entry for entry in log if entry["event"] == "retrieval" and any(entry["frames"])]
    clips = sorted({entry["clip"] for entry in found})
    if clip is None and clips:
        clip = clips[-1]
    found = [entry for entry in found if entry["clip"] == clip]
    if not found:
        raise ValueError(f"clip must be one in which frames were retrieved, of {clips}; got {clip}")
    samples = len(found[0]["frames"])
    if not 0 <= sample < samples:
        raise ValueError(f"sample must be between 0 and {samples - 1}, got {sample}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'longlive-rag-ops[demo]'") from error
    blocks = [entry["block"] for entry in found for _ in entry["frames"][sample]]
    frames = [frame for entry in found for frame in entry["frames"][sample]]
    scores = [score for entry in found for score in entry["scores"][sample]]
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # A video of an hour has thousands of blocks: dots then shrink to what there is room for.
    size = max(4.0, min(36.0, 9000.0 / max(len(blocks), 1)))
    dots = axes.scatter(blocks, frames, c=scores, s=size, cmap="viridis")
    axes.plot([0, max(blocks)], [0, max(blocks)], color="0.8", linewidth=1, label="the block itself", zorder=0)
    for number, switch in enumerate(
        entry for entry in log if entry["event"] == "prompt switch" and entry["clip"] == clip
    ):
        label = "prompt switch" if number == 0 else None
        axes.axvline(switch["at"], color="tab:red", linewidth=1, linestyle="--", label=label)
    axes.set(xlabel="first latent frame of the block", ylabel="retrieved latent frame", title=f"Video {clip}")
    axes.legend(loc="upper left", frameon=False)
    figure.colorbar(dots, label="cosine similarity")
    figure.savefig(path, dpi=120)
