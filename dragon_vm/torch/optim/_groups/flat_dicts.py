"""States of flat dicts: PyTorch's checkpoint functions look for the names that the optimizer's own states have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._distributed.hidden import loaded_flat_dict
from dragon.vm.torch.optim._groups.states import State
from dragon.vm.torch.optim._options import Group


def with_left_out(
    algorithm: Algorithm, groups: list[Group], saved_groups: list[Group], states: dict[Any, Any]
) -> dict[Any, Any]:
    """The states, with those of a flat dict that PyTorch left out.

    It asks for no step to create states where a parameter has a gradient, or where another one has a state.

    Args:
        algorithm: tells which parameters have states.
        groups: those of the optimizer that loads.
        saved_groups: the same with the names of the parameters.
        states: what PyTorch has found, by name.

    Raises:
        RuntimeError: for a trained parameter without a state in a dict that has states, unless `strict=False` is
            given. PyTorch has this text for nested dicts.
    """
    flat = loaded_flat_dict()
    found = {} if flat is None else _nested(flat.entries)
    if flat is None or not found:
        return states
    completed = dict(states)
    for group, saved_group in zip(groups, saved_groups, strict=True):
        has_states = bool(algorithm.state_keys(group))
        for param, name in zip(group["params"], saved_group["params"], strict=True):
            if not (has_states and param.requires_grad) or any(map(_is_there, completed.get(name, {}).values())):
                continue
            if name not in found and flat.is_strict:
                raise RuntimeError(
                    f"Missing optimizer state for parameter '{name}' in checkpoint. The parameter requires "
                    "gradients but has no saved optimizer state. To load anyway, use "
                    "StateDictOptions(strict=False)."
                )
            completed[name] = found.get(name, {})
    return completed


def _nested(entries: Mapping[str, Any]) -> dict[str, State]:
    """The states of a flat dict by the name of their parameter."""
    nested: dict[str, State] = {}
    for key, value in entries.items():
        path, _, entry = key.rpartition(".")
        if path.startswith("state."):
            nested.setdefault(path.removeprefix("state."), {})[entry] = value
    return nested


def _is_there(value: Any) -> bool:
    """Whether PyTorch has found an entry. It gives a dict for one that it misses, and flat dicts hold none."""
    return not isinstance(value, dict)
