"""Which engine's attention `auto` takes on a GPU: one table, by architecture, shape and dtype, with its reasons.

Nothing in it has been measured by this project yet: reasons are published figures and arithmetic on them. A row that
is measured names its results file. Figures are forward TFLOP/s at head dim 128, without a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .dense_backends import HALVES
from .triton_kernels.configs import EVERY, family

# What a call attends to. The first kind that fits a call is its shape.
SHAPES = {
    "int8": "int8 pages",
    "shifts": "pages shifted in time",
    "slots": "a table of slots: holes, another order, other pages in each sample",
    "counted": "a run of slots whose length only the device knows",
    "run": "a run of slots whose length the host knows",
}
DTYPES = {"half": "float16 or bfloat16", "float32": "float32", "float64": "float64, or heads of more than 256 channels"}


@dataclass(frozen=True)
class Preference:
    """One row; the first that fits a call decides.

    Attributes:
        families: architectures, as in `triton_kernels.configs.family`.
        shapes: of `SHAPES`.
        dtypes: of `DTYPES`.
        engine: ``dense`` or ``triton``.
        reason: why.
        measured: results file that shows it, None where nothing was measured.
        dense_with: back ends of dense attention; the row is skipped where another one would serve the call. Empty for
            any.
    """

    families: tuple[int, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    engine: str
    reason: str
    measured: str | None = None
    dense_with: tuple[str, ...] = ()


PREFERENCES = (
    Preference(EVERY, tuple(SHAPES), ("float64",), "dense", "rule: the Triton kernels do not take these"),
    Preference(
        EVERY,
        ("run",),
        ("float32",),
        "dense",
        "derived: IEEE float32 has no tensor cores; cuBLAS's products come near the peak of the FP32 units, while "
        "Triton's kernel must keep to tiles of 16 or 32 keys and reads shared memory for almost every product; the "
        "scores that plain products write and read (4.2 GB a pass for 12 frames of 1560 tokens) cost less than that",
    ),
    Preference(
        EVERY,
        ("int8", "shifts", "slots", "counted"),
        ("float32",),
        "triton",
        "rule: dense attention needs the table or the length on the host, which would wait for the device and rule "
        "out CUDA graphs",
    ),
    Preference(
        (90, 100),
        ("run",),
        ("half",),
        "dense",
        "published: H100 and H200: cuDNN 9.19 671-702 (cudnn-frontend), FlashAttention-3 639 (tritonbench 1254), "
        "Triton kernels like ours 464-487 (facebookexperimental/triton 205); B200: FlashAttention-4 1613, 2.7 times "
        "Triton (arXiv 2603.05451)",
        dense_with=("cudnn", "flash_attn_3", "flash_attn_4"),
    ),
    Preference(
        (90, 100),
        ("run",),
        ("half",),
        "triton",
        "published: H100: Triton kernels like ours 464-487 (facebookexperimental/triton 205), FlashAttention-2 370 "
        "(FlashAttention-3's figure)",
    ),
    Preference(
        (80, 89, 120),
        ("run",),
        ("half",),
        "dense",
        "published: RTX 5090: FlashAttention-2 212 (SageAttention's figure); for A100 and L40S no comparison with "
        "Triton was found, and FlashAttention-2 was written for their tensor cores",
        dense_with=("cudnn", "flash", "flash_attn_2"),
    ),
    Preference((80, 89, 120), ("run",), ("half",), "triton", "derived: plain products write the matrix of scores"),
    Preference(
        EVERY,
        ("counted",),
        ("half",),
        "triton",
        "rule: dense attention needs the length on the host, which would wait for the device and rule out CUDA graphs",
    ),
    Preference(
        EVERY,
        ("slots",),
        ("half",),
        "triton",
        "rule: dense attention needs the table on the host, which would wait for the device and rule out CUDA graphs; "
        "its copy of the pages would cost 4-9 % of the attention (derived, 12 frames of 1560 tokens, H100)",
    ),
    Preference(
        EVERY,
        ("shifts", "int8"),
        ("half",),
        "triton",
        "rule: dense attention would read the table on the host and write a placed copy of every page for each call",
    ),
)


def shape_of(run: int | None, shifts: torch.Tensor | None, k_scale: torch.Tensor | None) -> str:
    """Shape of a call of ``window_attend``."""
    if k_scale is not None:
        return "int8"
    if shifts is not None:
        return "shifts"
    return "slots" if run is None else "run"


def dtype_class(dtype: torch.dtype, head_dim: int) -> str:
    """Class of a call's dtype, one of `DTYPES`."""
    if dtype == torch.float64 or head_dim > 256:
        return "float64"
    return "half" if dtype in HALVES else "float32"


def candidates(architecture: int, shape: str, dtype: str) -> list[Preference]:
    """Rows for such calls, in their order; the last one takes any back end of dense attention.

    Raises:
        RuntimeError: the architecture is older than any that Triton kernels are for.
    """
    wanted = family(architecture)
    return [row for row in PREFERENCES if wanted in row.families and shape in row.shapes and dtype in row.dtypes]


def choose(rows: list[Preference], back_end: str | None = None) -> Preference:
    """The row that decides, given the back end that would serve the call densely."""
    return next(row for row in rows if not row.dense_with or back_end in row.dense_with)


def describe(architecture: int, back_end: str | None = None) -> list[str]:
    """What ``auto`` means on an architecture, a line for each outcome that differs.

    Args:
        back_end: the back end of dense attention that a machine has; None tells what depends on it.
    """
    lines = []
    for dtype, kind in DTYPES.items():
        outcomes: dict[str, list[str]] = {}
        for shape in SHAPES:
            rows = candidates(architecture, shape, dtype)
            if back_end is None:
                told = ", else ".join(
                    f"{row.engine} where {' or '.join(row.dense_with)} serves" if row.dense_with else row.engine
                    for row in rows
                )
            else:
                row = choose(rows, back_end)
                told = f"{row.engine} ({back_end})" if row.dense_with else row.engine
            outcomes.setdefault(told, []).append(shape)
        lines += [f"{kind}; {', '.join(shapes)}: {told}" for told, shapes in outcomes.items()]
    return lines
