"""The states of a saved dict, copied for the parameters of the optimizer that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._distributed.placement import placed_like
from dragon.vm.torch.optim._distributed.shards import distributed_like, local
from dragon.vm.torch.optim._formats.resolve import MOMENTS
from dragon.vm.torch.optim._groups.checks import labels
from dragon.vm.torch.optim._groups.eligibility import choose_backend, counter_place
from dragon.vm.torch.optim._groups.entries import named_parts
from dragon.vm.torch.optim._groups.exchange import restored_entries
from dragon.vm.torch.optim._groups.native import FORMAT_KEY, parts_of
from dragon.vm.torch.optim._groups.saved import checked_state
from dragon.vm.torch.optim._groups.states import CounterPlace, State, add_counters, zeros_for
from dragon.vm.torch.optim._groups.storage import storage_of
from dragon.vm.torch.optim._options import STORAGE_OPTIONS, Settings, complete

Group = dict[str, Any]

# Names of entries that a step writes. Under any other name None is a value of others.
_OWN = frozenset((*MOMENTS, "step", "ema", "stream"))


def restored_states(
    algorithm: Algorithm,
    settings: Settings,
    groups: Sequence[Group],
    saved_groups: Sequence[Group],
    saved: Mapping[Any, State],
) -> dict[Tensor, State]:
    """Copy saved states for an optimizer's parameters.

    A state has the format that its group asks for, else the wider one of the saved dtype and the parameter's: fp32
    states of a bf16 parameter stay fp32, which PyTorch would round. Rounding is to nearest.

    Args:
        algorithm: of the optimizer that loads.
        settings: likewise.
        groups: likewise, fitting the saved ones; its parameters are those that the states are for.
        saved_groups: with the keys of `saved` under "params".
        saved: a state for each key, or none.

    Returns:
        States that share no memory with the saved ones, for the parameters that have one.

    Raises:
        ValueError: for missing or misshapen state tensors and step counts, naming the parameter.
    """
    owners: list[tuple[Tensor, Group, State]] = []
    others: dict[Tensor, State] = {}
    names = iter(labels([{**saved, **own} for own, saved in zip(groups, saved_groups, strict=True)]))
    named = (state["stream"] for state in saved.values() if isinstance(state, dict) and "stream" in state)
    streams = {stream for stream in named if not _is_missing("stream", stream)}
    positions = count()
    for group, saved_group in zip(groups, saved_groups, strict=True):
        said = {name: value for name, value in saved_group.items() if name not in STORAGE_OPTIONS}
        merged = complete({**group, **said}, algorithm.own_defaults)
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            label, position = next(names), next(positions)
            state = {name: value for name, value in saved.get(key, {}).items() if not _is_missing(name, value)}
            if state and _is_of_others(state):
                others[param] = state
            elif state:
                state = _of_file(param, merged, algorithm, state, settings.native_state_dict)
                checked = checked_state(algorithm, param, merged, saved_group, state, label)
                # PyTorch's form leaves it out: groups may come and go before the first step.
                if position not in streams and _is_stochastic(param, merged, algorithm):
                    checked.setdefault("stream", position)
                owners.append((param, merged, checked))
    copies = _copied(algorithm, settings, owners)
    for param, state in others.items():
        _fill(copies.setdefault(param, {}), state, param)
    return copies


def _is_missing(name: str, value: Any) -> bool:
    """Whether an entry of ours is none. PyTorch's flat dicts have an empty dict where the file has nothing."""
    is_none = value is None or (isinstance(value, dict) and not value)
    return is_none and (name == FORMAT_KEY or not _is_of_others({name: value}))


def _is_of_others(state: State) -> bool:
    """Whether a state has nothing that a step would have written."""
    return not parts_of(state) and state.keys().isdisjoint(_OWN)


def _of_file(param: Tensor, group: Group, algorithm: Algorithm, state: State, is_native: bool) -> State:
    """A state with each moment in one form: this optimizer's own may lie beside that which was written over it."""
    names = algorithm.state_keys(group)
    dropped: set[str] = set()
    for name in names:
        codes = {f"{name}_q8", f"{name}_scale"}
        if {name, *codes} <= state.keys():
            own = named_parts(name, storage_of(param, group, names).states[name]) if is_native else {name}
            dropped |= codes.intersection(own) or {name}
    return {name: value for name, value in state.items() if name not in dropped} if dropped else state


def _is_stochastic(param: Tensor, group: Group, algorithm: Algorithm) -> bool:
    """Whether a step of a parameter takes random words."""
    storage = storage_of(param, group, algorithm.state_keys(group))
    return any(form.stochastic for form in (storage.param, *storage.states.values()))


@torch.no_grad()
def _copied(
    algorithm: Algorithm, settings: Settings, owners: Sequence[tuple[Tensor, Group, State]]
) -> dict[Tensor, State]:
    """Copy the states."""
    copies: list[State] = []
    counted: list[tuple[State, float, CounterPlace]] = []
    for param, group, state in owners:
        copy, in_parts = restored_entries(param, group, state, algorithm.state_keys(group))
        if "ema" in algorithm.all_state_keys(group) and "ema" in state:
            average = storage_of(param, group, algorithm.state_keys(group)).average.parts[0].dtype
            dtype = average if group["state_dtype"] else torch.promote_types(state["ema"].dtype, average)
            copy["ema"] = distributed_like(param, zeros_for(local(param), dtype))
        if algorithm.counts_steps(group):
            dtypes = {value.dtype for value in copy.values() if value.is_floating_point()}
            # Should its gradient be of its own dtype.
            wanted = local(param), param.dtype, dtypes, group["differentiable"]
            backend = settings.backend or choose_backend(None, *wanted, in_parts=in_parts)
            copy = {"step": None, **copy}
            counted.append((copy, 0.0, counter_place(param, backend, group)))
        copies.append(copy)
    add_counters(counted)
    for (param, _, state), copy in zip(owners, copies, strict=True):
        _fill(copy, state, param)
    return {param: copy for (param, _, _), copy in zip(owners, copies, strict=True)}


def _fill(copy: State, state: State, param: Tensor) -> None:
    parts = parts_of(state)
    for key, value in state.items():
        if key in ("step", "ema") and key in copy:
            copy[key].copy_(placed_like(copy[key], value))
        elif key in copy or f"{key}_q8" in copy or key in parts:
            continue
        elif isinstance(value, Tensor):
            copy[key] = value.detach().to(param.device, copy=True)
        else:
            copy[key] = deepcopy(value)
