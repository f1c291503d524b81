"""The bytes of a page: keys and values of one frame in one layer of one sample, as a bank stores them.

====================  ===============================================================  ====================
storage               a stored page, zeros up to a multiple of 4096 bytes              segments
====================  ===============================================================  ====================
plain                 keys ``(T, H, D)``, values ``(T, H, D)`` in the compute dtype    keys; values
int8, fp8 (e4m3fn)    keys and values ``(T, H, D)``, a byte an entry; then float16     the whole page
                      scales of keys ``(T, H)`` and of values ``(T, H)``
====================  ===============================================================  ====================

All row-major, little-endian. A segment is what one copy moves. Plain keys and values lie apart in a pool of window
slots, so they are two; a quantised page lies in a slot of bytes as it is stored, and is one. A record is all pages of
a frame, ``[layer][sample]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import check_int
from ..ops.checks import FLOATS, check
from .quantise import SCALE, STORED, dequantise, quantise

ALIGNMENT = 4096  # what direct I/O asks for, and the size of a memory page; kAlignment of the core
STORAGES = ("plain", *STORED)
SIZES = ("layers", "samples", "tokens_per_frame", "kv_heads", "head_dim")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


@dataclass(frozen=True)
class PageFormat:
    """How a bank stores pages; the same for all frames of a bank.

    Attributes:
        storage: ``plain`` (the compute dtype), ``int8`` or ``fp8`` (float8 e4m3fn) with scales.
        layers, samples: pages of a frame.
        tokens_per_frame, kv_heads, head_dim: T, H, D of a page's keys and of its values.
        dtype: the compute dtype, of the window's slots.

    Raises:
        TypeError, ValueError: an attribute is not allowed.
    """

    storage: str
    layers: int
    samples: int
    tokens_per_frame: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}; got {self.storage!r}")
        for name in SIZES:
            check_int(name, getattr(self, name), 1)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because channels are rotated in pairs; got {self.head_dim}")
        if self.dtype not in FLOATS:
            raise TypeError(f"dtype must be {' or '.join(map(str, FLOATS))}, got {self.dtype!r}")

    @property
    def quantised(self) -> bool:
        """Whether pages are stored in eight bits with scales."""
        return self.storage != "plain"

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of keys and values in a stored page."""
        return STORED.get(self.storage, self.dtype)

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """``(T, H, D)``."""
        return self.tokens_per_frame, self.kv_heads, self.head_dim

    @property
    def data_bytes(self) -> int:
        """Bytes of the keys, or of the values, of a stored page, without scales."""
        return math.prod(self.page_shape) * self.stored_dtype.itemsize

    @property
    def used_bytes(self) -> int:
        """Bytes of a stored page that are not padding."""
        scales = self.tokens_per_frame * self.kv_heads * SCALE.itemsize if self.quantised else 0
        return 2 * (self.data_bytes + scales)

    @property
    def page_bytes(self) -> int:
        """Bytes of a stored page, a multiple of 4096."""
        return -(-self.used_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def record_bytes(self) -> int:
        """Bytes of all pages of a frame."""
        return self.layers * self.samples * self.page_bytes

    @property
    def segments(self) -> list[tuple[int, int]]:
        """``(offset, bytes)`` of each run of a stored page that one copy moves."""
        if self.quantised:
            return [(0, self.page_bytes)]
        return [(0, self.data_bytes), (self.data_bytes, self.data_bytes)]

    def slots_shape(self, count: int) -> tuple[int, ...]:
        """Shape of ``count`` device slots: plain ``(layers, 2, samples, count, T, H, D)``, a `MemoryWindow`'s pool;
        quantised ``(layers, samples, count, page_bytes)``."""
        if self.quantised:
            return self.layers, self.samples, count, self.page_bytes
        return self.layers, 2, self.samples, count, *self.page_shape

    def slots(self, count: int, device: torch.device | str) -> torch.Tensor:
        """``count`` device slots of zeros, in the compute dtype, or uint8 when quantised; see `slots_shape`."""
        shape = self.slots_shape(check_int("count", count, 0))
        return torch.zeros(shape, dtype=torch.uint8 if self.quantised else self.dtype, device=device)

    def slot_parts(self, slots: torch.Tensor) -> list[tuple[int, int, int, int]]:
        """``(address, layer stride, sample stride, slot stride)`` in bytes of each segment of device slots.

        Args:
            slots: as `slots` makes them, or a view with other strides whose pages are contiguous and apart.

        Raises:
            TypeError, ValueError: dtype, shape or strides are not allowed.
        """
        shape = self.slots_shape(slots.shape[2 if self.quantised else 3]) if slots.dim() > 3 else self.slots_shape(0)
        check("slots", slots, shape, (torch.uint8 if self.quantised else self.dtype,), slots)
        _check_pages("slots", slots, 1 if self.quantised else 3)
        parts = [slots] if self.quantised else [slots[:, 0], slots[:, 1]]
        unit = slots.element_size()
        places = ((part.data_ptr(), *part.stride()[:3]) for part in parts)
        return [(base, layer * unit, sample * unit, slot * unit) for base, layer, sample, slot in places]

    def source_parts(self, keys: torch.Tensor, values: torch.Tensor | None = None) -> list[tuple[int, int, int]]:
        """``(address, layer stride, sample stride)`` in bytes of each segment of one frame's pages.

        Args:
            keys, values: plain: ``(layers, samples, T, H, D)``, views with any strides of layers and samples and
                contiguous pages. Quantised: the pages that `encode` made, and no values.

        Raises:
            TypeError, ValueError: dtype, shape or strides are not allowed.
        """
        if self.quantised:
            if values is not None:
                raise ValueError(f"storage {self.storage!r} takes encoded pages and no values")
            self._check_encoded("keys", keys)
            parts = [("keys", keys, 1)]
        else:
            if values is None:
                raise ValueError("values must be given together with keys")
            self._check_pair(keys, values)
            parts = [("keys", keys, 3), ("values", values, 3)]
        for name, part, page_dims in parts:
            _check_pages(name, part, page_dims, apart=False)
        unit = keys.element_size()
        return [(part.data_ptr(), part.stride(0) * unit, part.stride(1) * unit) for _, part, _ in parts]

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor | None = None, *, engine: str = "auto"
    ) -> torch.Tensor:
        """Stored pages ``(layers, samples, page_bytes)`` uint8 of one frame, padding included.

        Enqueued on the current stream; the host waits for nothing. See `quantise` for rounding, for magnitudes beyond
        what scales reach and for NaN and infinity, which pass as NaN (plain pages keep every bit).

        Args:
            keys, values: ``(layers, samples, T, H, D)`` of the compute dtype, any strides.
            out: where to write, any strides but bytes of a page contiguous; by default a new tensor.
            engine: as the ops take it; all make the same bytes.

        Raises:
            TypeError, ValueError: a dtype, shape, stride or device is not allowed.
            RuntimeError: the engine is not available.
        """
        self._check_pair(keys, values)
        if out is None:
            out = torch.empty(self.layers, self.samples, self.page_bytes, dtype=torch.uint8, device=keys.device)
        self._check_encoded("out", out, keys)
        padding = out[..., self.used_bytes :]
        if self.quantised:
            quantise(keys, values, **self.views(out), padding=padding, engine=engine)
        else:
            with torch.no_grad():
                views = self.views(out)
                views["k_pages"].copy_(keys)
                views["v_pages"].copy_(values)
                padding.zero_()
        return out

    def decode(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(layers, samples, T, H, D)`` in the compute dtype: new tensors, with the bits that
        ``place_frames`` writes at position 0.

        Args:
            pages: as `encode` returns them.
        """
        self._check_encoded("pages", pages)
        views = self.views(pages)
        if not self.quantised:
            return views["k_pages"].clone(), views["v_pages"].clone()
        return (
            dequantise(views["k_pages"], views["k_scale"], self.dtype),
            dequantise(views["v_pages"], views["v_scale"], self.dtype),
        )

    def views(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Strided views of stored pages, by the names under which ``place_frames`` takes them.

        Args:
            pages: ``(B, P, page_bytes)`` uint8: one layer's slots of bytes, or the pages of a frame.

        Returns:
            ``k_pages, v_pages`` ``(B, P, T, H, D)`` of `stored_dtype`; quantised also ``k_scale, v_scale``
            ``(B, P, T, H)`` float16.

        Raises:
            TypeError, ValueError: dtype, shape or strides are not allowed.
        """
        check("pages", pages, (None, None, self.page_bytes), (torch.uint8,), pages)
        unit = SCALE.itemsize if self.quantised else self.dtype.itemsize
        places = (pages.storage_offset(), *pages.stride()[:2])
        if pages.stride(-1) != 1 or any(place % unit for place in places):
            raise ValueError(
                f"pages must have contiguous bytes and begin at multiples of {unit}, got offset "
                f"{pages.storage_offset()} and strides {pages.stride()}"
            )

        def part(offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return pages[..., offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).unflatten(-1, shape)

        at, scales = self.data_bytes, self.page_shape[:2]
        views = {
            "k_pages": part(0, self.page_shape, self.stored_dtype),
            "v_pages": part(at, self.page_shape, self.stored_dtype),
        }
        if self.quantised:
            views["k_scale"] = part(2 * at, scales, SCALE)
            views["v_scale"] = part(2 * at + math.prod(scales) * SCALE.itemsize, scales, SCALE)
        return views

    def to_dict(self) -> dict[str, str | int]:
        """The attributes as JSON has them, the dtype by its name: ``bfloat16``."""
        sizes: dict[str, str | int] = {name: getattr(self, name) for name in SIZES}
        return {"storage": self.storage, **sizes, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PageFormat:
        """The format that `to_dict` described.

        Raises:
            TypeError, ValueError: a field is missing, unknown or not allowed.
        """
        names = {"storage", *SIZES, "dtype"}
        if not isinstance(fields, Mapping) or set(fields) != names:
            got = sorted(map(str, fields)) if isinstance(fields, Mapping) else type(fields).__name__
            raise ValueError(f"a page format must have the fields {', '.join(sorted(names))}; got {got}")
        dtype = fields["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        return cls(**{**fields, "dtype": DTYPES[dtype]})

    def _check_pair(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        shape = (self.layers, self.samples, *self.page_shape)
        check("keys", keys, shape, (self.dtype,), keys)
        check("values", values, shape, (self.dtype,), keys)

    def _check_encoded(self, name: str, pages: torch.Tensor, like: torch.Tensor | None = None) -> None:
        shape = (self.layers, self.samples, self.page_bytes)
        check(name, pages, shape, (torch.uint8,), pages if like is None else like)


def _check_pages(name: str, x: torch.Tensor, page_dims: int, apart: bool = True) -> None:
    """A page, the last dimensions, is contiguous; and no two pages share a byte, where something is written to them."""
    first = x.dim() - page_dims
    if x.numel() and not x[(0,) * first].is_contiguous():
        raise ValueError(f"{name} must have contiguous pages {tuple(x.shape[first:])}, got strides {x.stride()}")
    extent = math.prod(x.shape[first:])
    # Sufficient, and true of every view that slices or permutes: strides that nest, as those of a dense tensor do.
    for stride, size in sorted(zip(x.stride()[:first], x.shape[:first], strict=True)):
        if apart and size > 1:
            if stride < extent:
                raise ValueError(f"{name} must have pages that do not overlap, got strides {x.stride()}")
            extent = stride * (size - 1) + extent
