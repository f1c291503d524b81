"""Patches published backbones: their self-attention runs on ``torch.ops.longlive.retrieve_attend``, with memory.

``patch(model, ...)`` finds out what the model is, replaces the forward of each self-attention instance and returns a
`Handle`; docs/patching.md lists the families, the rules of positions and what happens at a change of prompt.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..embedder import Embedder, find_embedder
from .adapter import Adapter, Call, OwnWindow
from .block_embedding import embedder_name, key_layer
from .clip import Clip
from .forward import Forward
from .handle import Handle
from .registry import UnknownBackbone, families, find_backbone, register_adapter
from .settings import Settings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..bank import BankConfig
    from ..distributed import MemoryMesh

__all__ = [
    "Adapter",
    "Call",
    "Clip",
    "Forward",
    "Handle",
    "OwnWindow",
    "UnknownBackbone",
    "families",
    "patch",
    "patched",
    "register_adapter",
]


def patch(
    model: Any,
    *,
    window: int | None = None,
    sink: int | None = None,
    top_k: int = 6,
    recent_exclude: int = 5,
    embedder: str | os.PathLike[str] | Embedder = "average_pool",
    position_rule: str | None = None,
    frames_per_block: int | None = None,
    min_score: float | None = None,
    diversity: float = 0.0,
    bank: BankConfig | None = None,
    history_slots: int | None = None,
    engine: str = "auto",
    on_prompt_switch: str = "keep",
    max_clips: int | None = None,
    mesh: DeviceMesh | MemoryMesh | None = None,
    transfer: str = "auto",
) -> Handle:
    """Lets a backbone attend to ``[sink | retrieved memory | local window]``; its pipeline is used as before.

    Only this instance is patched. Nothing is retrieved with ``top_k=0``; the model then attends as it did, without
    rolling or copying its cache.

    Args:
        model: a model of a known family, or a pipeline that holds one.
        window, sink: frames attended to at most, and how many of the first ones always; None: the backbone's own.
        top_k, recent_exclude, min_score, diversity: what is retrieved, see `WindowConfig`.
        embedder: what turns finished latent frames ``(N, C, H, W)`` into embeddings ``(N, E)``: a callable, a name of
            `embedder.EMBEDDERS`, or a checkpoint of a retrieval autoencoder. One with an int attribute ``key_layer``
            gets un-rotated keys of that layer instead, ``(N, tokens_per_frame, kv_heads, head_dim)``.
        position_rule: ``slot``, ``absolute`` or ``before_window``, see `WindowConfig`; None: as published with memory
            (``slot`` for descendants of Wan), else the backbone's own.
        frames_per_block: most frames generated together; None: what the model says, or its first forward has.
        bank: limits of a memory bank for the history; None keeps it on the device.
        history_slots: as in `MemoryWindow`.
        engine: of the ops.
        on_prompt_switch: what becomes of the history when a pipeline encodes its newest frames again with another
            prompt: ``keep`` (it stays, of the old prompt), ``drop``, ``recache`` (it is encoded again, in as many
            forwards as it takes).
        max_clips: videos that may be under way together in this model; None: a new video ends the others, but the one
            used last when that is in its first block (guided sampling has two caches, which begin together).
        mesh: ranks over which the history is spread, see `MemoryWindow`; all of them patch their copy of the model, and
            run it alike. Along its heads, the copy's self-attention has this rank's heads alone.
        transfer: as in `MemoryWindow`; families that attend in several pieces take ``auto`` for ``pages``.

    Raises:
        UnknownBackbone: (a TypeError) no family fits; the message lists them and what was missing.
        TypeError, ValueError: an argument is not allowed.
        RuntimeError: the model is patched already; `RankFailure` with a mesh. The model is as it was in all of these
            cases. With a mesh, an error of one rank's arguments is that rank's alone; the others wait for it in vain.
    """
    ranks: MemoryMesh | None = None
    if mesh is not None:
        from ..distributed.mesh import memory_mesh

        ranks = memory_mesh(mesh)
    settings = Settings(
        window=window,
        sink=sink,
        top_k=top_k,
        recent_exclude=recent_exclude,
        embedder=find_embedder(embedder),
        position_rule=position_rule,
        frames_per_block=frames_per_block,
        min_score=min_score,
        diversity=diversity,
        bank=bank,
        history_slots=history_slots,
        engine=engine,
        on_prompt_switch=on_prompt_switch,
        max_clips=max_clips,
        mesh=ranks,
        transfer=transfer,
    )
    backbone, family = find_backbone(model)
    adapter = family(backbone)
    layer = key_layer(settings.embedder, len(adapter.modules))
    if layer is not None and ranks is not None and ranks.head_ranks > 1:
        raise ValueError(
            f"embedder must be one of latents on a mesh with {ranks.head_ranks} ranks along its heads, each of which "
            f"has other heads of the keys; got {embedder_name(settings.embedder)}, over the keys of layer {layer}"
        )
    # What can be known before the first forward is refused before the model is touched.
    if on_prompt_switch == "recache" and family.with_latents is Adapter.with_latents:
        raise ValueError(
            f"on_prompt_switch must be keep or drop for {family.name}, which encodes no history again; got 'recache'"
        )
    if family.in_pieces and transfer == "merge":
        raise ValueError(
            f"transfer must be auto or pages for {family.name}, whose attention is made of several pieces; got 'merge'"
        )
    if window is not None and sink is not None:
        settings.config(window, sink, "slot", adapter.frames_per_block() or 1)
    return Handle(backbone, adapter, settings)


def patched(model: Any, **options: Any) -> Handle:
    """As `patch`, for ``with patched(model, ...) as handle:``; the model is unpatched at the end of the block."""
    return patch(model, **options)


class _CallablePackage(ModuleType):
    """The package is also the function: ``longlive_rag_ops.patch(model)`` reads best, and so does the folder's name."""

    def __call__(self, model: Any, **options: Any) -> Handle:
        """As `patch`."""
        return patch(model, **options)


sys.modules[__name__].__class__ = _CallablePackage
