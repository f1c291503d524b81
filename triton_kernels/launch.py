"""Launching kernels: the device's limits, how a launcher reads them, and launches that only compile.

Launchers never ask torch or Triton about the device themselves: they call `device_of`, and start kernels by `launch`.
So one launcher serves a GPU, Triton's interpreter on a CPU, and the ahead-of-time compiler, which runs it on tensors
without data for a GPU that need not be there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

# Kernels were decorated for the interpreter: fixed when Triton is imported, whatever the environment says later.
INTERPRETED = type(triton.language.softmax).__name__ == "InterpretedFunction"


@dataclass(frozen=True)
class Device:
    """What a launcher needs to know of a device.

    Attributes:
        architecture: compute capability as in ``sm_90``: 80, 89, 90, 100, 120.
        multiprocessors: number of them.
        shared_memory: most bytes of shared memory that a block may take.
    """

    architecture: int
    multiprocessors: int
    shared_memory: int


# One device of each architecture that kernels are shipped for, for compiling ahead of time and for the interpreter.
# Multiprocessors of A100, L40S, H100 SXM, B200 and RTX 5090; shared memory: CUDA C++ Programming Guide, "Technical
# specifications per compute capability".
MODELS = {
    80: Device(80, 108, 166912),
    89: Device(89, 142, 101376),
    90: Device(90, 132, 232448),
    100: Device(100, 148, 232448),
    120: Device(120, 170, 101376),
}

_assumed: list[Device] = []
_recorders: list[tuple[Callable[[str, Any], None], Callable[[str], bool] | None]] = []


def device_of(x: torch.Tensor) -> Device:
    """The device that a kernel on ``x`` runs on, or is compiled for."""
    if _assumed:
        return _assumed[-1]
    return _cuda_device(x.device.index or 0) if x.is_cuda else MODELS[80]


@lru_cache
def _cuda_device(number: int) -> Device:
    properties = torch.cuda.get_device_properties(number)
    return Device(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Within it, launchers choose for ``device``: to test another architecture's path in the interpreter."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


@contextlib.contextmanager
def compile_only(
    device: Device, record: Callable[[str, Any], None], wanted: Callable[[str], bool] | None = None
) -> Iterator[None]:
    """Within it, launchers compile for ``device`` instead of running; tensors may be on the meta device.

    Args:
        record: called with the kernel's name and Triton's compiled kernel, for each launch.
        wanted: asked before, with the kernel's name; a launch that is not wanted does nothing.
    """
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET is set: unset it in a new process")
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_AbsentGpu(device))
    _recorders.append((record, wanted))
    try:
        with assume(device):
            yield
    finally:
        _recorders.pop()
        driver._active = before


class _AbsentGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, device: Device) -> None:
        from triton.backends.compiler import GPUTarget

        self._device, self._target = device.architecture, GPUTarget("cuda", device.architecture, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device  # Triton caches kernels by this number

    def get_current_stream(self, device: int) -> int:
        return 0


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Starts a kernel on the current stream: ``kernel[grid](*args, **options)``. An empty grid starts nothing."""
    if _recorders:
        record, wanted = _recorders[-1]
        if wanted is None or wanted(kernel.__name__):
            record(kernel.__name__, kernel.warmup(*args, grid=tuple(grid), **options))
    elif all(size > 0 for size in grid):
        tensor = next(x for x in args if isinstance(x, torch.Tensor))
        with torch.cuda.device_of(tensor):  # Triton starts kernels on the current device, whatever the tensors are on
            kernel[tuple(grid)](*args, **options)
