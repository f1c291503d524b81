"""Errors of a window that streams latents, by dtype and by the storage of the bank, held against float64.

The queries, keys and values are those of the demo's toy transformer, its first layer, over clean latents. All windows
retrieve the same frames; what differs is the dtype of pages, and how retrieved ones have been stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contenders import AsPublished, Forward, Shape
from benchmarks.error_records import ErrorGroups, Pair
from benchmarks.micro_cases import dtype_name
from benchmarks.preset import Preset
from benchmarks.record import Record
from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig
from longlive_rag_ops.bank import PageFormat
from longlive_rag_ops.demo.model import ToyTransformer
from longlive_rag_ops.embedder import grid_pool
from longlive_rag_ops.evaluation.clip import Clip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED = ("int8", "fp8")


class StreamedClip:
    """Whole blocks of a clip as the layer sees them, and their embeddings.

    Attributes:
        forwards: q, k, v of each block, ``(1, n*T, H, D)`` float32.
        embeddings: of each block, ``(1, n, E)`` float32.
    """

    def __init__(self, clip: Clip, config: WindowConfig, device: str, most: int) -> None:
        channels, height, width = clip.frame_shape
        self.config, self.device = config, device
        self.model = ToyTransformer("content", (height, width), layers=1, channels=channels)
        n = config.frames_per_block
        self.forwards: list[Forward] = []
        self.embeddings: list[torch.Tensor] = []
        for block in clip.latents[: min(most, clip.frames // n) * n].split(n):
            self.model.forward(block, 0.0, self._keep)
            self.embeddings.append(grid_pool(block)[None].to(device))
        # From here on a window retrieves as many frames as it can.
        self.first = next(b for b in range(len(self.forwards)) if n * b >= config.window + config.recent_exclude)
        self.first += -(-config.top_k // n)

    def _keep(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.forwards.append((q.to(self.device), k.to(self.device), v.to(self.device)))
        return torch.zeros_like(v)  # there is no other layer

    def shape(self, dtype: torch.dtype) -> Shape:
        """Of the layer."""
        made = Shape(self.model.grid, self.model.heads, self.model.head_dim, self.device, dtype)
        made.config = self.config
        return made

    def window(self, dtype: torch.dtype, engine: str, storage: str = "plain") -> tuple[torch.Tensor, list[list[int]]]:
        """Outputs of the blocks that retrieve, and what they retrieve.

        Args:
            storage: of a bank in host memory; plain has none.
        """
        model, bank = self.model, None
        if storage != "plain":
            form = PageFormat(storage, 1, 1, model.tokens_per_frame, model.heads, model.head_dim, dtype)
            room = form.record_bytes * self.config.frames_per_block * len(self.forwards)
            bank = BankConfig(host_bytes=room, storage=storage, slab_bytes=room)
        window = MemoryWindow(
            self.config,
            layers=1,
            batch=1,
            tokens_per_frame=model.tokens_per_frame,
            kv_heads=model.heads,
            head_dim=model.head_dim,
            dtype=dtype,
            device=self.device,
            bank=bank,
            engine=engine,
        )
        outs, chosen = [], []
        try:
            for block, (forward, embeddings) in enumerate(zip(self.forwards, self.embeddings, strict=True)):
                start = block * self.config.frames_per_block
                chosen.append(window.selected[0])
                outs.append(window.attend(0, *(x.to(dtype) for x in forward), start, model.grid))
                window.finish(start, embeddings)
        finally:
            if window.bank is not None:
                window.bank.close()
        return torch.cat(outs[self.first :], dim=1), chosen[self.first :]

    def published(self, dtype: torch.dtype) -> tuple[torch.Tensor, list[list[int]]]:
        """The same, by the published steps. Its choice is in float32, as its steps here are written."""
        contender = AsPublished(self.shape(dtype))
        outs, chosen = [], []
        for block, (q, k, v) in enumerate(self.forwards):
            chosen.append([row + self.config.sink for row in contender.choose()])
            forward = (q.to(dtype), k.to(dtype), v.to(dtype))
            outs.append(contender.run_block(block * self.config.frames_per_block, [forward], self.embeddings[block]))
        return torch.cat(outs[self.first :], dim=1), chosen[self.first :]


Streamed = Callable[[], tuple[torch.Tensor, list[list[int]]]]


def streamed_errors(
    preset: Preset, clip: Clip, config: WindowConfig, blocks: int, engines: Sequence[str]
) -> list[Record]:
    """The groups of a clip's first blocks. Of stored pages by the first engine only."""
    stream = StreamedClip(clip, config, preset.device, blocks)
    exact, chosen = stream.window(torch.float64, "reference")
    model = stream.model
    groups = ErrorGroups(
        f"error of a streamed window against float64, {clip.name}, {len(stream.forwards) - stream.first} blocks that "
        f"retrieve, {model.tokens_per_frame} tokens a frame, {model.heads} heads x {model.head_dim}",
        {"clip": clip.name, "source": clip.source, "tokens": model.tokens_per_frame, "window": config.window},
        preset.facts,
    )
    engines = groups.present(engines, preset)
    for dtype in DTYPES:
        name = dtype_name(dtype)
        known = {"dtype": name, "storage": "plain"}

        def add(label: str, role: str, make: Streamed, shape: dict[str, Any]) -> None:
            groups.add(label, role, functools.partial(_same_choice, make, exact, chosen), shape)

        for engine in engines:
            add(f"{name}: ours, plain pages, {engine}", "ours", functools.partial(stream.window, dtype, engine), known)
        for storage in STORED:
            make = functools.partial(stream.window, dtype, engines[0], storage)
            text = f"{name}: ours, {storage} pages of memory, {engines[0]}"
            add(text, "ours", make, known | {"storage": storage})
        add(f"{name}: as published", "published", functools.partial(stream.published, dtype), known)
    return groups.records


def _same_choice(make: Streamed, exact: torch.Tensor, chosen: Sequence[Sequence[int]]) -> Pair:
    """Raises ValueError where other frames were retrieved: the outputs are of other windows then."""
    out, found = make()
    if [set(frames) for frames in found] != [set(frames) for frames in chosen]:
        raise ValueError(f"it retrieved {found}, the exact window {chosen}")
    return out, exact
