"""The optimizer's part of ``last.pt``, held against the model and the configuration before it is taken over.

torch takes over whatever a state dict says: another learning rate, moments of another shape, none for a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .checkpoint import unusable


def optimizer_state(saved: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` may be given; the settings in it are the optimizer's own.

    Args:
        saved: the state dict in the file.
        model: whose parameters the optimizer has, in their order.
        optimizer: new, as the configuration says.

    Raises:
        ValueError: a setting is another, a parameter's state is missing or is not two moments of its shape.
    """
    own = optimizer.state_dict()["param_groups"]
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or len(groups) != len(own) or not all(isinstance(g, Mapping) for g in groups):
        raise ValueError(f"optimizer must have {len(own)} param_groups")
    for group, wanted in zip(groups, own, strict=True):
        for name, value in wanted.items():
            # One that is missing is of a newer torch than the file's, and has the value that it would have anyway.
            found = group.get(name, value)
            if type(found) is not type(value) or found != value:
                raise ValueError(f"optimizer must have {name} {value!r}, got {found!r}")
    parameters = list(model.named_parameters())
    # None at all: no step was taken yet.
    if not isinstance(states, Mapping) or states.keys() not in (set(), set(range(len(parameters)))):
        raise ValueError(f"optimizer must have a state for each of {len(parameters)} parameters, or none")
    for number, (name, parameter) in enumerate(parameters if states else ()):
        _check_moments(states[number], name, parameter)
    return {"state": dict(states), "param_groups": own}


def check_scaler(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Whether a gradient scaler may go on with a saved state; both are empty without float16.

    Raises:
        ValueError: it has other entries or settings, or a scale that is none.
    """
    if not saved or not own:
        return
    good = saved.keys() == own.keys() and all(type(saved[name]) is type(own[name]) for name in own)
    moving = ("scale", "_growth_tracker")
    good = good and all(saved[name] == own[name] for name in own if name not in moving)
    if not good or not 0 < saved["scale"] < math.inf or saved["_growth_tracker"] < 0:
        raise ValueError(f"scaler must have the entries of {dict(own)!r} with a scale above 0, got {dict(saved)!r}")


def _check_moments(state: Any, name: str, parameter: nn.Parameter) -> None:
    shapes = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
    if not isinstance(state, Mapping) or state.keys() != shapes.keys():
        got = ", ".join(map(str, state)) or "nothing" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"optimizer must have {', '.join(shapes)} for {name}, got {got}")
    for key, shape in shapes.items():
        value = state[key]
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"optimizer's {key} of {name} must be a tensor, got {type(value).__name__}")
        problem = unusable(value)
        if problem or tuple(value.shape) != shape:
            got = problem or f"shape {tuple(value.shape)}"
            raise ValueError(f"optimizer's {key} of {name} must be floating point of shape {shape}, got {got}")
        if not value.isfinite().all() or (key != "exp_avg" and (value < 0).any()):
            raise ValueError(
                f"optimizer's {key} of {name} must be finite" + ("" if key == "exp_avg" else ", at least 0")
            )
