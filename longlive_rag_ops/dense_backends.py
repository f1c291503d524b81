"""Implementations of dense attention: which of them serves a call, and why another cannot.

A back end takes queries ``(B, H, S, D)`` and keys and values ``(B, H, N, D)`` with as many heads, and gives the output
in the queries' shape and, when asked, the natural log-sum-exp of the scaled logits ``(B, H, S)``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .reference import lse_dtype

HALVES = (torch.float16, torch.bfloat16)
SCORES = 2**26  # elements of the score matrix that plain products hold at a time: 256 MiB in float32

Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Facts:
    """What decides about a back end.

    Attributes:
        device: ``cpu`` or ``cuda``.
        architecture: compute capability as in ``sm_90``: 90; 0 on a CPU.
        dtype, head_dim: of queries, keys and values.
        keys: number of them.
        reach: largest stride of queries, keys and values, in elements.
    """

    device: str
    architecture: int
    dtype: torch.dtype
    head_dim: int
    keys: int
    reach: int = 0


@dataclass(frozen=True)
class BackEnd:
    """One implementation.

    Attributes:
        name: for messages and the report.
        summary: what it is, for people.
        missing: returns why this machine does not have it, or None.
        obstacle: returns why it cannot serve such a call, or None; asked only where it is not missing.
        attend: ``(queries, keys, values, scale, return_lse)`` to output and log-sum-exp (None when not asked for).
    """

    name: str
    summary: str
    missing: Callable[[], str | None]
    obstacle: Callable[[Facts], str | None]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None, bool], Result]


def facts(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Facts:
    """Facts of one call; costs no device synchronisation."""
    architecture, far = architecture_of(queries.device), reach(queries, keys, values)
    return Facts(queries.device.type, architecture, queries.dtype, queries.shape[3], keys.shape[2], far)


def reach(*tensors: torch.Tensor) -> int:
    """Largest stride that is used, in elements."""
    used = [s for x in tensors for size, s in zip(x.shape, x.stride(), strict=True) if size > 1]
    return max(used, default=0)


def architecture_of(device: torch.device) -> int:
    """Compute capability of a device as in ``sm_90``; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _capability(number: int) -> int:
    major, minor = torch.cuda.get_device_capability(number)
    return 10 * major + minor


def select(wanted: Facts) -> BackEnd:
    """The first back end of the machine's order that can serve such a call; plain products always can."""
    return next(back_end for back_end in order(wanted) if why_not(back_end, wanted) is None)


def why_not(back_end: BackEnd, wanted: Facts) -> str | None:
    """Why a back end cannot serve such a call here, or None."""
    return back_end.missing() or back_end.obstacle(wanted)


def order(wanted: Facts) -> tuple[BackEnd, ...]:
    """Back ends, best first, by published speed; nothing here has been measured by us.

    Forward TFLOP/s, bf16 or fp16, head dim 128, without a mask. H100 or H200: cuDNN 9.19 671-702 (cudnn-frontend's
    benchmark results), FlashAttention-3 638-648, FlashAttention-2 370 (FlashAttention-3's figure); no figure of
    FlashAttention-4 was found. B200 or GB200: cuDNN 9.22 1731 (cudnn-frontend), FlashAttention-4 1613 (arXiv
    2603.05451), which compiles for seconds at its first call. Elsewhere torch itself prefers FlashAttention-2.
    """
    if wanted.device == "cpu":
        return CPU, MATH
    if wanted.architecture // 10 in (9, 10):
        return CUDNN, FLASH_ATTN_3, FLASH_ATTN_4, FLASH, FLASH_ATTN_2, MATH
    return FLASH, FLASH_ATTN_2, CUDNN, MATH


def report() -> list[dict[str, Any]]:
    """Every back end with ``name``, ``available``, ``reason`` (why not, or None) and ``summary``."""
    rows = []
    for back_end in BACK_ENDS:
        reason = back_end.missing()
        rows.append({"name": back_end.name, "available": reason is None, "reason": reason, "summary": back_end.summary})
    return rows


