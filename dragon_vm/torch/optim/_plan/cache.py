"""The plans of one optimizer: the latest few, and those that graphs were captured of."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import compress, repeat
from operator import is_not
from typing import Any

from dragon.vm.torch.optim._backends.selection import Gathered, picker
from dragon.vm.torch.optim._distributed.owners import check_gathered
from dragon.vm.torch.optim._graphs.capture import check_live, is_capturing
from dragon.vm.torch.optim._modes import with_plain_tensors
from dragon.vm.torch.optim._plan.preparation import prepare
from dragon.vm.torch.optim._plan.recipe import Chosen, Recipe
from dragon.vm.torch.optim._plan.step import StepPlan
from dragon.vm.torch.optim._plan.widening import Widening

# How many plans are kept.
N_LATEST = 8


# A plan with the tensors of the step that it was found for.
Found = tuple[StepPlan, Gathered]


class PlanCache:
    """The latest plans, `n_kept` of them, by what they were asked to do."""

    def __init__(self) -> None:
        self.n_kept = N_LATEST
        self._latest: dict[tuple[Hashable, bytes | None], StepPlan] = {}
        self._widening = Widening()
        # Their tables are read by graphs: they stay, whatever becomes of the latest.
        self._captured: list[Found] = []

    def latest(self) -> list[StepPlan]:
        """The kept plans, the last one used at the end."""
        return list(self._latest.values())

    def forget(self) -> None:
        """Prepare every step anew from here on."""
        self._latest.clear()
        self._widening.missed.clear()

    def find(self, recipe: Recipe, key: tuple[Hashable, ...]) -> Found | None:
        """The plan of a step, prepared if need be; None if no parameter has a gradient. Plans differ by `key`.

        Within a capture it is kept for the graph, with the tensors that the graph will read and write.

        Raises:
            RuntimeError: if a plan would have to be prepared within a capture, as `StepPlan.check_capture`, and as
                `prepare`.
            ValueError: as `prepare`.
        """
        present = bytes(map(is_not, recipe.members.grads, repeat(None)))
        if not any(present):
            check_gathered(recipe.members.params)
            return None
        # One for exactly these parameters, or one for more.
        for wanted in ((key, present), (key, None)):
            plan = self._latest.get(wanted)
            tensors = plan.gatherer.gather(recipe, present) if plan else None
            if plan is not None and tensors is not None:
                if is_capturing():
                    plan.check_capture()
                    self._captured.append((plan, tensors))
                    # A step with other gradients would number the partial norms anew that the graph reads.
                    del self._latest[wanted]
                    wanted = key, present
                self._keep(wanted, plan)
                return plan, tensors
        if is_capturing():
            raise RuntimeError(
                "a first step with these parameters, gradients, states and arguments cannot be captured: "
                "take one before the capture, as PyTorch's notes on CUDA graphs do"
            )
        return with_plain_tensors(lambda: self._prepare(recipe, key, present))

    def _keep(self, key: tuple[Hashable, bytes | None], plan: StepPlan) -> None:
        """Keep a plan as the last one used, which stands at the end."""
        if next(reversed(self._latest.values()), None) is not plan:
            self._latest.pop(key, None)
            self._latest[key] = plan
        while len(self._latest) > self.n_kept:
            # One for more parameters took several others to make. It serves steps to come, if not the latest.
            others = [each for each in self._latest if each[1] is not None and each != key]
            self._latest.pop(others[0] if others else next(iter(self._latest)))

    def _prepare(self, recipe: Recipe, key: tuple[Hashable, ...], present: bytes) -> Found:
        """Prepare a plan for the parameters with a gradient, and some more if that is worth it."""
        members, flats = recipe.members, _flats_of(recipe)
        check_gathered(members.params)
        more = self._widening.worth_adding(recipe, key, present, self._latest.get((key, None)))
        positions = sorted({*compress(range(len(present)), present), *more})
        lists: tuple[list[Any], ...] = members.params, members.shards, members.grads, members.group_index()
        chosen = Chosen(positions, *map(list, map(picker(positions, len(present)), lists)))
        prepared = prepare(recipe, chosen)
        if flats.keys() - _flats_of(recipe).keys():
            # Earlier plans would keep the memory of those that are gone.
            self.forget()
        plan = StepPlan(recipe, prepared, takes_parts=bool(more))
        if not more:
            self._widening.missed.append((key, plan.gatherer))
        tensors = plan.gatherer.read(recipe, present)
        assert tensors is not None
        self._keep((key, None if more else present), plan)
        return plan, tensors

    def publish(self, live: dict[str, Any], group: dict[str, Any]) -> None:
        """Upload the hyperparameters of a live group to wherever kernels read them, in stream order.

        `group` is the same with all options.

        Raises:
            RuntimeError: within a capture, for a graph would repeat the upload; once there are graphs, for a
                tensor that they would not see change.
        """
        plans = {id(plan): plan for plan in (*self._latest.values(), *(plan for plan, _ in self._captured))}
        if plans and is_capturing():
            raise RuntimeError(
                "a hyperparameter cannot change within a capture: set it before, or between replays"
            )
        if self._captured:
            check_live(group)
        for plan in plans.values():
            plan.publish(live, group)


def _flats_of(recipe: Recipe) -> dict[int, Any]:
    """The flat tensors of all buffers by their ids."""
    return {id(flat): flat for buffer in recipe.buffers for _, flat in buffer.flat_tensors()}
