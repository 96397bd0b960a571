"""The base of the optimizers: PyTorch's `Optimizer`, with Dragon's rules and one update for all groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, compress, repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from dragon.vm.torch.optim._backend import check_backend
from dragon.vm.torch.optim._capture import check_capture, is_capturing
from dragon.vm.torch.optim._chain import Scaling, zero_all
from dragon.vm.torch.optim._checkpoint import CheckpointedOptimizer
from dragon.vm.torch.optim._checks import check_memory, check_param, has_memory
from dragon.vm.torch.optim._ema import exchanged
from dragon.vm.torch.optim._flat import FlatBuffer, make_buffers
from dragon.vm.torch.optim._gradients import Gradients
from dragon.vm.torch.optim._identity import same_tensors
from dragon.vm.torch.optim._live import make_live
from dragon.vm.torch.optim._local import check_local, everywhere, is_distributed, local
from dragon.vm.torch.optim._numbers import GroupNumbers
from dragon.vm.torch.optim._options import Settings, check_common, own_tensors
from dragon.vm.torch.optim._prepared import PreparedSteps
from dragon.vm.torch.optim._sums import GradientSums


class Optimizer(CheckpointedOptimizer):
    """Base class of the optimizers; a `torch.optim.Optimizer` that updates all its groups at once.

    It differs from PyTorch's in Dragon's methods and defaults: `sum_grad`, and `zero_grad` that zeroes unless told
    otherwise.

    Args:
        params: parameters, named parameters or parameter groups.
        defaults: hyperparameters of groups that do not give their own.
        settings: options of the optimizer as a whole.
    """

    # Name of the update, as the kernels and backends know it.
    _algorithm: str
    _is_built = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], settings: Settings) -> None:
        self._settings = settings
        self._reset()
        # By name: between this class and PyTorch's there may be another of PyTorch's, for `isinstance`.
        torch.optim.Optimizer.__init__(self, params, defaults)
        check_memory(self._params_with_memory())
        self._is_built = True
        self._move_to_buffers()

    def _reset(self) -> None:
        """Forget everything that is derived: plans, tables and sums."""
        self._prepared = PreparedSteps()
        self._contexts: dict[torch.device, Any] = {}
        self._params: list[Tensor] = []
        self._members: list[list[Tensor]] = []
        self._numbers = GroupNumbers()
        self._buffers: list[FlatBuffer] = []
        self._sums = GradientSums()
        self._swapped = False
        self._is_distributed = False
        self._n_skipped = 0
        self._grad_norm: Tensor | None = None

    def _params_with_memory(self) -> list[Tensor]:
        return [local(param) for group in self.param_groups for param in group["params"] if has_memory(param)]

    def _move_to_buffers(self) -> None:
        """With ``flatten=True``, move parameters that are in no flat buffer yet into new ones."""
        if self._settings.flatten:
            moved = {id(param) for buffer in self._buffers for param in buffer.params}
            self._buffers += make_buffers([p for p in self._params_with_memory() if id(p) not in moved])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check a group's hyperparameters; raises `ValueError` for one out of range."""
        check_common(group, self._settings)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors of a parameter, in the order in which the update walks them."""
        raise NotImplementedError

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        """Whether the update needs a step counter."""
        raise NotImplementedError

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options of a group that decide which tensors and kernels take part."""
        flags = (bool(group[name]) for name in ("differentiable", "clip_norm", "capturable"))
        return self._state_keys(group), *flags

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a new param group into the optimizer.

        Args:
            param_group: its "params", and the hyperparameters in which it differs from the defaults.

        Raises:
            TypeError, ValueError: as PyTorch, and for hyperparameters out of range, integer parameters and an
                explicit backend that cannot update them. Nothing has been added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for param in group["params"]:
                check_param(param)
                check_backend(None if group["differentiable"] else self._settings.backend, param.device)
            own_tensors(group, self.param_groups[:-1])
            if self._is_built:
                check_memory(self._params_with_memory())
        except Exception:
            self.param_groups.pop()
            raise
        make_live(self)

    def _publish(self, group: dict[str, Any]) -> None:
        """Upload a live group's hyperparameters to wherever steps, captured ones too, read them."""
        GroupNumbers().read([group], self.defaults)
        self._prepared.publish(self, group)

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
        differentiable = bool(self.defaults.get("differentiable"))
        grad_mode = torch.set_grad_enabled(differentiable and torch.is_grad_enabled())
        with grad_mode, torch._C.DisableTorchFunctionSubclass():
            self._update(zero_grad)

    _step_undisturbed = _disable_dynamo(_step)

    def _update(self, zero_grad: bool) -> None:
        if self._swapped:
            raise RuntimeError("step() was called inside swap_ema(): the averages would be updated as parameters")
        groups = self.param_groups
        if not (are_unchanged := self._numbers.are_unchanged(groups)):
            self._read_members()
        params = self._params
        grads = self._sums.gradients(params, self._is_distributed)
        if is_capturing():
            check_capture(self, params, grads.tensors, self._sums.are_outside)
        if self._is_distributed:
            check_local(self._settings, groups)
        scaling = Scaling(getattr(self, "grad_scale", None), everywhere(getattr(self, "found_inf", None)))
        numbers = self._numbers.values if are_unchanged else self._numbers.read(groups, self.defaults)
        asked_to_zero, zero_grad = zero_grad, zero_grad and not self._sums
        options = bytes([zero_grad, bool(self._sums)])
        # The usual case first: all parameters have a gradient, as at the last step. None fails the guard.
        prepared = self._prepared.current(options, self, params, grads, numbers)
        if prepared is None:
            for buffer in self._buffers:
                buffer.gather()
            grads = self._sums.gradients(params, self._is_distributed) if self._buffers else grads
            present = bytes(map(is_not, grads.tensors, repeat(None)))
            if not any(present):
                return
            key = options
            if not all(present):
                params, key = list(compress(params, present)), options + present
                grads = Gradients.of(list(compress(grads.tensors, present)))
            prepared = self._prepared.prepare(key, self, params, grads, numbers)
        if is_capturing():
            prepared = self._prepared.capture(prepared, self)
        prepared.run(self, grads, numbers, scaling)
        if self._sums:
            self._sums.clear()
            if asked_to_zero:
                # The step read the sums: the gradients that came after them are apart.
                zero_all([local(param.grad) for param in params if param.grad is not None])

    def _read_members(self) -> None:
        """Notice other parameters in the groups."""
        if not same_tensors(members := [list(g["params"]) for g in self.param_groups], self._members):
            self._numbers.forget()
            self._members, self._params = members, list(chain.from_iterable(members))
            self._prepared.forget()
            self._move_to_buffers()
            self._is_distributed = any(map(is_distributed, self._params))

    @torch.no_grad()
    @_disable_dynamo
    def sum_grad(self) -> None:
        """Sum the gradients of all parameters.

        Call it after each backward pass; the next `step` uses the sum, together with any gradient that came after
        the last call, and starts a new one. The gradients themselves are dropped. Sums of half precision gradients
        are kept in float32.
        """
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        with torch._C.DisableTorchFunctionSubclass():
            self._sums.take(params, launch=self._settings.backend == "triton" or any(p.is_cuda for p in params))

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set the gradients of all parameters to zero.

        Sums that `sum_grad` gathered stay.

        Args:
            set_to_none: remove the gradients instead of zeroing them.
        """
        with torch._C.DisableTorchFunctionSubclass():
            params = list(chain.from_iterable(group["params"] for group in self.param_groups))
            if set_to_none:
                for param in params:
                    param.grad = None
                return
            held = {id(p) for buffer in self._buffers if buffer.zero() for p in buffer.params}
            zero_all([local(p.grad) for p in params if p.grad is not None and id(p) not in held])

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Exchange the parameters with their exponential moving averages inside a ``with`` block.

        Raises:
            RuntimeError: if no parameter has an average: `ema_decay` is 0, or no step has been taken; from `step`,
                if it is called inside the block.
        """
        if self._swapped:
            raise RuntimeError("swap_ema() was called inside swap_ema(): the parameters are exchanged already")
        with exchanged(self.state):
            self._swapped = True
            try:
                yield
            finally:
                self._swapped = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a `GradScaler` hands its scale and its findings to `step`, which skips on the device.

        ``fused=False`` turns it off for frameworks that clip between unscaling and the step, and then refuse
        optimizers that unscale on their own.
        """
        return self.defaults["fused"] is not False

    @property
    def n_skipped_steps(self) -> int:
        """Steps skipped so far for infinite or NaN gradients. Reading it waits for the device."""
        return self._n_skipped + sum(int(context.status[0]) for context in self._contexts.values())

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients at the last step that needed it, 0-dim float64; None before the first."""
        if self._grad_norm is None and self._contexts:
            status: Tensor = next(iter(self._contexts.values())).status
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
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickle's contents, or a state dict's that `load_state_dict` has checked."""
        earlier: Iterable[dict[str, Any]] = repeat({})
        if "param_groups" in self.__dict__:
            earlier = self.param_groups
            self._prepared.forget()
        else:
            self._reset()
        self._is_built = True
        super().__setstate__(state)
        self.state.update(self._restored or {})
        for group, old in zip(self.param_groups, earlier, strict=False):
            for name, default in self.defaults.items():
                group.setdefault(name, old.get(name, default))
        make_live(self)
