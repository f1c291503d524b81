"""Build of the extension module ``longlive_rag_ops._C`` through CMake and Ninja; everything else is in pyproject.toml.

torch is never imported here, no GPU is ever asked for: the build works in pip's isolated environment and on a machine
without a driver. What may be set in the environment:

``LONGLIVE_BUILD_CUDA``
    ``auto`` (default): CUDA sources are compiled when nvcc is found and works; otherwise one line says why not.
    ``1``: a build without them is an error. ``0``: nvcc is not even looked for.
``LONGLIVE_CUDA_ARCHS``
    CMake's list of CUDA architectures, default ``80-real;90-real;100`` (machine code for all three, PTX for the last).
``CUDACXX``, ``CUDA_HOME``, ``CUDA_PATH``
    where nvcc is, in this order; then ``PATH``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80-real;90-real;100"


class BuildError(SystemExit):
    """Stops the build with a message instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"longlive-rag-ops: {message}")


def say(message: str) -> None:
    print(f"longlive-rag-ops: {message}", file=sys.stderr, flush=True)


def works(program: str) -> bool:
    """Whether ``program --version`` runs (a version manager's shim may exist and still fail)."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_tool(name: str, folder_attribute: str) -> str:
    """Path of cmake or ninja: the one on PATH, else the one inside the Python package of that name."""
    on_path = shutil.which(name)
    if on_path and works(on_path):
        return on_path
    try:
        module = __import__(name)
    except ImportError:
        module = None
    inside = shutil.which(name, path=getattr(module, folder_attribute, "")) if module else None
    if inside and works(inside):
        return inside
    raise BuildError(f"{name} not found: neither on PATH nor as a Python package (pip install {name})")


def find_nvcc() -> tuple[str | None, str]:
    """(path of a working nvcc, "") or (None, the reason)."""
    candidates = [
        ("CUDACXX", os.environ.get("CUDACXX")),
        *((name, f"{os.environ[name]}/bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
        ("PATH", shutil.which("nvcc")),
    ]
    tried = [(origin, path) for origin, path in candidates if path]
    for _, path in tried:
        found = shutil.which(path)
        if found and works(found):
            return found, ""
    if tried:
        return None, "nvcc does not run: " + ", ".join(f"{path} (from {origin})" for origin, path in tried)
    return None, "nvcc not found in CUDACXX, CUDA_HOME, CUDA_PATH or PATH"


def plan_cuda() -> tuple[str, str | None, str]:
    """(what LONGLIVE_BUILD_CUDA asks for, nvcc to use or None, why None)."""
    wanted = os.environ.get("LONGLIVE_BUILD_CUDA", "auto").strip() or "auto"
    if wanted not in ("auto", "1", "0"):
        raise BuildError(f"LONGLIVE_BUILD_CUDA={wanted!r} is not allowed; set it to auto, 1 or 0")
    if wanted == "0":
        return wanted, None, "LONGLIVE_BUILD_CUDA=0"
    nvcc, reason = find_nvcc()
    if wanted == "1" and nvcc is None:
        raise BuildError(f"LONGLIVE_BUILD_CUDA=1, but {reason}")
    return wanted, nvcc, reason


class CMakeBuild(build_ext):
    """Builds the one extension with CMake; setuptools only decides where the result goes."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise BuildError("pybind11 not found (pip install pybind11)") from None
        wanted, nvcc, reason = plan_cuda()
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not self.build_temp: for an editable install that is a new folder each time, and everything is compiled again.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_cuda = build.with_name(build.name + "-cuda")
        common = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # given each time: in an isolated build the last one is gone
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLONGLIVE_VERSION={self.distribution.get_version()}",
        ]
        if nvcc is not None:
            archs = os.environ.get("LONGLIVE_CUDA_ARCHS", "").strip() or DEFAULT_ARCHS
            say(f"compiling CUDA sources with {nvcc} for {archs}")
            cuda = [
                "-DLONGLIVE_CUDA=ON",
                "-DLONGLIVE_CUDA_REASON=",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={archs}",
            ]
            if self.configure(cmake, build_cuda, [*common, *cuda], must=wanted == "1"):
                self.build_target(cmake, build_cuda, target)
                return
            reason = f"{nvcc} cannot compile for {archs} (build with LONGLIVE_BUILD_CUDA=1 to see why)"
        say(f"building without CUDA sources: {reason}")
        plain = ["-DLONGLIVE_CUDA=OFF", f"-DLONGLIVE_CUDA_REASON={reason}"]
        self.configure(cmake, build, [*common, *plain], must=True)
        self.build_target(cmake, build, target)

    def configure(self, cmake: str, build: Path, options: list[str], must: bool) -> bool:
        """Runs CMake's configure step; False when it fails and ``must`` is not set."""
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # the checkout was moved; CMake would refuse
        build.mkdir(parents=True, exist_ok=True)
        command = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
        done = subprocess.run(command, capture_output=not must, text=True)
        if done.returncode == 0:
            return True
        if must:
            raise BuildError(f"CMake could not configure the build (exit status {done.returncode}, see above)")
        # CMake keeps a compiler that failed in its cache and would not look at it again
        shutil.rmtree(build)
        return False

    def build_target(self, cmake: str, build: Path, target: Path) -> None:
        done = subprocess.run([cmake, "--build", str(build), "--target", "_C"])
        if done.returncode != 0:
            hint = "; LONGLIVE_BUILD_CUDA=0 leaves CUDA out" if build.name.endswith("-cuda") else ""
            raise BuildError(f"the compiler failed (exit status {done.returncode}, see above){hint}")
        # Copied, not built in place: of one output for two build folders, Ninja would take the other's for its own.
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


setup(
    ext_modules=[Extension("longlive_rag_ops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
