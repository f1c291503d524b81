"""Scenes in the order they are streamed: latents, thumbnails, and which frame of which clip each one is."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .clips import CLIPS, PREFIX, resolve
from .codec import FRAMES_PER_LATENT, Codec, encode_stream
from .settings import FRAMES_PER_BLOCK, OWN_VIDEO_BLOCKS, DemoSettings
from .video import Size, VideoFacts, probe_video, read_frames

__all__ = ["EDITS", "Cut", "Edit", "Footage", "Scene", "encode_video", "load_edit", "load_video"]


@dataclass(frozen=True)
class Cut:
    """A stretch of a clip: latent frames ``first .. first + count - 1`` of ``clip``, called ``name`` in the report.

    ``shot`` is one letter; two cuts of one shot (never overlapping) are what "the scene returns" means.
    """

    name: str
    shot: str
    clip: str
    first: int
    count: int


@dataclass(frozen=True)
class Edit:
    """Cuts in order; ``title`` heads the pictures."""

    name: str
    title: str
    cuts: tuple[Cut, ...]


# Every scene is a whole number of blocks, so no block straddles a cut.
EDITS = (
    Edit(
        "return",
        "a scene returns: A, B, A again",
        (
            Cut("A1", "A", "speaker", 0, 24),
            Cut("B", "B", "bunny", 0, 33),
            # Eleven latent frames of the shot (1.5 s) are left out between the two stretches.
            Cut("A2", "A", "speaker", 35, 24),
        ),
    ),
    Edit(
        "no-return",
        "nothing returns: A, B, C",
        (
            Cut("A1", "A", "speaker", 0, 24),
            Cut("B", "B", "bunny", 0, 33),
            Cut("C", "C", "carphone", 0, 30),
        ),
    ),
)


@dataclass(frozen=True)
class Scene:
    """Streamed latent frames ``start .. stop - 1``."""

    name: str
    shot: str
    start: int
    stop: int

    def __contains__(self, frame: int) -> bool:
        return self.start <= frame < self.stop


@dataclass(frozen=True)
class Footage:
    """What is streamed.

    ``latents`` (frames, 16, h, w) float32; ``thumbnails`` (frames, height, width, 3) uint8, the second of the four
    video frames behind each latent frame; ``sources`` one (clip, number of that video frame in it) each; ``scenes``
    empty where they are not known; ``facts`` of each clip by name; ``note`` says what was left out.
    """

    name: str
    title: str
    latents: torch.Tensor
    thumbnails: NDArray[np.uint8]
    sources: tuple[tuple[str, int], ...]
    scenes: tuple[Scene, ...]
    facts: dict[str, VideoFacts]
    note: str = ""

    @property
    def frames(self) -> int:
        return self.latents.shape[0]

    def scene_of(self, frame: int) -> Scene | None:
        """The scene that holds a latent frame; None where scenes are not known."""
        return next((scene for scene in self.scenes if frame in scene), None)

    def returning(self) -> tuple[Scene, Scene] | None:
        """(the earlier scene, the later scene of the same shot), or None where nothing returns."""
        for later in reversed(self.scenes):
            for earlier in self.scenes:
                if earlier.shot == later.shot and earlier.stop <= later.start:
                    return earlier, later
        return None


def encode_video(
    path: Path, codec: Codec, size: Size, argument: str, limit: int | None, tick: Callable[[], None]
) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """Latents (frames, 16, h, w) float32 and thumbnails (frames, height, width, 3) of a video, at most ``limit``.

    Raises:
        ValueError, RuntimeError: as ``read_frames``, under the name ``argument``.
    """
    frames = read_frames(path, size, limit=None if limit is None else limit * FRAMES_PER_LATENT, argument=argument)
    latents, thumbnails = [], []
    for latent, thumbnail in islice(encode_stream(codec, frames), limit):
        latents.append(latent)
        thumbnails.append(thumbnail)
        tick()
    if not latents:
        return torch.empty(0), np.empty(0, np.uint8)
    return torch.stack(latents), np.stack(thumbnails)


def load_edit(edit: Edit, codec: Codec, settings: DemoSettings, tick: Callable[[], None] = lambda: None) -> Footage:
    """Decodes, encodes and joins the cuts of an edit of sample clips.

    Raises:
        ValueError, RuntimeError: as ``read_frames`` and ``clip_path``; a clip shorter than its cut.
    """
    encoded: dict[str, tuple[torch.Tensor, NDArray[np.uint8]]] = {}
    facts: dict[str, VideoFacts] = {}
    for name in dict.fromkeys(cut.clip for cut in edit.cuts):
        path = resolve(PREFIX + name)
        facts[name] = probe_video(path)
        encoded[name] = encode_video(path, codec, settings.size, f"sample clip {name!r}", None, tick)
    scenes: list[Scene] = []
    sources: list[tuple[str, int]] = []
    for cut in edit.cuts:
        held = encoded[cut.clip][0].shape[0]
        if cut.first + cut.count > held:
            raise ValueError(
                f"sample clip {cut.clip!r}: holds {held} latent frames, {cut.first + cut.count} are needed"
            )
        start = scenes[-1].stop if scenes else 0
        scenes.append(Scene(cut.name, cut.shot, start, start + cut.count))
        sources += [(cut.clip, FRAMES_PER_LATENT * i + 1) for i in range(cut.first, cut.first + cut.count)]
    latents = torch.cat([encoded[cut.clip][0][cut.first : cut.first + cut.count] for cut in edit.cuts])
    thumbnails = np.concatenate([encoded[cut.clip][1][cut.first : cut.first + cut.count] for cut in edit.cuts])
    footage = Footage(edit.name, edit.title, latents, thumbnails, tuple(sources), tuple(scenes), facts)
    return _shorten(footage, settings.blocks)


def load_video(
    path: str | Path, codec: Codec, settings: DemoSettings, tick: Callable[[], None] = lambda: None
) -> Footage:
    """Decodes and encodes a whole video file, whose scenes are not known.

    Raises:
        ValueError: as ``read_frames``; or fewer latent frames than a block needs before it can retrieve anything.
    """
    path = resolve(path)
    blocks = settings.blocks or OWN_VIDEO_BLOCKS
    facts = probe_video(path)
    # One block more than is streamed is read, to be able to say that there was more.
    latents, thumbnails = encode_video(path, codec, settings.size, "--video", (blocks + 1) * FRAMES_PER_BLOCK, tick)
    whole = latents.shape[0] if latents.numel() else 0
    if whole < settings.shortest:
        raise ValueError(
            f"--video: got {str(path)!r}, which gives {whole} latent frames ({FRAMES_PER_LATENT} video frames each); "
            f"at least {settings.shortest} ({FRAMES_PER_LATENT * settings.shortest} video frames) are needed before "
            f"anything can be retrieved with --window {settings.window} and --recent-exclude {settings.recent_exclude}"
        )
    sources = tuple((path.name, FRAMES_PER_LATENT * i + 1) for i in range(whole))
    footage = Footage("video", path.name, latents, thumbnails, sources, (), {path.name: facts})
    return _shorten(footage, blocks)


def _shorten(footage: Footage, blocks: int) -> Footage:
    """Whole blocks only, at most ``blocks`` of them (0: all)."""
    frames = footage.frames - footage.frames % FRAMES_PER_BLOCK
    note = ""
    if blocks and blocks * FRAMES_PER_BLOCK < frames:
        frames = blocks * FRAMES_PER_BLOCK
        note = f"only the first {blocks} blocks are streamed (--blocks raises or lowers this)"
    scenes = tuple(Scene(s.name, s.shot, s.start, min(s.stop, frames)) for s in footage.scenes if s.start < frames)
    return Footage(
        footage.name,
        footage.title,
        footage.latents[:frames],
        footage.thumbnails[:frames],
        footage.sources[:frames],
        scenes,
        footage.facts,
        note,
    )


def clip_sources(footage: Footage) -> list[dict[str, str]]:
    """Package, licence and content of each sample clip in a footage, for the report."""
    return [
        {"clip": name, "package": CLIPS[name].requirement, "licence": CLIPS[name].licence, "shows": CLIPS[name].shows}
        for name in footage.facts
        if name in CLIPS
    ]