def _half_obstacle(wanted: Facts, largest_head: int) -> str | None:
    """What every tensor core kernel asks for."""
    if wanted.device != "cuda":
        return f"it runs on CUDA devices only, the tensors are on {wanted.device}"
    if wanted.architecture < 80:
        return f"it needs compute capability 8.0 or newer, got {wanted.architecture / 10:.1f}"
    if wanted.dtype not in HALVES:
        return f"it takes float16 and bfloat16 only, got {wanted.dtype}"
    if wanted.head_dim % 8 or wanted.head_dim > largest_head:
        return f"head_dim must be a multiple of 8 and at most {largest_head}, got {wanted.head_dim}"
    return None


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where kernels can load it 16 bytes at a time along a contiguous innermost axis, else a copy."""
    whole = 16 // x.itemsize
    outer = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and all(stride % whole == 0 for stride in outer)
    return x if fits and x.data_ptr() % 16 == 0 else x.contiguous()


# --- torch on a CPU ---------------------------------------------------------------------------------------------------


def _cpu_obstacle(wanted: Facts) -> str | None:
    return None if wanted.device == "cpu" else f"it runs on CPUs only, the tensors are on {wanted.device}"


def _cpu_attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, return_lse: bool
) -> Result:
    if not return_lse:
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale), None
    # This kernel reads the innermost axis as if it were contiguous, without looking.
    operands = [x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, values)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands, scale=scale)
    return out, lse.reshape(queries.shape[:3])


# --- torch on CUDA ----------------------------------------------------------------------------------------------------


def _cudnn_missing() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    version = torch.backends.cudnn.version()
    if version is None:
        return "torch finds no cuDNN"
    if version < 91501:  # pytorch issue 169849; torch prefers cuDNN from this version on, too
        return f"it needs cuDNN 9.15.1: older ones err where the keys are no multiple of 128; found {version}"
    return None


def _cudnn_obstacle(wanted: Facts) -> str | None:
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "torch does not count it as deterministic, and torch.use_deterministic_algorithms is on"
    if wanted.keys == 1:
        return "it does not take a single key"
    if wanted.reach >= 2**31:
        return f"its strides are 32-bit numbers, got {wanted.reach}"
    return _half_obstacle(wanted, 128)


def _cudnn_attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, return_lse: bool
) -> Result:
    if not return_lse:
        return _restricted([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], queries, keys, values, scale), None
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(queries, keys, values, None, True, scale=scale)[:2]
    return out, lse.reshape(queries.shape[:3])  # cuDNN's statistics are (B, H, S, 1)


def _flash_missing() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None if torch.backends.cuda.is_flash_attention_available() else "torch is built without it"


def _flash_obstacle(wanted: Facts) -> str | None:
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.enable_flash_sdp(False) was called"
    return _half_obstacle(wanted, 256)


def _flash_attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, return_lse: bool
) -> Result:
    if not return_lse:
        return _restricted([SDPBackend.FLASH_ATTENTION], queries, keys, values, scale), None
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, scale=scale)[:2]


def _restricted(
    back_ends: list[SDPBackend], queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the first of these that torch's own checks let pass."""
    with sdpa_kernel(back_ends, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale)


# --- FlashAttention packages ------------------------------------------------------------------------------------------


@lru_cache
def _package(path: str) -> tuple[Callable[..., Any] | None, frozenset[str], str | None]:
    """A package's ``flash_attn_func``, the names of its parameters, and why it cannot be imported."""
    try:
        function = importlib.import_module(path).flash_attn_func
        return function, frozenset(inspect.signature(function).parameters), None
    except ModuleNotFoundError as error:
        return None, frozenset(), f"{error.name} is not installed"
    except Exception as error:  # a package built for another torch or CUDA fails in many ways
        return None, frozenset(), f"{path} cannot be imported: {type(error).__name__}: {error}"


