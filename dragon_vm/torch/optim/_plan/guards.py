"""Guards: what a plan was made for, compared before each step by calls that PyTorch offers.

A guard holds no tensor. Another tensor at the same address in the same layout is as good as the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress

from torch import Tensor

from dragon.vm.torch.optim._plan.layout_guards import PartLayouts, layout_guard

# 0 for a tensor without elements.
_data_ptr = Tensor.data_ptr


class Guard:
    """Compares the tensors of a step with those that a plan was made for: layouts, and addresses but of gradients.

    Gradients may lie elsewhere at each step. With `takes_parts` some of them may be absent.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        *,
        takes_parts: bool = False,
    ) -> None:
        self._layouts = layout_guard([*grads, *params])
        self._part_layouts = PartLayouts(grads, params) if takes_parts else None
        self._state_layouts = layout_guard(list(chain(*states.values())))
        self._addresses = list(map(_data_ptr, chain(params, *states.values())))

    def check(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        present: bytes,
    ) -> bool:
        """Whether all is as it was.

        `grads` are those that are there, as `present` tells for each parameter. There are as many parameters and
        states as then.
        """
        seen = self._addresses
        tensors: Iterable[Tensor] = chain(params, *states.values())
        is_whole, n_columns = len(grads) == len(params), 1 + len(states)
        if not is_whole and len(seen) == n_columns * len(params):
            # Nobody reads or writes what belongs to the others.
            tensors, seen = compress(tensors, present * n_columns), list(compress(seen, present * n_columns))
        if list(map(_data_ptr, tensors)) != seen:
            return False
        if is_whole:
            are_like = self._layouts(*grads, *params)
        else:
            are_like = self._part_layouts is not None and self._part_layouts.check(grads, params, present)
        return are_like and self._state_layouts(*chain(*states.values()))

    def holds(self, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]) -> bool:
        """Whether parameters and states, as many as then, are where they were."""
        addresses = list(map(_data_ptr, chain(params, *states.values())))
        return addresses == self._addresses and self._state_layouts(*chain(*states.values()))
