"""Updates parameters of one optimizer, all or some of them, by plans that are prepared once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._distributed.hidden import is_state_asked_for
from dragon.vm.torch.optim._distributed.shards import specs_of
from dragon.vm.torch.optim._formats.resolve import check_options
from dragon.vm.torch.optim._gradients.scaling import Scaling, take_part, zero_norm
from dragon.vm.torch.optim._gradients.shared_norm import Reductions, SharedNorm, make_reductions
from dragon.vm.torch.optim._graphs.capture import is_capturing
from dragon.vm.torch.optim._groups.buffers import FlatBuffer
from dragon.vm.torch.optim._groups.early_averages import drop_early, note_early
from dragon.vm.torch.optim._groups.masters import MasterVersions
from dragon.vm.torch.optim._groups.members import Members
from dragon.vm.torch.optim._groups.sharding import check_sharding
from dragon.vm.torch.optim._groups.storage import options_of
from dragon.vm.torch.optim._options import (
    STORAGE_OPTIONS,
    Group,
    Settings,
    by_value,
    check_own,
    complete,
    needs_norm,
)
from dragon.vm.torch.optim._plan.cache import PlanCache
from dragon.vm.torch.optim._plan.hyperparameters import Hyperparameters
from dragon.vm.torch.optim._plan.recipe import Outcome, Recipe

# Options that all of PyTorch's counterparts have, or that are our own.
_COMMON_FLAGS = ("maximize", "foreach", "capturable", "differentiable", "fused")

_average_of = itemgetter("ema_decay")


class Updater:
    """What an optimizer derives from its groups and states, and needs to update parameters."""

    def __init__(self, owner: str, algorithm: Algorithm, settings: Settings) -> None:
        self._owner, self._algorithm, self._settings = owner, algorithm, settings
        self.plans = PlanCache()
        self.buffers: list[FlatBuffer] = []
        self.masters = MasterVersions()
        self._devices: dict[torch.device, Any] = {}
        # The sums over processes of each part, and what they were made for.
        self._reductions: dict[int, tuple[object, Reductions | None]] = {}
        self._hyperparameters = self._new_hyperparameters()
        # The last norm, and how many steps were skipped as far as the host knows.
        self._so_far: tuple[Tensor | None, int | Tensor] = None, 0

    def read(self, groups: Sequence[Group]) -> list[Group]:
        """Read and check the hyperparameters of all groups; return the groups with all options."""
        self._hyperparameters.read(groups)
        return self._hyperparameters.groups

    def publish(self, groups: Sequence[Group], changed: Group) -> None:
        """Check a group that has changed, and upload its hyperparameters to wherever kernels read them."""
        self._new_hyperparameters().read([changed])
        if any(group is changed for group in groups):
            self.plans.publish(changed, complete(changed, self._algorithm.own_defaults))

    def _new_hyperparameters(self) -> Hyperparameters:
        own = self._algorithm.own_defaults
        names = [name for name in (*self._algorithm.fused_names, *_COMMON_FLAGS) if name not in own]
        # A reference to this object would keep flat buffers until the garbage collector runs.
        return Hyperparameters(names, own, partial(_checked_structure, self._algorithm, self._settings))

    def update(
        self,
        members: Members,
        param_groups: list[Group],
        state: MutableMapping[Any, Any],
        scaling: Scaling,
        *,
        zero_grad: bool,
        are_own: bool = True,
        part: int = 0,
    ) -> None:
        """Update the parameters that have a gradient, as the hyperparameters were last read.

        With `are_own` the gradients are the parameters' own, and not sums of them. `zero_grad` sets only those to
        zero. `part` is a number for some of the parameters, or 0 for all of them.
        """
        values = self._hyperparameters
        zero_grad = zero_grad and are_own
        # What is found in a part has been agreed on.
        decides = scaling.found_inf is not None and not part
        reductions = self._find_reductions(members, part, decides=decides)
        begin_too_early = self._settle_averages(members, values.groups, state)
        recipe = Recipe(
            self._owner,
            self._algorithm,
            self._settings,
            values.groups,
            values.version,
            param_groups,
            state,
            members,
            scaling,
            self.buffers,
            self._devices,
            reductions,
            zero_grad,
            are_own,
            are_last=bool(part),
        )
        key = (zero_grad, are_own, values.structure, reductions is not None, part, *members.lengths)
        outcome = self._run(recipe, key)
        if begin_too_early:
            note_early(members.params, state)
        norm, n_skipped = self._so_far
        norm = norm if outcome.grad_norm is None else outcome.grad_norm
        self._so_far = norm, n_skipped + outcome.n_skipped

    def _run(self, recipe: Recipe, key: tuple[Hashable, ...]) -> Outcome:
        """Take a step, also one without gradients, of which other processes may have some."""
        with_masters = _with_masters(recipe.members, recipe.groups)
        if with_masters and is_capturing():
            self.masters.check_capture(with_masters)
        elif with_masters:
            self.masters.notice(with_masters, recipe.state)
        found = self.plans.find(recipe, key)
        if found is None:
            params, settings = recipe.members.params, recipe.settings
            if recipe.reductions is not None:
                return Outcome(*take_part(recipe.reductions, params, settings, recipe.scaling))
            return Outcome(zero_norm(self._so_far[0], params) if needs_norm(settings) else None)
        plan, tensors = found
        try:
            return plan.run(recipe, tensors)
        finally:
            if with_masters:
                # An interrupted step has written some of them, and their masters.
                self.masters.note(with_masters, recipe.state)

    def _settle_averages(self, members: Members, groups: Sequence[Group], state: Mapping[Any, Any]) -> bool:
        """Let averages begin anew that began too early, and tell whether a step is about to begin such."""
        # A saved step count shows whether an average was loaded in place.
        if not self._algorithm.saves_steps or not any(map(_average_of, groups)):
            return False
        is_asked = is_state_asked_for()
        if not (is_asked or is_capturing()):
            drop_early(members.params, state)
        return is_asked

    def agreed(self, members: Members, found_inf: Tensor, part: int) -> Tensor:
        """A finding about the gradients of a part, positive if it is on any process that shares the parameters."""
        reductions = self._find_reductions(members, part, decides=True)
        if reductions is None:
            return found_inf
        none = torch.zeros(0, dtype=torch.float64, device=found_inf.device)
        return SharedNorm(reductions._replace(each=None), [], 0).reduce(none, found_inf)[1]

    def _find_reductions(self, members: Members, part: int, *, decides: bool) -> Reductions | None:
        """The sums that a step needs; None if it needs none, or no other process takes part.

        With `decides` a finding of some process decides for all.
        """
        process_group = self._settings.process_group
        if not members.are_distributed and process_group is None:
            return None
        clips_each = any(group["clip_norm"] for group in self._hyperparameters.groups)
        if not (decides or clips_each or needs_norm(self._settings)):
            return None
        # All parameters, with a gradient or not, by id: process groups outlive them, tensors must not be kept.
        # Another parameter may have the id of one that is gone.
        made_for = list(map(id, members.params)), specs_of(members.params), clips_each, process_group
        if part not in self._reductions or self._reductions[part][0] != made_for:
            made = make_reductions(members.params, process_group, clips_each)
            self._reductions[part] = made_for, made
        found = self._reductions[part][1]
        # PyTorch makes states where a process has none: other processes may take no such step.
        return None if found is not None and is_state_asked_for() else found

    @property
    def n_skipped(self) -> int:
        """Skipped updates so far. Reading it waits for the device."""
        return int(self._so_far[1]) + sum(int(context.status[0]) for context in self._devices.values())

    @n_skipped.setter
    def n_skipped(self, value: int) -> None:
        self._so_far = self._so_far[0], value

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients at the last update that needed it, 0-dim float64; None before the first."""
        norm, _ = self._so_far
        return None if norm is None else norm.clone()


def _checked_structure(algorithm: Algorithm, settings: Settings, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The options of a group that decide which tensors and kernels take part; ours are as at construction."""
    check_own(group, settings)
    check_options(options_of(group))
    algorithm.check_storage(group)
    if group["clip_norm"]:
        # It may have come after the construction.
        check_sharding([group], settings)
    flags = (bool(group[name]) for name in ("differentiable", "clip_norm", "capturable"))
    storage = tuple(by_value(group[name]) for name in STORAGE_OPTIONS)
    return algorithm.all_state_keys(group), algorithm.counts_steps(group), *flags, storage


def _with_masters(members: Members, groups: Sequence[Group]) -> list[Tensor]:
    """The parameters that have a master."""
    flags = [group["master_weights"] is not None for group in groups]
    if True not in flags:
        return []
    if all(flags):
        return members.params
    return [param for param, index in zip(members.params, members.group_index(), strict=True) if flags[index]]
