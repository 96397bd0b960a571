"""States of a state dict: checked as a whole before anything changes, then copied into arenas of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from dragon.vm.torch.optim._backend import choose_backend, step_device
from dragon.vm.torch.optim._flatten import State, complete_states
from dragon.vm.torch.optim._local import local, placed_like
from dragon.vm.torch.optim._owner import Owner

Group = dict[str, Any]

# Counts of states that come without one. PyTorch's SGD does not count; its buffer is there after the first step.
_UNTOLD_STEPS = {"sgd": 1.0}


class CheckpointedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state dicts are complete when saved, and checked and copied when loaded."""

    # Between the check of a state dict and the end of its loading.
    _restored: dict[Tensor, State] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state in PyTorch's format; complete for an AMSGrad switched on since the last step."""
        complete_switched_on(cast(Owner, self))
        return super().state_dict()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of PyTorch's counterpart, sharing no memory with it.

        Hyperparameters that it does not know keep their values; so do sums of gradients and the count of skipped
        steps. State tensors get the optimizer's `state_dtype`, or the wider of their and the parameter's dtype.

        Raises:
            ValueError: as PyTorch, and for missing or misshapen states. Nothing has changed then.
        """
        # Behind the hooks of others, which may still change the dict.
        handle = self.register_load_state_dict_pre_hook(take_states)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._restored = None


def take_states(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A hook before loading: copy the states to `optimizer._restored`, and leave PyTorch the rest of the dict.

    Raises:
        ValueError: as `restored_states`.
    """
    saved_groups, saved = state_dict["param_groups"], state_dict["state"]
    lengths = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in saved_groups] != lengths:
        return None  # PyTorch refuses it, with its own words
    optimizer._restored = restored_states(optimizer, saved_groups, saved)
    owned = set(chain.from_iterable(group["params"] for group in saved_groups))
    return {**state_dict, "state": {key: value for key, value in saved.items() if key not in owned}}


def restored_states(
    optimizer: Owner, saved_groups: Sequence[Group], saved: Mapping[Any, State]
) -> dict[Tensor, State]:
    """Copy saved states for an optimizer's parameters.

    A state tensor has the optimizer's `state_dtype` if it has one, else the wider one of the saved dtype and the
    parameter's: fp32 states of a bf16 parameter stay fp32, which PyTorch would round.

    Args:
        optimizer: whose parameters the states are for; it fits the saved groups. Nothing of it changes.
        saved_groups: with the keys of `saved` under "params".
        saved: a state for each key, or none.

    Returns:
        States that share no memory with the saved ones, for the parameters that have one.

    Raises:
        ValueError: for missing or misshapen state tensors and step counts, naming the parameter.
    """
    owners: list[tuple[Tensor, Group, State]] = []
    labels = _labels(optimizer, saved_groups)
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
        merged = {**group, **saved_group}
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            label = next(labels)
            state = {name: value for name, value in saved.get(key, {}).items() if value is not None}
            if state:
                required = _required_keys(optimizer, merged, saved_group)
                owners.append((param, merged, _checked(optimizer, param, merged, state, required, label)))
    return _copied(optimizer, owners)


def _labels(optimizer: Owner, saved_groups: Sequence[Group]) -> chain[str]:
    """What to call each parameter, in order: its index, and its name if it has one."""
    n_params = sum(len(group["params"]) for group in saved_groups)
    names = list(
        chain.from_iterable(
            group.get("param_names") or saved.get("param_names") or [None] * len(group["params"])
            for group, saved in zip(optimizer.param_groups, saved_groups, strict=True)
        )
    )
    return chain(f"parameter {i}" + (f" ({names[i]})" if names[i] else "") for i in range(n_params))


def _required_keys(optimizer: Owner, group: Group, saved_group: Group) -> list[str]:
    """State tensors that a saved group must have.

    An average begins when it is asked for; so does AMSGrad's maximum where the dict knows nothing of AMSGrad.
    """
    optional = {"ema"} if "amsgrad" in saved_group else {"ema", "max_exp_avg_sq"}
    return [key for key in optimizer._state_keys(group) if key not in optional]


