"""When a plan is worth preparing for more parameters than have a gradient."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain, compress

from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import overlapping_pair
from dragon.vm.torch.optim._plan.gathering import Gatherer
from dragon.vm.torch.optim._plan.recipe import Recipe
from dragon.vm.torch.optim._plan.step import StepPlan

# Sets of gradients that are prepared one by one before others are expected to come.
N_MISSED = 8


class Widening:
    """Remembers what was prepared for one set of gradients each, until it has cost as much as a plan for all.

    Attributes:
        missed: since the last plan for more, what gathers the tensors of each other plan, with the plan's key.
    """

    def __init__(self) -> None:
        self.missed: list[tuple[Hashable, Gatherer]] = []
        # How many parameters the last plan for more has.
        self._n_wide = 0

    def worth_adding(self, recipe: Recipe, key: Hashable, present: bytes, wide: StepPlan | None) -> set[int]:
        """Positions of parameters without a gradient for which a plan is to be prepared all the same.

        `present` tells for each parameter whether it has a gradient; `wide` is the last plan for more parameters.
        """
        n_prepared = sum(len(gatherer.positions) for _, gatherer in self.missed)
        if len(self.missed) < N_MISSED or n_prepared < self._n_wide:
            return set()
        earlier = [gatherer for own, gatherer in self.missed if own == key] + ([wide.gatherer] if wide else [])
        known = [gatherer.positions for gatherer in earlier if gatherer.holds(recipe)]
        added = {*chain.from_iterable(known)}.difference(compress(range(len(present)), present))
        self._n_wide = sum(present) + len(added)
        self.missed.clear()
        together = [shard for i, shard in enumerate(recipe.members.shards) if present[i] or i in added]
        # Those that never step together may share memory.
        return added if overlapping_pair(list(filter(has_memory, together))) is None else set()