def _package_back_end(name: str, path: str, summary: str, generations: tuple[int, ...], largest_head: int) -> BackEnd:
    def obstacle(wanted: Facts) -> str | None:
        if wanted.device == "cuda" and wanted.architecture // 10 not in generations:
            able = " or ".join(f"{generation}.x" for generation in generations)
            return f"it is used on compute capability {able}, got {wanted.architecture / 10:.1f}"
        return _half_obstacle(wanted, largest_head)

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, return_lse: bool
    ) -> Result:
        function, parameters, _ = _package(path)
        assert function is not None
        # The flag has two names, and some versions have none and always return both.
        flag = next((x for x in ("return_lse", "return_attn_probs") if x in parameters), None)
        options: dict[str, Any] = {} if flag is None else {flag: return_lse}
        if "num_splits" in parameters:
            options["num_splits"] = 1  # one order of summation, whatever else runs
        result = function(*(x.transpose(1, 2) for x in (queries, keys, values)), softmax_scale=scale, **options)
        out, lse = result[:2] if isinstance(result, tuple) else (result, None)
        return out.transpose(1, 2), lse if return_lse else None

    return BackEnd(name, summary, lambda: _package(path)[2], obstacle, attend)


# --- plain products ---------------------------------------------------------------------------------------------------


def _math_attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, return_lse: bool
) -> Result:
    """Products and softmax over some queries at a time, in float32 (float64 stays).

    It serves float32 on CUDA too: torch's memory-efficient kernel computes it as three TF32 products on tensor cores
    (CUTLASS's ``OpMultiplyAddFastF32``), close to IEEE float32 but not it.
    """
    compute = lse_dtype(queries.dtype)
    samples, heads, length, head_dim = queries.shape
    factor = head_dim**-0.5 if scale is None else scale
    q, k, v = (x.to(compute).flatten(0, 1) for x in (queries, keys, values))
    out, lse = torch.empty_like(queries), q.new_empty(samples, heads, length)
    rows = max(1, SCORES // max(1, samples * heads * keys.shape[2]))
    with ieee_products():
        for start in range(0, length, rows):
            part = slice(start, start + rows)
            scores = torch.baddbmm(q.new_empty(1, 1, 1), q[:, part], k.mT, beta=0, alpha=factor)  # beta 0: never read
            total = scores.logsumexp(-1, keepdim=True)
            out[:, :, part] = (scores.sub_(total).exp_() @ v).unflatten(0, (samples, heads))
            lse[:, :, part] = total.squeeze(-1).unflatten(0, (samples, heads))
    return out, lse if return_lse else None


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """Within it, CUDA products of float32 matrices do not use TF32, whatever the process has chosen for its own.

    torch keeps the choice twice, under an old and a new name, and raises when they differ: both are set and restored.
    """
    backends: Any = torch.backends
    matmul, on_cpu = backends.cuda.matmul, backends.mkldnn.matmul
    chosen = matmul.fp32_precision
    if chosen == "ieee" or (chosen == "none" and backends.fp32_precision in ("none", "ieee")):
        yield
        return
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # the choice was made under the new name alone, and the old one still says "highest"
        old = "highest"
    chosen_on_cpu = on_cpu.fp32_precision
    if old != "highest":
        torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if old != "highest":
            torch.set_float32_matmul_precision(old)
        matmul.fp32_precision, on_cpu.fp32_precision = chosen, chosen_on_cpu


CPU = BackEnd("cpu", "torch's flash attention for CPUs", lambda: None, _cpu_obstacle, _cpu_attend)
CUDNN = BackEnd("cudnn", "cuDNN's attention, through torch", _cudnn_missing, _cudnn_obstacle, _cudnn_attend)
FLASH = BackEnd("flash", "FlashAttention-2 as built into torch", _flash_missing, _flash_obstacle, _flash_attend)
FLASH_ATTN_2 = _package_back_end(
    "flash_attn_2", "flash_attn.flash_attn_interface", "the package flash-attn, version 2", (8, 9, 10, 12), 256
)
FLASH_ATTN_3 = _package_back_end(
    "flash_attn_3", "flash_attn_interface", "the package flash-attn-3, for Hopper", (9,), 256
)
FLASH_ATTN_4 = _package_back_end(
    "flash_attn_4", "flash_attn.cute", "the package flash-attn-4, for Hopper and Blackwell", (9, 10), 128
)
MATH = BackEnd("math", "matrix products and a softmax, for every dtype", lambda: None, lambda _: None, _math_attend)
BACK_ENDS = (CPU, CUDNN, FLASH, FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4, MATH)