def _checked(
    optimizer: Owner, param: Tensor, group: Group, state: State, required: Sequence[str], label: str
) -> State:
    """The state, with its step count as a 0-dim tensor if it counts; raises if it cannot be used."""
    for key in required:
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise ValueError(f"loaded state dict has no {key} for {label}: it has {', '.join(state) or 'nothing'}")
    for key in optimizer._state_keys(group):
        value = state.get(key, param)
        if value.shape != param.shape or value.is_complex() != param.is_complex():
            raise ValueError(
                f"loaded state dict has {key} of shape {tuple(value.shape)} and {value.dtype} for {label} "
                f"of shape {tuple(param.shape)} and {param.dtype}"
            )
    if not optimizer._counts_steps(group):
        return state
    step = state.get("step", _UNTOLD_STEPS.get(optimizer._algorithm))
    if step is None:
        raise ValueError(f"loaded state dict has no step for {label}: it has {', '.join(state)}")
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"loaded state dict has a step of shape {tuple(step.shape)} for {label}, not one number")
    count = step.detach().reshape(()) if isinstance(step, Tensor) else torch.tensor(float(step), device="cpu")
    return {**state, "step": count}


@torch.no_grad()
def _copied(optimizer: Owner, owners: Sequence[tuple[Tensor, Group, State]]) -> dict[Tensor, State]:
    """Copy the states, those of one dtype into arenas together."""
    asked = optimizer._settings.state_dtype
    copies: dict[Tensor, State] = {param: {} for param, _, _ in owners}
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Group, State, tuple[str, ...]]]] = {}
    for param, group, state in owners:
        names: dict[torch.dtype, list[str]] = {}
        for key in optimizer._state_keys(group):
            if key in state:
                dtype = asked or torch.promote_types(state[key].dtype, param.dtype)
                names.setdefault(dtype, []).append(key)
        for dtype, keys in names.items() if names else [(param.dtype, [])]:
            by_dtype.setdefault(dtype, []).append((param, group, state, tuple(keys)))
    for dtype, entries in by_dtype.items():
        complete_states(
            [param for param, *_ in entries],
            [copies[param] for param, *_ in entries],
            [keys for *_, keys in entries],
            [_counter_device(optimizer, param, group, dtype) for param, group, *_ in entries],
            dtype,
        )
    for param, _, state in owners:
        _fill(copies[param], state, param)
    return copies


def _fill(copy: State, state: State, param: Tensor) -> None:
    for key, value in state.items():
        if key in copy:
            copy[key].copy_(placed_like(copy[key], value))
        elif isinstance(value, Tensor):
            copy[key] = value.detach().to(param.device, copy=True)
        else:
            copy[key] = deepcopy(value)


def _counter_device(
    optimizer: Owner, param: Tensor, group: Group, state_dtype: torch.dtype
) -> torch.device | None:
    """Where the step counter of a parameter will be wanted, should its gradient be of its own dtype."""
    if not optimizer._counts_steps(group):
        return None
    backend = optimizer._settings.backend
    if backend is None:
        backend = choose_backend(None, local(param), param.dtype, {state_dtype}, group["differentiable"])
    return step_device(param, backend, group)


@torch.no_grad()
def complete_switched_on(optimizer: Owner) -> None:
    """Give parameters that have a state the maximum that AMSGrad wants since it was switched on, zero."""
    params: list[Tensor] = []
    keys: list[tuple[str, ...]] = []
    for group in optimizer.param_groups:
        wanted = tuple(key for key in optimizer._state_keys(group) if key == "max_exp_avg_sq")
        for param in group["params"] if wanted else ():
            if optimizer.state.get(param) and wanted[0] not in optimizer.state[param]:
                params.append(param)
                keys.append(wanted)
    for param, key in zip(params, keys, strict=True):
        state = optimizer.state[param]
        complete_states([param], [state], [key], [None], state["exp_avg_sq"].dtype)
