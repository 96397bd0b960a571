"""A step that is prepared once, and run as long as its premises hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from itertools import chain, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dragon.vm.torch.optim._backend import choose_backend, step_device
from dragon.vm.torch.optim._chain import (
    Factors,
    Scaling,
    TotalNorm,
    detach_all,
    gradient_factors,
    needs_norm,
    zero_all,
)
from dragon.vm.torch.optim._checks import check_grads, check_memory, check_state
from dragon.vm.torch.optim._eager import EagerGroup
from dragon.vm.torch.optim._flat import coalesce
from dragon.vm.torch.optim._flatten import FlattenedGroup, Signature, complete_states, flatten_groups, settle_state
from dragon.vm.torch.optim._gradients import Gradients, all_apart, apart
from dragon.vm.torch.optim._identity import same_tensors
from dragon.vm.torch.optim._layout import in_layout_of, is_dense, same_walk
from dragon.vm.torch.optim._local import is_distributed, local, local_state
from dragon.vm.torch.optim._native import NativeGroup
from dragon.vm.torch.optim._options import Settings
from dragon.vm.torch.optim._owner import Owner
from dragon.vm.torch.optim._premises import Premises

if TYPE_CHECKING:
    from dragon.vm.torch.optim._device import TritonDevice


class PreparedStep:
    """A step of one set of parameters: who updates which, with states complete and tables laid out.

    Args:
        optimizer: whose step it is.
        params: parameters with a gradient.
        gradients: their gradients, or the shards of those.
        zero_grad: set the gradients to zero as well.

    Raises:
        RuntimeError, ValueError: for gradients or parameters that cannot be updated. Nothing has changed then.
    """

    def __init__(self, optimizer: Owner, params: list[Tensor], gradients: Gradients, zero_grad: bool) -> None:
        grads = gradients.tensors
        self._params = [local(param) for param in params]
        # Themselves, in the order of the rows, whatever becomes of the optimizer's list.
        self._groups = list(optimizer.param_groups)
        self._is_distributed = any(map(is_distributed, params))
        check_grads(self._params, grads, type(optimizer).__name__)
        check_memory(self._params)
        row_of = {id(param): row for row, group in enumerate(optimizer.param_groups) for param in group["params"]}
        self._rows = [row_of[id(param)] for param in params]
        flattened = self._flatten(optimizer, params, grads)
        states = [optimizer.state[param] for param in params if param in optimizer.state]
        self._strays = [
            i for i, grad in enumerate(grads) if is_dense(self._params[i]) and not _walks(self._params[i], grad)
        ]
        if optimizer._settings.flatten and not self._strays:
            # A graph must advance each counter by itself: other steps may part them between its replays.
            separate = {row for row, group in enumerate(self._groups) if group["clip_norm"] or group["capturable"]}
            flattened = [coalesce(g, g.select(gradients), optimizer._buffers, separate) or g for g in flattened]
        self._followers = [s["followers"] for group in flattened for s in group.states if "followers" in s]
        self._versions: list[int] = []
        self._premises = Premises(
            optimizer,
            self._params,
            gradients,
            states,
            fixed_grads=optimizer._settings.flatten,
        )
        algorithm = optimizer._algorithm
        self._hosted: list[NativeGroup | EagerGroup] = []
        by_device: dict[torch.device, list[FlattenedGroup]] = {}
        for group in flattened:
            if group.signature.backend == "triton":
                by_device.setdefault(group.signature.device, []).append(group)
            elif group.signature.backend == "native":
                self._hosted.append(NativeGroup(group, algorithm))
            else:
                self._hosted.append(EagerGroup(group, algorithm))
        # The kernel zeroes the gradients it reads: not those that it reads copies of.
        self._zero_grad = zero_grad
        self._kernel_zeroes = zero_grad and not self._strays and not self._hosted
        self._launched = _on_devices(optimizer, by_device, self._kernel_zeroes)
        # The hosted ones first.
        self._flattened = [member.group for member in self._hosted]
        self._flattened += chain.from_iterable(by_device.values())
        self._total_norm: TotalNorm | None = None
        # Autograd is told that they were written to: neither kernels nor torch's fused operations do that.
        self._written = [*params, *self._params] if self._is_distributed else params

    def _flatten(self, optimizer: Owner, params: list[Tensor], grads: list[Tensor]) -> list[FlattenedGroup]:
        """Choose backends and complete the states; raises before it changes any."""
        settings, shards = optimizer._settings, self._params
        groups = [optimizer.param_groups[row] for row in self._rows]
        states = [optimizer.state.get(param, {}) for param in params]
        keys = [optimizer._state_keys(group) for group in groups]
        for param, state, names, group in zip(params, states, keys, groups, strict=True):
            check_state(param, state, names, optimizer._counts_steps(group))
        backends = [
            choose_backend(
                settings.backend,
                param,
                grad.dtype,
                _state_dtypes(param, state, names, settings.state_dtype),
                group["differentiable"],
            )
            for param, grad, state, names, group in zip(shards, grads, states, keys, groups, strict=True)
        ]
        for i, names in enumerate(keys):
            if names:
                states[i] = optimizer.state[params[i]]
        devices = [
            step_device(param, backend, group) if optimizer._counts_steps(group) else None
            for param, backend, group in zip(params, backends, groups, strict=True)
        ]
        complete_states(params, states, keys, devices, settings.state_dtype)
        for param, state, names, device in zip(params, states, keys, devices, strict=True):
            settle_state(param, state, names, device)
        states = [local_state(state) for state in states]
        signatures = [
            Signature(
                backend,
                param.device,
                param.dtype,
                grad.dtype,
                state[names[0]].dtype if names else param.dtype,
                tuple(name for name in names if name != "ema"),
                "ema" in names,
            )
            for backend, param, grad, state, names in zip(backends, shards, grads, states, keys, strict=True)
        ]
        return flatten_groups(shards, states, self._rows, signatures)

    def is_current(
        self, optimizer: Owner, params: list[Tensor], grads: Gradients, numbers: list[tuple[Any, ...]]
    ) -> bool:
        """Whether everything is still as it was when this step was prepared; for params and grads as there."""
        return (
            (not self._is_distributed or same_tensors(list(map(local, params)), self._params))
            and self._premises.hold(optimizer, grads, numbers)
            and self._versions == self._read_versions()
        )

    def _read_versions(self) -> list[int]:
        """Versions of the counters that stand for one another: nobody else may have written to them."""
        # A tensor of inference mode has no version, and its value decides.
        return [f._version if not f.is_inference() else hash(tuple(f.tolist())) for f in self._followers]

    def run(self, optimizer: Owner, grads: Gradients, numbers: list[tuple[Any, ...]], scaling: Scaling) -> None:
        """Update the parameters from their gradients."""
        settings, groups = optimizer._settings, optimizer.param_groups
        ready = grads
        if self._strays:
            tensors = list(grads.tensors)
            for index in self._strays:
                tensors[index] = in_layout_of(self._params[index], tensors[index])
            ready = Gradients.of(tensors)
        if self._kernel_zeroes and len(ready.addresses.unique()) < len(ready.addresses):
            ready = Gradients.of(apart(ready.tensors))
        are_zero = self._kernel_zeroes
        if self._hosted or (len(self._launched) > 1 and needs_norm(settings)):
            are_zero &= self._run_hosted(optimizer, ready, numbers, scaling)
        else:
            # The norm is the device's now.
            optimizer._grad_norm = None
            for device in self._launched:
                device.update(ready, groups, numbers, settings, scaling)
            increment_version(self._written)
        if are_zero:
            detach_all(grads.tensors)
            increment_version(grads.tensors)
        elif self._zero_grad:
            zero_all(grads.tensors)
        self._versions = self._read_versions()

    def publish(self, group: dict[str, Any]) -> None:
        """Bring a group's hyperparameters up to date where kernels read them, between steps."""
        rows = [row for row, other in enumerate(self._groups) if other is group]
        for row, device in product(rows, self._launched):
            device.publish(row, group)

    def captured(self, optimizer: Owner) -> PreparedStep:
        """This step for a graph: its gradients' addresses stay, its hyperparameters follow `publish`.

        Raises:
            RuntimeError: for a step that decides something on the host.
        """
        if self._hosted or (len(self._launched) > 1 and needs_norm(optimizer._settings)):
            raise RuntimeError(
                "a step cannot be captured that decides on the host: one with parameters or states that no kernel "
                "updates, or with the norm of gradients on several devices"
            )
        self._groups = list(optimizer.param_groups)
        twin = copy(self)
        twin._launched = [device.captured(optimizer.param_groups) for device in self._launched]
        return twin

    def _run_hosted(
        self, optimizer: Owner, grads: Gradients, numbers: list[tuple[Any, ...]], scaling: Scaling
    ) -> bool:
        """Decide about scaling, clipping and skipping on the host, then update with every backend there is.

        Returns:
            False for a step that was skipped.
        """
        settings, groups = optimizer._settings, optimizer.param_groups
        # As the updates walk them: a joined entry is one gradient.
        walked = [group.select(grads) for group in self._flattened]

        def measure() -> float:
            walk = list(chain.from_iterable(walked))
            if self._total_norm is None:
                rows = list(chain.from_iterable(group.rows for group in self._flattened))
                self._total_norm = TotalNorm(walk, rows)
            return self._total_norm.measure(walk, groups, settings.norm_type)

        factors = Factors()
        if any(part is not None for part in scaling) or needs_norm(settings) or any(map(_clips_norm, groups)):
            factors = gradient_factors(grads.tensors, self._rows, groups, settings, scaling, measure)
            optimizer._grad_norm = factors.norm
        if factors.skip:
            optimizer._n_skipped += 1
            return False
        writable = all_apart(walked) if _scales(groups, settings, scaling) else walked
        for member, selected in zip(self._hosted, writable, strict=False):
            member.update(selected, groups, numbers, factors)
        for device in self._launched:
            # A norm of infinity leaves a factor of 0.
            decided = Scaling(_divisor(factors.common), None)
            device.update(grads, groups, numbers, _without_norm(settings), decided)
        increment_version(self._written)
        return True


