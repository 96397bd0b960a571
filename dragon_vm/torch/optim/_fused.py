"""torch's fused CPU operations, called as the optimizers here mean them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._chain import clip_value
from dragon.vm.torch.optim._layout import as_real
from dragon.vm.torch.optim._scalars import one_minus_power

# The hyperparameters that decide whether tensors may share a call. What it does depends on the step count if, and
# only if, the first two are both other than 0.
KEYS = {
    "adam": (
        *("epsilon_hat", "eps", "lr", "betas", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize"),
        *("grad_scale", "clip_norm", "clip_value"),
    ),
    "sgd": (
        *("momentum", "dampening", "lr", "nesterov", "weight_decay", "maximize"),
        *("grad_scale", "clip_norm", "clip_value"),
    ),
}


class FusedCall(NamedTuple):
    """One fused operation on tensors that have everything but their memory in common.

    Attributes:
        algorithm: a key of `KEYS`.
        params, states, steps: as the operation takes them; states in walking order.
        options: keywords of the operation, as they are at every step.
        eps: of Adam.
        is_hat: whether Adam's epsilon is added before the bias correction.
        factor: of the gradients, positive: the sign is `maximize`'s.
        bound: of the gradients' magnitudes; 0 for none.
        decoupled: decay the parameters rather than the gradients.
    """

    algorithm: str
    params: list[Tensor]
    states: list[list[Tensor]]
    steps: list[Tensor]
    options: dict[str, Any]
    eps: float
    is_hat: bool
    factor: float
    bound: float
    decoupled: bool

    def run(self, grads: list[Tensor], step: float) -> None:
        """Update the parameters; gradients with a factor other than 1 may be left scaled.

        Args:
            grads: gradients.
            step: the count after this step, if the call depends on it.
        """
        params, states = self.params, self.states
        if params[0].is_complex():
            # Views made anew at each step, like everything that refers to memory.
            params, grads = _real(params), _real(grads)
            states = list(map(_real, states))
        if self.factor != 1 or self.bound:
            grads = self._limited(grads)
        if self.algorithm == "sgd":
            _run_sgd(params, grads, states[0] if states else [], {**self.options, "is_first_step": step == 1})
            return
        operation = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        largest = states[2] if len(states) > 2 else []
        # The operation divides sqrt(v) by the correction before it adds its epsilon.
        correction = math.sqrt(one_minus_power(self.options["beta2"], step)) if self.is_hat and self.eps else 1.0
        operation(
            params, grads, states[0], states[1], largest, self.steps, **self.options, eps=self.eps / correction
        )

    def _limited(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients that the operation does not scale on its own, scaled, and all of them clipped."""
        if self.factor != 1 and self.options["grad_scale"] is None:
            grads = list(torch._foreach_mul(grads, self.factor))
        if self.bound:
            grads = list(torch._foreach_clamp_min(torch._foreach_clamp_max(grads, self.bound), -self.bound))
        return grads


def plan_call(
    algorithm: str,
    params: list[Tensor],
    states: list[list[Tensor]],
    steps: list[Tensor],
    group: dict[str, Any],
    factor: float,
) -> FusedCall:
    """Prepare a call.

    Args:
        algorithm: a key of `KEYS`.
        params: parameters.
        states: their states, in walking order.
        steps: their step counters.
        group: hyperparameters.
        factor: of the gradients, positive.
    """
    bound = clip_value(group)
    options: dict[str, Any] = {
        "lr": float(group["lr"]),
        "weight_decay": float(group["weight_decay"]),
        "maximize": bool(group["maximize"]),
        "found_inf": None,
        "grad_scale": None,
    }
    # The operation divides by an fp32 number: too coarse for fp64, too late for a clip, infinite for tiny factors.
    # Nor may it write a NaN into the padding between joined gradients.
    is_wide = params[0].dtype in (torch.float64, torch.complex128)
    divides = not bound and not is_wide and 1e-38 < abs(factor) < math.inf
    if factor != 1 and divides:
        options["grad_scale"] = torch.tensor(1 / factor, dtype=torch.float32, device="cpu")
    if algorithm == "sgd":
        options |= {name: float(group[name]) for name in ("momentum", "dampening")}
        options |= {"nesterov": group["nesterov"]}
        return FusedCall(algorithm, params, states, steps, options, 0.0, False, factor, bound, False)
    beta1, beta2 = map(float, group["betas"])
    options |= {"beta1": beta1, "beta2": beta2, "amsgrad": bool(group["amsgrad"])}
    eps, is_hat, decoupled = float(group["eps"]), bool(group["epsilon_hat"]), bool(group["decoupled_weight_decay"])
    return FusedCall(algorithm, params, states, steps, options, eps, is_hat, factor, bound, decoupled)


def _run_sgd(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], options: dict[str, Any]
) -> None:
    # The fused operation is wrong by whole gradients for half precision of 15 elements and more (torch 2.13).
    half = params[0].dtype in (torch.float16, torch.bfloat16)
    wide = [[t.float() for t in tensors] if half else tensors for tensors in (params, grads, momentum_buffers)]
    torch._fused_sgd_(*wide, **options)
    if half:
        torch._foreach_copy_([*params, *momentum_buffers], [*wide[0], *wide[2]])


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(map(as_real, tensors))
