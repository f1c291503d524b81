"""Decoding a video file to small RGB frames.

Frames are scaled to cover the wanted size and cropped about the centre, so nothing is stretched. The file's own frame
rate is kept (nothing is resampled in time), the sample aspect ratio and rotation tags are not applied.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extras import need

__all__ = ["Size", "VideoFacts", "probe_video", "read_frames"]

Size = tuple[int, int]
"""Width and height in pixels."""

SIZE_STEP = 16
"""Latent frames are an eighth of the pixel size and the toy model takes latents two by two."""


@dataclass(frozen=True)
class VideoFacts:
    """What the container says about its first video stream.

    ``declared_frames`` is 0 where the container does not say; ``fps`` is 0.0 where it does not say.
    """

    name: str
    width: int
    height: int
    fps: float
    declared_frames: int


def check_size(size: Size) -> Size:
    """Returns ``size`` or raises ValueError: both sides are positive multiples of 16, at most 4096 pixels."""
    width, height = size
    if any(side <= 0 or side % SIZE_STEP or side > 4096 for side in (width, height)):
        raise ValueError(f"size: got {width}x{height}; width and height must be multiples of {SIZE_STEP} in 16..4096")
    return size


def _open(path: Path, argument: str) -> tuple[Any, Any, Any]:
    """Opens ``path`` and returns (av, container, first video stream)."""
    av = need("av", "reading a video")
    if not path.exists():
        raise ValueError(f"{argument}: got {str(path)!r}, which does not exist; it must be a readable video file")
    if not path.is_file():
        raise ValueError(f"{argument}: got {str(path)!r}, which is not a file; it must be a readable video file")
    if path.stat().st_size == 0:
        raise ValueError(f"{argument}: got {str(path)!r}, an empty file; it must be a readable video file")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{argument}: got {str(path)!r}, which cannot be opened as a video ({reason}): it is no video, or it was "
            "cut off before its header was complete; it must be a complete video that FFmpeg can read"
        ) from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{argument}: got {str(path)!r}, which has no video stream; it must hold a video")
    return av, container, container.streams.video[0]


def probe_video(path: str | Path, *, argument: str = "--video") -> VideoFacts:
    """Reads the header of a video; raises like ``read_frames``."""
    path = Path(path)
    _, container, stream = _open(path, argument)
    with container:
        rate = stream.average_rate
        return VideoFacts(
            path.name, int(stream.width), int(stream.height), float(rate) if rate else 0.0, int(stream.frames or 0)
        )


def _declared_seconds(container: Any, stream: Any) -> float:
    """When the stream ends according to the container, on the frames' clock; 0 where it does not say."""
    start = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    if stream.duration and stream.time_base:
        return start + float(stream.duration * stream.time_base)
    # Matroska and WebM keep it as a tag, hours:minutes:seconds; a container's duration is that of its longest stream.
    parts = str(stream.metadata.get("DURATION", "")).split(":")
    try:
        return sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    except ValueError:
        alone = len(container.streams) == 1 and container.duration
        return float(container.duration) / 1_000_000 if alone else 0.0


def _cover(array: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Crops (H', W', 3) to (height, width, 3) about the centre."""
    width, height = size
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return np.ascontiguousarray(array[top : top + height, left : left + width])


def read_frames(
    path: str | Path, size: Size, *, limit: int | None = None, argument: str = "--video"
) -> Iterator[NDArray[np.uint8]]:
    """Decodes a video, one frame at a time.

    Args:
        path: a file with a video stream that FFmpeg can decode.
        size: width and height of the frames returned, multiples of 16.
        limit: stop after so many frames; a file that is only read in part is not checked for being complete.
        argument: the name that error messages give to ``path``.

    Yields:
        uint8 arrays of shape (height, width, 3), RGB.

    Raises:
        ValueError: no such file, not a video, no video stream, a frame that does not decode, or fewer frames than the
            container declares (more than 2 frames and more than 2 % short: containers miscount by a frame or two);
            where it declares no count, the last frame's time is held against the duration it declares.
        RuntimeError: PyAV is not installed.
    """
    path = Path(path)
    width, height = check_size(size)
    av, container, stream = _open(path, argument)
    with container:
        stream.thread_type = "AUTO"
        declared, length = int(stream.frames or 0), _declared_seconds(container, stream)
        ratio = max(width / stream.width, height / stream.height) if stream.width and stream.height else 1.0
        scaled = (max(width, round(stream.width * ratio)), max(height, round(stream.height * ratio)))
        count, seen, interval = 0, 0.0, 0.0
        try:
            for frame in container.decode(stream):
                if limit is not None and count >= limit:
                    return
                if frame.is_corrupt:
                    raise ValueError(
                        f"{argument}: got {str(path)!r}, whose frame {count} is damaged; every frame must decode"
                    )
                small = frame.reformat(width=scaled[0], height=scaled[1], format="rgb24", interpolation="AREA")
                yield _cover(small.to_ndarray(), (width, height))
                count += 1
                interval, seen = (frame.time or 0.0) - seen, frame.time or 0.0
        except (av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{argument}: got {str(path)!r}, which stops decoding after {count} frames ({reason}): it is damaged "
                "or cut off; it must be a complete video"
            ) from error
        if limit is None or count < limit:
            if declared and count < declared - max(2, declared // 50):
                raise ValueError(
                    f"{argument}: got {str(path)!r}, which declares {declared} frames and holds {count} that decode: "
                    "it is damaged or cut off; it must be a complete video"
                )
            # Without a count, the last frame's time tells; it lasts about as long as the one before it.
            if not declared and length and seen < length - max(0.1 + 2 * interval, length / 50):
                raise ValueError(
                    f"{argument}: got {str(path)!r}, which declares {length:.2f} seconds and whose last frame that "
                    f"decodes is at {seen:.2f} seconds: it is damaged or cut off; it must be a complete video"
                )
            if count == 0:
                raise ValueError(f"{argument}: got {str(path)!r}, which holds no frame that decodes")
