"""Adam and SGD in plain float64 torch; the unit of rounding errors is the size of the largest addend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# bf16 is truncated by triton's interpreter, where a GPU rounds to nearest.
TRUNCATED = (torch.bfloat16,)


@dataclass(frozen=True)
class Expected:
    """A result in float64, and what its relative rounding errors are relative to."""

    value: Tensor
    unit: Tensor

    def check(self, actual: Tensor, name: str, budget: float = 8) -> None:
        """Assert `actual` to be right up to its storage and `budget` roundings of the maths.

        Both formulas round fewer than 8 times: no addend takes more than 6 operations.
        """
        compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
        stored = torch.finfo(actual.dtype).eps * (1 if actual.dtype in TRUNCATED else 0.5)
        bound = stored * self.value.abs() + budget * torch.finfo(compute).eps * self.unit
        bound += torch.finfo(actual.dtype).smallest_normal * (1 if actual.dtype != torch.float16 else 2**-9)
        error = (actual.double() - self.value).abs()
        worst = (error - bound).argmax()
        assert (error <= bound).all(), (
            f"{name}[{worst}] = {actual[worst]!r}, expected {self.value[worst]!r} +- {bound[worst]}"
        )


@dataclass(frozen=True)
class AdamSettings:
    """Hyperparameters of one step, and the number of steps before it."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    epsilon_hat: bool = True
    factor: float = 1.0
    steps_before: int = 0


def correction(beta: float, step: int) -> float:
    """1 - beta**step without cancellation."""
    return -math.expm1(step * math.log(beta)) if beta else 1.0


def gradient(param: Tensor, grad: Tensor, factor: float, l2: float) -> Expected:
    """The gradient with its L2 decay."""
    return Expected(factor * grad + l2 * param, (factor * grad).abs() + (l2 * param).abs())


def adam(param: Tensor, grad: Tensor, states: tuple[Tensor, ...], s: AdamSettings) -> tuple[Expected, ...]:
    """The parameter and its states after a step, from tensors of any dtype."""
    param, grad, *states = (t.double() for t in (param, grad, *states))
    step = s.steps_before + 1
    g = gradient(param, grad, s.factor, 0 if s.decoupled else s.weight_decay)
    shrunk = param * (1 - s.lr * s.weight_decay) if s.decoupled else param
    exp_avg = s.beta1 * states[0] + (1 - s.beta1) * g.value
    exp_avg_unit = states[0].abs() + g.unit
    exp_avg_sq = s.beta2 * states[1] + (1 - s.beta2) * g.value**2
    exp_avg_sq_unit = s.beta2 * states[1] + (1 - s.beta2) * 2 * g.unit**2
    largest = [torch.maximum(states[2], exp_avg_sq)] if len(states) > 2 else []
    root = math.sqrt(correction(s.beta2, step))
    step_size = s.lr * root / correction(s.beta1, step)
    denom = (largest[0] if largest else exp_avg_sq).sqrt() + s.eps * (1 if s.epsilon_hat else root)
    # An error of the second moment is as large, relative to it, as the unit is.
    inflation = 1 + exp_avg_sq_unit / exp_avg_sq.clamp(min=1e-300)
    param_unit = param.abs() + step_size * exp_avg_unit / denom * inflation
    return (
        Expected(shrunk - step_size * exp_avg / denom, param_unit),
        Expected(exp_avg, exp_avg_unit),
        Expected(exp_avg_sq, exp_avg_sq_unit),
        *(Expected(value, exp_avg_sq_unit + value) for value in largest),
    )


@dataclass(frozen=True)
class SGDSettings:
    """Hyperparameters of one step, and the number of steps before it."""

    lr: float = 0.1
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    factor: float = 1.0
    steps_before: int = 0


def sgd(param: Tensor, grad: Tensor, states: tuple[Tensor, ...], s: SGDSettings) -> tuple[Expected, ...]:
    """The parameter and, with momentum, its buffer after a step, from tensors of any dtype."""
    param, grad, *states = (t.double() for t in (param, grad, *states))
    g = gradient(param, grad, s.factor, s.weight_decay)
    if not states:
        return (Expected(param - s.lr * g.value, param.abs() + s.lr * g.unit),)
    gain = 1 - s.dampening if s.steps_before else 1.0
    buffer = s.momentum * states[0] + gain * g.value
    unit = (s.momentum * states[0]).abs() + gain * g.unit
    change = g.value + s.momentum * buffer if s.nesterov else buffer
    change_unit = g.unit + s.momentum * unit if s.nesterov else unit
    return Expected(param - s.lr * change, param.abs() + s.lr * change_unit), Expected(buffer, unit)
