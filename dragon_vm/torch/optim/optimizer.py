"""The base of the optimizers: PyTorch's `Optimizer`, with Dragon's rules and one update for all groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl as without_torch_function
from torch._C import _set_grad_enabled as set_grad_enabled
from torch._compile import _disable_dynamo

from dragon.vm.torch.optim._accumulate import GradientSums
from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._averages import exchange, restore
from dragon.vm.torch.optim._distributed.hidden import check_norms, split_by_fsdp1
from dragon.vm.torch.optim._distributed.placement import placed_like
from dragon.vm.torch.optim._distributed.shards import is_distributed, local
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.shared_norm import Reductions, SharedNorm, make_reductions
from dragon.vm.torch.optim._gradients.zeroing import zero_all
from dragon.vm.torch.optim._graphs.capture import check_capture, is_capturing
from dragon.vm.torch.optim._graphs.live import make_live
from dragon.vm.torch.optim._groups.buffers import FlatBuffer, make_buffers
from dragon.vm.torch.optim._groups.checks import check_memory, check_param, has_memory, labels
from dragon.vm.torch.optim._groups.eligibility import check_backend
from dragon.vm.torch.optim._groups.members import MemberReader
from dragon.vm.torch.optim._groups.storage import check_storage, options_of
from dragon.vm.torch.optim._options import Settings, check_common, complete, needs_norm, own_tensors, read_settings
from dragon.vm.torch.optim._plan.cache import PlanCache
from dragon.vm.torch.optim._plan.hyperparameters import Hyperparameters
from dragon.vm.torch.optim._plan.recipe import Recipe
from dragon.vm.torch.optim._storage import StoringOptimizer
from dragon.vm.torch.tensor_type import Tensor as DragonTensor

_PLAIN = torch.zeros(())


class Optimizer(StoringOptimizer):
    """Base class of the optimizers; a `torch.optim.Optimizer` that updates all its groups at once.

    It differs from PyTorch's in Dragon's methods: `sum_grad`, and rules of Dragon's own parameters.

    Args:
        params: parameters, named parameters or parameter groups.
        options: hyperparameters of groups that do not give their own, and the options of the optimizer as a whole.
    """

    # What the class computes.
    _algorithm: Algorithm
    _is_built = False

    @_disable_dynamo
    def __init__(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        self._settings = read_settings(options)
        check_common(options, self._settings)
        check_storage(options)
        self._algorithm.check(options)
        self._reset()
        # By name: between this class and PyTorch's there is another of PyTorch's, for `isinstance`.
        torch.optim.Optimizer.__init__(self, params, options)
        self._step_supports_amp_scaling = bool(options["fused"])
        self._check_memory(self.param_groups)
        self._check_sharding()
        self._is_built = True
        self._make_buffers(self.param_groups)

    def _reset(self) -> None:
        """Forget everything that is derived: plans, buffers and sums."""
        self._plans = PlanCache()
        self._hyperparameters: Hyperparameters | None = None
        self._buffers: list[FlatBuffer] = []
        self._devices: dict[torch.device, Any] = {}
        self._sums = GradientSums()
        self._originals: dict[Tensor, Tensor] = {}
        self._members = MemberReader()
        # Sums over processes, and the parameters that they are for, by id.
        self._reductions: tuple[list[int], bool, Reductions | None] | None = None
        self._versions = {}
        self._n_skipped: int | Tensor = 0
        self._grad_norm: Tensor | None = None

    def _check_memory(self, groups: list[dict[str, Any]]) -> None:
        """Check that no two trained parameters share memory; with others they are compared at their first step."""
        params = list(chain.from_iterable(group["params"] for group in groups))
        trained = [i for i, param in enumerate(params) if param.requires_grad and has_memory(local(param))]
        check_memory([local(params[i]) for i in trained], lambda: [labels(groups)[i] for i in trained])

    def _check_sharding(self) -> None:
        """Check that norms will be those of whole gradients, and that no buffer takes memory from its owner."""
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        settings = self._settings
        totals = {"max_grad_norm": settings.max_grad_norm, "skip_nonfinite": settings.skip_nonfinite}
        each = max((group.get("clip_norm", 0.0) for group in self.param_groups), default=0.0)
        check_norms(
            params,
            settings.process_group,
            total=next((f"{name}={value}" for name, value in totals.items() if value), None),
            per_tensor=f"clip_norm={each}" if each else None,
        )
        if settings.flatten and (any(map(is_distributed, params)) or any(split_by_fsdp1(params))):
            raise ValueError(
                "flatten=True moves parameters, but these are distributed: their owner goes on gathering the "
                "memory that they were moved away from. Leave flatten=False"
            )

    def _make_buffers(self, groups: Iterable[dict[str, Any]]) -> None:
        if self._settings.flatten:
            for group in groups:
                if not group.get("clip_norm"):
                    self._buffers += without_torch_function(make_buffers, (), (group["params"],), {})

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a new param group into the optimizer.

        Args:
            param_group: its "params", and the hyperparameters in which it differs from the defaults.

        Raises:
            TypeError, ValueError: as PyTorch, and for hyperparameters out of range, trained integer parameters and
                an explicit backend that cannot update them. Nothing has been added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._settle_group(group)
            own_tensors(group, self.param_groups[:-1])
            if self._is_built:
                self._check_memory([group])
                self._check_sharding()
                self._make_buffers([group])
        except BaseException:
            self.param_groups.pop()
            raise
        make_live(self.param_groups, self._publish)

    def _settle_group(self, group: dict[str, Any]) -> None:
        """Check a group, decide what its parameters decide, and leave only options of groups in it."""
        for name in Settings._fields:
            group.pop(name, None)
        if group.get("epsilon_hat", False) is None:
            # Dragon's own parameters follow Dragon's formula, all others PyTorch's.
            group["epsilon_hat"] = self._follows_dragon(group)
        check_common(group, self._settings)
        self._algorithm.check(group)
        for param in group["params"]:
            if param.requires_grad:
                check_param(param)
                check_backend(None if group["differentiable"] else self._settings.backend, param.device)
        check_storage(group, self._algorithm.state_keys(group))
        self._warn_of_rounding(group)
        self._drop_defaults(group, group)

    def _follows_dragon(self, group: Mapping[str, Any]) -> bool:
        return bool(group["params"]) and all(map(_is_dragon, group["params"]))

    def _publish(self, group: dict[str, Any]) -> None:
        """Upload a live group's hyperparameters to wherever steps, captured ones too, read them."""
        self._new_hyperparameters().read([group])
        for index, member in enumerate(self.param_groups):
            if member is group:
                self._plans.publish(index, complete(group, self._algorithm.own_defaults), self._settings)

    def _new_hyperparameters(self) -> Hyperparameters:
        own = self._algorithm.own_defaults
        names = [name for name in self.defaults if name not in own and name not in Settings._fields]
        return Hyperparameters(names, own, self._structure)

    def _structure(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """The options of a group that decide which tensors and kernels take part."""
        flags = (bool(group[name]) for name in ("differentiable", "clip_norm", "capturable"))
        storage = options_of(group)
        return self._algorithm.all_state_keys(group), self._algorithm.counts_steps(group), *flags, storage

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
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break()
            self._step_undisturbed(zero_grad)
        else:
            self._step(zero_grad)
        return loss

    def _step(self, zero_grad: bool) -> None:
        """Step with gradients off and subclasses' `__torch_function__` off, and leave both as they were."""
        enabled = torch.is_grad_enabled()
        try:
            try:
                set_grad_enabled(enabled and bool(self.defaults["differentiable"]))
                without_torch_function(self._update, (), (zero_grad,), {})
            finally:
                set_grad_enabled(enabled)
        finally:
            # Once more: an interrupt may have hit the line above.
            set_grad_enabled(enabled)

    _step_undisturbed = _disable_dynamo(_step)

    def _update(self, zero_grad: bool) -> None:
        if self._originals:
            raise RuntimeError("step() was called inside swap_ema(): the averages would be updated as parameters")
        groups, settings = self.param_groups, self._settings
        make_live(groups, self._publish)
        if self._hyperparameters is None:
            self._hyperparameters = self._new_hyperparameters()
        values = self._hyperparameters
        self._widen_bounds()
        values.read(groups)
        members = self._members.read(groups)
        groups, grads = values.groups, members.grads
        summed = bool(self._sums)
        if summed:
            grads = self._sums.added_to(members.params, grads)
        if is_capturing():
            has_grads = any(grad is not None for grad in grads)
            check_capture(type(self).__name__, groups, settings.backend, has_grads, self._sums.are_outside)
        scaling = Scaling(getattr(self, "grad_scale", None), _number(getattr(self, "found_inf", None)))
        reductions = self._find_reductions(members.params, groups, scaling)
        recipe = Recipe(
            type(self).__name__,
            self._algorithm,
            settings,
            groups,
            self.state,
            self._buffers,
            self._devices,
            reductions,
            len(members.params),
        )
        key = (zero_grad and not summed, summed, values.structure, reductions is not None, *members.lengths)
        found = self._plans.find(recipe, members, grads, key, zero_grad and not summed)
        if found is None:
            if reductions is not None:
                self._take_part(reductions, scaling, groups)
            return
        if is_capturing():
            self._plans.capture(found.plan, settings)
        else:
            self._notice_writes()
        outcome = found.plan.run(recipe, found.params, found.tensors, values.version, scaling, are_own=not summed)
        self._note_versions()
        self._grad_norm = outcome.grad_norm
        self._n_skipped += outcome.n_skipped
        if summed:
            self._sums.clear()
            if zero_grad:
                # The step read the sums: the gradients that came after them are apart.
                zero_all([local(param.grad) for param in members.params if param.grad is not None])

    def _find_reductions(
        self, params: list[Tensor], groups: list[dict[str, Any]], scaling: Scaling
    ) -> Reductions | None:
        """The sums over processes that a step needs; None if it needs none, or no other process takes part."""
        clips_each = any(group["clip_norm"] for group in groups)
        if not (needs_norm(self._settings) or clips_each or scaling.found_inf is not None):
            return None
        if self._settings.process_group is None and not self._members.are_distributed:
            return None
        ids = list(map(id, params))
        if self._reductions is None or self._reductions[:2] != (ids, clips_each):
            self._reductions = ids, clips_each, make_reductions(params, self._settings.process_group, clips_each)
        return self._reductions[2]

    def _take_part(self, reductions: Reductions, scaling: Scaling, groups: list[dict[str, Any]]) -> None:
        """Take part in the sums of a step for which this process has no gradient."""
        settings = self._settings
        shared = SharedNorm(reductions, [], len(self._reductions[0]) if self._reductions else 0)
        device = next((local(p).device for group in groups for p in group["params"]), torch.device("cpu"))
        none = torch.zeros(0, dtype=torch.float64, device=device)
        if any(group["clip_norm"] for group in groups):
            shared.each(none, scaling.found_inf, skip_nonfinite=settings.skip_nonfinite)
            return
        largest = settings.norm_type == math.inf
        total, flag = shared.total(none, scaling.found_inf, largest=largest)
        scale = 1.0 if scaling.grad_scale is None else scaling.grad_scale.double().to(device).reshape(())
        norm = (total if largest else total.sqrt()).reshape(()) / scale
        self._grad_norm = norm if needs_norm(settings) else None
        skipped = (flag > 0).reshape(()) | (torch.isfinite(norm).logical_not() & settings.skip_nonfinite)
        self._n_skipped = self._n_skipped + skipped.long()

    @torch.no_grad()
    @_disable_dynamo
    def sum_grad(self) -> None:
        """Sum the gradients of all parameters.

        Call it after each backward pass; the next `step` uses the sum, together with any gradient that came after
        the last call, and starts a new one. The gradients themselves are dropped. Sums of half precision gradients
        are kept in float32.
        """
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        launch = self._settings.backend == "triton" or any(param.is_cuda for param in params)
        without_torch_function(self._sums.take, (), (params, launch), {})

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Set the gradients of all parameters to zero. Sums that `sum_grad` gathered stay.

        Args:
            set_to_none: remove the gradients instead. None decides by each parameter: gradients of Dragon's own
                are zeroed, those of all others removed, as with PyTorch.
        """
        without_torch_function(self._zero_grad, (), (set_to_none,), {})

    def _zero_grad(self, set_to_none: bool | None) -> None:
        zeroed = []
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param.grad is None:
                continue
            if set_to_none or (set_to_none is None and not _is_dragon(param)):
                param.grad = None
            else:
                zeroed.append(local(param.grad))
        zero_all(zeroed)

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Exchange the parameters with their exponential moving averages inside a ``with`` block.

        Raises:
            RuntimeError: if no parameter has an average: `ema_decay` is 0, or no step has been taken; from `step`,
                if it is called inside the block.
        """
        if self._originals:
            raise RuntimeError("swap_ema() was called inside swap_ema(): the parameters are exchanged already")
        try:
            try:
                self._notice_writes()
                exchange(self.state, self._originals)
                yield
            finally:
                restore(self._originals)
                if self._versions:
                    self._note_versions()
        finally:
            # Once more: an interrupt may have hit the line above.
            restore(self._originals)

    @property
    def n_skipped_steps(self) -> int:
        """Steps skipped so far for infinite or NaN gradients. Reading it waits for the device."""
        return int(self._n_skipped) + sum(int(context.status[0]) for context in self._devices.values())

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients at the last step that needed it, 0-dim float64; None before the first."""
        if self._grad_norm is None and self._devices:
            status: Tensor = next(iter(self._devices.values())).status
            return status[1].clone()
        return self._grad_norm

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies hold: PyTorch's, the settings, and what is summed and counted."""
        return {
            **super().__getstate__(),
            "param_groups": list(map(dict, self.param_groups)),
            "_settings": self._settings,
            "_sums": self._sums,
            "_n_skipped": self.n_skipped_steps,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickle's contents, or a state dict's that `load_state_dict` has checked."""
        is_copy = "param_groups" not in self.__dict__
        earlier: list[dict[str, Any]] = [] if is_copy else self.param_groups
        if is_copy:
            self._reset()
        else:
            self._plans.forget()
            self._versions = {}
        self._is_built = True
        torch.optim.Optimizer.__setstate__(self, state)
        self.state.update(self._restored or {})
        for index, group in enumerate(self.param_groups):
            old = earlier[index] if index < len(earlier) else {}
            own = self._algorithm.own_defaults
            for name in self.defaults:
                if name in old or name not in (*own, *Settings._fields):
                    group.setdefault(name, old.get(name, self.defaults[name]))
            for name in Settings._fields:
                group.pop(name, None)
            self._drop_defaults(group, group)
        make_live(self.param_groups, self._publish)
        if is_copy:
            self._make_buffers(self.param_groups)


def _number(found_inf: Any) -> Tensor | None:
    """A finding of a `GradScaler` that holds for all processes; None for the 0 that stands for no gradient."""
    if not isinstance(found_inf, Tensor):
        return None
    whole: Tensor = placed_like(_PLAIN, found_inf) if is_distributed(found_inf) else found_inf
    return whole


def _is_dragon(param: Tensor) -> bool:
    """Whether a parameter is one of Dragon's own; `isinstance` says so of every tensor."""
    return DragonTensor in type(param).__mro__
