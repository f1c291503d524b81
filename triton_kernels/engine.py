"""The Triton engine: the ops' functions, with the arguments of `longlive_rag_ops.reference`."""

from __future__ import annotations

from .merge_attention import merge_attention
from .place_frames import place_frames
from .retrieve_attend import retrieve_attend
from .topk_retrieve import topk_retrieve
from .window_attend import window_attend
from .write_frames import write_frames

__all__ = ["merge_attention", "place_frames", "retrieve_attend", "topk_retrieve", "window_attend", "write_frames"]
