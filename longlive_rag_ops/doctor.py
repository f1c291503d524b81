"""What this installation consists of and what this machine can run, for people and for bug reports.

``collect`` gathers, ``format_text`` prints. Nothing here raises because something is missing: a part that cannot be
found is reported with its reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from longlive_rag_ops.build_info import build_info, extension
from longlive_rag_ops.version import __version__

# Distributions whose version matters; only the first two are needed, the others belong to an extra.
DISTRIBUTIONS = ("torch", "numpy", "triton", "av", "matplotlib", "pillow", "safetensors", "tqdm", "pytest-benchmark")
CUDA_DRIVER = "libcuda.so.1"


def collect() -> dict[str, Any]:
    """Everything known, as plain data that ``json.dumps`` takes.

    Keys: ``package`` (version, folder), ``python``, ``libraries`` (name -> version or None), ``engines`` (rows of
    ``engines.report()``), ``auto`` (device -> what ``auto`` means there), ``dense_attention`` (rows of
    ``dense_backends.report()``), ``extension`` (``build_info()``), ``cuda_code`` (what the compiled CUDA code finds,
    or None), ``driver`` and ``gpu``.
    """
    return {
        "package": {"version": __version__, "folder": str(Path(__file__).parent)},
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "platform": platform.platform(),
        },
        "libraries": {name: _version(name) for name in DISTRIBUTIONS},
        "engines": _engines(),
        "auto": _auto(),
        "dense_attention": _dense_attention(),
        "extension": build_info(),
        "cuda_code": _cuda_code(),
        "driver": _driver(),
        "gpu": _gpu(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engines() -> list[dict[str, Any]]:
    from longlive_rag_ops import engines

    return [dict(row) for row in engines.report()]


def _auto() -> dict[str, list[str]]:
    """What ``auto`` means on a CPU and on each GPU."""
    import torch

    from longlive_rag_ops import dense_backends, engines, preferences

    devices: list[tuple[str, torch.device]] = [("cpu", torch.device("cpu"))]
    with contextlib.suppress(Exception):  # a broken driver: the section about the GPU reports it
        if torch.cuda.is_available():
            devices += [(f"cuda:{n}", torch.device("cuda", n)) for n in range(torch.cuda.device_count())]
    means: dict[str, list[str]] = {}
    for name, device in devices:
        try:
            engine = engines.engine_name("auto", device.type)
            if engine != "auto":
                means[name] = [engine]
                continue
            architecture = dense_backends.architecture_of(device)
            usual = dense_backends.Facts("cuda", architecture, torch.bfloat16, head_dim=128, keys=18720)
            means[name] = preferences.describe(architecture, dense_backends.select(usual).name)
        except (ValueError, RuntimeError) as error:
            means[name] = [f"nothing: {error}"]
    return means


def _dense_attention() -> list[dict[str, Any]]:
    from longlive_rag_ops import dense_backends

    return dense_backends.report()


def _cuda_code() -> dict[str, Any] | None:
    try:
        found = extension().cuda_build_info()
    except ImportError:
        return None
    if found is None:
        return None
    devices = [{**device, "capability": list(device["capability"])} for device in found["devices"]]
    return {**found, "devices": devices}


def _driver() -> dict[str, Any]:
    """The newest CUDA version that the installed driver supports (no device is touched for it)."""
    try:
        library = ctypes.CDLL(CUDA_DRIVER)
    except OSError as error:
        return {"version": None, "reason": f"{CUDA_DRIVER} cannot be loaded: {error}"}
    number = ctypes.c_int(0)
    try:
        status = library.cuDriverGetVersion(ctypes.byref(number))
    except AttributeError:
        return {"version": None, "reason": f"{CUDA_DRIVER} has no cuDriverGetVersion"}
    if status != 0:
        return {"version": None, "reason": f"cuDriverGetVersion failed with CUDA error {status}"}
    return {"version": f"{number.value // 1000}.{number.value % 1000 // 10}", "reason": None}


def _gpu() -> dict[str, Any]:
    """The devices torch can use, and why when it can use none."""
    import torch

    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "devices": [], "reason": None}
    if torch.version.cuda is None:
        found["reason"] = "this torch is built without CUDA"
        return found
    try:
        if not torch.cuda.is_available():
            found["reason"] = "torch.cuda.is_available() is False (no device, or no working driver)"
            return found
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found["devices"].append(
                {
                    "name": properties.name,
                    "capability": [properties.major, properties.minor],
                    "memory_bytes": properties.total_memory,
                    "multiprocessors": properties.multi_processor_count,
                }
            )
    except Exception as error:  # a broken driver shows as one of many types; a report of it is what was asked for
        found["reason"] = f"{type(error).__name__}: {error}"
    return found


def format_text(report: dict[str, Any]) -> str:
    """The report of :func:`collect` in lines for people."""
    python, libraries, gpu, driver = report["python"], report["libraries"], report["gpu"], report["driver"]
    missing = [name for name, version in libraries.items() if version is None]
    lines = [
        f"longlive-rag-ops {report['package']['version']} in {report['package']['folder']}",
        f"{python['implementation']} {python['version']} on {python['platform']}",
        "",
        "Libraries",
        *(f"  {name} {version}" for name, version in libraries.items() if version is not None),
    ]
    if missing:
        lines.append(f"  not installed: {', '.join(missing)}")
    lines += ["", "Engines", *(_engine_line(row) for row in report["engines"])]
    lines += [f"  auto on {device}: {line}" for device, means in report["auto"].items() for line in means]
    lines += ["", "Dense attention", *(_back_end_line(row) for row in report["dense_attention"]), "", "Compiled core"]
    lines += [f"  {line}" for line in _extension_lines(report["extension"], report["cuda_code"])]
    lines += ["", "GPU", f"  driver: {_driver_line(driver)}"]
    lines += [f"  {_device_line(device)}" for device in gpu["devices"]]
    if gpu["reason"] is not None:
        lines.append(f"  torch uses none: {gpu['reason']}")
    return "\n".join(lines)


def _engine_line(row: dict[str, Any]) -> str:
    state = f"yes, on {', '.join(row['devices'])}" if row["available"] else f"no: {row['reason']}"
    return f"  {row['name']}: {state}"


def _back_end_line(row: dict[str, Any]) -> str:
    return f"  {row['name']}: {'yes' if row['available'] else 'no: ' + row['reason']}"


def _extension_lines(info: dict[str, Any], cuda_code: dict[str, Any] | None) -> list[str]:
    if not info["available"]:
        return [f"not available: {info['reason']}"]
    lines = [f"version {info['version']}, {info['compiler']}, {info['build_type']}, for Python {info['python']}"]
    if not info["cuda"]:
        return [*lines, f"CUDA not compiled: {info['cuda_reason']}"]
    lines.append(f"CUDA compiled for {info['cuda_archs']}")
    if cuda_code is not None:
        lines[-1] += f" with toolkit {cuda_code['toolkit']}"
        if cuda_code["error"] is not None:
            lines.append(f"it finds no device: {cuda_code['error']}")
        lines += [f"it runs {_image(device)}" for device in cuda_code["devices"]]
    return lines


def _image(device: dict[str, Any]) -> str:
    if device["image_error"] is not None:
        return f"nothing on {device['name']}: {device['image_error']}"
    return f"its sm_{device['image']} code on {device['name']}"


def _driver_line(driver: dict[str, Any]) -> str:
    return f"none found ({driver['reason']})" if driver["version"] is None else f"supports CUDA {driver['version']}"


def _device_line(device: dict[str, Any]) -> str:
    major, minor = device["capability"]
    return (
        f"{device['name']}, sm_{major}{minor}, {device['memory_bytes'] / 2**30:.1f} GiB, "
        f"{device['multiprocessors']} multiprocessors"
    )
