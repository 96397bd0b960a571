"""The hyperparameters of all groups: read once a step, and compared in this place only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from dragon.vm.torch.optim._algorithms.algorithm import host_number, kinds
from dragon.vm.torch.optim._gradients.zeroing import are_dragon
from dragon.vm.torch.optim._options import PLAIN_TYPES, Version, by_value, check_number, check_numbers, complete

# Of learning rates that need no check.
_RATE_TYPES = {float}
# Numbers that decide nothing about which tensors and kernels take part.
_SCALARS = {"weight_decay", "eps", "betas"}

_rate_of = itemgetter("lr")


class Hyperparameters:
    """The hyperparameters of all groups at the last reading.

    Args:
        names: keys that every group has, "params" aside.
        own: keys that a group may have, with the values of those that it has not.
        structure_of: maps a group with all options to what decides which tensors and kernels take part, and
            refuses bad options. It is asked after changes of anything but the learning rate, `weight_decay`, `eps`
            and betas.

    Attributes:
        groups: the groups with all options, without their parameters.
        version: another one after each change.
        structure: a number that is new after each change of the structure of some group.
    """

    def __init__(
        self, names: Sequence[str], own: Mapping[str, Any], structure_of: Callable[[Mapping[str, Any]], object]
    ) -> None:
        self._own = dict(own)
        names = [name for name in names if name != "lr"]
        self._read_row = itemgetter(*names)
        self._structural = itemgetter(*(i for i, name in enumerate(names) if name not in _SCALARS))
        self._structure_of = structure_of
        # The rows of the last reading, the identities of their values, and whether these can change in place.
        self._same: tuple[list[Any], list[int], bool] = [], [], False
        # Rows by value with learning rates that are no numbers, or None: nothing counts as seen; learning rates.
        self._seen: tuple[Any, list[Any]] = None, []
        # Options that decide about structure, and the structures of the groups.
        self._structures: tuple[list[Any], list[object]] = [], []
        self.groups: list[dict[str, Any]] = []
        self.version: Version = (0, 0)
        self.structure = 0

    def read(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Read all groups, and check what has changed.

        Raises:
            KeyError, TypeError, ValueError: for a hyperparameter that is missing, or not a number.
        """
        rates = list(map(_rate_of, groups))
        rows = list(map(self._read_row, groups))
        if not all(map(self._own.keys().isdisjoint, groups)):
            rows += [tuple(map(group.get, self._own, self._own.values())) for group in groups]
        ids = list(map(id, chain.from_iterable(rows)))
        (values, seen_rates), (_, seen_ids, can_change) = self._seen, self._same
        are_like = values is not None and values[1] is None and not can_change and ids == seen_ids
        if not (are_like and set(map(type, rates)) <= _RATE_TYPES):
            self._read_anew(groups, rates, rows)
        elif rates != seen_rates:
            self._take_rates(values, rates)

    def _read_anew(self, groups: Sequence[Mapping[str, Any]], rates: list[Any], rows: list[Any]) -> None:
        """Compare by value."""
        are_numbers = set(map(type, rates)) <= _RATE_TYPES
        can_change = not kinds(rows) <= PLAIN_TYPES | {tuple}
        taken = by_value(rows) if can_change else rows, None if are_numbers else by_value(rates)
        # Whatever interrupts it, nothing counts as seen.
        (values, seen_rates), self._seen = self._seen, (None, [])
        if taken != values:
            self._take(groups, taken[0])
            seen_rates = rates
        else:
            # Equal, but perhaps others, into which somebody will write.
            for own, group in zip(self.groups, groups, strict=True):
                own.update(self._options_of(group))
        self._same = rows, list(map(id, chain.from_iterable(rows))), can_change
        if are_numbers and rates != seen_rates:
            self._take_rates(taken, rates)
        else:
            self._seen = taken, rates

    def _take_rates(self, values: Any, rates: list[Any]) -> None:
        """Take learning rates alone. Whatever interrupts it, they do not count as seen."""
        self._seen = values, []
        for group, rate in zip(self.groups, rates, strict=True):
            group["lr"] = rate
        self.version = self.version[0], self.version[1] + 1
        self._seen = values, rates

    def _options_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group with all options, without its parameters: what is taken out of it must not stay here."""
        options = {name: value for name, value in complete(group, self._own).items() if name != "params"}
        if options.get("epsilon_hat", False) is None:
            # Written in mid-run: it means what it does at construction.
            options["epsilon_hat"] = are_dragon(group["params"])
        return options

    def _take(self, groups: Sequence[Mapping[str, Any]], rows: Sequence[Any]) -> None:
        complete_groups = list(map(self._options_of, groups))
        for group in complete_groups:
            _check_numbers(group)
        # Of what a scheduler changes at each step nothing decides about structure.
        options = [*map(self._structural, rows[: len(groups)]), *rows[len(groups) :]]
        seen_options, seen_structures = self._structures
        structures = seen_structures
        if options != seen_options:
            pairs = zip(groups, complete_groups, strict=True)
            structures = [self._structure_of({**group, **full}) for group, full in pairs]
        if structures != seen_structures:
            self.structure += 1
        self.version = self.version[0] + 1, self.version[1]
        self._structures, self.groups = (options, structures), complete_groups


def _check_numbers(group: Mapping[str, Any]) -> None:
    """Check that hyperparameters are numbers: anybody may have edited them since their ranges were checked.

    Raises:
        TypeError: for one that is no number, naming it.
        ValueError: for a tensor of several, and for betas that are not two or out of range.
    """
    check_numbers(group)
    betas = group.get("betas", (0.0, 0.0))
    if len(betas) < 2:
        raise ValueError(f"betas must be two numbers, but got {betas}")
    for index, beta in enumerate(betas):
        if type(beta) is not float:
            check_number(f"betas[{index}]", beta)
        if not 0.0 <= host_number(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
