"""The states of a saved dict, copied for the parameters of the optimizer that loads it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._distributed.placement import placed_like
from dragon.vm.torch.optim._distributed.shards import distributed_like, local
from dragon.vm.torch.optim._formats.resolve import MOMENTS, Storage
from dragon.vm.torch.optim._formats.rounding import Plain
from dragon.vm.torch.optim._groups.bounds import bound_restored
from dragon.vm.torch.optim._groups.checks import labels
from dragon.vm.torch.optim._groups.eligibility import choose_backend, counter_place
from dragon.vm.torch.optim._groups.entries import named_parts, wider
from dragon.vm.torch.optim._groups.exchange import restored_entries
from dragon.vm.torch.optim._groups.native import FORMAT_KEY, parts_of
from dragon.vm.torch.optim._groups.saved import checked_state
from dragon.vm.torch.optim._groups.states import CounterPlace, State, add_counters, zeros_for
from dragon.vm.torch.optim._groups.storage import options_of, storage_of
from dragon.vm.torch.optim._options import STORAGE_OPTIONS, Group, Settings, complete

# Names of entries that a step writes. Under any other name None is a value of others.
_OWN = frozenset((*MOMENTS, "step", "ema", "stream"))


class _Owner(NamedTuple):
    """A parameter, its group with all options, its formats, and its state in the saved dict."""

    param: Tensor
    group: Group
    storage: Storage
    state: State


def restored_states(
    algorithm: Algorithm, settings: Settings, groups: list[Group], saved_groups: list[Group], saved: dict[Any, Any]
) -> dict[Tensor, State]:
    """Copy saved states for an optimizer's parameters.

    A state has the format that its group asks for, else the wider one of the saved dtype and the parameter's: fp32
    states of a bf16 parameter stay fp32, which PyTorch would round. Rounding is to nearest.

    The saved groups fit those of the optimizer that loads. They have keys of `saved` under "params".

    Returns:
        States that share no memory with the saved ones, for the parameters of `groups` that have one.

    Raises:
        ValueError: for missing or misshapen state tensors and step counts, naming the parameter, and for formats
            of one that is uninitialized.
    """
    owners: list[_Owner] = []
    others: dict[Tensor, State] = {}
    names = enumerate(labels([{**saved, **own} for own, saved in zip(groups, saved_groups, strict=True)]))
    named = (state["stream"] for state in saved.values() if isinstance(state, dict) and "stream" in state)
    streams = {stream for stream in named if isinstance(stream, int)}
    for group, saved_group in zip(groups, saved_groups, strict=True):
        said = {name: value for name, value in saved_group.items() if name not in STORAGE_OPTIONS}
        merged = complete({**group, **said}, algorithm.own_defaults)
        moments = algorithm.state_keys(merged)
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            position, label = next(names)
            state = {name: value for name, value in saved.get(key, {}).items() if not _is_missing(name, value)}
            if state and torch.nn.parameter.is_lazy(param):
                if parts_of(state) or any(options_of(merged)):
                    raise ValueError(
                        f"{label} is uninitialized: formats of states need a shape. Run the model once, or load "
                        "its own state dict, before the optimizer's"
                    )
                # A step will check them.
                others[param] = state
            elif state and _is_of_others(state):
                others[param] = state
            elif state:
                storage = storage_of(param, merged, moments)
                state = _of_file(state, storage, settings.native_state_dict)
                checked = checked_state(algorithm, param, merged, saved_group, state, label)
                # PyTorch's form leaves it out: groups may come and go before the first step.
                if position not in streams and any(form.stochastic for form in storage.formats):
                    checked.setdefault("stream", position)
                owners.append(_Owner(param, merged, storage, checked))
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


def _of_file(state: State, storage: Storage, is_native: bool) -> State:
    """A state with each moment in one form: this optimizer's own may lie beside that which was written over it."""
    dropped: set[str] = set()
    for name, form in storage.states.items():
        if {name, f"{name}_q8", f"{name}_scale"} <= state.keys():
            dropped.update(named_parts(name, form) if is_native else (name,))
    return {name: value for name, value in state.items() if name not in dropped}


@torch.no_grad()
def _copied(algorithm: Algorithm, settings: Settings, owners: Sequence[_Owner]) -> dict[Tensor, State]:
    """Copy the states."""
    copies: dict[Tensor, State] = {}
    counted: list[tuple[State, float, CounterPlace]] = []
    for param, group, storage, state in owners:
        copy = restored_entries(param, storage, state)
        bound_restored(copy, state, group)
        if "ema" in algorithm.all_state_keys(group) and "ema" in state:
            average = storage.average
            dtype = average if group["state_dtype"] else wider(state["ema"].dtype, average)
            copy["ema"] = distributed_like(param, zeros_for(local(param), dtype))
        if algorithm.counts_steps(group):
            dtypes = {value.dtype for value in copy.values() if value.is_floating_point()}
            in_parts = not all(isinstance(form, Plain) for form in storage.formats)
            # Should its gradient be of its own dtype.
            wanted = local(param), param.dtype, dtypes, group["differentiable"]
            backend = settings.backend or choose_backend(None, *wanted, in_parts=in_parts)
            copy = {"step": None, **copy}
            counted.append((copy, 0.0, counter_place(param, backend, group)))
        copies[param] = copy
    add_counters(counted)
    for owner in owners:
        _fill(copies[owner.param], owner.state, owner.param)
    return copies


def _fill(copy: State, state: State, param: Tensor) -> None:
    parts = parts_of(state)
    for key, value in state.items():
        if key in ("step", "ema") and key in copy:
            copy[key].copy_(placed_like(copy[key], value))
        elif not (key in copy or f"{key}_q8" in copy or key in parts):
            is_tensor = isinstance(value, Tensor)
            copy[key] = value.detach().to(param.device, copy=True) if is_tensor else deepcopy(value)
