"""A window's share of a mesh: the heads and frames that this rank keeps, and what it asks of the other ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ..bank import BankConfig, PageFormat
from ..blocks import Block
from ..config import WindowConfig
from ..engines import engine_name
from ..history import FrameHistory
from ..mesh_options import TRANSFERS, missing_bank
from ..modes import normal_tensors
from ..version import __version__
from .agreement import BlockAgreement, RanksDisagree, check_settings, tell_error
from .embedding_digest import EmbeddingDigest
from .failure import RankFailure
from .merged_attention import attend_merged, frames_of_others
from .mesh import MemoryMesh, memory_mesh
from .own_part_history import OwnPartHistory
from .sharded_history import ShardedHistory
from .traffic import window_transfer

if TYPE_CHECKING:
    from ..window import MemoryWindow

DEALT = 256  # frames whose owners are compared at the start
OF_ONE_RANK = ("spill", "log", "lock_memory", "direct_io", "io_threads")  # of a bank: ranks may differ


class RankShare:
    """What `MemoryWindow` asks about its mesh. Making one is collective, and compares the ranks' settings first.

    Args:
        mesh: of the ranks.
        config: sizes of the window.
        kv_heads: of all ranks together.
        bank: of the window.
        transfer, agreement: as `MemoryWindow` takes them.
        settings: returns whatever else must be the same on all ranks, as JSON has it, or raises an error about it.

    Attributes:
        mesh: as given.
        kv_heads: of this rank.
        transfer: ``pages`` or ``merge``; None where this rank keeps all frames. Known after `history`.

    Raises:
        TypeError, ValueError: an argument is not allowed, or settings differ between ranks.
        RankFailure: a rank has not answered within the time-out.
    """

    def __init__(
        self,
        mesh: MemoryMesh,
        config: WindowConfig,
        kv_heads: int,
        bank: BankConfig | None,
        transfer: str,
        agreement: bool,
        settings: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.mesh, self._config, self._bank = mesh, config, bank

        def told() -> dict[str, Any]:
            others = settings()
            kept = bank.to_dict() if isinstance(bank, BankConfig) else {}
            return {
                "version": __version__,
                "mesh": mesh.shape(),
                "deal": _digest([mesh.owner(frame, config.sink) for frame in range(DEALT)]),
                **asdict(config),
                "kv_heads": kv_heads,
                **others,
                "bank": bank is not None,
                **{f"bank's {name}": value for name, value in kept.items() if name not in OF_ONE_RANK},
                "transfer": transfer,
                "agreement": agreement,
            }

        check_settings(mesh, told)
        if transfer not in TRANSFERS:
            raise ValueError(f"transfer must be one of {', '.join(TRANSFERS)}; got {transfer!r}")
        if kv_heads % mesh.head_ranks:
            raise ValueError(
                f"kv_heads must be a multiple of the mesh's ranks along its heads ({mesh.head_ranks}), got {kv_heads}"
            )
        self.kv_heads = kv_heads // mesh.head_ranks
        self.transfer: str | None = None
        self._asked_transfer = transfer
        if mesh.frame_ranks > 1 and config.top_k > 0 and not isinstance(bank, BankConfig):
            if bank is not None:
                raise TypeError(f"bank must be a BankConfig or None, got {type(bank).__name__}")
            raise missing_bank(mesh.frame_ranks)
        self._agreement = BlockAgreement(mesh) if agreement and len(mesh.ranks) > 1 else None
        self._given = EmbeddingDigest()
        self._others: tuple[tuple[int, int, list[list[int]]], list[int]] | None = None

    @property
    def spreads_frames(self) -> bool:
        """Whether other ranks keep frames that this one does not; without retrieval there are none to keep."""
        return self.mesh.frame_ranks > 1 and self._config.top_k > 0

    @property
    def keeps_history(self) -> bool:
        """Whether `history` makes the window's: frames are spread, or one rank alone may lose its heads of a frame."""
        may_lose = self._bank is not None and self._bank.disk_bytes > 0
        return self.spreads_frames or (self.mesh.head_ranks > 1 and self._config.top_k > 0 and may_lose)

    @property
    def merges(self) -> bool:
        """Whether attention is joined from the ranks' parts."""
        return self.transfer == "merge"

    def history(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        bank: BankConfig,
        device_slots: int | None,
        engine: str,
    ) -> FrameHistory:
        """The history of a window with a bank; arguments as `ShardedHistory` takes them."""
        if not self.spreads_frames:
            return OwnPartHistory(self._config, shape, dtype, device, bank, device_slots, engine, self.mesh)
        self.transfer = self._asked_transfer
        if self.transfer == "auto":
            form = _page_format(shape, dtype, bank)
            self.transfer = window_transfer(form, self._config, self.mesh.frame_ranks)
        made = OwnPartHistory if self.merges else ShardedHistory
        return made(self._config, shape, dtype, device, bank, device_slots, engine, self.mesh)

    @contextmanager
    def making(self, window: MemoryWindow) -> Iterator[None]:
        """Around what may fail on one rank alone while a window is made, memory or a folder for spilling: it then fails
        on all ranks, and their banks are closed.

        Raises:
            Exception: this rank's error. RuntimeError: another rank's, which is named.
            RankFailure: a rank has not answered within the time-out.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        try:
            tell_error(self.mesh, "the window could not be made", own)
        except BaseException:
            bank = getattr(getattr(window, "_history", None), "bank", None)
            if bank is not None:
                bank.close()
            raise

    def check_whole(self, name: str, instead: str) -> None:
        """RuntimeError where attention that is not joined would silently be that of this rank's part."""
        if self.merges:
            raise RuntimeError(
                f"{name} gives this rank's part of the attention alone where transfer is merge: {instead}, or make the "
                "window with transfer='pages'"
            )

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around collectives: what fails on this rank alone once it has begun one leaves it out of step with the
        others, so that it must not begin another."""
        begun = self.mesh.collectives.begun
        try:
            yield
        except (RankFailure, RanksDisagree):  # which the others are told too
            raise
        except BaseException as error:
            if len(self.mesh.ranks) > 1 and self.mesh.collectives.begun > begun:
                self.mesh.collectives.fail_alone(error)
            raise

    def check_norms(self, *weights: torch.Tensor | None) -> None:
        """ValueError for weights of a norm that this rank cannot compute, or that merged attention does not take."""
        if any(weight is not None for weight in weights) and (self.mesh.head_ranks > 1 or self.merges):
            raise ValueError(
                f"q_weight and k_weight must be None on a mesh with {self.mesh.head_ranks} ranks along its heads and "
                f"transfer {self.transfer}, got a weight: RMSNorm is over the heads of all ranks; normalise q and k "
                "before"
            )

    def check_agreement(self) -> None:
        """Before a block begins: whether the ranks held the same window in the last one.

        Raises:
            RanksDisagree: they did not. RankFailure: a rank has not answered within the time-out.
        """
        if self._agreement is not None:
            self._agreement.check()

    @normal_tensors
    def given(self, start: int, embeddings: torch.Tensor) -> None:
        """This rank was given the embeddings ``(B, n, E)`` of the block at ``start``, perhaps not for the first time.

        Where frames are spread, all ranks choose alike by construction, from what each of them was given: only the
        embeddings themselves show that these differ.
        """
        if self._agreement is not None and self.spreads_frames:
            self._given.give(start, embeddings)

    def began(self, block: Block, history: FrameHistory) -> None:
        """A block has begun with the choice of ``history``."""
        if self._agreement is not None:
            held = [] if self.merges else [block.plan[:, :2]]  # frames and positions; slots are each rank's own
            given = self._given.taken()
            self._agreement.begin(block.start, torch.tensor([block.frames]), given, history.selected, *held)

    def reset(self) -> None:
        """A new video begins."""
        if self._agreement is not None:
            self._agreement.forget()
        self._given.clear()

    def attend_merged(
        self,
        window: MemoryWindow,
        history: FrameHistory,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start_frame: int,
        grid: Sequence[int],
        frames: int,
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention joined from the ranks' parts; see `merged_attention.attend_merged`."""
        return attend_merged(
            window,
            layer,
            q,
            k,
            v,
            start_frame,
            grid,
            exclude=self.others(history, start_frame, frames),
            group=self.mesh.frame_group,  # type: ignore[arg-type]
            collectives=self.mesh.collectives,
            scale=scale,
        )

    def others(self, history: FrameHistory, start: int, frames: int) -> list[int]:
        """The sink and local frames that other ranks attend to, of a block for which ``history`` has chosen."""
        key = start, frames, history.selected.tolist()
        if self._others is None or self._others[0] != key:
            sink, mesh = self._config.sink, self.mesh
            left = frames_of_others(
                self._config,
                start,
                frames,
                key[2],
                lambda frame: mesh.owner(frame, sink),
                mesh.frame_ranks,
                mesh.frame_rank,
            )
            self._others = key, left
        return self._others[1]


