"""Flattened groups: the tensors of an optimizer that may share a launch, whatever parameter group they are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._gradients import Gradients, addresses_of
from dragon.vm.torch.optim._layout import in_layout_of, is_dense
from dragon.vm.torch.optim._local import distributed_like, local
from dragon.vm.torch.optim._state import arena_views, step_counters

State = dict[str, Any]


class Signature(NamedTuple):
    """What tensors must have in common to share a launch."""

    backend: str
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtype: torch.dtype
    # State tensors that the update walks, in its order, and the average if one is kept.
    state_keys: tuple[str, ...]
    average: bool


@dataclass
class FlattenedGroup:
    """Tensors that share a launch, in walking order; all lists have one entry a tensor.

    Attributes:
        signature: what the tensors have in common.
        params: parameters.
        states: their entries of `Optimizer.state`.
        rows: index of each one's parameter group.
        indices: position of each one among all parameters with a gradient.
        joined_grads: gradients of the entries if some stand for several parameters; None if none does.
    """

    signature: Signature
    params: list[Tensor]
    states: list[State]
    rows: list[int]
    indices: list[int]
    joined_grads: list[Tensor] | None = None

    def select(self, grads: Gradients) -> list[Tensor]:
        """The gradients of these entries among those of all parameters with a gradient."""
        if self.joined_grads is not None:
            return self.joined_grads
        tensors = grads.tensors
        return tensors if len(tensors) == len(self.indices) else [tensors[i] for i in self.indices]

    def select_addresses(self, grads: Gradients) -> Tensor:
        """Their addresses, int64 on the CPU."""
        if self.joined_grads is not None:
            return self._joined_addresses
        addresses = grads.addresses
        return addresses if addresses.numel() == len(self.indices) else addresses[self._index]

    @cached_property
    def _joined_addresses(self) -> Tensor:
        return addresses_of(self.joined_grads or [])

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.indices, device="cpu")


def flatten_groups(
    params: Sequence[Tensor],
    states: Sequence[State],
    rows: Sequence[int],
    signatures: Sequence[Signature],
) -> list[FlattenedGroup]:
    """Collect tensors of one signature, in order of first appearance."""
    members: dict[Signature, list[int]] = {}
    for index, signature in enumerate(signatures):
        members.setdefault(signature, []).append(index)
    return [
        FlattenedGroup(
            signature,
            [params[i] for i in indices],
            [states[i] for i in indices],
            [rows[i] for i in indices],
            indices,
        )
        for signature, indices in members.items()
    ]


def complete_states(
    params: Sequence[Tensor],
    states: Sequence[State],
    keys: Sequence[tuple[str, ...]],
    step_devices: Sequence[torch.device | None],
    dtype: torch.dtype | None,
) -> None:
    """Give each parameter the state tensors that it lacks, at their first values, as views of arenas.

    Args:
        params: parameters.
        states: their states, completed in place.
        keys: names of each one's state tensors, beside "step".
        step_devices: where each one's step counter lives; None for an update that does not count.
        dtype: of new state tensors; None for the parameter's.
    """
    counters: dict[torch.device, list[State]] = {}
    missing: dict[tuple[str, torch.device, torch.dtype, bool], list[int]] = {}
    for index, (param, state) in enumerate(zip(params, states, strict=True)):
        device = step_devices[index]
        if device is not None and "step" not in state:
            counters.setdefault(device, []).append(state)
        for key in keys[index]:
            if key not in state:
                missing.setdefault((key, param.device, param.dtype, is_dense(local(param))), []).append(index)
    for device, owners in counters.items():
        for state, counter in zip(owners, step_counters(len(owners), device), strict=True):
            state["step"] = counter
    for (key, _, _, dense), indices in missing.items():
        chosen = [local(params[i]) for i in indices]
        views = arena_views(chosen, dtype) if dense else [torch.zeros_like(p, dtype=dtype) for p in chosen]
        for i, view in zip(indices, views, strict=True):
            # An average starts where its parameter is; everything else at 0.
            shard = view.copy_(local(params[i])) if key == "ema" else view
            states[i][key] = distributed_like(params[i], shard)


def settle_state(param: Tensor, state: State, keys: tuple[str, ...], step_device: torch.device | None) -> None:
    """Bring state tensors that somebody else put there to the parameter's device and layout, in place of them."""
    step = state.get("step")
    if step_device is not None and not (
        isinstance(step, Tensor)
        and step.device == step_device
        and step.dtype == torch.float32
        and step.numel() == 1
        and not step.requires_grad
    ):
        value = step.detach() if isinstance(step, Tensor) else torch.tensor(float(step or 0), device="cpu")
        state["step"] = value.to(step_device, torch.float32, copy=True).reshape(())
    shard = local(param)
    for key in keys:
        value = local(state[key])
        settled = value.to(shard.device)
        if is_dense(shard):
            settled = in_layout_of(shard, settled)
        if settled is not value:
            state[key] = distributed_like(param, settled)


def follow_leaders(states: Sequence[State]) -> None:
    """Give the step counters of joined entries the count of the one that stands for them."""
    for state in states:
        if "followers" in state:
            state["followers"].copy_(state["step"])
