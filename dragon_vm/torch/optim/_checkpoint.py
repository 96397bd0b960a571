"""Checkpoints: state dicts are PyTorch's when saved, and checked and copied when loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl as without_torch_function

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._distributed.hidden import dict_request
from dragon.vm.torch.optim._distributed.shards import distributed_like
from dragon.vm.torch.optim._gradients.zeroing import are_dragon
from dragon.vm.torch.optim._groups.bounds import add_place, drop_place, keep_bounds
from dragon.vm.torch.optim._groups.entries import stored_entries
from dragon.vm.torch.optim._groups.exchange import pytorch_state, tagged_state
from dragon.vm.torch.optim._groups.flat_dicts import with_left_out
from dragon.vm.torch.optim._groups.native import FORMAT_KEY, MASTER, MASTER_PARTS
from dragon.vm.torch.optim._groups.restored import restored_states
from dragon.vm.torch.optim._groups.states import State
from dragon.vm.torch.optim._groups.storage import storage_of
from dragon.vm.torch.optim._modes import with_plain_tensors
from dragon.vm.torch.optim._options import STORAGE_OPTIONS, Group, Settings, check_bound, complete


class CheckpointedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state dicts are PyTorch's when saved, and checked and copied when loaded."""

    _algorithm: Algorithm
    _settings: Settings
    # Inside swap_ema(), the shards of parameters as they are without it.
    _originals: dict[Tensor, Tensor]
    # Between the check of a state dict and the end of its loading, the states and other attributes that it gives.
    _restored: Mapping[str, Any] = {}

    def _hook_own(self) -> None:
        """Let hooks of others see and change what is saved, since they run outside of the conversions."""
        self._optimizer_state_dict_post_hooks = _BehindConversion(self._optimizer_state_dict_post_hooks)
        self._optimizer_load_state_dict_pre_hooks = _BeforeLoading(self._optimizer_load_state_dict_pre_hooks)

    def _as_saved(self, packed: dict[str, Any]) -> dict[str, Any]:
        """What is saved, of what PyTorch would save."""
        is_native, request = self._settings.native_state_dict, dict_request()
        for group in packed["param_groups"]:
            if not is_native:
                _drop_storage(group, request.flattens)
            elif request.is_theirs:
                # A record, which flat dicts want too. PyTorch's checkpoint functions know no dtypes here.
                group.update((name, str(group[name])) for name in STORAGE_OPTIONS if name in group)
            if request.fills:
                add_place(group)
                # Loading ignores what stays None.
                group.update(dict.fromkeys(self._algorithm.own_defaults.keys() - group.keys()))
        # A broadcast gives tensors that are not there to the first process alone.
        is_to_fill = request.fills and not request.broadcasts
        convert = tagged_state if is_native else pytorch_state
        states = dict(packed["state"])
        # Other keys are of others.
        for key, param in enumerate(self._all_params()):
            if isinstance(entries := states.get(key), dict):
                found = without_torch_function(convert, (), (self._own_value(param), entries, key), {})
                found = found if self._algorithm.saves_steps else _uncounted(found)
                states[key] = _to_fill(found) if is_to_fill else found
        return {**packed, "state": states}

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What is left to PyTorch of a dict: all of one for other groups, which it refuses with its own words."""
        self._restored, saved_groups = {}, state_dict["param_groups"]
        own, saved = ([len(group["params"]) for group in groups] for groups in (self.param_groups, saved_groups))
        return self._taken(state_dict) if own == saved else state_dict

    def _taken(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy the states of a dict for `_with_restored`, and leave PyTorch the rest of it.

        Raises:
            ValueError: as `restored_states`, and as `check_bound`.
            RuntimeError: as `with_left_out`.
        """
        own, saved = self._algorithm.own_defaults, _rejoined(state_dict["state"])
        # Nothing was written over the places that are None.
        saved_groups = [
            {name: value for name, value in group.items() if value is not None or name not in own}
            for group in state_dict["param_groups"]
        ]
        for group in saved_groups:
            check_bound(group)
        # What a later step is to write must not be of inference mode.
        saved = with_left_out(self._algorithm, self.param_groups, saved_groups, saved)
        loading = self._algorithm, self._settings, self.param_groups, saved_groups, saved
        states = with_plain_tensors(lambda: restored_states(*loading))
        self._restored = {**self._restored, "state": states}
        owned = set(chain.from_iterable(group["params"] for group in saved_groups))
        groups = [{k: v for k, v in group.items() if k not in STORAGE_OPTIONS} for group in saved_groups]
        rest = {key: value for key, value in saved.items() if key not in owned}
        return {**state_dict, "param_groups": groups, "state": rest}

    def _with_restored(self, state: dict[str, Any]) -> dict[str, Any]:
        """With copies of what is loaded, and what it lacks. All of it takes effect at once, or nothing.

        A later call in the same loading, by a hook of others, is not to bring the copies back.
        """
        restored, self._restored = dict(self._restored), {}
        # PyTorch's takes some of them alone too.
        own: dict[str, Any] = {name: vars(self)[name] for name in ("state", "param_groups") if name in vars(self)}
        state = {**own, **state}
        state["state"].update(restored.pop("state", {}))
        return {**state, **restored}

    def _all_params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _own_value(self, param: Tensor) -> Tensor:
        """A parameter as it is outside swap_ema(): remainders belong to it, not to the average."""
        original = self._originals.get(param)
        return param if original is None else distributed_like(param, original)

    def _complete_groups(
        self, groups: Sequence[Group], earlier: Sequence[Group], state: Mapping[Any, Any]
    ) -> None:
        """Give loaded groups what they do not know, as earlier ones had it, and leave only options of groups."""
        own = self._algorithm.own_defaults
        for index, group in enumerate(groups):
            old, said = earlier[index] if index < len(earlier) else {}, set(group)
            for name, default in self.defaults.items():
                if name in old or name not in own:
                    group.setdefault(name, old.get(name, default))
            for name in Settings._fields:
                group.pop(name, None)
            self._drop_defaults(group, said)
            drop_place(group)
        keep_bounds(groups, state)

    def _drop_defaults(self, group: Group, kept: Collection[str] = ()) -> None:
        """Take own keys that mean what PyTorch does out of a group, but for those to keep."""
        for name, meaning in self._algorithm.own_defaults.items():
            # A default of the optimizer must not switch it on again, nor Dragon's formula for Dragon's parameters.
            keeps = name in kept or self.defaults.get(name) not in (None, meaning)
            keeps |= name == "epsilon_hat" and are_dragon(group["params"])
            if name in group and group[name] == meaning and not keeps:
                del group[name]

    @torch.no_grad()
    def _complete_switched_on(self) -> None:
        """Give parameters that have a state the maximum that AMSGrad wants since it was switched on, zero."""
        for group in self.param_groups:
            names = self._algorithm.state_keys(group)
            if "max_exp_avg_sq" not in names:
                continue
            for param in group["params"]:
                state = self.state.get(param)
                if state and "max_exp_avg_sq" not in state:
                    storage = storage_of(param, complete(group, self._algorithm.own_defaults), names)
                    state.update(stored_entries(param, state, storage, ("max_exp_avg_sq",))[0])


