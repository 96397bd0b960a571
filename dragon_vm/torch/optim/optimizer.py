"""The base of the optimizers: PyTorch's `Optimizer`, with Dragon's rules and one update for all groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._C import _disabled_torch_function_impl as without_torch_function
from torch._compile import _disable_dynamo

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._averages import exchanged
from dragon.vm.torch.optim._distributed.handles import borrowed, returned
from dragon.vm.torch.optim._distributed.hidden import is_state_asked_for
from dragon.vm.torch.optim._distributed.lanes import check_process_group
from dragon.vm.torch.optim._distributed.owners import check_accumulated
from dragon.vm.torch.optim._distributed.placement import lying_otherwise
from dragon.vm.torch.optim._gradients.unscaling import unscale_left
from dragon.vm.torch.optim._gradients.zeroing import are_dragon, zero_or_remove
from dragon.vm.torch.optim._graphs.capture import check_capture, is_capturing
from dragon.vm.torch.optim._graphs.live import make_live, unwatched
from dragon.vm.torch.optim._groups.bounds import widen_bounds
from dragon.vm.torch.optim._groups.buffers import make_buffers
from dragon.vm.torch.optim._groups.checks import check_differentiable, check_param, check_trained
from dragon.vm.torch.optim._groups.eligibility import check_backend
from dragon.vm.torch.optim._groups.members import MemberReader
from dragon.vm.torch.optim._groups.sharding import check_sharding
from dragon.vm.torch.optim._groups.storage import check_storage
from dragon.vm.torch.optim._hooks import hooked_step, recorded
from dragon.vm.torch.optim._modes import undisturbed, with_plain_tensors
from dragon.vm.torch.optim._options import Settings, check_common, check_keys, complete, own_tensors, read_settings
from dragon.vm.torch.optim._plan.updater import Updater
from dragon.vm.torch.optim._release import GradientRelease, check_release, keep_gradients
from dragon.vm.torch.optim._sums import GradientSums
from dragon.vm.torch.optim._takeover import TakingOptimizer


class Optimizer(TakingOptimizer):
    """Base class of the optimizers; a `torch.optim.Optimizer` that updates all its groups at once.

    Args:
        params: parameters, named parameters or parameter groups.
        options: hyperparameters of groups that do not give their own, and the options of the optimizer as a whole.
    """

    # What the class computes.
    _algorithm: Algorithm
    _is_built = False
    profile_hook_step = staticmethod(hooked_step)

    @_disable_dynamo
    def __init__(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        self._settings = read_settings(options)
        check_process_group(self._settings.process_group)
        self._checked(options)
        if "betas" in options:
            # As PyTorch's: a group that gives its own keeps the list that it gave.
            options["betas"] = tuple(options["betas"])
        self._forget_derived()
        # PyTorch's class of the same algorithm is there for `isinstance`.
        self._behind_counterpart().__init__(params, options)
        self._handles_scaling = bool(options["fused"])
        self._check_params(self.param_groups)
        self._hook_own()
        self._is_built = True
        self._make_buffers(self.param_groups)
        self._watch(self.param_groups)

    def _forget_derived(self) -> None:
        """Forget everything that is derived: plans, buffers and sums."""
        self._updater = Updater(type(self).__name__, self._algorithm, self._settings)
        self._sums = GradientSums()
        self._release = None
        self._originals = {}
        self._members = MemberReader()

    def _check_params(self, groups: list[dict[str, Any]]) -> None:
        """Check the memory of trained parameters, that of all groups before a buffer parts it, and sharding."""
        check_trained(self.param_groups if self._settings.flatten else groups)
        check_sharding(self.param_groups, self._settings)
        check_release(self.param_groups, self._settings)

    def _watch(self, groups: list[dict[str, Any]]) -> None:
        """From here on decide about the gradients of new groups: release them if `release_gradients` says so."""
        if self._settings.release_gradients is False:
            keep_gradients(groups, self)
            return
        if self._release is None:
            # A scaler leaves unscaling to the step: it says so by what it hands over.
            self._handles_scaling = True
            self._release = GradientRelease(self)
        self._release.watch(self.param_groups)

    def _make_buffers(self, groups: Iterable[dict[str, Any]], *, leaves_shared: bool = False) -> None:
        # Kernels update all tensors in one launch, and other operations a tensor at a time.
        if self._settings.flatten and self._settings.backend in (None, "native"):
            self._updater.buffers += with_plain_tensors(lambda: make_buffers(groups, leaves_shared=leaves_shared))

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a new param group into the optimizer.

        Args:
            param_group: its "params", and the hyperparameters in which it differs from the defaults.

        Raises:
            TypeError, ValueError: as PyTorch; for hyperparameters out of range, options of the optimizer as a
                whole, and trained parameters that cannot be updated. Nothing has been added then.
        """
        # Before PyTorch fills in what the group does not say.
        check_keys(param_group, vars(self))
        n_groups = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            self._settle_group(group)
            own_tensors(group, self.param_groups[:-1])
            if self._is_built:
                self._check_params([group])
                self._make_buffers([group])
        except BaseException:
            del self.param_groups[n_groups:]
            raise
        make_live(self.param_groups, self._publish)
        if self._is_built:
            self._watch([group])

    def _settle_group(self, group: dict[str, Any]) -> None:
        """Check a group, decide what its parameters decide, and leave only options of groups in it."""
        for name in Settings._fields:
            group.pop(name, None)
        if group.get("epsilon_hat", False) is None:
            # Dragon's own parameters follow Dragon's formula, all others PyTorch's.
            group["epsilon_hat"] = are_dragon(group["params"])
        full = self._checked(group)
        check_differentiable(group, self._settings.max_grad_norm)
        self._warn_of_options(full)
        self._drop_defaults(group)

    def _checked(self, group: dict[str, Any]) -> dict[str, Any]:
        """Check a group, or the options of those that do not give their own; return it with all options."""
        check_common(group, self._settings)
        self._algorithm.check(group)
        self._algorithm.check_storage(group)
        for param in group.get("params", ()):
            if param.requires_grad:
                check_param(param)
                check_backend(None if group["differentiable"] else self._settings.backend, param.device)
        full = complete(group, self._algorithm.own_defaults)
        check_storage(full, self._algorithm.state_keys(full))
        return full

    def _publish(self, group: dict[str, Any]) -> None:
        """Upload a live group's hyperparameters to wherever steps, captured ones too, read them."""
        self._updater.publish(self.param_groups, group)
        # What this changes is published in turn.
        widen_bounds([group], self.state)

    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Update all parameter groups using gradients.

        Args:
            closure: reevaluates the model and returns the loss.
            zero_grad: set the gradients to zero, in the same pass where the backend can.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            if self._release is not None:
                raise RuntimeError("release_gradients updates in each backward pass: step() takes no closure then")
            with torch.enable_grad():
                loss = closure()
        step = self._take_step_undisturbed if torch.compiler.is_dynamo_compiling() else self._take_step
        step(zero_grad)
        return loss

    def _take_step(self, zero_grad: bool) -> None:
        undisturbed(self._update_all, zero_grad, with_grad=bool(self.defaults["differentiable"]))

    _take_step_undisturbed = _disable_dynamo(_take_step)

    def _update_all(self, zero_grad: bool) -> None:
        groups, backend = self._read_groups(), self._settings.backend
        scaling = self._scaling()
        has_released = self._release is not None and self._release.begin(scaling.grad_scale)
        members = self._members.read(self.param_groups)
        # A step that is to create states uses no sum up.
        summed = bool(self._sums) and (bool(self.state) or not is_state_asked_for())
        if summed:
            self._sums.reduce()
            members = members._replace(grads=self._sums.added_to(members.params, members.grads))
        if is_capturing():
            check_capture(type(self).__name__, groups, backend, members.have_grads, self._sums.are_outside)
        if members.are_distributed and not (has_released or members.have_grads):
            check_accumulated(members.params)
        step = members, self.param_groups, self.state, scaling
        self._updater.update(*step, zero_grad=zero_grad, are_own=not summed)
        self._drop_handed_over()
        if summed:
            self._sums.finish()
        if self._release is not None:
            zero_or_remove(members.params, True)  # what incomplete buckets left to this step
        # The step read sums, or copies that lie as the parameters do: the gradients themselves are apart.
        elif summed or members.are_copies:
            left = members.params if summed else lying_otherwise(members.params, members.grads)
            if zero_grad:
                zero_or_remove(left, False)
            elif scaling.grad_scale is not None:
                unscale_left(left, scaling)

    def _read_groups(self) -> list[dict[str, Any]]:
        if self._originals:
            raise RuntimeError("step() was called inside swap_ema(): the averages would be updated as parameters")
        make_live(self.param_groups, self._publish)
        groups = self._updater.read(self.param_groups)
        # Only now, since what is refused must have changed nothing.
        has_changed = widen_bounds(self.param_groups, self.state, self._sums.totals)
        return self._updater.read(self.param_groups) if has_changed else groups

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Set the gradients of all parameters to zero. Sums that `sum_grad` gathered stay.

        Args:
            set_to_none: remove the gradients instead. None decides by each parameter: gradients of Dragon's own
                are zeroed, those of all others removed, as with PyTorch.
        """
        with recorded(self._zero_grad_profile_name):
            without_torch_function(self._zero_all, (), (set_to_none,), {})

    def _zero_all(self, set_to_none: bool | None) -> None:
        if self._release is not None:
            self._release.begin()
        self._take_back()
        zero_or_remove(self._all_params(), set_to_none)

    def swap_ema(self) -> AbstractContextManager[None]:
        """Exchange the parameters with their exponential moving averages inside a ``with`` block.

        Raises:
            RuntimeError: if no parameter has an average: `ema_decay` is 0, or no step has been taken; if FSDP1
                splits parameters; from `step`, copies and pickles of the optimizer inside the block.
        """
        return exchanged(self.state, self._originals, self._updater.masters)

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies hold: PyTorch's, the settings, and what is summed and counted."""
        if self._originals:
            raise RuntimeError("an optimizer was copied inside swap_ema(): its parameters would be the averages")
        self._settle_masters()
        self._take_back()
        state = super().__getstate__()
        return {
            **state,
            "defaults": borrowed(state["defaults"]),
            "param_groups": unwatched(self.param_groups),
            "_settings": borrowed(self._settings._asdict()),
            "_sums": self._sums,
            "_n_skipped": self._updater.n_skipped,
            "_handles_scaling": self._handles_scaling,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickle's contents, or a state dict's that `load_state_dict` has checked."""
        earlier: list[dict[str, Any]] = vars(self).get("param_groups", [])
        if is_copy := "_settings" in state:
            self._settings, self.defaults = Settings(**returned(state["_settings"])), returned(state["defaults"])
            state = {**state, "_settings": self._settings, "defaults": self.defaults}
            self._forget_derived()
            self._updater.n_skipped = state["_n_skipped"]
        self._is_built = True
        state = self._with_restored(state)
        self._complete_groups(state["param_groups"], earlier, state["state"])
        self._behind_counterpart().__setstate__(state)
        if not is_copy:
            # Not before: an interrupt of the loading must leave the masters that are stale known as such.
            self._updater.plans.forget()
            self._updater.masters.forget()
        make_live(self.param_groups, self._publish)
        if is_copy:
            self._hook_own()
            # Their memory may have been shared after the construction.
            self._make_buffers(self.param_groups, leaves_shared=True)
            self._watch(self.param_groups)
