"""Checks of saved states before they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._groups.entries import held_format, part_keys
from dragon.vm.torch.optim._groups.native import FORMAT_KEY, MASTER, MASTER_PARTS, parts_of, walking_order
from dragon.vm.torch.optim._groups.states import State


def checked_state(
    algorithm: Algorithm, param: Tensor, group: dict[str, Any], state: State, required: Sequence[str], label: str
) -> State:
    """The state, with its step count as a 0-dim tensor if it counts.

    Raises:
        ValueError: if it cannot be used.
    """
    for key in required:
        if held_format(state, key) is None:
            raise ValueError(f"loaded state dict has no {key} for {label}: it has {', '.join(state) or 'nothing'}")
    try:
        if FORMAT_KEY in parts_of(state):
            walking_order(state[FORMAT_KEY], param.ndim)
    except ValueError as error:
        raise ValueError(f"loaded state dict has {FORMAT_KEY} for {label}: {error}") from None
    for key, shape in _shapes(algorithm, param, group, state).items():
        value = state.get(key)
        if not isinstance(value, Tensor) or value.shape != shape or value.is_complex() != param.is_complex():
            found = f"shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"loaded state dict has {key} of {found} for {label} "
                f"of shape {tuple(param.shape)} and {param.dtype}"
            )
    if not algorithm.counts_steps(group):
        return {name: value for name, value in state.items() if algorithm.saves_steps or name != "step"}
    has_begun = any(held_format(state, key) is not None for key in algorithm.state_keys(group))
    step = state.get("step", algorithm.uncounted_steps if has_begun or algorithm.saves_steps else 0.0)
    if step is None:
        raise ValueError(f"loaded state dict has no step for {label}: it has {', '.join(state)}")
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"loaded state dict has a step of shape {tuple(step.shape)} for {label}, not one number")
    count = step.detach().reshape(()) if isinstance(step, Tensor) else torch.tensor(float(step), device="cpu")
    return {**state, "step": count}


def _shapes(algorithm: Algorithm, param: Tensor, group: dict[str, Any], state: State) -> dict[str, Size]:
    """The shape that each saved entry of a parameter must have."""
    shapes = {key: param.shape for key in (MASTER, *MASTER_PARTS) if key in state}
    for key in algorithm.all_state_keys(group):
        form = held_format(state, key)
        for part_key, part in zip(part_keys(key, form), form.parts, strict=True) if form else ():
            shapes[part_key] = part.shape(param.shape) if part.elements > 1 else param.shape
    return shapes
