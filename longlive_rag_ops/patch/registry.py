"""Which families of backbones there are, and to which a model belongs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch

from .adapter import Adapter

ENTRY_POINTS = "longlive_rag_ops.adapters"
OWN = (
    # First: asking a model of diffusers for attributes of the others makes it warn.
    "anyflow:AnyFlow",
    "sana:SanaRefiner",
    "wan:InPlaceWan",
    "wan:DeferredWan",
    "longlive2:LongLive2Wan",
    "fastvideo:FastVideoWan",
)
_registered: list[type[Adapter]] = []


class UnknownBackbone(TypeError):
    """No adapter knows the model; the message lists the families and what each of them missed."""


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Adds a family, before all others. A package does the same by an entry point of group `ENTRY_POINTS`.

    Raises:
        TypeError: not a subclass of `Adapter`.
    """
    _check_adapter(adapter, "adapter")
    if adapter not in _registered:
        _registered.insert(0, adapter)
    return adapter


def families() -> list[type[Adapter]]:
    """Every adapter: registered ones, those of other packages' entry points, then the package's own."""
    found = list(_registered)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        try:
            adapter = point.load()
        except Exception as error:  # somebody else's package; other families do not need it
            warnings.warn(f"entry point {point.name!r} of {ENTRY_POINTS} cannot be loaded: {error}", stacklevel=3)
            continue
        _check_adapter(adapter, f"entry point {point.name!r} of {ENTRY_POINTS}")
        found.append(adapter)
    for name in OWN:
        module, _, attribute = name.partition(":")
        found.append(getattr(import_module(f".{module}", __package__), attribute))
    return list(dict.fromkeys(found))


def find_backbone(target: Any) -> tuple[torch.nn.Module, type[Adapter]]:
    """The one model in ``target`` that an adapter knows, and that adapter.

    Args:
        target: a model, or a pipeline that holds one: as a submodule, an attribute, or a component.

    Raises:
        UnknownBackbone: there is none. ValueError: there are several.
    """
    known = families()
    # A compiled model, or one with LoRA layers in it, passes on what it is asked for: the innermost is the model.
    found: dict[int, tuple[str, torch.nn.Module, type[Adapter]]] = {}
    for name, module in _candidates(target):
        for adapter in known:
            if not adapter.missing(module):
                found[id(adapter(module).modules[0])] = name, module, adapter
                break
    if len(found) > 1:
        names = ", ".join(sorted(name for name, _, _ in found.values()))
        raise ValueError(f"model must hold one backbone, got {len(found)} ({names}): patch each of them")
    if not found:
        raise UnknownBackbone(_unknown(target, known))
    _, module, adapter = next(iter(found.values()))
    return module, adapter


def _candidates(target: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules that may be a backbone: those that have layers, the outermost first; no module twice."""
    seen: set[int] = set()
    roots: list[tuple[str, Any]] = [("model", target)]
    if not isinstance(target, torch.nn.Module):
        parts = {**getattr(target, "components", {}), **vars(target)} if hasattr(target, "__dict__") else {}
        roots = [(name, part) for name, part in parts.items() if isinstance(part, torch.nn.Module)]
    for root_name, root in roots:
        if not isinstance(root, torch.nn.Module):
            continue
        for name, module in root.named_modules():
            if id(module) not in seen and (name == "" or any(True for _ in module.children())):
                seen.add(id(module))
                yield f"{root_name}.{name}".rstrip("."), module


def _unknown(target: Any, known: list[type[Adapter]]) -> str:
    """The families, and what the module that comes nearest lacks for each."""
    modules = list(_candidates(target))
    if not modules:
        names = "; ".join(adapter.name for adapter in known)
        return f"model must be a torch module, or hold one; got {type(target).__name__}. Known families: {names}"
    lines = [f"model must hold a backbone of a known family, got {type(target).__name__}:"]
    for adapter in known:
        name, lacks = min(((name, adapter.missing(module)) for name, module in modules), key=lambda pair: len(pair[1]))
        lines.append(f"- {adapter.name}: {name} lacks {', '.join(lacks)}")
    lines.append("docs/patching.md shows how to write an adapter")
    return "\n".join(lines)


def _check_adapter(adapter: Any, name: str) -> None:
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"{name} must be a subclass of longlive_rag_ops.patch.Adapter, got {adapter!r}")
