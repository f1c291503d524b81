"""How an op gets under ``torch.ops.longlive``: one function checks the arguments and hands them to an engine.

The same function serves CPU, CUDA and fake tensors; for fake ones the engine is `fake`, which only knows shapes.
`torch.library.Library` is used rather than `custom_op`, which costs several times as much a call.

Autocast does not reach into an engine: an op computes in the dtypes it is given.

The ops are for inference. In grad mode an input that requires grad raises, because the engines either have no
backward or (on a CPU) would be differentiated through by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..engines import check_engine, resolve_engine
from . import fake
from .checks import is_fake
from .schemas import SCHEMAS

LIBRARY = torch.library.Library("longlive", "FRAGMENT")

Pair = tuple[torch.Tensor, torch.Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


def implementation(engine: str, like: torch.Tensor) -> Any:
    """The module whose functions carry out the ops for a tensor like ``like``."""
    if is_fake(like):
        check_engine(engine)
        return fake
    return resolve_engine(engine, like.device.type)


def register(function: Function) -> Function:
    """Registers a function as the op of its name, for all devices, with the schema of that name."""
    name = function.__name__
    LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"longlive::{name}", function, lib=LIBRARY)
    op = getattr(torch.ops.longlive, name).default
    LIBRARY.impl(name, _refuse_gradients(op), "Autograd", with_keyset=True)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(name, _without_autocast(op), key)
    return function


def _without_autocast(op: Any) -> Callable[..., Any]:
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*args, **kwargs)

    return call


def _refuse_gradients(op: Any) -> Callable[..., Any]:
    below_autograd = torch._C._after_autograd_keyset

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for position, value in (*enumerate(args), *kwargs.items()):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    name = op._schema.arguments[position].name if isinstance(position, int) else position
                    raise RuntimeError(
                        f"{op._schema.name.replace('::', '.')} has no backward: {name} requires grad; call it under "
                        "torch.no_grad() or torch.inference_mode(), or detach the argument"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below_autograd, *args, **kwargs)

    return autograd
