"""The tensors of a flattened group among all that a step gathers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class Gathered(NamedTuple):
    """The tensors of one step, read from where they live. All lists have the same positions.

    Attributes:
        params: parameters, or this process's shards of them, then flat buffers.
        grads: their gradients, in the layouts of the parameters.
        states: state tensors by name; None for a parameter without that state.
        addresses: of the gradients.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Any]]
    addresses: list[int]


def picker(positions: Sequence[int], n_all: int) -> Callable[[Sequence[T]], Sequence[T]]:
    """What selects elements at positions of sequences of length `n_all`; all in order stay the sequence itself."""
    if list(positions) == list(range(n_all)):
        return lambda sequence: sequence
    if len(positions) < 2:
        return lambda sequence: [sequence[position] for position in positions]
    return itemgetter(*positions)