def _digest(numbers: list[int]) -> str:
    return hashlib.blake2b(repr(numbers).encode(), digest_size=4).hexdigest()


def share_of_mesh(
    mesh: Any,
    config: WindowConfig,
    kv_heads: int,
    bank: BankConfig | None,
    transfer: str,
    agreement: bool,
    check: Callable[[], None],
    **settings: Any,
) -> RankShare:
    """A window's share of a `DeviceMesh` or `MemoryMesh`; ``settings`` are the window's other arguments.

    ``check`` raises where an argument is not allowed; all ranks then raise an error.
    """
    made = memory_mesh(mesh)
    assert made is not None

    def told() -> dict[str, Any]:
        check()
        device = torch.device(settings["device"])
        check_device(device, made.device)
        rope, split = settings["rope"], settings["rope_split"]
        return {
            **{name: value if isinstance(value, int | str | None) else str(value) for name, value in settings.items()},
            "device": device.type,
            "rope": None if rope is None else list(rope.shape),
            "rope_split": None if split is None else list(split),
            "engine": engine_name(settings["engine"], device.type),
        }

    return RankShare(made, config, kv_heads, bank, transfer, agreement, told)


def check_device(device: torch.device, of_mesh: torch.device) -> None:
    """ValueError when a window's device is not the mesh's; without a number it is the current one, as the mesh's."""
    if device.type != of_mesh.type:
        raise ValueError(f"device must be of the mesh's type, {of_mesh.type}; got {device}")
    if None not in (device.index, of_mesh.index) and device.index != of_mesh.index:
        raise ValueError(f"device must be this rank's current one, {of_mesh}, which the mesh uses; got {device}")


def _page_format(shape: Sequence[int], dtype: torch.dtype, bank: BankConfig) -> PageFormat:
    layers, _, samples, tokens, heads, head_dim = shape
    return PageFormat(bank.storage, layers, samples, tokens, heads, head_dim, dtype)
