"""Checks of states that were saved, before they are loaded or a step takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Size, Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._formats.rounding import Plain
from dragon.vm.torch.optim._formats.split import Split8, Split16
from dragon.vm.torch.optim._groups.entries import held_format, held_master, named_parts
from dragon.vm.torch.optim._groups.native import FORMAT_KEY, MASTER, MASTER_PARTS, parts_of, walking_order
from dragon.vm.torch.optim._groups.states import State, count_of

Group = Mapping[str, Any]


def checked_state(
    algorithm: Algorithm, param: Tensor, group: Group, saved_group: Group, state: State, label: str
) -> State:
    """The state as it is saved, with its step count as a 0-dim tensor if it counts.

    Raises:
        ValueError: if it cannot be used.
    """
    # An average begins when it is asked for.
    optional = {"ema", *algorithm.optional_keys(saved_group)}
    for key in algorithm.all_state_keys(group):
        if not (key in optional or key in state or held_format(state, key)):
            raise ValueError(f"loaded state dict has no {key} for {label}: it has {', '.join(state) or 'nothing'}")
    try:
        if FORMAT_KEY in parts_of(state):
            walking_order(state[FORMAT_KEY], param.ndim)
    except ValueError as error:
        raise ValueError(f"loaded state dict has {FORMAT_KEY} for {label}: {error}") from None
    state = with_saved_remainder(state, saved_group)
    found = misfit(param, state, algorithm.all_state_keys(group))
    if found is not None:
        raise ValueError(
            f"loaded state dict has {found} for {label} of shape {tuple(param.shape)} and {param.dtype}"
        )
    stream = state.get("stream", 0)
    if not isinstance(stream, int) or not 0 <= stream < 2**32:
        raise ValueError(f"loaded state dict has a stream of {stream!r} for {label}, not a number below 2**32")
    if not algorithm.counts_steps(group):
        return {name: value for name, value in state.items() if name != "step"}
    has_begun = any(held_format(state, key) is not None for key in algorithm.state_keys(group))
    step = state.get("step", algorithm.uncounted_steps if has_begun else 0.0)
    if step is None:
        raise ValueError(f"loaded state dict has no step for {label}: it has {', '.join(state)}")
    if isinstance(step, Tensor) and (step.numel() != 1 or step.is_complex()):
        found = f"shape {tuple(step.shape)} and {step.dtype}"
        raise ValueError(f"loaded state dict has a step of {found} for {label}, not one real number")
    return {**state, "step": count_of(step)}


def with_saved_remainder(state: State, saved_group: Group) -> State:
    """The state with an int8 remainder as such. PyTorch's loader has made it bf16, as which int16 is saved."""
    remainder = state.get("param_remainder")
    if saved_group.get("master_weights") != "split8" or not isinstance(remainder, Tensor):
        return state
    return {**state, "param_remainder": remainder.to(torch.int8)} if _fits(local(remainder), torch.int8) else state


def misfit(param: Tensor, state: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """What of a state's values and of its master does not fit the parameter, in words; None if all does.

    PyTorch's loader casts parts to the parameter's dtype. Codes survive it, while scales lose bits in 16.
    """
    expected: dict[str, tuple[Size, torch.dtype | None]] = {
        key: (param.shape, None) for key in (MASTER, *MASTER_PARTS) if key in state
    }
    master = held_master(state, param)
    if isinstance(master, (Split8, Split16)):
        expected["param_remainder"] = param.shape, master.parts[1].dtype
    for name in names:
        form = held_format(state, name)
        if form is None and name in state:
            return f"{name} of {state[name]!r}"
        for key, part in named_parts(name, form).items() if form else ():
            dtype = None if isinstance(form, Plain) else part.dtype
            expected[key] = part.shape(param.shape), dtype
    for key, (shape, dtype) in expected.items():
        value = state.get(key)
        if not isinstance(value, Tensor):
            return f"{key} of {value!r}"
        found = f"{key} of shape {tuple(value.shape)} and {value.dtype}"
        if value.shape != shape or value.is_complex() != param.is_complex():
            return found
        if dtype is not None and not _fits(local(value), dtype):
            return f"{found} instead of {dtype}"
    return None


def _fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor has values of a part's dtype, which no cast has changed."""
    if value.dtype == dtype:
        return True
    if dtype == torch.int16:
        # It is saved as bf16 of the same bits.
        return value.dtype == torch.bfloat16
    if dtype.is_floating_point:
        return value.dtype == torch.float64
    return value.is_floating_point() and torch.equal(value.to(dtype).to(value.dtype), value)
