"""Flat buffers in a native group: each is a row behind those of the entries, and is updated in their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

from torch import Tensor

from dragon.vm.torch.optim._backends.selection import picker
from dragon.vm.torch.optim._groups.flattening import Entry, FlattenedGroup

T = TypeVar("T")


def with_flats(group: FlattenedGroup) -> list[Entry]:
    """The entries of a group, and behind them one for each buffer, at the position of its first parameter."""
    flats = [group.entries[rows[0]]._replace(param=flats["param"]) for _, rows, flats in group.joined]
    return [*group.entries, *flats]


class Flats:
    """The flat buffers of one group; false if there are none."""

    def __init__(self, group: FlattenedGroup) -> None:
        self._n_rows = len(group.entries)
        self._joined = [(each, picker(each.positions, self._n_rows)) for each in group.joined]
        # The rows of the last step, the buffers chosen then, and the rows of both.
        self._arranged: tuple[Sequence[int], list[int], list[int]] = (), [], []

    def __bool__(self) -> bool:
        return bool(self._joined)

    def chosen(self, rows: Sequence[int], steps: Sequence[float]) -> list[int]:
        """The indices of buffers whose parameters all take part, with one step count.

        `steps` are the counts of all entries, one if they agree, or none if nothing counts.
        """
        if len(rows) == self._n_rows and len(steps) <= 1:
            return list(range(len(self._joined)))
        present = set(rows)
        return [
            index
            for index, (each, pick) in enumerate(self._joined)
            if present.issuperset(each.positions) and (len(steps) <= 1 or len(set(pick(steps))) == 1)
        ]

    def in_place_of(self, rows: Sequence[int], chosen: list[int]) -> list[int]:
        """The rows that take part, with chosen buffers in the place of their parameters."""
        if self._arranged[:2] != (rows, chosen):
            inside = set(self.picked(range(self._n_rows), chosen))
            outside = [row for row in rows if row not in inside]
            self._arranged = rows, chosen, [*outside, *(self._n_rows + index for index in chosen)]
        return self._arranged[2]

    def behind(self, column: Sequence[Tensor], name: str) -> Sequence[Tensor]:
        """Parameters, gradients or a state of the entries, with the buffers' flat tensors behind them."""
        return [*column, *(each.flats[name] for each, _ in self._joined)] if column else ()

    def with_counts(self, counts: Sequence[T]) -> list[T]:
        """Step counts of the entries, with those of the buffers behind them; one that is all stays so."""
        firsts = self._joined if len(counts) > 1 else ()
        return [*counts, *(counts[each.positions[0]] for each, _ in firsts)]

    def copy_grads(self, grads: Sequence[Tensor], chosen: Sequence[int]) -> None:
        """Copy the gradients of chosen buffers' parameters into them."""
        for each, pick in map(self._joined.__getitem__, chosen):
            each.buffer.copy_grads(pick(grads))

    def picked(self, values: Sequence[T], chosen: Sequence[int]) -> list[T]:
        """What chosen buffers' parameters have."""
        return list(chain.from_iterable(self._joined[index][1](values) for index in chosen))
