"""Adam: the update of a tile, and the scalars that it needs."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.maths import divide, one_minus_power, square_root
from dragon.kernels.rounding import clamp_moment, moment_bound
from dragon.kernels.scalars import hyperparameter, store_scalar, tensor_hyperparameter
from dragon.kernels.spec import has_bound, n_states


@triton.jit
def adam_update(param, grad, states, scalars, SPEC: tl.constexpr):
    """One Adam step of a tile; `states` are exp_avg, exp_avg_sq and, with AMSGrad, max_exp_avg_sq.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  p <- p - step_size m / (sqrt(v) + eps')

    with step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t), and eps' = eps for the epsilon-hat of section 2 of
    Kingma & Ba, https://arxiv.org/abs/1412.6980, or eps' = eps sqrt(1 - beta2^t) for their algorithm 1, which is
    PyTorch's. With three states it is AMSGrad (Reddi et al., https://openreview.net/forum?id=ryQu7f-RZ), which
    divides by the largest v so far. Where `has_bound` says so, m is bounded by K sqrt(v), as that of exact Adam
    is: see `dragon.kernels.rounding.moment_bound`.
    """
    # Not m + (1 - beta1) (g - m): for a small beta1 that leaves the rounding of a large m in the result.
    exp_avg = scalars[table.BETA1_FACTOR] * states[0] + scalars[table.ONE_MINUS_BETA1] * grad
    exp_avg_sq = scalars[table.BETA2_FACTOR] * states[1] + scalars[table.ONE_MINUS_BETA2] * grad * grad
    if has_bound(SPEC):
        exp_avg = clamp_moment(exp_avg, square_root(exp_avg_sq), scalars[table.MOMENT_BOUND])
    largest = exp_avg_sq
    if n_states(SPEC) > 2:
        largest = tl.maximum(states[2], exp_avg_sq, tl.PropagateNan.ALL)
    denom = square_root(largest) + scalars[table.DENOM_EPS]
    param = param - scalars[table.STEP_SIZE] * divide(exp_avg, denom)
    if n_states(SPEC) > 2:
        return param, (exp_avg, exp_avg_sq, largest)
    else:
        return param, (exp_avg, exp_avg_sq)


@triton.jit
def adam_scalars(group, target, lr, step):
    """Write step size, epsilon and betas of a bias-corrected Adam step."""
    beta1 = tensor_hyperparameter(group, table.BETA1, table.BETA1_SOURCE)
    store_scalar(target, table.BETA1_FACTOR, beta1)
    store_scalar(target, table.ONE_MINUS_BETA1, 1 - beta1)
    beta2 = tensor_hyperparameter(group, table.BETA2, table.BETA2_SOURCE)
    store_scalar(target, table.BETA2_FACTOR, beta2)
    store_scalar(target, table.ONE_MINUS_BETA2, 1 - beta2)
    correction2 = tl.sqrt(one_minus_power(beta2, step))
    store_scalar(target, table.STEP_SIZE, lr * correction2 / one_minus_power(beta1, step))
    eps = hyperparameter(group, table.EPS)
    epsilon_hat = hyperparameter(group, table.EPSILON_HAT)
    store_scalar(target, table.DENOM_EPS, tl.where(epsilon_hat != 0, eps, eps * correction2))
    bound = hyperparameter(group, table.BOUND)
    store_scalar(target, table.MOMENT_BOUND, tl.where(bound > 0, bound, moment_bound(beta1, beta2, step)))
