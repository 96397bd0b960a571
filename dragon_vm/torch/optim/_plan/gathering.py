"""Gather the tensors of a step from where they live, if they are what its plan was made for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._backends.selection import Gathered, picker
from dragon.vm.torch.optim._distributed.shards import locals_of
from dragon.vm.torch.optim._modes import if_possible
from dragon.vm.torch.optim._plan.guards import Guard
from dragon.vm.torch.optim._plan.preparation import Prepared
from dragon.vm.torch.optim._plan.recipe import Recipe

# What reading a tensor raises where there is none.
_MISSING = (KeyError, TypeError, AttributeError, IndexError)


class StateReader:
    """Reads the state tensors of a plan's parameters from `Optimizer.state`, column by column.

    Attributes:
        are_complete: whether every parameter has each state tensor that some parameter has.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        order = {id(key): index for index, key in enumerate(recipe.state)}
        params, self._n_params = prepared.chosen.params, len(prepared.keys)
        # Positions of the parameters that have a state, and where their states stand among all states.
        holders = [i for i, keys in enumerate(prepared.keys) if keys]
        self._pick_params = picker(holders, self._n_params)
        # Never all that there are: others may come, and go.
        self._pick_states = picker([order[id(params[i])] for i in holders], len(recipe.state) + 1)
        self._positions: dict[str, list[int]] = {}
        self._columns: list[tuple[str, Any, Any]] = []
        for key in dict.fromkeys(chain.from_iterable(prepared.keys)):
            within = [n for n, i in enumerate(holders) if key in prepared.keys[i]]
            self._positions[key] = [holders[n] for n in within]
            self._columns.append((key, itemgetter(key), picker(within, len(holders))))
        self.are_complete = all(len(positions) == self._n_params for positions in self._positions.values())

    def read(self, recipe: Recipe, params: Sequence[Tensor]) -> dict[str, list[Any]] | None:
        """By name, the tensors of the parameters that have it; None if other parameters have states now.

        Raises:
            KeyError, TypeError, IndexError: if an entry is gone.
        """
        if not self._columns:
            return {}
        owners, expected = self._pick_states(list(recipe.state)), self._pick_params(params)
        if len(owners) != len(expected) or not all(map(is_, owners, expected)):
            return None
        entries = self._pick_states(list(recipe.state.values()))
        columns = {key: list(map(read, pick(entries))) for key, read, pick in self._columns}
        if recipe.members.are_distributed:
            columns = {key: locals_of(column) for key, column in columns.items()}
        return columns

    def by_position(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The tensors by the position of their parameter; None for a parameter without that entry."""
        spread = dict(columns)
        for key, column in columns.items():
            if len(column) < self._n_params:
                held = dict(zip(self._positions[key], column, strict=True))
                spread[key] = list(map(held.get, range(self._n_params)))
        return spread


class Gatherer:
    """Gathers the tensors of a plan, of which it holds none. With `takes_parts` some may have no gradient.

    Attributes:
        positions: of the plan's parameters among all of the optimizer.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared, *, takes_parts: bool) -> None:
        self.positions, n_all = prepared.chosen.positions, len(recipe.members.params)
        self.takes_parts = takes_parts
        self._pick = picker(self.positions, n_all)
        self._pick_others = picker(sorted({*range(n_all)}.difference(self.positions)), n_all)
        self.states = StateReader(recipe, prepared)
        self._guard: Guard | None = None
        if not prepared.are_opaque:
            _, params, shards, grads, _ = prepared.chosen
            states = self.states.read(recipe, params)
            assert states is not None
            hands_on = all(group.hands_on for group in prepared.flattened)
            # Counters are advanced as pieces of one tensor.
            placed = [key for key in states if key == "step" or not hands_on]
            self._guard = Guard(grads, shards, states, placed, takes_parts=takes_parts)

    def gather(self, recipe: Recipe, present: bytes) -> Gathered | None:
        """The tensors of a step; None if they are not what they were.

        `present` tells for each parameter of the optimizer whether it has a gradient.
        """
        if self._guard is None or any(self._pick_others(present)):
            return None
        return if_possible(_MISSING, self.read, recipe, present, self._guard)

    def read(self, recipe: Recipe, present: bytes, guard: Guard | None = None) -> Gathered | None:
        """`gather` as far as a guard tells; without one the tensors are those that the plan was just made for."""
        members = recipe.members
        params, grads, present = self._pick(members.params), self._pick(members.grads), bytes(self._pick(present))
        shards = params if members.shards is members.params else self._pick(members.shards)
        states = self.states.read(recipe, params)
        if states is None:
            return None
        tensors = Gathered(params, shards, grads, states)
        if not all(present):
            tensors = tensors._replace(take=picker(list(compress(range(len(grads)), present)), len(grads)))
        are_same = guard is None or guard.check(tensors.take(grads), shards, states, present)
        return tensors if are_same else None

    def holds(self, recipe: Recipe) -> bool:
        """Whether parameters and states are what they were, with a gradient or not."""
        return self._guard is not None and bool(if_possible(_MISSING, self._holds, self._guard, recipe))

    def _holds(self, guard: Guard, recipe: Recipe) -> bool:
        states = self.states.read(recipe, self._pick(recipe.members.params))
        return states is not None and guard.holds(self._pick(recipe.members.shards), states)
