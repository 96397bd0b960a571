"""Read the state tensors of a plan's parameters from `Optimizer.state`, at the speed of C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._backends.selection import picker
from dragon.vm.torch.optim._distributed.shards import locals_of
from dragon.vm.torch.optim._plan.preparation import Prepared

_step_of = itemgetter("step")


class StateReader:
    """Reads the state tensors of a plan's parameters from `Optimizer.state`, column by column.

    Attributes:
        are_complete: whether every parameter has each state tensor that some parameter has.
    """

    def __init__(self, state: Mapping[Any, Any], prepared: Prepared) -> None:
        order = {id(key): index for index, key in enumerate(state)}
        self._n_params = len(prepared.params)
        self._are_distributed = prepared.are_distributed
        # Positions of the parameters that have a state, and where their states stand among all states.
        holders = [i for i, keys in enumerate(prepared.keys) if keys]
        # Joined parameters share a counter: it is compared by identity, once for each of them.
        index_of = {position: index for index, position in enumerate(holders)}
        self._shared = [
            (picker([index_of[i] for i in joined.positions], len(holders)), joined.buffer)
            for joined in prepared.joined
            if "step" in joined.buffer.state
        ]
        self._pick_params = picker(holders, self._n_params)
        self._pick_states = picker([order[id(prepared.params[i])] for i in holders], len(state))
        self._positions: dict[str, list[int]] = {}
        self._columns: list[tuple[str, Any, Any]] = []
        for key in dict.fromkeys(chain.from_iterable(prepared.keys)):
            within = [
                n
                for n, i in enumerate(holders)
                if key in prepared.keys[i] and not (key == "step" and i in prepared.inside)
            ]
            if not within:
                continue
            self._positions[key] = [holders[n] for n in within]
            self._columns.append((key, itemgetter(key), picker(within, len(holders))))
        self.are_complete = all(len(positions) == self._n_params for positions in self._positions.values())

    def read(self, state: Mapping[Any, Any], params: Sequence[Tensor]) -> dict[str, list[Any]] | None:
        """By name, the tensors of the parameters that have it; None if other parameters have states now.

        Raises:
            KeyError, TypeError, IndexError: if an entry is gone.
        """
        if not self._columns:
            return {}
        if not all(map(is_, self._pick_states(list(state)), self._pick_params(params))):
            return None
        entries = self._pick_states(list(state.values()))
        for pick, buffer in self._shared:
            if not all(map(is_, map(_step_of, pick(entries)), repeat(buffer.state["step"]))):
                return None
        columns = {key: list(map(read, pick(entries))) for key, read, pick in self._columns}
        return {key: locals_of(column) for key, column in columns.items()} if self._are_distributed else columns

    def by_position(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The tensors by the position of their parameter; None for a parameter without that entry."""
        spread = {}
        for key, column in columns.items():
            if len(column) < self._n_params:
                tensors: list[Any] = [None] * self._n_params
                for position, tensor in zip(self._positions[key], column, strict=True):
                    tensors[position] = tensor
                column = tensors
            spread[key] = column
        return spread
