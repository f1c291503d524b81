"""The best frames of all ranks: each searches the embeddings that it keeps, and all agree on what one would find."""

from __future__ import annotations

import math

import torch

from ..config import WindowConfig, candidate_end
from ..index import FrameIndex
from ..reference import lse_dtype, row_scores, unit_rows
from ..transfer import HostCopy
from .failure import Pending
from .mesh import MemoryMesh
from .packing import Layout, pack, unpack
from .side_stream import SideStream

NO_FRAME = -1


def merge_found(ids: torch.Tensor, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` best of what several ranks found: the larger score first, of equal ones the older frame.

    Args:
        ids: ``(ranks, B, k')`` int64, -1 for none.
        scores: ``(ranks, B, k')``, -inf for none.

    Returns:
        ids ``(B, k)``, -1 past the last; scores ``(B, k)``, -inf past the last.
    """
    ids, scores = ids.transpose(0, 1).flatten(1), scores.transpose(0, 1).flatten(1)
    older_first = ids.argsort(1)
    order = older_first.gather(1, scores.gather(1, older_first).argsort(dim=1, descending=True, stable=True))[:, :k]
    return ids.gather(1, order), scores.gather(1, order)


class ShardSearch:
    """A search that has begun, for one block. All ranks that share frames begin it with the same query.

    What it finds is what ``topk_retrieve`` finds with all embeddings in one index, to the last bit: a row's score does
    not depend on where it is stored, ties go to the older frame. (On a GPU with diversity up to the order in which one
    window's kernel sums.) Without diversity each rank offers its ``k`` best in
    one collective. With diversity there are ``k`` rounds, begun when the result is asked for: in each every rank offers
    its best candidate with its embedding, and all take the same one.

    Args:
        start: first frame of the block that is searched for.
        query: ``(B, E)``, unit length, NaN where it finds nothing.
        index: embeddings that this rank keeps; None before it has any.
        config: of the window.
        engine: that searches.
        mesh: of the ranks.
        side: where a GPU merges what is gathered, so that the choice does not wait for what the caller enqueues later.
    """

    def __init__(
        self,
        start: int,
        query: torch.Tensor,
        index: FrameIndex | None,
        config: WindowConfig,
        engine: str,
        mesh: MemoryMesh,
        side: SideStream,
    ) -> None:
        self.start = start
        self._mesh, self._config = mesh, config
        self._query, self._what = query, f"search for the block at {start}"
        self._end = candidate_end(start, config.window, config.sink)
        self._found: tuple[HostCopy, HostCopy] | None = None
        if index is None:
            index = FrameIndex(query.shape[0], query.shape[1], query.dtype, query.device)
        if config.diversity > 0:
            # Now: rows that are added or replaced until the result is asked for are no part of it.
            length = index.used
            self._rows, self._frames = index.embeddings[:, :length].clone(), index.ids[:, :length].clone()
        else:
            self._search_own(index, engine)
        if not side.on_host:
            with side.entered():
                self._find()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames ``(B, K)`` int64 and their cosines, on the host, the same on every rank.

        Raises:
            RankFailure: a rank has not answered within the time-out.
        """
        if self._found is None:
            self._find()
        assert self._found is not None
        self._pending.wait_on_host()
        return self._found[0].get(), self._found[1].get()

    def abandon(self) -> None:
        """Waits until nothing of it is under way any more; the result is not wanted."""
        if self._mesh.collectives.failure is None and (self._found is not None or self._config.diversity == 0):
            self.result()

    def _search_own(self, index: FrameIndex, engine: str) -> None:
        config = self._config
        ids, scores = torch.ops.longlive.topk_retrieve(
            self._query,
            index.embeddings,
            index.ids,
            index.length,
            index.length.new_full((1,), self._end),
            config.top_k,
            first_frame=config.sink,
            recent_exclude=config.recent_exclude,
            normalized=True,
            min_score=config.min_score,
            engine=engine,
        )
        self._layout: Layout = [(tuple(ids.shape), ids.dtype), (tuple(scores.shape), scores.dtype)]
        self._gathered, self._pending = self._gather(pack(ids, scores), self._what)

    def _find(self) -> None:
        if self._config.diversity > 0:
            ids, scores = self._rounds()
        else:
            self._pending.wait()
            found = unpack(self._gathered, self._layout)
            ids, scores = merge_found(found[0], found[1], self._config.top_k)
        self._found = HostCopy(ids), HostCopy(scores)

    def _gather(self, row: torch.Tensor, what: str) -> tuple[torch.Tensor, Pending]:
        group, collectives = self._mesh.frame_group, self._mesh.collectives
        if group is None:  # this rank keeps all frames
            return row[None], Pending(collectives, what, None, self._mesh.group)
        return collectives.all_gather(what, row, group)

    def _rounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Maximal marginal relevance as in `reference.topk_retrieve`, operation by operation."""
        config, query, frames = self._config, self._query, self._frames
        samples, width = query.shape
        dtype = lse_dtype(query.dtype)
        rows = self._rows.to(dtype)
        units = unit_rows(query)
        cosine = torch.stack([row_scores(units[b], rows[b]) for b in range(samples)])
        allowed = (frames >= config.sink) & (frames < self._end - config.recent_exclude) & cosine.isfinite()
        if config.min_score is not None:
            allowed &= cosine >= config.min_score
        redundancy = torch.zeros_like(cosine)  # largest cosine with a frame already chosen, by any rank
        ids = torch.full((samples, config.top_k), NO_FRAME, dtype=torch.int64, device=query.device)
        scores = torch.full((samples, config.top_k), -math.inf, dtype=dtype, device=query.device)
        layout: Layout = [((samples,), torch.int64), *(((samples, size), dtype) for size in (1, 1, width))]
        for rank in range(config.top_k):
            value = (1 - config.diversity) * cosine - config.diversity * redundancy
            offer = _offer(frames, rows, cosine, torch.where(allowed, value, -math.inf))
            gathered, self._pending = self._gather(pack(*offer), f"{self._what}, round {rank}")
            self._pending.wait()
            offered, values, cosines, embeddings = unpack(gathered, layout)
            best, _ = merge_found(offered[..., None], values, 1)  # (B, 1)
            taker = (offered == best.T).int().argmax(0)  # (B,): of the ranks, who has it
            at = torch.arange(samples, device=query.device)
            there = best[:, 0] >= 0
            ids[:, rank] = best[:, 0]
            scores[:, rank] = torch.where(there, cosines[taker, at, 0], -math.inf)
            taken = embeddings[taker, at]  # (B, E)
            for b in range(samples):
                shared = row_scores(taken[b], rows[b])
                redundancy[b] = shared if rank == 0 else torch.maximum(redundancy[b], shared)
            allowed &= frames != best
        return ids, scores


def _offer(
    frames: torch.Tensor, rows: torch.Tensor, cosine: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """A rank's best candidate in each sample: frame ``(B,)``, value, cosine ``(B, 1)`` and embedding ``(B, E)``.

    Frame -1 and value -inf where there is none.
    """
    samples, count, width = rows.shape
    if count == 0:
        none = torch.full((samples, 1), -math.inf, dtype=rows.dtype, device=rows.device)
        return frames.new_full((samples,), NO_FRAME), none, none, rows.new_zeros(samples, width)
    most = value.amax(1, keepdim=True)
    last = torch.iinfo(torch.int64).max
    frame, row = torch.where((value == most) & (value > -math.inf), frames, last).min(1)
    at = torch.arange(samples, device=rows.device)
    return torch.where(frame < last, frame, NO_FRAME), most, cosine[at, row][:, None], rows[at, row]