def _scales(groups: Sequence[dict[str, Any]], settings: Settings, scaling: Scaling) -> bool:
    """Whether the native backend may leave gradients scaled."""
    asked = scaling.grad_scale is not None or needs_norm(settings)
    return asked or any(group["grad_scale"] != 1 or group["clip_norm"] for group in groups)


def _divisor(factor: float) -> Tensor:
    """A factor as a loss scale, by which gradients are divided."""
    return torch.tensor([1 / factor if factor else math.inf], dtype=torch.float32, device="cpu")


def _clips_norm(group: dict[str, Any]) -> bool:
    return bool(group["clip_norm"])


def _without_norm(settings: Settings) -> Settings:
    return settings._replace(max_grad_norm=0.0, skip_nonfinite=False)


def _walks(param: Tensor, grad: Tensor) -> bool:
    return is_dense(grad) and same_walk(grad, param) and not grad.is_conj() and not grad.is_neg()


def _state_dtypes(
    param: Tensor, state: dict[str, Any], names: Sequence[str], dtype: torch.dtype | None
) -> set[torch.dtype]:
    """Dtypes that a parameter's state tensors have, or will have."""
    new = param.dtype if dtype is None or param.is_complex() else dtype
    return {state[name].dtype if name in state else new for name in names}


def _on_devices(
    optimizer: Owner, by_device: dict[torch.device, list[FlattenedGroup]], zero_grad: bool
) -> list[TritonDevice]:
    if not by_device:
        return []
    from dragon.vm.torch.optim._context import DeviceContext
    from dragon.vm.torch.optim._device import TritonDevice

    launched: list[TritonDevice] = []
    for device, flattened in by_device.items():
        if device not in optimizer._contexts:
            optimizer._contexts[device] = DeviceContext(device)
        context = optimizer._contexts[device]
        n_groups, is_first = len(optimizer.param_groups), not launched
        launched.append(
            TritonDevice(flattened, optimizer._algorithm, context, n_groups, zero_grad, counts=is_first)
        )
    return launched
