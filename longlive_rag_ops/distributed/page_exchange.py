"""Pages on their way from the ranks that keep them to all that share the frames, layer by layer, in the background."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..bank.page_format import PageFormat
from .failure import Pending
from .mesh import MemoryMesh

Pack = Callable[[int, Sequence[int], torch.Tensor], None]


class PageExchange:
    """Arrival slots, and the broadcasts that fill them.

    An owner packs its pages into arrival slots too, one frame's after another's, and broadcasts these in place: what is
    in the slots is what every rank places, and nothing is copied after it has arrived. There are two sets of slots,
    because pages for the next block may arrive while the open one is still being placed. Quantised pages travel as they
    are stored.

    Args:
        form: of the pages that a rank keeps.
        frames: most of one block.
        mesh: of the ranks.
        device: of the pages.

    Attributes:
        slots: arrival slot of each frame that was asked for last.
    """

    def __init__(self, form: PageFormat, frames: int, mesh: MemoryMesh, device: torch.device) -> None:
        self._form, self._frames, self._mesh = form, frames, mesh
        shape = form.slots_shape(2 * frames)
        # The slots of a layer first, so that consecutive ones are one message.
        order = (0, 2, 1, 3) if form.quantised else (0, 3, 1, 2, 4, 5, 6)
        dtype = torch.uint8 if form.quantised else form.dtype
        self._pages = torch.zeros([shape[axis] for axis in order], dtype=dtype, device=device)
        self._placed = 0  # the set that an open block places
        self._filled = 0
        self._pending: list[list[Pending]] = [[] for _ in range(form.layers)]
        self.slots: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrival slots."""
        return self._pages.nbytes

    def begin(self, start: int, frames: Sequence[Sequence[int]], pack: Pack) -> None:
        """Sends and receives pages in all layers.

        Args:
            start: first frame of the block that they are for.
            frames: of each rank, ascending; the same on all ranks.
            pack: called with a layer, the ``n`` frames that this rank keeps, and their arrival slots in that layer:
                plain ``(n, 2, B, T, H, D)``, quantised ``(n, B, page_bytes)``.
        """
        self.drain()
        self._filled = 1 - self._placed
        first = self._filled * self._frames
        numbers = [frame for of_rank in frames for frame in of_rank]
        self.slots = dict(zip(numbers, range(first, first + len(numbers)), strict=True))
        group, peers = self._mesh.frame_group, self._mesh.frame_peers
        assert group is not None and len(numbers) <= self._frames
        for layer, pending in enumerate(self._pending):
            for owner, of_rank in zip(peers, frames, strict=True):
                if of_rank:
                    at = self.slots[of_rank[0]]
                    message = self._pages[layer, at : at + len(of_rank)]
                    if owner == self._mesh.rank:
                        pack(layer, of_rank, message)
                    what = f"pages of layer {layer} for the block at {start}"
                    pending.append(self._broadcast(message.view(-1).view(torch.uint8), owner, what))

    def _broadcast(self, message: torch.Tensor, owner: int, what: str) -> Pending:
        group = self._mesh.frame_group
        assert group is not None
        return self._mesh.collectives.begin(
            what, lambda: dist.broadcast(message, src=owner, group=group, async_op=True), group, (message,)
        )

    def open(self) -> None:
        """The block that the pages are for begins: its slots stay as they are until the next one does."""
        self._placed = self._filled

    def wait(self, layer: int) -> None:
        """Until a layer's pages are there: for the host on a CPU, for the current stream on a GPU.

        Raises:
            RankFailure: a rank has not answered within the time-out.
        """
        pending, self._pending[layer] = self._pending[layer], []
        for broadcast in pending:
            broadcast.wait()

    def drain(self) -> None:
        """Until nothing is under way; after a failure it does not wait."""
        for layer in range(len(self._pending)):
            if self._mesh.collectives.failure is None:
                self.wait(layer)
            self._pending[layer] = []

    def views(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's arrival slots, as ``place_frames`` takes pages."""
        pages = self._pages[layer]
        if self._form.quantised:
            return self._form.views(pages.transpose(0, 1))
        return {"k_pages": pages[:, 0].transpose(0, 1), "v_pages": pages[:, 1].transpose(0, 1)}
