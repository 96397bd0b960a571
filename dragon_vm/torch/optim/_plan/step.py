"""A step that is prepared once, and run as long as its guards hold."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import increment_version

from dragon.vm.torch.optim._backends.selection import Gathered
from dragon.vm.torch.optim._gradients.unscaling import assign
from dragon.vm.torch.optim._gradients.zeroing import apart, detach_all, zero_all
from dragon.vm.torch.optim._graphs.live import LiveGroup
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._groups.layout import in_layout_of
from dragon.vm.torch.optim._options import Settings, needs_norm
from dragon.vm.torch.optim._plan.gathering import Gatherer
from dragon.vm.torch.optim._plan.host_step import HostStep
from dragon.vm.torch.optim._plan.preparation import Prepared
from dragon.vm.torch.optim._plan.recipe import Outcome, Recipe

if TYPE_CHECKING:
    from dragon.vm.torch.optim._backends.triton import TritonDevice


class StepPlan:
    """A step of one set of parameters: who updates which, with states complete and tables laid out.

    It holds no tensor of the user's: each step gathers them from where they live. With `takes_parts` some of the
    parameters may have no gradient: they take no part in the step.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared, *, takes_parts: bool) -> None:
        self._strays, n_gathered = prepared.strays, len(prepared.keys)
        self._host = HostStep(recipe, prepared, n_gathered)
        # The kernel zeroes the gradients it reads: not those that it reads copies of.
        self._kernel_zeroes = recipe.zero_grad and not self._strays and not self._host.groups
        by_device = _by_device(prepared.flattened)
        # Host groups, or several devices, need to know what is found in all gradients.
        asks_all = needs_norm(recipe.settings) or recipe.reductions is not None
        self._decides_on_host = bool(self._host.groups) or (len(by_device) > 1 and asks_all)
        settings = recipe.settings
        if by_device and self._decides_on_host:
            _check_shared_clipping(recipe)
            settings = settings._replace(max_grad_norm=0.0, skip_nonfinite=False)
        self._devices = _on_devices(recipe, by_device, settings, n_gathered, self._kernel_zeroes)
        # The groups at the rows of the devices' tables, as long as somebody has them.
        self._rows = [weakref.ref(each) if isinstance(each, LiveGroup) else None for each in recipe.param_groups]
        # The last write makes the plan valid.
        self.gatherer = Gatherer(recipe, prepared, takes_parts=takes_parts)

    def run(self, recipe: Recipe, tensors: Gathered) -> Outcome:
        """Update the parameters from their gradients."""
        scaling = recipe.scaling
        are_left = not (recipe.zero_grad or recipe.are_last)
        kept_scale = scaling.grad_scale if recipe.are_own and are_left else None
        grads = tensors.take(tensors.grads)
        # Host groups see to it themselves.
        writes = bool(self._devices) and (kept_scale is not None or self._kernel_zeroes)
        ready = self._ready(tensors, writes=writes)
        outcome, shared, devices = Outcome(), None, self._devices
        if self._decides_on_host:
            kept = (1.0 if kept_scale is None else float(kept_scale)) if are_left else None
            outcome, scaling = self._host.run(recipe, ready, kept)
            devices = [] if outcome.n_skipped else devices
        else:
            shared = self._host.shared(recipe, ready)
            if needs_norm(recipe.settings):
                outcome = Outcome(devices[0].norm)
        for device in devices:
            device.update(ready.grads, recipe.groups, recipe.version, scaling, shared, kept_scale)
        if not outcome.n_skipped:
            # Autograd is told of what neither kernels nor torch's fused operations tell it.
            increment_version(tensors.take(tensors.params))
            if recipe.members.are_distributed:
                pairs = zip(tensors.take(tensors.params), tensors.take(tensors.shards), strict=False)
                increment_version([shard for param, shard in pairs if shard is not param])
            if kept_scale is not None:
                for position in self._strays:
                    if tensors.grads[position] is not None:
                        # The update read a copy of it.
                        assign(tensors.grads[position], ready.grads[position])
                increment_version(grads)
        if self._kernel_zeroes and not outcome.n_skipped:
            detach_all(grads)
            increment_version(grads)
        elif recipe.zero_grad:
            zero_all(grads)
        return outcome

    def _ready(self, tensors: Gathered, *, writes: bool) -> Gathered:
        """The tensors with gradients in their parameters' layouts; with `writes` no two are the same memory."""
        if not (writes or self._strays) and (not self._host.groups or self.gatherer.states.are_complete):
            return tensors
        grads, states = tensors.grads, tensors.states
        if self._host.groups:
            states = self.gatherer.states.by_position(states)
        if self._strays:
            grads = list(grads)
            for position in self._strays:
                if grads[position] is not None:
                    grads[position] = in_layout_of(tensors.shards[position], grads[position])
        if writes:
            grads = apart(grads, [position for position, grad in enumerate(grads) if grad is not None])
        return tensors._replace(grads=grads, states=states)

    def publish(self, live: Any, group: dict[str, Any]) -> None:
        """Bring a group's hyperparameters up to date where kernels read them, between steps."""
        for index, reference in enumerate(self._rows):
            if reference is not None and reference() is live:
                for device in self._devices:
                    device.publish(index, group)

    def check_capture(self) -> None:
        """Check that a graph of this step repeats all of it.

        Raises:
            RuntimeError: for a step that decides something on the host.
        """
        if self._decides_on_host:
            raise RuntimeError(
                "a step cannot be captured that decides on the host: one with parameters or states that no kernel "
                "updates, or with the norm of gradients on several devices"
            )


def _check_shared_clipping(recipe: Recipe) -> None:
    """Check that kernels clip by norms of whole tensors where the host decides.

    Raises:
        ValueError: if other processes hold parts of them: kernels would clip by the parts' norms.
    """
    if recipe.reductions is not None and recipe.reductions.each:
        limits = sorted({float(group["clip_norm"]) for group in recipe.groups})
        raise ValueError(
            f"clip_norm={limits[-1]} over several processes needs parameters that kernels of one device update, "
            "all or none of a process. Give backend='eager', or clip by torch.nn.utils.clip_grad_norm_ and leave "
            "clip_norm out"
        )


def _by_device(flattened: Sequence[FlattenedGroup]) -> dict[torch.device, list[FlattenedGroup]]:
    """The groups that kernels update."""
    found: dict[torch.device, list[FlattenedGroup]] = {}
    for group in flattened:
        if group.signature.backend == "triton":
            found.setdefault(group.signature.device, []).append(group)
    return found


def _on_devices(
    recipe: Recipe,
    by_device: Mapping[torch.device, list[FlattenedGroup]],
    settings: Settings,
    n_gathered: int,
    zero_grad: bool,
) -> list[TritonDevice]:
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
                recipe.algorithm.columns,
                settings,
                counts=is_first,
            )
        )
    return devices
