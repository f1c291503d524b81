"""The stand-in for the CUDA driver (csrc/tests/fake_cuda), built once, and a face to it for tests."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "tests" / "fake_cuda"


def stand_in(folder: Path) -> Path:
    """Path of a ``libcuda.so.1`` in ``folder``, compiled once. Skips the test when there is no C++ compiler."""
    library = folder / "libcuda.so.1"
    if library.exists():
        return library
    if not SOURCES.is_dir():
        pytest.skip("the C++ sources are not here")
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled beside and renamed: another worker may be looking for it.
    partial = folder / f"libcuda.{os.getpid()}.so"
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
    subprocess.run([compiler, *flags, *sources, "-o", str(partial)], check=True)
    partial.rename(library)
    return library


class StandIn:
    """What a test does to the stand-in at ``path``: streams, kernels on them, the order of work, faults.

    Addresses are ints (``tensor.data_ptr()``), sizes are bytes. Work is put off until something waits for it, or
    ``run``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = library = ctypes.CDLL(str(path))
        address, size, number = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int64
        declared = {
            "fake_stream": (address, ctypes.c_uint),
            "fake_launch_write": (ctypes.c_int, address, address, ctypes.c_int, size),
            "fake_launch_copy": (ctypes.c_int, address, address, address, size),
            "fake_launch_check": (ctypes.c_int, address, address, ctypes.c_char_p, size),
            "fake_run": (number, number, number),
            "fake_pending": (number, number),
            "fake_touching": (number, address, size),
            "fake_violations": (ctypes.c_char_p,),
            "fake_count": (number, ctypes.c_char_p),
            "fake_set": (ctypes.c_int, ctypes.c_char_p, number),
            "fake_hold": (None, address, ctypes.c_int),
            "fake_capture": (number, address, ctypes.c_int),
            "fake_allocation": (None, address, size),
            "fake_reset": (None,),
        }
        for name, (result, *arguments) in declared.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    def stream(self, *, blocking: bool = False) -> int:
        """A new compute stream. A blocking one takes the default stream (0) along into its captures."""
        return int(self._library.fake_stream(0 if blocking else 1))

    def write(self, stream: int, address: int, byte: int, size: int) -> None:
        """A kernel that fills memory with a byte."""
        self._launch("fake_launch_write", stream, address, byte, size)

    def copy(self, stream: int, to: int, source: int, size: int) -> None:
        """A kernel that copies memory, piece by piece."""
        self._launch("fake_launch_copy", stream, to, source, size)

    def check(self, stream: int, address: int, expected: bytes) -> None:
        """A kernel that reads memory: a violation when it does not find ``expected`` once it runs."""
        self._launch("fake_launch_check", stream, address, expected, len(expected))

    def _launch(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            raise RuntimeError(f"{name} failed with {result}")

    def run(self, steps: int = -1, seed: int = -1) -> int:
        """Does up to ``steps`` steps, or all that can be done; a seed starts the random order anew. Steps done."""
        return int(self._library.fake_run(steps, seed))

    def pending(self, stream: int = -1) -> int:
        """Operations not finished, on one stream or on all."""
        return int(self._library.fake_pending(stream))

    def touching(self, address: int, size: int) -> int:
        """Operations not finished that read or write these bytes."""
        return int(self._library.fake_touching(address, size))

    def violations(self) -> list[str]:
        return self._library.fake_violations().decode().splitlines()

    def count(self, name: str) -> int:
        """See ``fake_count`` in csrc/tests/fake_cuda/controls.cpp for the names."""
        return int(self._library.fake_count(name.encode()))

    def set(self, **options: int) -> None:
        """Options by name, listed at the top of csrc/tests/fake_cuda/machine.cpp."""
        for name, value in options.items():
            if self._library.fake_set(name.encode(), value) != 0:
                raise ValueError(f"the stand-in has no option {name!r}")

    def hold(self, stream: int, held: bool = True) -> None:
        """Keeps a stream from running, as a long kernel at its head would."""
        self._library.fake_hold(stream, int(held))

    def capture(self, stream: int, on: bool = True) -> int:
        """Begins a capture on a stream, or ends it wherever it has reached. Operations captured so far."""
        return int(self._library.fake_capture(stream, int(on)))

    def allocation(self, address: int, size: int) -> None:
        """Declares device memory as an allocation of its own (size 0 forgets it)."""
        self._library.fake_allocation(address, size)

    def reset(self) -> None:
        """As new. Not while a bank is open."""
        self._library.fake_reset()
