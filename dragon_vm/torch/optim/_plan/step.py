"""A step that is prepared once, and run as long as its guards hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dragon.vm.torch.optim._backends.eager import EagerGroup
from dragon.vm.torch.optim._backends.native import NativeGroup
from dragon.vm.torch.optim._backends.piecewise import PiecewiseGroup
from dragon.vm.torch.optim._backends.selection import Gathered
from dragon.vm.torch.optim._gradients.scaling import Factors, Scaling, TotalNorm, gradient_factors
from dragon.vm.torch.optim._gradients.shared_norm import SharedNorm
from dragon.vm.torch.optim._gradients.zeroing import apart, detach_all, zero_all
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._groups.layout import in_layout_of
from dragon.vm.torch.optim._options import Settings, needs_norm
from dragon.vm.torch.optim._plan.guards import Guard, addresses_of
from dragon.vm.torch.optim._plan.preparation import Prepared
from dragon.vm.torch.optim._plan.recipe import Outcome, Recipe
from dragon.vm.torch.optim._plan.state_reader import StateReader

if TYPE_CHECKING:
    from dragon.vm.torch.optim._backends.triton import TritonDevice


class StepPlan:
    """A step of one set of parameters: who updates which, with states complete and tables laid out.

    It holds no tensor of the user's: each step gathers them from where they live.

    Args:
        recipe: what the optimizer is.
        prepared: the tensors in their flattened groups, their states complete.
        zero_grad: set the gradients to zero as well.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared, zero_grad: bool) -> None:
        self._algorithm = recipe.algorithm
        self._group_index = prepared.group_index
        self._joined = prepared.joined
        self._strays = prepared.strays
        self._are_distributed = prepared.are_distributed
        flattened = prepared.flattened
        n_gathered = len(prepared.group_index) + len(prepared.joined)
        hosts = [group for group in flattened if group.signature.backend != "triton"]
        self._hosts = [_on_host(recipe, group, n_gathered) for group in hosts]
        self._zero_grad = zero_grad
        # The kernel zeroes the gradients it reads: not those that it reads copies of.
        self._kernel_zeroes = zero_grad and not self._strays and not self._hosts
        self._devices = _on_devices(recipe, flattened, n_gathered, self._kernel_zeroes)
        self._states = StateReader(recipe.state, prepared)
        # Positions of the entries of all flattened groups: a buffer is one gradient, not its parameters.
        on_devices = [group for group in flattened if group.signature.backend == "triton"]
        self._walked = [entry.position for group in (*hosts, *on_devices) for entry in group.entries]
        self._total_norm: TotalNorm | None = None
        self._shared: SharedNorm | None = None
        if recipe.reductions:
            first_of = [*prepared.among_all, *(prepared.among_all[j.positions[0]] for j in prepared.joined)]
            self._shared = SharedNorm(recipe.reductions, [first_of[i] for i in self._walked], recipe.n_params)
        self._guard: Guard | None = None
        if not prepared.are_opaque:
            states = self._states.read(recipe.state, prepared.params)
            assert states is not None
            # The last write makes the plan valid.
            self._guard = Guard(prepared.grads, prepared.shards, states)

    def gather(
        self, state: Mapping[Any, Any], params: list[Tensor], shards: list[Tensor], grads: list[Any]
    ) -> Gathered | None:
        """The tensors of a step, if everything is as it was when this plan was made.

        Args:
            state: of the optimizer.
            params: parameters, as many as the plan has.
            shards: for each the tensor that is updated.
            grads: gradients; None for one that is missing, which is a difference.
        """
        if self._guard is None:
            return None
        try:
            states = self._states.read(state, params)
            if states is None:
                return None
            addresses = self._guard.check(grads, shards, states)
        except (KeyError, TypeError, AttributeError, IndexError):
            # Something is no tensor any more, or is not there.
            return None
        return None if addresses is None else Gathered(shards, grads, states, addresses)

    def gather_anew(self, state: Mapping[Any, Any], prepared: Prepared) -> Gathered:
        """The tensors of the step that this plan was just made for."""
        states = self._states.read(state, prepared.params)
        assert states is not None
        addresses = [] if prepared.are_opaque else addresses_of(prepared.grads)
        return Gathered(prepared.shards, prepared.grads, states, addresses)

    def run(
        self,
        recipe: Recipe,
        params: list[Tensor],
        tensors: Gathered,
        version: int,
        scaling: Scaling,
        *,
        are_own: bool,
    ) -> Outcome:
        """Update the parameters from their gradients.

        Args:
            recipe: what the optimizer is.
            params: parameters.
            tensors: what `gather` found.
            version: of the hyperparameters; a new one after each change.
            scaling: a `GradScaler`'s.
            are_own: whether the gradients are the parameters' own, and not sums of them.
        """
        settings = recipe.settings
        if self._joined and are_own:
            tensors = self._in_buffers(params, tensors)
        grads = tensors.grads
        ready = self._ready(tensors, are_own)
        outcome, are_zero = Outcome(), self._kernel_zeroes
        if self._hosts or (len(self._devices) > 1 and needs_norm(settings)):
            outcome = self._run_on_host(recipe, ready, version, scaling)
            are_zero &= not outcome.n_skipped
        else:
            for device in self._devices:
                values = recipe.groups, recipe.algorithm, version
                device.update(ready.addresses, *values, settings, scaling, self._shared)
        if not outcome.n_skipped:
            # Autograd is told of what neither kernels nor torch's fused operations tell it.
            increment_version(params)
            if self._are_distributed:
                increment_version(tensors.params)
        if are_zero:
            detach_all(grads)
            increment_version(grads)
        elif self._zero_grad:
            zero_all(grads)
        return outcome

    def _in_buffers(self, params: list[Tensor], tensors: Gathered) -> Gathered:
        """The tensors with the gradients of joined parameters moved into their flat buffers."""
        grads, addresses = list(tensors.grads), list(tensors.addresses)
        for buffer, positions, _ in self._joined:
            chosen = [grads[i] for i in positions], [addresses[i] for i in positions]
            buffer.gather([params[i] for i in positions], *chosen)
            for position, view, address in zip(positions, buffer.grad_views, buffer.grad_addresses, strict=True):
                grads[position], addresses[position] = view, address
        return tensors._replace(grads=grads, addresses=addresses)

    def _ready(self, tensors: Gathered, are_own: bool) -> Gathered:
        """The tensors with gradients in their parameters' layouts, and with flat buffers behind the parameters."""
        shards, grads, states, addresses = tensors
        if self._hosts:
            states = self._states.by_position(states)
        if self._strays:
            grads = list(grads)
            for position in self._strays:
                grads[position] = in_layout_of(shards[position], grads[position])
            addresses = addresses_of(grads)
        if self._kernel_zeroes and len(set(addresses)) < len(addresses):
            grads = apart(grads)
            addresses = addresses_of(grads)
        if self._joined:
            buffers = [joined.buffer for joined in self._joined]
            flat = [
                joined.buffer.grads if are_own else joined.buffer.joined_copy([grads[i] for i in joined.positions])
                for joined in self._joined
            ]
            shards = [*shards, *(buffer.values for buffer in buffers)]
            grads = [*grads, *flat]
            states = {
                key: [*states.get(key, [None] * len(tensors.params)), *(b.state.get(key) for b in buffers)]
                for key in {**states, **buffers[0].state}
            }
            addresses = [*addresses, *addresses_of(flat)]
        return Gathered(shards, grads, states, addresses)

    def publish(self, index: int, group: dict[str, Any], settings: Settings) -> None:
        """Bring a group's hyperparameters up to date where kernels read them, between steps."""
        for device in self._devices:
            device.publish(index, group, self._algorithm, settings)

    def check_capture(self, settings: Settings) -> None:
        """Check that a graph of this step repeats all of it.

        Raises:
            RuntimeError: for a step that decides something on the host.
        """
        if self._hosts or (len(self._devices) > 1 and needs_norm(settings)):
            raise RuntimeError(
                "a step cannot be captured that decides on the host: one with parameters or states that no kernel "
                "updates, or with the norm of gradients on several devices"
            )

    def _run_on_host(self, recipe: Recipe, tensors: Gathered, version: int, scaling: Scaling) -> Outcome:
        """Decide about scaling, clipping and skipping on the host, then update with every backend there is."""
        groups, settings = recipe.groups, recipe.settings
        factors = Factors()
        asked = any(part is not None for part in scaling) or needs_norm(settings)
        clips_each = any(group["clip_norm"] for group in groups)
        if asked or clips_each:
            walked = [tensors.grads[position] for position in self._walked]
            index_of = [*self._group_index, *(joined.group_index for joined in self._joined)]
            indices = [index_of[position] for position in self._walked]

            def measure() -> float:
                if self._total_norm is None:
                    self._total_norm = TotalNorm(walked, indices)
                return self._total_norm.measure(walked, groups, settings.norm_type)

            factors = gradient_factors(walked, indices, groups, settings, scaling, measure, self._shared)
            if factors.each:
                each = [1.0] * len(index_of)
                for position, factor in zip(self._walked, factors.each, strict=True):
                    each[position] = factor
                factors = factors._replace(each=each)
        if factors.skip:
            return Outcome(factors.norm, 1)
        grads = tensors.grads
        if asked or any(group["grad_scale"] != 1 or group["clip_norm"] for group in groups):
            # The native backend may leave gradients scaled: no two may be the same memory.
            grads = list(grads)
            for position, grad in zip(self._walked, apart([grads[i] for i in self._walked]), strict=True):
                grads[position] = grad
        for member in self._hosts:
            member.update(tensors, member.pick(grads), groups, version, factors)
        for device in self._devices:
            decided = Scaling(_divisor(factors.common), None)
            without = settings._replace(max_grad_norm=0.0, skip_nonfinite=False)
            device.update(tensors.addresses, groups, recipe.algorithm, version, without, decided)
        return Outcome(factors.norm)


