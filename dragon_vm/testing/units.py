"""The unit of error: eps of the operand, that is eps(dtype) times the largest addend of its sum.

Units of the result would not do: where a gradient cancels a moment, a correctly rounded sum is off by 1e5 of
those. Nor would rtol and atol: `1 - beta` in float32 is wrong by 100 eps of exp_avg_sq and passes
`torch.testing.assert_close`.

Every unit has a floor of one smallest subnormal. The unit of a parameter also holds what one unit of error
in each moment can move it by, evaluated at the four corners and not by a derivative, so that cancelled,
underflowed and zero second moments are judged by what arithmetic allows there.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .records import AdamOptions, AdamState, SGDOptions, SGDState
from .reference import AdamReference, SGDReference, adam_change, bias_correction, loss_gradient
from .wide import WideArray, eps, smallest_subnormal, wide


class AdamUnits(NamedTuple):
    """One unit of error of each tensor, elementwise, in the tensor's own numbers."""

    param: WideArray
    exp_avg: WideArray
    exp_avg_sq: WideArray
    max_exp_avg_sq: WideArray | None


class SGDUnits(NamedTuple):
    """One unit of error of each tensor, elementwise, in the tensor's own numbers."""

    param: WideArray
    momentum_buffer: WideArray | None


def _unit(addend: WideArray, *dtypes: torch.dtype) -> WideArray:
    """Return eps times the addend plus one subnormal, of the coarsest of `dtypes`; infinity has no rounding."""
    addend = np.where(np.isfinite(addend), addend, 0)
    return np.asarray(max(map(eps, dtypes)) * addend + max(map(smallest_subnormal, dtypes)))


def _decayed_addend(gradient: WideArray, param: WideArray, weight_decay: float) -> WideArray:
    """Return the largest addend of a gradient that L2 decay is added to.

    The sum may cancel, and then has lost eps of its larger operand, or be twice as large.
    """
    if not weight_decay:
        return np.asarray(abs(gradient))
    decay = np.longdouble(weight_decay) * param
    return np.asarray(np.maximum.reduce([abs(gradient), abs(decay), abs(gradient + decay)]))


def _moment_addends(start: AdamState, grad: Tensor, options: AdamOptions) -> tuple[WideArray, WideArray]:
    beta1, beta2 = map(np.longdouble, options.betas)
    decay = 0.0 if options.decoupled_weight_decay else options.weight_decay
    gradient = _decayed_addend(loss_gradient(wide(grad), options), wide(start.param), decay)
    first = np.maximum(beta1 * abs(wide(start.exp_avg)), (1 - beta1) * gradient)
    second = np.maximum(beta2 * wide(start.exp_avg_sq), (1 - beta2) * gradient * gradient)
    return first, second


def _scalar_error(options: AdamOptions, step: float) -> float:
    """Return the relative error of 1 - beta**step in float64, which is where optimizers compute it."""
    corrections = (bias_correction(beta, step) for beta in options.betas)
    return float(sum(eps(torch.float64) / correction for correction in corrections))


@np.errstate(all="ignore")
def adam_units(
    start: AdamState,
    grad: Tensor,
    expected: AdamReference,
    options: AdamOptions,
    compute_dtype: torch.dtype,
) -> AdamUnits:
    """Return the unit of error of every element that an Adam step writes.

    Args:
        start: State before the step, in storage dtypes.
        grad: Gradient, the parameter's shape.
        expected: `adam_reference` of the same arguments.
        options: Hyperparameters.
        compute_dtype: Precision of the arithmetic: moments that the parameter's update is made of have
            errors of this dtype, those that are stored also have errors of the state's dtype.
    """
    first, second = _moment_addends(start, grad, options)
    moment, largest = expected.exp_avg_sq, second
    if expected.max_exp_avg_sq is not None and start.max_exp_avg_sq is not None:
        # The parameter is divided by the maximum; exp_avg_sq itself has only its own addends.
        moment, largest = expected.max_exp_avg_sq, np.maximum(second, wide(start.max_exp_avg_sq))
    change = adam_change(expected.exp_avg, moment, expected.step, options)
    moved = np.zeros_like(change)
    for sign1, sign2 in product((-1, 1), repeat=2):
        corner1 = expected.exp_avg + sign1 * _unit(first, compute_dtype)
        corner2 = np.maximum(moment + sign2 * _unit(largest, compute_dtype), 0)
        distance = abs(adam_change(corner1, corner2, expected.step, options) - change)
        # NaN is a denominator of zero, or infinity, one unit away: any result is within reach.
        moved = np.maximum(moved, np.where(np.isnan(distance), np.inf, distance))
    # lr * exp_avg may be subnormal where their quotient by a small root is not.
    moved = moved + smallest_subnormal(compute_dtype) / (np.sqrt(moment) + np.longdouble(options.eps))
    moved = moved + _scalar_error(options, expected.step) * np.where(np.isfinite(change), abs(change), 0)
    # In every precision 0/0 of exact zeros is NaN, 0/eps is 0, and what is NaN already stays so.
    is_exact = ((expected.exp_avg == 0) & (moment == 0)) | np.isnan(expected.exp_avg) | np.isnan(moment)
    moved = np.where(is_exact, 0, moved)

    addend = np.maximum(abs(wide(start.param)), abs(change))
    if options.weight_decay and options.decoupled_weight_decay:
        addend = np.maximum(addend, options.lr * options.weight_decay * abs(wide(start.param)))
    state_dtype = start.exp_avg_sq.dtype
    return AdamUnits(
        _unit(addend, start.param.dtype, compute_dtype) + moved,
        _unit(first, start.exp_avg.dtype, compute_dtype),
        _unit(second, state_dtype, compute_dtype),
        _unit(largest, state_dtype, compute_dtype) if options.amsgrad else None,
    )


@np.errstate(all="ignore")
def sgd_units(
    start: SGDState,
    grad: Tensor,
    expected: SGDReference,
    options: SGDOptions,
    state_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> SGDUnits:
    """Return the unit of error of every element that an SGD step writes; arguments as in `adam_units`."""
    param = abs(wide(start.param))
    signed = -wide(grad) if options.maximize else wide(grad)
    gradient = _decayed_addend(signed, wide(start.param), options.weight_decay)
    if expected.momentum_buffer is None:
        addend = np.maximum(param, options.lr * gradient)
        return SGDUnits(_unit(addend, start.param.dtype, compute_dtype), None)
    buffer = gradient
    if start.momentum_buffer is not None:
        damped = abs(1 - np.longdouble(options.dampening)) * gradient
        buffer = np.maximum(options.momentum * abs(wide(start.momentum_buffer)), damped)
    direction = np.maximum(gradient, options.momentum * buffer) if options.nesterov else buffer
    # The direction is rounded in the precision of the arithmetic, the parameter in that of its storage.
    moved = options.lr * _unit(direction, compute_dtype)
    addend = np.maximum(param, options.lr * abs(direction))
    return SGDUnits(
        _unit(addend, start.param.dtype, compute_dtype) + moved, _unit(buffer, state_dtype, compute_dtype)
    )