class _BeforeLoading(OrderedDict[int, Callable[..., Any]]):
    """The hooks of others, which may still change what is loaded, with ours behind their values."""

    def values(self) -> Any:
        """What PyTorch calls, in order."""
        return [*super().values(), _before_loading]


class _BehindConversion(OrderedDict[int, Callable[..., Any]]):
    """The hooks of others, with the conversion in front of their values."""

    def values(self) -> Any:
        """What PyTorch calls, in order."""
        return [_as_saved, *super().values()]


# An optimizer of others may have taken over the attributes of one of ours. PyTorch saves and loads what they are.
def _before_loading(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    if isinstance(optimizer, CheckpointedOptimizer):
        return optimizer._before_loading(state_dict)
    _check_plain(optimizer)
    return None


def _as_saved(optimizer: torch.optim.Optimizer, packed: dict[str, Any]) -> dict[str, Any] | None:
    if isinstance(optimizer, CheckpointedOptimizer):
        return optimizer._as_saved(packed)
    _check_plain(optimizer)
    return None


def _check_plain(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer of others has states as PyTorch stores them: it loads them in the parameter's dtype.

    Raises:
        RuntimeError: if it does not.
    """
    for group in optimizer.param_groups:
        for name in ("state_dtype", "master_weights"):
            if group.get(name) is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__}, which has taken over the attributes of an optimizer with "
                    f"{name}={group[name]!r}, cannot save or load its states: call state_dict() and "
                    "load_state_dict() of that optimizer"
                )


def _drop_storage(packed: Group, is_flat: bool) -> None:
    """Take out of a saved group what PyTorch's does not have, and a bound that the betas imply.

    Raises:
        RuntimeError: for a flat dict, which PyTorch's checkpoint functions could not load.
    """
    for name in STORAGE_OPTIONS:
        value = packed.pop(name, None)
        if value is not None and is_flat:
            raise RuntimeError(
                f"flatten_optimizer_state_dict=True with {name}={value!r}: PyTorch loads a flat dict by the names "
                "under which this optimizer stores its states. Give native_state_dict=True to the optimizer, or "
                "leave the dict nested"
            )
    # Numbers on a device are not waited for where there is no bound.
    if "bound_betas" in packed and packed["bound_betas"] == tuple(map(float, packed.get("betas", ()))):
        del packed["bound_betas"]


def _to_fill(entries: State) -> State:
    """A state to write a saved one over: places for its numbers, and no master: it may have another form."""
    kept = {name: value for name, value in entries.items() if name not in (MASTER, *MASTER_PARTS)}
    return {"stream": None, **kept, FORMAT_KEY: None}


def _uncounted(entries: State) -> State:
    """A state without its step counter, which PyTorch's counterpart lacks; without a buffer before a first step.

    Reading a counter waits for the device.
    """
    rest = dict(entries)
    step = rest.pop("step", None)
    if "momentum_buffer" in rest and step is not None and float(step) == 0:
        rest["momentum_buffer"] = None
    return rest


def _rejoined(saved: dict[Any, Any]) -> dict[Any, Any]:
    """The states, each with its numbers: `dcp.load` puts those of key 0 under "0" beside it (torch 2.13)."""
    apart = {key: int(key) for key in saved if isinstance(key, str) and key.isdecimal() and int(key) in saved}
    states = {key: entries for key, entries in saved.items() if key not in apart}
    for key, owner in apart.items():
        states[owner] = {**states[owner], **saved[key]}
    return states
