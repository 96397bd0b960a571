"""The numbers of one update, on the host and in float64."""

from __future__ import annotations

import math


def one_minus_power(base: float, exponent: float) -> float:
    """1 - base**exponent without cancellation, for 0 <= base < 1 and exponent >= 1."""
    return -math.expm1(exponent * math.log(base)) if base > 0 else 1.0


def adam_scalars(
    lr: float, beta1: float, beta2: float, eps: float, step: float, epsilon_hat: bool
) -> tuple[float, float]:
    """Fold both bias corrections of Adam into a step size and an epsilon.

    The update is ``param -= step_size * exp_avg / (sqrt(exp_avg_sq) + denom_eps)``: section 2 of Kingma & Ba,
    https://arxiv.org/abs/1412.6980. With `epsilon_hat` the epsilon is theirs of that section, else that of
    their algorithm 1, which is PyTorch's.

    Returns:
        ``(step_size, denom_eps)``.
    """
    correction = math.sqrt(one_minus_power(beta2, step))
    step_size = lr * correction / one_minus_power(beta1, step)
    return step_size, eps if epsilon_hat else eps * correction
