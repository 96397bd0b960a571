"""The native backend: torch's fused CPU operations, behind the layout rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._chain import clip_value
from dragon.vm.torch.optim._flatten import FlattenedGroup, follow_leaders
from dragon.vm.torch.optim._layout import as_real
from dragon.vm.torch.optim._scalars import one_minus_power
from dragon.vm.torch.optim._state import common_base

# A fused operation forks its threads once a tensor. Below this many elements a tensor, one thread is faster:
# 1000 tensors of 1000 elements took 0.87 ms on one thread, 2.05 ms on two (torch 2.13, 2 cores).
SINGLE_THREAD_NUMEL = 8192


@contextmanager
def _threads_for(large: bool) -> Iterator[None]:
    n_threads = torch.get_num_threads()
    if large or n_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class Call(NamedTuple):
    """Tensors that one fused operation updates, because they have everything but their memory in common.

    Attributes:
        indices: positions in the flattened group; None for all, in order.
        group: the parameter group, any of those whose hyperparameters are the same.
        factor: of the gradients, positive: the sign is `maximize`'s.
        step: the count after this step, where the operation depends on it; else 0.
        large: whether a tensor is worth several threads.
    """

    indices: list[int] | None
    group: dict[str, Any]
    factor: float
    step: float
    large: bool


class NativeGroup:
    """One flattened group on the CPU: parameter, gradient and states of one dtype, all in one layout.

    Args:
        group: the tensors.
        algorithm: "adam" or "sgd".
    """

    def __init__(self, group: FlattenedGroup, algorithm: str) -> None:
        self.group, self.algorithm = group, algorithm
        self._names = _ADAM_NAMES if algorithm == "adam" else _SGD_NAMES
        self._large = [param.numel() >= SINGLE_THREAD_NUMEL for param in group.params]
        self._complex = group.signature.param_dtype.is_complex
        self._states = [[state[key] for state in group.states] for key in group.signature.state_keys]
        self._steps: list[Tensor] = [state["step"] for state in group.states if "step" in state]
        self._step_base = common_base(self._steps) if self._steps else None
        self._calls: list[Call] = []
        self._calls_for: object = None

    def update(self, grads: Sequence[Tensor], groups: Sequence[dict[str, Any]], factors: Sequence[float]) -> None:
        """Advance the counters and update the tensors.

        Args:
            grads: gradients, in the parameters' layouts; those with a factor other than 1 may be left scaled.
            groups: all parameter groups of the optimizer.
            factors: of each gradient; empty for the groups' own.
        """
        steps = self._advance(groups)
        calls_for = (self._numbers(groups), list(factors), steps)
        if calls_for != self._calls_for:
            self._calls = self._partition(groups, factors, steps)
            self._calls_for = calls_for
        params, signature = self.group.params, self.group.signature
        if signature.grad_dtype != signature.param_dtype:
            grads = [grad.to(signature.param_dtype) for grad in grads]
        if self._complex:
            grads, params = [as_real(grad) for grad in grads], [as_real(param) for param in params]
        for call in self._calls:
            states = [_take(tensors, call.indices) for tensors in self._states]
            if self._complex:
                states = [[as_real(state) for state in tensors] for tensors in states]
            chosen = _take(params, call.indices), _take(grads, call.indices)
            with _threads_for(call.large):
                _UPDATES[self.algorithm](call, *chosen, states, _take(self._steps, call.indices))
        if signature.average:
            self._move_averages(groups)
        follow_leaders(self.group.states)

    def _move_averages(self, groups: Sequence[dict[str, Any]]) -> None:
        for param, state, row in zip(self.group.params, self.group.states, self.group.rows, strict=True):
            as_real(state["ema"]).lerp_(as_real(param), 1 - groups[row]["ema_decay"])

    def _advance(self, groups: Sequence[dict[str, Any]]) -> list[float]:
        """Count the step; return the counts if the operations depend on them: one if all agree, or none."""
        if not self._steps:
            return []
        if self._step_base is not None:
            self._step_base += 1
        else:
            torch._foreach_add_(self._steps, 1)
        if not any(map(_depends_on_step, groups)):
            return []
        base = self._step_base
        steps: list[float] = base.tolist() if base is not None else [float(step) for step in self._steps]
        return steps[:1] if len(set(steps)) == 1 else steps

    def _numbers(self, groups: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
        """Hyperparameters of each parameter group, by value: a tensor stands for the number it holds now."""
        numbers = list(map(itemgetter(*self._names), groups))
        return list(map(_by_value, numbers)) if any(map(_holds_tensor, groups)) else numbers

    def _partition(
        self, groups: Sequence[dict[str, Any]], factors: Sequence[float], steps: list[float]
    ) -> list[Call]:
        """Collect what may go into one operation; parameter groups of equal hyperparameters share one."""
        numbers = self._numbers(groups)
        members: dict[tuple[Any, ...], list[int]] = {}
        for index, row in enumerate(self.group.rows):
            group = groups[row]
            factor = abs(factors[index]) if factors else float(group["grad_scale"])
            step = steps[index if len(steps) > 1 else 0] if steps and _depends_on_step(group) else 0.0
            key = (numbers[row], factor, step, self._large[index])
            members.setdefault(key, []).append(index)
        everything = len(members) == 1
        return [
            Call(None if everything else indices, groups[self.group.rows[indices[0]]], *key[1:])
            for key, indices in members.items()
        ]


_COMMON_NAMES = ("lr", "weight_decay", "maximize", "grad_scale", "clip_norm", "clip_value")
_ADAM_NAMES = (*_COMMON_NAMES, "betas", "eps", "amsgrad", "decoupled_weight_decay", "epsilon_hat")
_SGD_NAMES = (*_COMMON_NAMES, "momentum", "dampening", "nesterov")


def _holds_tensor(group: dict[str, Any]) -> bool:
    return isinstance(group["lr"], Tensor) or any(isinstance(beta, Tensor) for beta in group.get("betas", ()))


def _by_value(value: Any) -> Any:
    return (
        tuple(map(_by_value, value))
        if isinstance(value, tuple)
        else float(value)
        if isinstance(value, Tensor)
        else value
    )


def _depends_on_step(group: dict[str, Any]) -> bool:
    """Whether the fused operation must be told the count, beside counting itself."""
    if "betas" in group:
        return bool(group["epsilon_hat"] and group["eps"])
    return bool(group["momentum"] and group["dampening"])


def _take(tensors: Sequence[Tensor], indices: list[int] | None) -> list[Tensor]:
    return list(tensors) if indices is None else [tensors[i] for i in indices] if tensors else []


def _scaled(call: Call, grads: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Gradients, and by what the operation shall divide them, which leaves them divided."""
    bound = clip_value(call.group)
    # The operation divides by an fp32 number: too coarse for fp64, too early for a clip.
    if call.factor != 1 and (bound or grads[0].dtype == torch.float64):
        grads = list(torch._foreach_mul(grads, call.factor))
    elif call.factor != 1:
        return grads, torch.tensor(1 / call.factor)
    if bound:
        grads = list(torch._foreach_clamp_min(torch._foreach_clamp_max(grads, bound), -bound))
    return grads, None


