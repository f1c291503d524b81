"""Who takes part in the block suite, and whether each computes what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.block_choice import PlannedChoice
from benchmarks.block_contenders import BlockAttention, Ours
from benchmarks.block_memory import available_bytes
from benchmarks.block_model import ModelSize
from benchmarks.block_native import Native, NativeAtBest
from benchmarks.block_published import AsPublished
from benchmarks.block_stream import BlockStream, Scene
from benchmarks.gpu_contenders import difference, first_line
from longlive_rag_ops import WindowConfig, dense_backends, preferences
from longlive_rag_ops.engines import engine_name

PUBLISHED, NATIVE = "as published", "native"
BEST = f"{NATIVE}, at its best"
PAGEABLE = f"{PUBLISHED}, pageable history"
DEVICE, HOST = "ours, memory on device", "ours, memory in host memory"
INT8 = f"{HOST} as int8"
# Relative root mean square of the last layer's attention. Rounding in float32 stays far below the first; int8 pages
# have four tenths of a per cent of error, of which averaging over keys lets a part through; bfloat16 rounds every
# layer's every step, to 0.005. To attend to no memory, to other frames or to keys that are not rotated makes at least
# 0.07.
EXACT, QUANTISED, ROUNDED = 2e-5, 0.01, 0.015
CHECKED_BLOCKS = 20  # from the sixth on frames are retrieved
SPARE = 0.9  # of the host memory that is there

Make = Callable[[ModelSize, str, torch.dtype, int], BlockAttention]


@dataclass(frozen=True)
class Participant:
    """A contender by name.

    Attributes:
        make: from a model's size, a device, a dtype and the frames of a video.
        storage: of our history: device, plain or int8; empty for others.
        engine: of our window; empty for others.
        host: host memory that a frame's pages take, in pages of the compute dtype.
        page_locked: torch takes that, page by page.
    """

    name: str
    role: str
    make: Make
    storage: str = ""
    engine: str = ""
    host: float = 0.0
    page_locked: bool = False


def ours(name: str, storage: str, engine: str = "auto") -> Participant:
    def make(size: ModelSize, device: str, dtype: torch.dtype, frames: int) -> BlockAttention:
        return Ours(size, device, dtype, frames, storage, engine=engine)

    return Participant(name, "ours", make, storage, engine, host={"device": 0.0, "plain": 1.0, "int8": 0.55}[storage])


def participants(device: str) -> list[Participant]:
    def published(size: ModelSize, device: str, dtype: torch.dtype, frames: int) -> BlockAttention:
        return AsPublished(size, device, dtype)

    def pageable(size: ModelSize, device: str, dtype: torch.dtype, frames: int) -> BlockAttention:
        return AsPublished(size, device, dtype, pageable=True)

    found = [Participant(PUBLISHED, "published", published, host=1.0, page_locked=True), native(), native_at_best()]
    found += [ours(DEVICE, "device"), ours(HOST, "plain"), ours(INT8, "int8")]
    if device == "cuda":  # elsewhere the two are the same
        found.append(Participant(PAGEABLE, "published", pageable, host=1.0))
    return found


def native() -> Participant:
    return Participant(NATIVE, "native", lambda size, device, dtype, frames: Native(size, device, dtype))


def native_at_best() -> Participant:
    return Participant(BEST, "native", lambda size, device, dtype, frames: NativeAtBest(size, device, dtype))


def by_engine(engines: Sequence[str]) -> list[Participant]:
    """Native, and ours by engine; memory in host memory, as on the device there is no room for several histories."""
    return [native(), *(ours(f"ours, {engine}", "plain", engine) for engine in engines)]


def too_little_memory(
    everyone: Sequence[Participant], size: ModelSize, device: str, dtype: torch.dtype, frames: int
) -> dict[str, str]:
    """Why a participant's history would not fit into this machine's memory beside the others': empty when it does.

    Ours come first, then the others in their order: the last one is left out first.
    """
    there, taken = available_bytes(), 0.0
    found = {one.name: "" for one in everyone}
    if there is None:
        return found
    for one in sorted(everyone, key=lambda one: one.role != "ours"):
        needed = one.host * frames * size.page_bytes(dtype.itemsize)
        if one.page_locked and device == "cuda":
            page = size.tokens * size.width * dtype.itemsize  # each is an allocation, of a power of two of bytes
            needed *= (1 << (page - 1).bit_length()) / page
        if taken + needed > SPARE * there:
            found[one.name] = f"absent: {frames} frames of its history need {needed / 1e9:.0f} GB of host memory"
        else:
            taken += needed
    return found


def attention_facts(device: str, dtype: torch.dtype, size: ModelSize, window: int, engine: str = "") -> dict[str, str]:
    """What attends to a full window: the back end of dense attention, and of ours the engine.

    Args:
        engine: of our window; empty for other contenders, which have dense attention.
    """
    architecture = dense_backends.architecture_of(torch.device(device))
    wanted = dense_backends.Facts(device, architecture, dtype, size.head_dim, window * size.tokens)
    back_end = dense_backends.select(wanted).name
    if not engine:
        return {"dense_attention": back_end}
    name = engine_name(engine, device)
    if name == "auto":
        rows = preferences.candidates(architecture, "run", preferences.dtype_class(dtype, size.head_dim))
        name = preferences.choose(rows, back_end).engine
    return {"dense_attention": back_end, "our_attention": name}


def disagreements(
    everyone: Sequence[Participant], size: ModelSize, device: str, dtype: torch.dtype, blocks: int = CHECKED_BLOCKS
) -> dict[str, str]:
    """What is wrong with each participant on a small model, over blocks with retrieval: empty when nothing is.

    In float32, the last layer's attention in every block's clean forward, which stands on what its noisy forward made:
    what is published against our oracle; ours with plain pages against what is published; ours with quantised pages
    against the oracle with such pages, and more loosely against what is published; native, in both ways, against the
    oracle without retrieval and at global positions. All others must choose what is planned. Then, on a device that
    computes in another dtype, in that dtype: native against its oracle, the others against what is published.
    """
    found = {one.name: "" for one in everyone}
    for tried in dict.fromkeys((torch.float32, dtype)):
        scene = Scene(size, device, tried)
        plan = PlannedChoice(blocks, 0.5, embedding=256, device=device)
        checker = Checker(scene, plan, blocks)
        for one in everyone:
            if not found[one.name]:
                try:
                    found[one.name] = checker.trouble(one)
                except Exception as error:  # one that fails must not stop the others
                    found[one.name] = f"FAILED, {first_line(error)}"
    return found


class Checker:
    """Attention of the participants and of the oracles, each made once."""

    def __init__(self, scene: Scene, plan: PlannedChoice, blocks: int) -> None:
        self._scene, self._plan, self._blocks = scene, plan, blocks
        self._kept: dict[str, list[torch.Tensor]] = {}

    def trouble(self, one: Participant) -> str:
        outs, wrong = self._outputs(one)
        if wrong:
            return wrong
        for name, limit in self._standards(one):
            errors = [difference(*pair)[0] for pair in zip(outs, self._oracle(name), strict=True)]
            block = max(range(len(errors)), key=lambda number: (errors[number] != errors[number], errors[number]))
            if not errors[block] < limit:  # NaN is wrong too
                return f"WRONG by {errors[block]:.1e} against {name}, block {block}; allowed {limit:g}"
        return ""

    def _standards(self, one: Participant) -> list[tuple[str, float]]:
        """What a participant is held against, and by how much it may differ."""
        if self._scene.dtype != torch.float32:
            return [("the oracle, native" if one.role == "native" else PUBLISHED, ROUNDED)]
        if one.role == "ours":
            quantised = one.storage == "int8"
            return [("the oracle, int8", EXACT), (PUBLISHED, QUANTISED)] if quantised else [(PUBLISHED, EXACT)]
        return [("the oracle, native" if one.role == "native" else "the oracle", EXACT)]

    def _oracle(self, name: str) -> list[torch.Tensor]:
        if name not in self._kept:
            native = WindowConfig(top_k=0, recent_exclude=0, position_rule="absolute")

            def make(size: ModelSize, device: str, dtype: torch.dtype, frames: int) -> BlockAttention:
                if name == PUBLISHED:
                    return AsPublished(size, device, dtype)
                storage = "int8" if name.endswith("int8") else "device"
                config = native if name.endswith("native") else None
                return Ours(size, device, dtype, frames, storage, engine="reference", config=config)

            self._kept[name], _ = self._outputs(Participant(name, "", make))
        return self._kept[name]

    def _outputs(self, one: Participant) -> tuple[list[torch.Tensor], str]:
        scene = self._scene
        contender = one.make(scene.size, scene.device, scene.dtype, scene.size.frames * self._blocks)
        stream, outs = BlockStream(scene, contender, self._plan), []
        try:
            for block in range(1, self._blocks + 1):
                stream.warm(block)
                outs.append(stream.seen)
        finally:
            contender.close()
        return outs, self._plan.trouble(stream.choices, self._plan.steady) if one.role in ("ours", "published") else ""