def _divisor(factor: float) -> Tensor:
    """A factor as a loss scale, by which gradients are divided; a norm of infinity leaves a factor of 0."""
    return torch.tensor([1 / factor if factor else math.inf], dtype=torch.float32, device="cpu")


def _on_host(recipe: Recipe, group: FlattenedGroup, n_gathered: int) -> NativeGroup | PiecewiseGroup | EagerGroup:
    algorithm, seed = recipe.algorithm, recipe.settings.rounding_seed
    if group.signature.backend != "native":
        return EagerGroup(group, algorithm, n_gathered, seed)
    if group.signature.is_uniform:
        return NativeGroup(group, algorithm, n_gathered)
    return PiecewiseGroup(group, algorithm, n_gathered, seed)


def _on_devices(
    recipe: Recipe, flattened: Sequence[FlattenedGroup], n_gathered: int, zero_grad: bool
) -> list[TritonDevice]:
    by_device: dict[torch.device, list[FlattenedGroup]] = {}
    for group in flattened:
        if group.signature.backend == "triton":
            by_device.setdefault(group.signature.device, []).append(group)
    if not by_device:
        return []
    from dragon.vm.torch.optim._backends.context import DeviceContext
    from dragon.vm.torch.optim._backends.triton import TritonDevice

    devices: list[TritonDevice] = []
    for device, groups in by_device.items():
        if device not in recipe.devices:
            recipe.devices[device] = DeviceContext(device)
        context, is_first = recipe.devices[device], not devices
        devices.append(
            TritonDevice(
                *(groups, recipe.algorithm.name, context, len(recipe.groups), n_gathered, zero_grad),
                counts=is_first,
                seed=recipe.settings.rounding_seed,
            )
        )
    return devices
