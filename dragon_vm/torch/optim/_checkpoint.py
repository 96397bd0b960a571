"""Checkpoints: state dicts are PyTorch's when saved, and checked and copied when loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._distributed.hidden import is_flat_dict_asked_for
from dragon.vm.torch.optim._distributed.placement import placed_like
from dragon.vm.torch.optim._distributed.shards import distributed_like, local
from dragon.vm.torch.optim._formats import Plain
from dragon.vm.torch.optim._groups.eligibility import choose_backend, step_device
from dragon.vm.torch.optim._groups.exchange import (
    is_part,
    pytorch_state,
    restored_entries,
    tagged_state,
)
from dragon.vm.torch.optim._groups.saved import checked_state, saved_labels
from dragon.vm.torch.optim._groups.states import State, missing_states, zeros_for
from dragon.vm.torch.optim._groups.storage import (
    held_format,
    options_of,
    storage_of,
    stored_entries,
)
from dragon.vm.torch.optim._options import STORAGE_OPTIONS, Settings, complete

Group = dict[str, Any]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class CheckpointedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state dicts are PyTorch's when saved, and checked and copied when loaded."""

    _algorithm: Algorithm
    _settings: Settings
    # Inside swap_ema(), the shards of parameters as they are without it.
    _originals: dict[Tensor, Tensor]
    # Between the check of a state dict and the end of its loading.
    _restored: dict[Tensor, State] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state in PyTorch's format.

        Own keys of a group are there only where they differ from what PyTorch does. An AMSGrad that was
        switched on since the last step has its maximum, zero. What is stored in parts is there as fp32, one
        parameter after the other, or as it is if `native_state_dict` says so: see `pytorch_state`.
        """
        self._complete_switched_on()
        is_native = self._settings.native_state_dict
        saved = super().state_dict()
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            self._drop_defaults(group, packed)
            if is_native:
                # As a record, and for flat dicts. PyTorch's checkpoint functions know no dtypes here.
                packed.update((name, str(packed[name])) for name in STORAGE_OPTIONS if name in packed)
            else:
                _drop_storage(packed)
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        convert = tagged_state if is_native else pytorch_state
        saved["state"] = {
            key: convert(self._own_value(params[key]), entries, key)
            if isinstance(key, int) and isinstance(entries, dict)
            else entries
            for key, entries in saved["state"].items()
        }
        if not self._algorithm.saves_steps:
            saved["state"] = {key: _uncounted(entries) for key, entries in saved["state"].items()}
        return saved

    def _follows_dragon(self, group: Group) -> bool:
        """Whether the parameters of a group are Dragon's own."""
        raise NotImplementedError

    def _own_value(self, param: Tensor) -> Tensor:
        """A parameter as it is outside swap_ema(): remainders belong to it, not to the average."""
        original = self._originals.get(param)
        return param if original is None else distributed_like(param, original)

    def _complete_groups(self, earlier: Sequence[Group]) -> None:
        """Give loaded groups what they do not know, as earlier ones had it, and leave only options of groups."""
        own = self._algorithm.own_defaults
        for index, group in enumerate(self.param_groups):
            old = earlier[index] if index < len(earlier) else {}
            for name, default in self.defaults.items():
                if name in old or name not in (*own, *Settings._fields):
                    group.setdefault(name, old.get(name, default))
            for name in Settings._fields:
                group.pop(name, None)
            self._drop_defaults(group, group)

    def _drop_defaults(self, group: Group, packed: Group) -> None:
        """Take own keys that mean what PyTorch does out of a group, or of what is saved of it."""
        for name, meaning in self._algorithm.own_defaults.items():
            # Dragon's formula is what Dragon's parameters ask for: a False must not be lost to it.
            keeps = name == "epsilon_hat" and self._follows_dragon(group)
            if name in packed and packed[name] == meaning and not keeps:
                del packed[name]

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of PyTorch's counterpart, sharing no memory with it.

        Hyperparameters that it does not know keep their values; so do sums of gradients and the count of skipped
        steps. State tensors get the optimizer's formats, else the wider of their and the parameter's dtype.

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

    @torch.no_grad()
    def _complete_switched_on(self) -> None:
        """Give parameters that have a state the maximum that AMSGrad wants since it was switched on, zero."""
        for group in self.param_groups:
            if "max_exp_avg_sq" not in self._algorithm.state_keys(group):
                continue
            for param in group["params"]:
                state = self.state.get(param)
                if state and "max_exp_avg_sq" not in state:
                    storage = storage_of(param, complete(group, self._algorithm.own_defaults), _MOMENTS)
                    square = held_format(state, "exp_avg_sq")
                    if isinstance(square, Plain) and isinstance(storage.states["max_exp_avg_sq"], Plain):
                        storage = storage._replace(states={"max_exp_avg_sq": square})
                    state.update(stored_entries(param, state, storage, ("max_exp_avg_sq",))[0])


