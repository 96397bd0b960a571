"""What a parity check talks about: the hyperparameters and the state of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor


@dataclass(frozen=True)
class AdamOptions:
    """Hyperparameters of one Adam step; names and defaults are PyTorch's.

    Attributes:
        epsilon_hat: True adds eps to the square root of the *uncorrected* second moment (Kingma & Ba 2014,
            end of section 2), False to that of the corrected one (their Algorithm 1, and PyTorch).
        grad_scale: The gradient is multiplied by this first.
        clip_value: Then its elements are clamped to [-clip_value, clip_value]; None clamps nothing.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False
    grad_scale: float = 1.0
    clip_value: float | None = None
    epsilon_hat: bool = False


class AdamState(NamedTuple):
    """One parameter and its Adam state as stored; every tensor has the parameter's shape."""

    param: Tensor  # the parameter's dtype
    step: float  # steps already taken
    exp_avg: Tensor  # state dtype
    exp_avg_sq: Tensor  # state dtype
    max_exp_avg_sq: Tensor | None  # state dtype; None without AMSGrad


@dataclass(frozen=True)
class SGDOptions:
    """Hyperparameters of one SGD step; names and defaults are PyTorch's."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class SGDState(NamedTuple):
    """One parameter and its SGD state; the buffer has the parameter's shape."""

    param: Tensor  # the parameter's dtype
    momentum_buffer: Tensor | None  # state dtype; None before the first step, and without momentum


StateT = TypeVar("StateT", AdamState, SGDState)


def converted(state: StateT, convert: Callable[[Tensor], Tensor]) -> StateT:
    """Return a state with each of its tensors converted."""
    values: list[Any] = [convert(value) if isinstance(value, Tensor) else value for value in state]
    return type(state)(*values)