def _update_adam(
    call: Call, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]
) -> None:
    group = call.group
    beta1, beta2 = map(float, group["betas"])
    eps = float(group["eps"])
    if call.step:
        # The operation divides sqrt(v) by the correction before it adds its epsilon.
        eps /= math.sqrt(one_minus_power(beta2, call.step))
    grads, grad_scale = _scaled(call, grads)
    operation = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    operation(
        params,
        grads,
        states[0],
        states[1],
        states[2] if group["amsgrad"] else [],
        steps,
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=float(group["weight_decay"]),
        eps=eps,
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        grad_scale=grad_scale,
        found_inf=None,
    )


def _update_sgd(
    call: Call, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]
) -> None:
    group = call.group
    grads, grad_scale = _scaled(call, grads)
    buffers = states[0] if group["momentum"] else []
    # The fused operation is wrong by whole gradients for half precision of 15 elements and more (torch 2.13).
    half = params[0].dtype in (torch.float16, torch.bfloat16)
    wide = [[t.float() for t in tensors] if half else tensors for tensors in (params, grads, buffers)]
    torch._fused_sgd_(
        *wide,
        weight_decay=float(group["weight_decay"]),
        momentum=float(group["momentum"]),
        lr=float(group["lr"]),
        dampening=float(group["dampening"]),
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=call.step == 1,
        grad_scale=grad_scale,
        found_inf=None,
    )
    if half:
        torch._foreach_copy_([*params, *buffers], [*wide[0], *wide[2]])


_UPDATES = {"adam": _update_adam, "sgd": _update_sgd}
