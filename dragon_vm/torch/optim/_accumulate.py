"""Gradient accumulation: an optimizer that sums gradients over several backward passes until a step uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl as without_torch_function
from torch._compile import _disable_dynamo

from dragon.vm.torch.optim._checkpoint import CheckpointedOptimizer
from dragon.vm.torch.optim._distributed.hidden import check_scaled_sums, looking_scaler, tell_scaler
from dragon.vm.torch.optim._distributed.lanes import has_others
from dragon.vm.torch.optim._distributed.shards import distributed_like
from dragon.vm.torch.optim._gradients.reporting import any_of, report, report_to_all, stand_in
from dragon.vm.torch.optim._gradients.scaling import Scaling, handed_over
from dragon.vm.torch.optim._groups.checks import are_of_one_kind
from dragon.vm.torch.optim._modes import with_plain_tensors
from dragon.vm.torch.optim._options import Settings
from dragon.vm.torch.optim._release import GradientRelease
from dragon.vm.torch.optim._sums import GradientSums

# Of a parameter in state dicts.
_SUM = "grad_sum"


class AccumulatingOptimizer(CheckpointedOptimizer):
    """An optimizer that sums gradients over backward passes. Its state dicts have sums that no step has used."""

    _sums: GradientSums
    # Whether a `GradScaler` leaves unscaling to the step, and the parameters whose sums it finds in `.grad`.
    _handles_scaling = False
    _handed_over: Sequence[Tensor] = ()
    # The parameter that has a gradient only for a `GradScaler` to find.
    _stand_in: Tensor | None = None
    # What others found, where no gradient here has an element that could tell the scaler.
    _untold: Tensor | None = None
    _release: GradientRelease | None

    @torch.no_grad()
    @_disable_dynamo
    def sum_grad(self) -> None:
        """Sum the gradients of all parameters.

        Call it after each backward pass; the next `step` uses the sum, together with any gradient that came after
        the last call, and starts a new one. The gradients themselves are dropped. Sums of half precision gradients
        are kept in float32. Gradients that DDP has not reduced, inside `no_sync`, are reduced once, by the step.
        With `find_unused_parameters` they stay as zeros until then. Wrap the model before the first call: a search
        for DDP takes long, so that a later one finds a new wrapper only now and then.
        DDP tells only of its last forward pass. So no forward pass with gradients and outside of `no_sync` may
        come between the backward pass inside and this call: the step would not reduce, and replicas would diverge.

        Raises:
            RuntimeError: with `release_gradients` or `differentiable`, for sparse gradients, and for gradients of
                DDP inside `no_sync` and inside `Join`.
            ValueError: for gradients of FSDP1 inside `no_sync`.
        """
        if self._settings.release_gradients:
            raise RuntimeError("sum_grad() cannot sum gradients that release_gradients has used and freed")
        if self.defaults["differentiable"]:
            raise RuntimeError(
                "sum_grad() with differentiable=True: autograd would not see the sum. "
                "Let backward passes add to .grad"
            )
        params, self._handed_over = self._all_params(), ()
        launch = self._settings.backend == "triton" or any(param.is_cuda for param in params)
        with_plain_tensors(lambda: self._sums.take(params, launch))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a `GradScaler` leaves unscaling to the step.

        It asks before it looks at `.grad`: sums go there, to be checked and unscaled with the rest. So does what
        other processes of `process_group` find, and what was found in gradients that are gone.
        """
        is_shared = has_others(self._settings.process_group)
        is_left = "found_inf" in vars(self)
        is_asked = bool(self._sums) or is_shared or self._release is not None
        scaler = looking_scaler() if is_asked or is_left else None
        if scaler is not None and is_left:
            # By a step that failed: the scaler would multiply its scale by the one that is left.
            self._drop_scaling()
        if self._release is not None and scaler is not None:
            self._release.check_scaler(scaler)
        if self._sums:
            if not is_shared and scaler is not None:
                check_scaled_sums(self._all_params())
            note = partial(setattr, self, "_handed_over")
            without_torch_function(self._sums.hand_over, (), (self._all_params(), note), {})
        if (is_shared or self._release is not None) and scaler is not None:
            without_torch_function(self._report, (), (is_shared,), {})
        return bool(self._handed_over) or self._handles_scaling or is_shared

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._handles_scaling = value

    def _report(self, is_shared: bool) -> None:
        """Let a scaler find what was found elsewhere, by a gradient of zeros if there is none."""
        params = self._all_params()
        if is_shared:
            self._stand_in, self._untold = report_to_all(params, self._settings.process_group)
        elif self._release is not None and (found := self._release.report.untold()):
            self._stand_in = stand_in(params)
            report(params, found)

    def _scaling(self) -> Scaling:
        """What a `GradScaler` hands over for this step."""
        scaling = handed_over(self)
        has_stood_in = self._drop_stand_in()
        untold, self._untold = self._untold, None
        if untold is not None and tell_scaler(untold):
            scaling = scaling._replace(found_inf=untold)
        # A scaler that leaves unscaling to the step says what it found, and the scale if there still is one.
        if scaling.grad_scale is None and "found_inf" in vars(self):
            self._check_unscaled(scaling, has_stood_in)
        return scaling

    def _check_unscaled(self, scaling: Scaling, has_stood_in: bool) -> None:
        """Refuse a step whose gradients a scaler unscaled before it could find what this optimizer reports."""
        flags, group = [bool(self._handed_over), has_stood_in], self._settings.process_group
        if has_others(group):
            found = scaling.found_inf is not None and bool(scaling.found_inf > 0)
            *flags, is_found, is_clean = any_of([*flags, found, not found], self._all_params(), group)
            flags.append(is_found and is_clean)
        if not any(flags):
            return
        reasons = (
            "sums of sum_grad(): they are still scaled. Leave unscale_() out: the step unscales sums too, and "
            "max_grad_norm clips them. Or leave sum_grad() out",
            "gradients on this process, or on another one of process_group. Leave unscale_() out: the step "
            "unscales too",
            "gradients of other processes of process_group, and found something else. Leave unscale_() out: the "
            "step unscales too, and max_grad_norm clips. Or use a ShardedGradScaler with this process_group",
        )
        # The sums are of no use any more. The scaler takes its findings away behind a step that returns.
        self._drop_handed_over()
        self._drop_scaling()
        raise RuntimeError(f"GradScaler.unscale_() saw no {reasons[flags.index(True)]}")

    def _drop_scaling(self) -> None:
        """Take away what a scaler has handed over."""
        for name in ("grad_scale", "found_inf"):
            vars(self).pop(name, None)

    def _drop_stand_in(self) -> bool:
        """Take away a gradient that was there only for a scaler, and tell whether there was one."""
        param, self._stand_in = self._stand_in, None
        if param is not None:
            param.grad = None
        return param is not None

    def _drop_handed_over(self) -> None:
        """End sums with the step that used them, or that a scaler skipped."""
        handed_over, self._handed_over = self._handed_over, ()
        for param in handed_over:
            param.grad = None

    def _take_back(self) -> None:
        """Make sums again of what no step has used."""
        self._drop_stand_in()
        if self._handed_over:
            params, self._handed_over = self._handed_over, ()
            with_plain_tensors(lambda: self._sums.take(params, False))

    def _as_saved(self, packed: dict[str, Any]) -> dict[str, Any]:
        """With the sums."""
        saved = super()._as_saved(packed)
        states = saved["state"]
        for index, param in enumerate(self._all_params()):
            if param in self._sums.totals:
                total = distributed_like(param, self._sums.totals[param])
                states[index] = {**states.get(index, {}), _SUM: total}
        return saved

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of PyTorch's counterpart, sharing no memory with it.

        Hyperparameters that it does not know keep their values; so does the count of skipped steps, and sums of
        gradients if it has none. State tensors get the optimizer's formats, else the wider of their and the
        parameter's dtype.

        Raises:
            ValueError: as PyTorch, and for missing or misshapen states. Nothing has changed then.
        """
        self._take_back()
        try:
            super().load_state_dict(state_dict)
        finally:
            self._restored = {}

    def _taken(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy the sums of a dict too."""
        state = state_dict["state"]
        saved = {key: each[_SUM] for key, each in state.items() if isinstance(each, Mapping) and _SUM in each}
        if not saved:
            return super()._taken(state_dict)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        sums = {param: saved[key] for key, param in zip(keys, self._all_params(), strict=True) if key in saved}
        _check_sums(sums, self._settings)
        restored = GradientSums()
        with_plain_tensors(lambda: restored.restore(sums))
        self._restored = {"_sums": restored}
        rest = dict(state)
        for key in saved:
            rest[key] = {name: value for name, value in state[key].items() if name != _SUM}
        return super()._taken({**state_dict, "state": rest})


def _check_sums(sums: Mapping[Tensor, Any], settings: Settings) -> None:
    """Refuse to load what is no sum of gradients of its parameter, and sums that no step would use."""
    if settings.release_gradients:
        raise ValueError(
            f"loaded state dict has {_SUM}, which release_gradients={settings.release_gradients!r} would leave "
            "unused. Load it without release_gradients and call step(), or save it behind a step"
        )
    for param, total in sums.items():
        if not (isinstance(total, Tensor) and total.shape == param.shape and are_of_one_kind(param, total)):
            found = f"{total.dtype} and shape {tuple(total.shape)}" if isinstance(total, Tensor) else repr(total)
            raise ValueError(
                f"loaded state dict has {_SUM} of {found} for a parameter of {param.dtype} and shape "
                f"{tuple(param.shape)}"
            )
