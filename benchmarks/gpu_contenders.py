"""What the GPU benchmarks run: tensors of one layer, the dense back ends present, and float64 results to be held to."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.figures import Shape
from longlive_rag_ops import chain, reference
from longlive_rag_ops.assignment import FRAME, POSITION, SOURCE, STAGED, advance_window, empty_window_state
from longlive_rag_ops.config import local_frames, temporal_position, window_slot
from longlive_rag_ops.rotary import default_split, rotary_table

Tensors = dict[str, Any]
Backend = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]  # (q, pool_layer, run) -> out
SINK, RECENT_EXCLUDE, START = 1, 5, 60


class Layer:
    """Random tensors of one layer, the same for the same seed."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._rng = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(size, generator=self._rng, device=self.device, dtype=dtype or self.dtype)

    def queries(self, frames: int | None = None) -> torch.Tensor:
        shape = self.shape
        return self.normal(1, (frames or shape.block) * shape.tokens, shape.heads, shape.head_dim)

    def pool(self, slots: int) -> torch.Tensor:
        return self.normal(2, 1, slots, self.shape.tokens, self.shape.heads, self.shape.head_dim)

    def ints(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    def rope(self) -> Tensors:
        table = rotary_table(self.shape.head_dim, 128, dtype=torch.float32, device=self.device)
        return {"rope": table, "rope_split": list(default_split(self.shape.head_dim))}

    def attend(self, frames: int | None = None) -> Tensors:
        """`window_attend` over the first slots of a pool that has more."""
        frames = frames or self.shape.window
        return {"q": self.queries(), "pool_layer": self.pool(frames + 2), "run": frames}

    def quantised(self, values: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and float16 factors, one for each token and head."""
        scale = values.float().abs().amax(-1) / (127 if dtype == torch.int8 else 448)
        scaled = values.float() / scale[..., None]
        return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale.to(torch.float16)

    def write(self) -> Tensors:
        """`write_frames` of a block into a full window."""
        shape, first = self.shape, self.shape.window - self.shape.block
        return {
            "q": self.queries(),
            "k": self.queries(),
            "v": self.queries(),
            "pool_layer": self.pool(shape.window),
            "staging": self.pool(2 * shape.block)[0],
            "slots": self.ints([*range(shape.block)]),
            "staging_rows": self.ints([*range(shape.block)]),
            "positions": self.ints([*range(first, first + shape.block)]),
            "grid": list(shape.grid),
        } | self.rope()

    def place(self, position: int, stored: torch.dtype | None = None) -> Tensors:
        """`place_frames` of the memory frames, out of the pool or out of quantised pages."""
        shape, pages = self.shape, self.shape.new_pages
        case = {
            "pool_layer": self.pool(2 * pages),
            "slots": self.ints([[*range(pages)]]),
            "source": self.ints([[*range(pages, 2 * pages)]]),
            "positions": self.ints([[position] * pages]),
        } | self.rope()
        if stored is not None:
            case["source"] = self.ints([[*range(pages)]])
            plain = self.normal(2, 1, pages, shape.tokens, shape.heads, shape.head_dim, dtype=torch.float32)
            for name, values in zip("kv", plain, strict=True):
                case[f"{name}_pages"], case[f"{name}_scale"] = self.quantised(values, stored)
        return case

    def search(self, rows: int) -> Tensors:
        """`topk_retrieve` over an index whose rows are the frames in order."""
        embedding = self.shape.embedding
        return {
            "query": self.normal(1, embedding),
            "index": self.normal(1, rows, embedding),
            "index_ids": torch.arange(rows, device=self.device)[None],
            "index_length": self.ints([rows]),
            "end_frame": self.ints([rows]),
            "k": self.shape.new_pages,
            "first_frame": SINK,
            "recent_exclude": RECENT_EXCLUDE,
        }

    def retrieve(self, plan: str = "same", index_rows: int = 256) -> Tensors:
        """`retrieve_attend` in a full window.

        ``plan``: same (the state is the block's, nothing to place), new (it is the block's, and places all memory
        frames and anew the local frames that moved in time), select (it is the block's before, and choosing leads to
        new).
        """
        shape = self.shape
        window, top_k, n = shape.window, shape.new_pages, shape.block
        local = window - SINK - top_k
        state = empty_window_state(1, window)
        held = [*range(SINK), *local_frames(START - n, n, SINK, local)]
        state[0, FRAME, [window_slot(frame, SINK, local) for frame in held]] = torch.tensor(held)
        state[0, POSITION, [window_slot(frame, SINK, local) for frame in held]] = torch.tensor(
            [temporal_position(frame, START - n, n, window, SINK, top_k, "slot") for frame in held]
        )
        state[0, FRAME, window - top_k :] = torch.arange(SINK, SINK + top_k)
        state[0, POSITION, window - top_k :] = 0
        chosen = torch.arange(SINK + top_k, SINK + 2 * top_k)
        frame_slot = torch.full((1, index_rows), -1)
        frame_slot[0, chosen] = torch.arange(window, window + top_k)
        index = self.normal(1, index_rows, shape.embedding)
        for rank, frame in enumerate(chosen.tolist()):  # the most similar to the query, in this order
            index[:, frame] = index[:, START - 1] + (rank + 1) / (2 * top_k) * index[:, frame]
        if plan != "select":
            rows = local + n
            state = advance_window(state, chosen[None], frame_slot, START, n, sink=SINK, top_k=top_k, staging_rows=rows)
        if plan == "same":
            state[:, [SOURCE, STAGED]] = -1
        return {
            "q": self.queries(),
            "k": self.queries(),
            "v": self.queries(),
            "pool_layer": self.pool(window + top_k),
            "staging": self.pool(local + n)[0],
            "window_state": state.to(self.device),
            "index": index,
            "index_ids": torch.arange(index_rows, device=self.device)[None],
            "index_length": self.ints([START]),
            "frame_slot": frame_slot.to(self.device),
            "start_frame": self.ints([START]),
            "grid": list(shape.grid),
            "sink": SINK,
            "top_k": top_k,
            "recent_exclude": RECENT_EXCLUDE,
            "select": plan == "select",
            "place": plan != "same",
            "count": window,
        } | self.rope()


def clone(case: Tensors) -> Tensors:
    """A copy whose tensors may be mutated."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def dense_backends(q: torch.Tensor) -> dict[str, Backend | str]:
    """Each dense attention for tensors like ``q``: the function, or why it cannot be used here."""
    named: dict[str, Backend] = {
        "SDPA cuDNN": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "varlen": _varlen,
        "flash-attn": functools.partial(_flash_attn, "flash_attn"),
        "flash-attn 3": functools.partial(_flash_attn, "flash_attn_interface"),
    }
    if q.device.type == "cpu":
        named["SDPA"] = functools.partial(_sdpa, SDPBackend.MATH)
    small = q[:1, :1].repeat(1, 64, 1, 1)
    pool = small.view(1, 1, 2, 32, *q.shape[2:]).repeat(2, 1, 1, 1, 1, 1)
    found: dict[str, Backend | str] = {}
    for name, backend in named.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                backend(small, pool, 2)
            found[name] = backend
        except Exception as error:  # absent libraries, devices too old, shapes refused: each says so in its own way
            found[name] = f"absent: {first_line(error)}"
    return found


def first_line(error: BaseException) -> str:
    """For results that others read: folders of this machine are left out."""
    text = re.sub(r"(?:/[^\s/'\":]+)+/", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"


def _run(pool_layer: torch.Tensor, run: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``(B, run * T, H, D)``, views of the pool."""
    keys, values = pool_layer[:, :, :run].flatten(2, 3)
    return keys, values


def _sdpa(backend: SDPBackend, q: torch.Tensor, pool_layer: torch.Tensor, run: int) -> torch.Tensor:
    keys, values = _run(pool_layer, run)
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))
    return out.transpose(1, 2)


def _varlen(q: torch.Tensor, pool_layer: torch.Tensor, run: int) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q.device.type != "cuda" or q.shape[0] != 1:
        raise RuntimeError("one sample on a CUDA device only")
    keys, values = _run(pool_layer, run)
    ends = [_ends(x.shape[1], q.device) for x in (q, keys)]
    return varlen_attn(q[0], keys[0], values[0], *ends, q.shape[1], keys.shape[1])[None]


@functools.cache
def _ends(length: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def _flash_attn(module: str, q: torch.Tensor, pool_layer: torch.Tensor, run: int) -> torch.Tensor:
    out = importlib.import_module(module).flash_attn_func(q, *_run(pool_layer, run))
    return out[0] if isinstance(out, tuple) else out


def exact_attention(q: torch.Tensor, pool_layer: torch.Tensor, **options: Any) -> torch.Tensor:
    """The oracle's output in float64, one head after another: all at once would take tens of GiB."""
    heads = []
    for head in range(q.shape[2]):
        scales = {n: options[n][..., head : head + 1] for n in ("k_scale", "v_scale") if n in options}
        one = slice(head, head + 1)
        heads.append(reference.window_attend(q[:, :, one].double(), pool_layer[..., one, :], **options | scales)[0])
    return torch.cat(heads, dim=2)


def exact_retrieve(case: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The oracle's output (float64), pool and staging buffer after `retrieve_attend`; the state is the block's."""
    case = clone(case)
    pool, staging, state = (case[name] for name in ("pool_layer", "staging", "window_state"))
    n, window, top_k = case["q"].shape[1] // pool.shape[3], state.shape[2], case["top_k"]
    if case["place"]:
        chain.place_window(reference, pool, staging, state, case["rope"], case["rope_split"])
    slots = [window_slot(START + i, SINK, window - SINK - top_k) for i in range(n)]
    rows = [(START + i) % staging.shape[1] for i in range(n)]
    rotated = reference.write_frames(
        *(case[name] for name in ("q", "k", "v")),
        pool,
        staging,
        torch.tensor(slots, device=pool.device),
        torch.tensor(rows, device=pool.device),
        state[0, POSITION, slots],
        *(case[name] for name in ("rope", "rope_split", "grid")),
    )
    return exact_attention(rotated, pool, run=window), pool, staging


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch fills new memory with NaN (integers with their largest), so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def difference(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Root mean square of the error over that of the result: of the whole, and of the worst vector of D numbers."""
    if got.shape != exact.shape:
        raise ValueError(f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    error, size = (got.double() - exact.double()).square().mean(-1), exact.double().square().mean(-1)
    size = size.clamp_min(torch.finfo(torch.float32).tiny)
    return float((error.mean() / size.mean()).sqrt()), float((error / size).max().sqrt())
