"""The tensors of a flattened group among all that a step gathers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

# What selects elements at some positions of any sequence of one length.
Picker = Callable[[Sequence[Any]], Sequence[Any]]


def _all(sequence: Sequence[Any]) -> Sequence[Any]:
    return sequence


class Gathered(NamedTuple):
    """The tensors of one step, read from where they live. All lists have the same positions.

    Attributes:
        params: parameters.
        shards: for each the tensor that this process updates.
        grads: their gradients, in the layouts of the parameters; None for a parameter that takes no part.
        states: state tensors by name; None for a parameter without that state.
        take: selects what belongs to the parameters that take part.
    """

    params: Sequence[Tensor]
    shards: Sequence[Tensor]
    grads: Sequence[Any]
    states: dict[str, list[Any]]
    take: Picker = _all

    @property
    def are_all(self) -> bool:
        """Whether all parameters take part."""
        return self.take is _all


def picked(pick: Picker, columns: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """What a picker selects of each column."""
    return columns if pick is _all else [pick(column) for column in columns]


def picker(positions: list[int], n_all: int) -> Picker:
    """What selects elements at positions of sequences of length `n_all`; all in order stay the sequence itself."""
    first = positions[0] if positions else 0
    if positions == list(range(first, first + len(positions))):
        return _all if len(positions) == n_all else itemgetter(slice(first, first + len(positions)))
    return itemgetter(*positions)
