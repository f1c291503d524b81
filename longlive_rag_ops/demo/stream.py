"""The block loop: four noisy forwards and one clean forward a block, as in the published sampler.

Every forward runs all layers, and every layer's self-attention is ``MemoryWindow.attend``, which calls
``torch.ops.longlive.retrieve_attend``. The clean forward (timestep 0) is the one whose keys and values stay.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..bank.config import BankConfig
from ..window import MemoryWindow
from .footage import Footage
from .measures import Choice, eligible_frames
from .model import TIMESTEPS, ToyTransformer, WeightKind, mix_noise
from .probe import Masses, Probe
from .settings import AMPLE, FRAMES_PER_BLOCK, DemoSettings

__all__ = ["BlockRecord", "Streamed", "model_and_window", "stream"]


@dataclass(frozen=True)
class BlockRecord:
    """One block: what it retrieved, what it would have attended to, how long it took.

    ``cosines`` belong to ``choice.retrieved``, most similar first. Seconds of wall time: ``total`` is the block's,
    measuring attention mass left out; ``retrieval`` is embedding and search, of which ``embedding`` is the first;
    ``attention`` the ``attend`` calls of all layers and forwards, placing and rotating included, retrieval not;
    ``rest`` what remains (noise, projections, MLPs, book-keeping).
    """

    choice: Choice
    cosines: tuple[float, ...]
    masses: Masses
    bytes_held: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Streamed:
    """A footage streamed through one kind of weights: a record per block, embeddings (frames, E), final statistics,
    and how ranks came by what others keep (`MemoryWindow.transfer`)."""

    footage: Footage
    weights: WeightKind
    records: tuple[BlockRecord, ...]
    embeddings: torch.Tensor
    stats: dict[str, Any]
    transfer: str | None = None


@dataclass
class _Clock:
    """Wall seconds spent in attend calls, and the retrieval seconds that the window counted within them."""

    window: MemoryWindow
    attention: float = 0.0
    inside: float = 0.0
    queries: list[torch.Tensor] = field(default_factory=list)

    def retrieval(self) -> float:
        return float(self.window.stats()["seconds"]["retrieval"])


def model_and_window(
    footage: Footage, weights: WeightKind, settings: DemoSettings, dtype: torch.dtype = torch.float32
) -> tuple[ToyTransformer, MemoryWindow]:
    """The toy for a footage's size, and an empty window for it in ``dtype``."""
    size = (int(footage.latents.shape[2]), int(footage.latents.shape[3]))
    model = ToyTransformer(weights, size, seed=settings.seed)
    window = MemoryWindow(
        settings.window_config(),
        layers=model.layers,
        batch=1,
        tokens_per_frame=model.tokens_per_frame,
        kv_heads=model.heads,
        head_dim=model.head_dim,
        dtype=dtype,
        bank=_bank(settings),
        mesh=settings.mesh,
        transfer=settings.transfer,
    )
    return model, window


def _bank(settings: DemoSettings) -> BankConfig | None:
    """Where ranks share frames, each keeps its own in a bank."""
    shared = settings.mesh is not None and settings.mesh.frame_ranks > 1
    return BankConfig(host_bytes=AMPLE, slab_bytes="16MiB") if shared and settings.bank is None else settings.bank


def _attention_and_probe(window: MemoryWindow) -> tuple[Callable[..., torch.Tensor], type[Probe]]:
    if window.mesh is None:
        return MemoryWindow.attend, Probe
    from .ranks import RankProbe, attend_on_ranks

    return attend_on_ranks, RankProbe


def stream(
    footage: Footage,
    weights: WeightKind,
    settings: DemoSettings,
    tick: Callable[[], None] = lambda: None,
) -> Streamed:
    """Streams all blocks of a footage. Deterministic for a seed, times apart; ``tick`` is called once a block."""
    model, window = model_and_window(footage, weights, settings)
    attend, probe_type = _attention_and_probe(window)
    probe = probe_type(window, window.config, model.head_dim, model.grid)
    noise = torch.Generator().manual_seed(settings.seed + 1)
    records, embeddings = [], []
    for start in range(0, footage.frames, FRAMES_PER_BLOCK):
        record, embedding = _block(footage, start, model, window, probe, attend, noise, settings)
        records.append(record)
        embeddings.append(embedding)
        tick()
    stats = window.stats()
    if window.bank is not None:
        stats["bank"] = window.bank.stats()
        window.bank.close()
    return Streamed(footage, weights, tuple(records), torch.cat(embeddings), stats, window.transfer)


def _block(
    footage: Footage,
    start: int,
    model: ToyTransformer,
    window: MemoryWindow,
    probe: Probe,
    attend_in: Callable[..., torch.Tensor],
    noise: torch.Generator,
    settings: DemoSettings,
) -> tuple[BlockRecord, torch.Tensor]:
    latents = footage.latents[start : start + FRAMES_PER_BLOCK]
    clock = _Clock(window)
    began, retrieval_before = time.perf_counter(), clock.retrieval()

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        searched, entered = clock.retrieval(), time.perf_counter()
        out: torch.Tensor = attend_in(window, layer, q, k, v, start, model.grid)
        clock.attention += time.perf_counter() - entered
        clock.inside += clock.retrieval() - searched
        clock.queries.append(q)
        return out

    for timestep in TIMESTEPS:
        model.forward(mix_noise(latents, timestep, noise), timestep, attend)
    clock.queries.clear()
    model.forward(latents, 0.0, attend)
    total = time.perf_counter() - began

    # The clock stands still: the choice is read, and attention over the full history is measured.
    choice = Choice(
        start,
        eligible_frames(start, settings.window, settings.sink, settings.recent_exclude),
        tuple(window.selected[0]),
    )
    cosines = tuple(float(score) for score in window.selected_scores[0])
    masses = probe.measure(clock.queries, start)
    clock.queries.clear()

    began = time.perf_counter()
    embedding = settings.embedder.embed(latents)
    embedded = time.perf_counter() - began
    window.finish(start, embedding.unsqueeze(0))
    total += time.perf_counter() - began
    stats = window.stats()
    searched = float(stats["seconds"]["retrieval"]) - retrieval_before
    attention = clock.attention - clock.inside
    seconds = {
        "total": total,
        "retrieval": embedded + searched,
        "embedding": embedded,
        "attention": attention,
        "rest": total - embedded - searched - attention,
    }
    held = {name: int(size) for name, size in stats["bytes"].items()}
    # In memory; "history" is the used part of "history_reserved".
    held["total"] = sum(size for name, size in held.items() if name not in ("history", "disk"))
    return BlockRecord(choice, cosines, masses, held, seconds), embedding
