"""A small causal video diffusion transformer with memory: trained in a minute on a CPU, then run with and without it.

``python examples/causal_video_transformer.py [--seconds 60] [--seed 0] [--out OUT]``

The model is built from `RetrievalAttention`. It learns by flow matching with teacher forcing (a noisy block sees the
clean frames that its window would hold) on the clips of `toy_scenes.py`, in which a scene returns after it has left the
window. Half of the steps train under a window with memory, half under an equally large one without, so that neither is
new to the weights. Then the return of the scene is generated, block by block, a few denoising forwards and a clean one
each: only a window that found the scene's old frames can know how it looked. The opening, A and B are given.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from toy_scenes import (
    BLOCK,
    CHANNELS,
    OPENING,
    SCENES,
    SIDE,
    Clips,
    backdrop_error,
    embed_frames,
    longest_first,
    make_clips,
)
from tqdm import tqdm

from longlive_rag_ops import WindowConfig
from longlive_rag_ops.clip_windows import clip_windows
from longlive_rag_ops.retrieval_attention import RetrievalAttention, memory_for

PATCH = 2
GRID = (SIDE // PATCH, SIDE // PATCH)
TOKENS = GRID[0] * GRID[1]
RETURN = 3  # blocks of the returned scene that are generated and measured
SHIFT = 3.0  # warps noise levels towards 1, where a block's look is decided
SIZES: dict[str, Any] = {"window": 8, "sink": 1, "recent_exclude": 0, "frames_per_block": BLOCK}
# Plain top-k finds more of the newest scene. Diversity also finds the others, among them the one that a cut returns to.
WINDOWS = {
    "memory": WindowConfig(**SIZES, top_k=3, diversity=0.7),
    "plain top-k": WindowConfig(**SIZES, top_k=3),
    "no memory": WindowConfig(**SIZES, top_k=0),
}
TRAINED = ("memory", "no memory")


class Layer(nn.Module):
    """Attention and MLP, both modulated by the block's label and noise level (adaLN, arXiv 2212.09748)."""

    def __init__(self, dim: int, heads: int, layer: int) -> None:
        super().__init__()
        self.attention = RetrievalAttention(dim, heads, config=WINDOWS["memory"], layer=layer)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulate(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.modulation(condition).chunk(6, -1)

    def attention_input(self, x: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:]) * (1 + parts[0]) + parts[1]

    def finish(self, x: torch.Tensor, attended: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = x + attended * (1 + parts[2])
        h = F.layer_norm(x, x.shape[-1:]) * (1 + parts[3]) + parts[4]
        return x + self.mlp(h) * (1 + parts[5])


class VideoTransformer(nn.Module):
    """Predicts the velocity ``noise - latents`` of a block, or of all blocks of a clip."""

    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.dim = dim
        self.tokens = nn.Linear(CHANNELS * PATCH**2, dim)
        self.place = nn.Parameter(torch.randn(TOKENS, dim) * 0.5)
        self.label = nn.Embedding(SCENES, dim)
        self.level = nn.Sequential(nn.Linear(32, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.layers = nn.ModuleList(Layer(dim, heads, layer) for layer in range(layers))
        self.head = nn.Linear(dim, CHANNELS * PATCH**2)

    def use_window(self, config: WindowConfig) -> None:
        for layer in self.layers:
            layer.attention.config = config

    def embed(
        self, latents: torch.Tensor, labels: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, conditions ``(B, F*T, dim)``, from latents ``(B, F, C, H, W)``, labels and levels ``(B, blocks)``."""
        frequencies = torch.exp(torch.arange(16) * (-math.log(1000.0) / 15)) * 100
        angles = level[..., None] * frequencies
        condition = self.level(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(labels)
        per_token = condition.repeat_interleave(latents.shape[1] // labels.shape[1] * TOKENS, dim=1)
        patches = F.pixel_unshuffle(latents, PATCH).flatten(3).transpose(2, 3)  # (B, F, T, C * 4)
        x = (self.tokens(patches) + self.place).flatten(1, 2)
        return x + per_token, per_token

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(F.layer_norm(x, x.shape[-1:])).unflatten(1, (-1, TOKENS)).transpose(2, 3)
        return F.pixel_shuffle(y.unflatten(-1, GRID), PATCH)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor, level: torch.Tensor, **memory: Any) -> torch.Tensor:
        """One forward of a block: ``labels`` and ``level (B, 1)``, ``memory`` the window and ``start_frame``."""
        x, condition = self.embed(latents, labels, level)
        for layer in self.layers:
            parts = layer.modulate(condition)
            x = layer.finish(x, layer.attention(layer.attention_input(x, parts), GRID, **memory), parts)
        return self.latents(x)

    def forward_clips(self, noisy: torch.Tensor, level: torch.Tensor, clips: Clips) -> torch.Tensor:
        """All blocks of clips at once: the noisy stream, whose past is the clean one."""
        config = self.layers[0].attention.config
        frames = noisy.shape[1]
        windows = clip_windows(config, frames, len(noisy), embed_frames(clips.latents))
        x, condition = self.embed(noisy, clips.labels, level)
        y, clean_condition = self.embed(clips.latents, clips.labels, torch.zeros_like(level))
        for layer in self.layers:
            parts, clean_parts = layer.modulate(condition), layer.modulate(clean_condition)
            h, clean = layer.attention_input(x, parts), layer.attention_input(y, clean_parts)
            x = layer.finish(x, layer.attention(h, GRID, clean=clean, windows=windows), parts)
            if layer is not self.layers[-1]:  # nobody reads the last layer's clean output
                y = layer.finish(y, layer.attention(clean, GRID, windows=windows), clean_parts)
        return self.latents(x)


def warp(level: torch.Tensor) -> torch.Tensor:
    return SHIFT * level / (1 + (SHIFT - 1) * level)


def train(model: VideoTransformer, settings: argparse.Namespace, generator: torch.Generator) -> list[float]:
    """Flow matching on ``(1 - s) latents + s noise``, a level s per block, until --steps or --seconds; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01, betas=(0.9, 0.98))
    losses: list[float] = []
    began, done = time.perf_counter(), 0.0
    with tqdm(total=100, desc="train", unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while done < 1:
            for group in optimizer.param_groups:  # warm-up, then a half cosine down
                group["lr"] = settings.lr * min(1, len(losses) / 30) * (0.5 + 0.5 * math.cos(math.pi * done))
            model.use_window(WINDOWS[TRAINED[len(losses) % 2]])
            clips = make_clips(settings.batch, settings.blocks, generator)
            noise = torch.randn(clips.latents.shape, generator=generator)
            level = warp(torch.rand(clips.labels.shape, generator=generator))
            share = level.repeat_interleave(BLOCK, 1)[..., None, None, None]
            velocity = model.forward_clips(torch.lerp(clips.latents, noise, share), level, clips)
            loss = F.mse_loss(velocity, noise - clips.latents)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            done = len(losses) / settings.steps if settings.steps else (time.perf_counter() - began) / settings.seconds
            bar.set_postfix_str(f"step {len(losses)}, loss {losses[-1]:.3f}", refresh=False)
            bar.update(min(100, int(100 * done)) - bar.n)
    return losses


@torch.inference_mode()
def generate(model: VideoTransformer, config: WindowConfig, clips: Clips, settings: argparse.Namespace) -> torch.Tensor:
    """Clips up to the scene's return as they are, by clean forwards; from there on generated: ``(B, F, C, H, W)``."""
    model.use_window(config)
    batch, blocks = clips.labels.shape
    memory = memory_for(model, batch, TOKENS)
    generator = torch.Generator().manual_seed(settings.seed)  # the same noise for every window
    levels = warp(torch.linspace(1, 0, settings.forwards + 1)).tolist()
    done = []
    for block in range(blocks):
        start = block * BLOCK
        where: dict[str, Any] = {"memory": memory, "start_frame": start}
        labels = clips.labels[:, block : block + 1]
        x = clips.latents[:, start : start + BLOCK]
        if block >= clips.returns:
            x = torch.randn(x.shape, generator=generator)
            for level, following in pairwise(levels):
                x = x + (following - level) * model(x, labels, torch.full(labels.shape, level), **where)
        model(x, labels, torch.zeros(labels.shape), **where)  # the pages that later blocks will see
        memory.finish(start, embed_frames(x))
        done.append(x)
    return torch.cat(done, 1)


def measure(clips: Clips, versions: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Distance of the returned scene from its first appearance, each of its blocks: the mean over clips."""
    first = clips.returns * BLOCK
    other = {"another clip": clips.latents.roll(1, 0)}  # what knowing nothing at all would give
    return {
        name: backdrop_error(latents[:, first:], clips.backdrop).unflatten(1, (-1, BLOCK)).mean((0, 2)).tolist()
        for name, latents in (versions | other).items()
    }


def draw_sheet(clips: Clips, versions: dict[str, torch.Tensor], path: Path, rows: int = 3) -> None:
    """Writes a picture: for some clips, frames of A and B, then the return as it was and as each window made it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, frames = clips.returns * BLOCK, clips.latents.shape[1]
    returned = range(first, frames)
    labels = clips.labels[0].repeat_interleave(BLOCK)
    shown = (labels[:first] == labels[first]).nonzero().flatten().tolist()[-2:]
    shown += list(range(first - 2, first))
    lines = [(clip, name) for clip in range(min(rows, len(clips.latents))) for name in ("footage", *versions)]
    columns = [*shown, *returned]
    figure, axes = pyplot.subplots(len(lines), len(columns), figsize=(len(columns), 0.95 * len(lines) + 0.6))
    for row, (clip, name) in zip(axes, lines, strict=True):
        latents = clips.latents if name == "footage" else versions[name]
        for axis, frame in zip(row, columns, strict=True):
            axis.set_axis_off()
            if name == "footage" or frame >= first:
                axis.imshow((latents[clip, frame].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy())
        if name != "footage":
            row[3].text(1.0, 0.5, name, transform=row[3].transAxes, va="center", ha="right", fontsize=10)
    for axis, frame in zip(axes[0], columns, strict=True):
        scene = "A" if frame in shown[:2] else "B" if frame < first else "A again"
        axis.set_title(f"{scene}\nframe {frame}", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: list[str] | None = None, report: Callable[[str], None] = print) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--steps", type=int, default=0, help="of training, instead of --seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("toy_out"), help="folder for scenes.png and report.json")
    parser.add_argument("--blocks", type=int, default=12, help=f"of a clip, {BLOCK} latent frames each; at least 10")
    parser.add_argument("--batch", type=int, default=4, help="clips of a training step")
    parser.add_argument("--clips", type=int, default=32, help="clips to measure, for each length of A")
    parser.add_argument("--forwards", type=int, default=5, help="denoising forwards of a block")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1, help="tensors are too small for more to help")
    parser.add_argument("--dim", type=int, default=64, help="width of the model, a multiple of 16")
    settings = parser.parse_args(arguments)
    if settings.blocks < 10:
        parser.error(f"argument --blocks: must be at least 10, got {settings.blocks}")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = VideoTransformer(settings.dim, settings.dim // 16)
    losses = train(model, settings, generator)
    settings.out.mkdir(parents=True, exist_ok=True)
    errors = {}
    for first in range(2, longest_first(settings.blocks, RETURN) + 1):
        clips = make_clips(settings.clips, settings.blocks, generator, first, RETURN)
        versions = {name: generate(model, config, clips, settings) for name, config in WINDOWS.items()}
        between = settings.blocks - OPENING - first - RETURN
        errors[f"{first} blocks of A, {between} of B"] = measure(clips, versions)
        if first == 2:
            draw_sheet(clips, versions, settings.out / "scenes.png")
    kept = 10
    result = {
        "settings": {**vars(settings), "out": str(settings.out)},
        "torch": torch.__version__,
        "steps": len(losses),
        "loss_first": sum(losses[:kept]) / len(losses[:kept]),
        "loss_last": sum(losses[-kept:]) / len(losses[-kept:]),
        "backdrop_error": errors,
    }
    (settings.out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    report(f"{len(losses)} steps, loss {result['loss_first']:.3f} -> {result['loss_last']:.3f}")
    report(f"distance of the returned scene's blocks from its first appearance, RMS, {settings.clips} clips each:")
    for group, rows in errors.items():
        report(f"  {group}")
        for name, error in rows.items():
            report(f"    {name:14}" + "".join(f"{value:8.3f}" for value in error))
    report(f"{settings.out / 'scenes.png'}, {settings.out / 'report.json'}")
    return result


if __name__ == "__main__":
    main()
