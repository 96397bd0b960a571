"""The hyperparameters of all groups as numbers, read and checked again only when one has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from types import NoneType
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._containers import ContainerWatch

# Immutable: whoever holds one of these sees no change in it.
_PLAIN_TYPES = {float, int, bool, tuple, NoneType}
# Hyperparameters that kernels read where they are, if they are tensors on the device.
_LIVE_TENSORS = ("lr", "betas[0]", "betas[1]")
_NUMBERS = (
    *("lr", "weight_decay", "eps", "momentum", "dampening"),
    *("grad_scale", "clip_norm", "clip_value", "ema_decay"),
)


class GroupNumbers:
    """The hyperparameters of each group, comparable: equal to those of an earlier step if none has changed."""

    def __init__(self) -> None:
        # As they were read last.
        self.values: list[tuple[Any, ...]] = []
        # The list of groups, watched since it was read to no change; None if more in it may change unseen.
        self._watched: tuple[Sequence[dict[str, Any]], ContainerWatch] | None = None

    def are_unchanged(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups are as they were at the last reading, with the same parameters; False if in doubt."""
        return self._watched is not None and groups is self._watched[0] and self._watched[1].is_unchanged()

    def forget(self) -> None:
        """Be in doubt until the next reading."""
        self._watched = None

    def read(self, groups: Sequence[dict[str, Any]], names: Iterable[str]) -> list[tuple[Any, ...]]:
        """The values of these names of each group.

        Raises:
            KeyError, TypeError, ValueError: for a hyperparameter that is missing, or not a number.
        """
        self.forget()
        numbers = list(map(itemgetter(*names), groups))
        types = set(map(type, chain.from_iterable(numbers)))
        types.update(map(type, chain.from_iterable(group.get("betas", ()) for group in groups)))
        are_plain = types <= _PLAIN_TYPES
        if not are_plain:
            numbers = list(map(by_value, numbers))
        if numbers != self.values:
            _check_numbers(groups)
            self.values = numbers
        elif are_plain:
            # Not before they stayed for a step: a scheduler may change them at each.
            self._watched = groups, ContainerWatch(groups, [groups, *map(itemgetter("params"), groups)])
        return numbers


def by_value(value: Any) -> Any:
    """A hyperparameter in a form that tells whether it changed: a tensor's number, or its address on a device."""
    if isinstance(value, Tensor):
        on_host = value.device.type == "cpu"
        return float(value.detach()) if on_host else (value.data_ptr(), value.dtype, value.device)
    return tuple(map(by_value, value)) if isinstance(value, tuple | list) else value


def _check_numbers(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that hyperparameters are numbers: anybody may have edited them since their ranges were checked.

    Raises:
        TypeError: for one that is no number, naming it.
        ValueError: for a tensor of several, and for betas that are not two.
    """
    for group in groups:
        for name in _NUMBERS:
            if type(value := group.get(name, 0)) is not float:
                _check_number(name, value)
        if "betas" in group:
            if len(group["betas"]) != 2:
                raise ValueError(f"betas must be two numbers, but got {group['betas']}")
            for index, beta in enumerate(group["betas"]):
                _check_number(f"betas[{index}]", beta)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        if value.device.type != "cpu" and name not in _LIVE_TENSORS:
            raise ValueError(f"{name} must be a number or a tensor on the CPU, but got a tensor on {value.device}")
    elif not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, but got {value!r}")