def _drop_storage(packed: Group) -> None:
    """Take out of a saved group what PyTorch's does not have, and a bound that the betas imply.

    Raises:
        RuntimeError: if PyTorch's checkpoint functions ask for a flat dict, which they could not load.
    """
    for name in STORAGE_OPTIONS:
        value = packed.pop(name, None)
        if value is not None and is_flat_dict_asked_for():
            raise RuntimeError(
                f"flatten_optimizer_state_dict=True with {name}={value!r}: PyTorch loads a flat dict by the names "
                "under which this optimizer stores its states. Give native_state_dict=True to the optimizer, or "
                "leave the dict nested"
            )
    if packed.get("bound_betas") == tuple(map(float, packed.get("betas", ()))):
        del packed["bound_betas"]


def _uncounted(entries: Any) -> Any:
    """A state without its step counter, which PyTorch's counterpart lacks; without a buffer before a first step.

    Reading a counter waits for the device.
    """
    if not isinstance(entries, dict) or "step" not in entries:
        return entries
    is_first = float(entries["step"]) == 0
    return {
        name: None if is_first and name == "momentum_buffer" else value
        for name, value in entries.items()
        if name != "step"
    }


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
    groups = [{k: v for k, v in group.items() if k not in STORAGE_OPTIONS} for group in saved_groups]
    rest = {key: value for key, value in saved.items() if key not in owned}
    return {**state_dict, "param_groups": groups, "state": rest}


def restored_states(
    optimizer: CheckpointedOptimizer, saved_groups: Sequence[Group], saved: Mapping[Any, State]
) -> dict[Tensor, State]:
    """Copy saved states for an optimizer's parameters.

    A state has the format that its group asks for, else the wider one of the saved dtype and the parameter's: fp32
    states of a bf16 parameter stay fp32, which PyTorch would round. Rounding is to nearest.

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
    algorithm = optimizer._algorithm
    labels = saved_labels(optimizer.param_groups, saved_groups)
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
        own = {name: group.get(name) for name in STORAGE_OPTIONS}
        merged = complete({**group, **saved_group, **own}, algorithm.own_defaults)
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            label = next(labels)
            state = {name: value for name, value in saved.get(key, {}).items() if not _is_missing(value)}
            if state:
                # An average begins when it is asked for.
                optional = {"ema", *algorithm.optional_keys(saved_group)}
                required = [key for key in algorithm.all_state_keys(merged) if key not in optional]
                owners.append((param, merged, checked_state(algorithm, param, merged, state, required, label)))
    return _copied(algorithm, optimizer._settings, owners)


def _is_missing(value: Any) -> bool:
    """Whether a saved entry is none. PyTorch's flat dicts have an empty dict for one that is not in the file."""
    return value is None or (isinstance(value, dict) and not value)


@torch.no_grad()
def _copied(
    algorithm: Algorithm, settings: Settings, owners: Sequence[tuple[Tensor, Group, State]]
) -> dict[Tensor, State]:
    """Copy the states."""
    params = [param for param, _, _ in owners]
    copies: list[State] = []
    devices: list[torch.device | None] = []
    for param, group, state in owners:
        copy, in_parts = restored_entries(param, group, state, algorithm.state_keys(group))
        if "ema" in algorithm.all_state_keys(group) and "ema" in state:
            average = storage_of(param, group, algorithm.state_keys(group)).average.parts[0].dtype
            dtype = average if options_of(group).state_dtype else None
            dtype = dtype or torch.promote_types(state["ema"].dtype, average)
            copy["ema"] = distributed_like(param, zeros_for(local(param), dtype))
        dtypes = {param.dtype, *(value.dtype for value in copy.values() if value.is_floating_point())}
        copies.append(copy)
        devices.append(_counter_device(algorithm, settings, param, group, dtypes, in_parts))
    nothing: list[State] = [{} for _ in owners]
    counters = missing_states(params, nothing, [() for _ in owners], devices, [None] * len(owners))
    for (param, _, state), copy, counter in zip(owners, copies, counters, strict=True):
        copy.update(counter)
        _fill(copy, state, param)
    return dict(zip(params, copies, strict=True))


def _fill(copy: State, state: State, param: Tensor) -> None:
    for key, value in state.items():
        if key in ("step", "ema") and key in copy:
            copy[key].copy_(placed_like(copy[key], value))
        elif key in copy or f"{key}_q8" in copy or is_part(key):
            continue
        elif isinstance(value, Tensor):
            copy[key] = value.detach().to(param.device, copy=True)
        else:
            copy[key] = deepcopy(value)


def _counter_device(
    algorithm: Algorithm,
    settings: Settings,
    param: Tensor,
    group: Group,
    dtypes: set[torch.dtype],
    in_parts: bool,
) -> torch.device | None:
    """Where the step counter of a parameter will be wanted, should its gradient be of its own dtype."""
    if not algorithm.counts_steps(group):
        return None
    backend = settings.backend
    if backend is None:
        backend = choose_backend(
            *(None, local(param), param.dtype, dtypes - {param.dtype} or dtypes, group["differentiable"]),
            in_parts=in_parts,
        )
    return step_device(param, backend, group)
