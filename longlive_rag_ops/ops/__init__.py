"""Registers ``torch.ops.longlive`` on import. Each op's function documents shapes, dtypes and errors."""

from .attention import merge_attention, retrieve_attend, window_attend
from .placement import place_frames, write_frames
from .retrieval import topk_retrieve
from .waiting import wait_pages

__all__ = [
    "merge_attention",
    "place_frames",
    "retrieve_attend",
    "topk_retrieve",
    "wait_pages",
    "window_attend",
    "write_frames",
]
