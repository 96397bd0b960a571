"""The eager backend: the updates in plain torch operations, one tensor at a time.

This is the readable specification. It runs on any device, takes any layout and complex tensors, and autograd sees
through it if asked to. It computes in fp32 for bf16 and fp16 tensors and reads counters, so on an accelerator it
synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm, Maths
from dragon.vm.torch.optim._algorithms.average import average_update
from dragon.vm.torch.optim._backends.selection import Gathered, picker
from dragon.vm.torch.optim._backends.stored import StoredUpdate
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._gradients.scaling import Factors, clip_value
from dragon.vm.torch.optim._gradients.unscaling import unscale_all
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._options import Version

Group = dict[str, Any]


def _maths_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which a parameter's update is computed, as in the kernels."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The real view of a tensor in the dtype of the maths; a copy if autograd may keep it."""
    real = as_real(tensor)
    if real.dtype != dtype:
        return real.to(dtype)
    return real.clone() if torch.is_grad_enabled() else real


class EagerGroup:
    """One flattened group, updated one tensor at a time.

    Args:
        group: the tensors.
        algorithm: what is computed.
        n_gathered: how many tensors a step gathers.
        seed: of random words.
    """

    def __init__(self, group: FlattenedGroup, algorithm: Algorithm, n_gathered: int, seed: int = 0) -> None:
        self._algorithm = algorithm
        self._signature = group.signature
        self._members = [(entry.position, entry.group_index) for entry in group.entries]
        # Autograd sees through plain tensors only.
        self._stored = StoredUpdate(group, algorithm, seed) if group.signature.is_narrowed else None
        self.pick = picker([entry.position for entry in group.entries], n_gathered)

    def update(
        self,
        tensors: Gathered,
        grads: Sequence[Tensor | None],
        groups: Sequence[Group],
        version: Version,
        factors: Factors,
    ) -> None:
        """Update the tensors.

        Args:
            tensors: all that the step gathered.
            grads: this group's gradients; None for a parameter that takes no part.
            groups: all parameter groups of the optimizer.
            version: of their hyperparameters; unused, since nothing is kept from step to step.
            factors: of the gradients.
        """
        if self._stored is not None:
            self._stored.update(tensors, grads, groups, factors)
            return
        for (position, index), grad in zip(self._members, grads, strict=True):
            if grad is None:
                continue
            states = {key: tensors.states[key][position] for key in self._signature.all_keys}
            self._update_one(
                tensors.params[position], grad, states, groups[index], factors.of(position, groups[index])
            )
        if factors.kept_scale not in (None, 1.0):
            unscale_all([grad for grad in grads if grad is not None], factors.kept_scale)

    def _update_one(
        self, param: Tensor, grad: Tensor, states: dict[str, Tensor], group: Group, factor: float
    ) -> None:
        dtype = _maths_dtype(param)
        bound = clip_value(group)
        ready = _wide(grad, dtype)
        if factor != 1:
            ready = ready * factor
        if bound:
            ready = ready.clamp(-bound, bound)
        step = states.get("step")
        if step is not None:
            step += 1
        target = as_real(param)
        old = [as_real(states[key]) for key in self._signature.state_keys]
        value, new = self._algorithm.update(
            _wide(target, dtype), ready, [_wide(state, dtype) for state in old], step, group, Maths()
        )
        for state, new_state in zip(old, new, strict=True):
            state.copy_(new_state)
        target.copy_(value)
        if group["ema_decay"]:
            ema = as_real(states["ema"])
            ema.copy_(average_update(_wide(ema, dtype), _wide(target, dtype), group["ema_decay"]))
