"""What an installation consists of: the names in a wheel, what the binary links, what importing drags in."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from longlive_rag_ops import build_info

ROOT = Path(__file__).resolve().parents[1]
# What the build reads; the copy keeps tests of the build from each other and from the checkout's own build folder.
SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE")
SOURCES += ("csrc", "triton_kernels", "longlive_rag_ops")
DATA = ("*.npz", "*.safetensors")  # kinds of files that the package reads
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}

# Torch's own dependencies (by what they install), and what those and Python's tools may import in turn.
ALLOWED = {"torch", "torchgen", "functorch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock"}
ALLOWED |= {"fsspec", "typing_extensions", "nvidia", "cuda", "setuptools", "_distutils_hack", "pkg_resources", "optree"}


@pytest.fixture(scope="module")
def checkout() -> Path:
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests do not run from a checkout")
    return ROOT


def not_installed(*names: str) -> list[str]:
    return [name for name in names if not list(importlib.metadata.distributions(name=name))]


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout without CUDA sources, built with what this environment has (no network)."""
    missing = not_installed("pip", "setuptools", "pybind11")
    missing += [name for name in not_installed("cmake", "ninja") if not shutil.which(name)]
    if not (os.environ.get("CXX") or shutil.which("c++")):
        missing.append("a C++ compiler")
    if missing:
        pytest.skip(f"building a wheel needs {', '.join(missing)}")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building a wheel needs setuptools >= 77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        origin = checkout / name
        if origin.is_dir():
            shutil.copytree(
                origin, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.pyc")
            )
        elif origin.exists():
            shutil.copy2(origin, source / name)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps"]
    environment = {**os.environ, "LONGLIVE_BUILD_CUDA": "0"}
    done = subprocess.run(
        [*command, "-w", str(folder), str(source)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_installs_one_module_with_everything_in_it(wheel: Path, checkout: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("longlive_rag_ops-")
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"longlive_rag_ops"}
    kernels = {f"longlive_rag_ops/triton_kernels/{path.name}" for path in (checkout / "triton_kernels").glob("*.py")}
    assert kernels == {name for name in names if "triton_kernels" in name}
    assert kernels
    package = checkout / "longlive_rag_ops"
    sources = {path.relative_to(checkout).as_posix() for kind in ("*.py", *DATA) for path in package.rglob(kind)}
    sources |= {"longlive_rag_ops/py.typed"}
    assert sources - set(names) == set()
    assert len([name for name in names if re.fullmatch(r"longlive_rag_ops/_C\..*so", name)]) == 1
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)

    def read(ending: str) -> str:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name).decode()

    metadata = read(".dist-info/METADATA")
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert needed == ["Requires-Dist: torch>=2.11", "Requires-Dist: numpy"]
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "longlive-rag = longlive_rag_ops.cli:main" in read("entry_points.txt")


@pytest.fixture(scope="module")
def unpacked_extension(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if "/_C." in name)
    return Path(archive.extract(name, tmp_path_factory.mktemp("extension")))


def test_built_extension_needs_neither_torch_nor_cuda(unpacked_extension: Path) -> None:
    info = load_alone(unpacked_extension, "print(module.build_info()['cuda'], module.build_info()['cuda_reason'])")
    assert info == "False LONGLIVE_BUILD_CUDA=0"
    assert linked(unpacked_extension) <= SYSTEM_LIBRARIES


def test_installed_extension_needs_neither_torch_nor_cuda() -> None:
    try:
        path = Path(str(build_info.extension().__file__))
    except ImportError as error:
        pytest.skip(str(error))
    assert load_alone(path, "print(module.SlotTable(3).acquire(5))") == "(0, True, None)"
    assert not [name for name in linked(path) if re.search("torch|c10|cuda|cudart|python", name)]


def load_alone(path: Path, code: str) -> str:
    """Loads the module from its file, without the package round it, and prints; torch must not come with it."""
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(path)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"{code}\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'longlive_rag_ops')]\n"
    )
    return run_python(program, "-S")


def linked(path: Path) -> set[str]:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run([readelf, "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))


def run_python(program: str, *options: str) -> str:
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_importing_the_package_imports_torch_and_numpy_only() -> None:
    # What torch brings along by itself is not ours to answer for: it depends on its version and on what is installed.
    program = (
        "import sys\n"
        "import torch, numpy\n"
        "before = set(sys.modules)\n"
        "import longlive_rag_ops, longlive_rag_ops.bank, longlive_rag_ops.triton_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(longlive_rag_ops.triton_kernels.__name__)\n"
        "print(*new - set(sys.stdlib_module_names) - {'longlive_rag_ops'})\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'triton', 'triton_kernels'})\n"
    )
    kernels, third, triton = run_python(program).split("\n")
    assert kernels == "longlive_rag_ops.triton_kernels"
    assert set(third.split()) - ALLOWED == set()
    assert triton == ""


def test_every_kind_of_data_is_packed(checkout: Path) -> None:
    packed = re.search(r'^"longlive_rag_ops.demo" = \[(.*)\]$', (checkout / "pyproject.toml").read_text(), re.MULTILINE)
    assert packed is not None
    assert sorted(re.findall(r'"(.*?)"', packed[1])) == sorted(DATA)
    others = {path for path in (checkout / "longlive_rag_ops").rglob("*") if path.suffix in (".npz", ".safetensors")}
    assert {path.parent.name for path in others} == {"demo"}


def test_makefile_installs_the_build_requirements(checkout: Path) -> None:
    requires = re.search(r"^requires = \[(.*)\]$", (checkout / "pyproject.toml").read_text(), re.MULTILINE)
    tools = re.search(r"^BUILD_TOOLS = (.*)$", (checkout / "Makefile").read_text(), re.MULTILINE)
    assert requires is not None
    assert tools is not None
    assert sorted(re.findall(r'"(.*?)"', requires[1])) == sorted(tools[1].replace("'", "").split())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LONGLIVE_BUILD_CUDA": "yes"}, r"LONGLIVE_BUILD_CUDA='yes' is not allowed; set it to auto, 1 or 0"),
        ({"LONGLIVE_BUILD_CUDA": "1"}, r"LONGLIVE_BUILD_CUDA=1, but nvcc not found in CUDACXX"),
        ({"LONGLIVE_BUILD_CUDA": "1", "CUDACXX": "/bin/false"}, r"nvcc does not run: /bin/false \(from CUDACXX\)"),
    ],
)
def test_build_refuses_clearly(checkout: Path, tmp_path: Path, variables: dict[str, str], message: str) -> None:
    if missing := not_installed("setuptools", "pybind11"):
        pytest.skip(f"the build needs {', '.join(missing)}")
    hidden = {"CUDACXX", "CUDA_HOME", "CUDA_PATH"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": str(tmp_path), **variables}  # no nvcc there
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
