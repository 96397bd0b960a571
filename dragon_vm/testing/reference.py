"""The specification: one Adam and one SGD step in extended precision, as the papers write them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from .records import AdamOptions, AdamState, SGDOptions, SGDState
from .wide import WideArray, wide


class AdamReference(NamedTuple):
    """What an Adam step should give, before any rounding; arrays have the parameter's shape."""

    param: WideArray
    step: float
    exp_avg: WideArray
    exp_avg_sq: WideArray
    max_exp_avg_sq: WideArray | None


class SGDReference(NamedTuple):
    """What an SGD step should give, before any rounding; arrays have the parameter's shape."""

    param: WideArray
    momentum_buffer: WideArray | None


def bias_correction(beta: float, step: float) -> np.longdouble:
    """Return 1 - beta**step without cancellation, also for beta near 1 and few steps."""
    with np.errstate(divide="ignore"):
        correction: np.longdouble = -np.expm1(np.longdouble(step) * np.log(np.longdouble(beta)))
    return correction


def loss_gradient(grad: WideArray, options: AdamOptions) -> WideArray:
    """Return the gradient that enters the update, before L2 decay: scaled, clipped, negated to maximize."""
    grad = grad * np.longdouble(options.grad_scale)
    if options.clip_value is not None:
        grad = np.clip(grad, -np.longdouble(options.clip_value), np.longdouble(options.clip_value))
    return -grad if options.maximize else grad


def adam_change(exp_avg: WideArray, second_moment: WideArray, step: float, options: AdamOptions) -> WideArray:
    """Return what one step subtracts from a parameter.

    Args:
        exp_avg: First moment after the step.
        second_moment: Second moment after the step, or with AMSGrad its maximum over all steps (Reddi et al.
            2018, https://openreview.net/forum?id=ryQu7f-RZ; as in PyTorch the maximum is of uncorrected
            moments).
        step: Number of this step, from 1.
        options: Hyperparameters.
    """
    correction1 = bias_correction(options.betas[0], step)
    root_correction2 = np.sqrt(bias_correction(options.betas[1], step))
    epsilon = np.longdouble(options.eps) * (np.longdouble(1) if options.epsilon_hat else root_correction2)
    scaled = np.longdouble(options.lr) * (root_correction2 / correction1) * exp_avg
    return np.asarray(scaled / (np.sqrt(second_moment) + epsilon))


@np.errstate(all="ignore")
def adam_reference(start: AdamState, grad: Tensor, options: AdamOptions) -> AdamReference:
    """Compute one Adam step from `start` in extended precision.

    Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, Algorithm 1, or with `epsilon_hat` the efficient form
    at the end of its section 2. The two differ in eps alone: the first equals the second with epsilon-hat =
    eps * sqrt(1 - beta2**step). L2 decay adds to the gradient; decoupled decay shrinks the parameter before
    the update (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101).

    Args:
        start: State before the step, real tensors of any floating dtype.
        grad: Gradient, same shape as the parameter, any floating dtype and strides.
        options: Hyperparameters.
    """
    beta1, beta2 = map(np.longdouble, options.betas)
    decay = np.longdouble(options.weight_decay)
    param, gradient = wide(start.param), loss_gradient(wide(grad), options)
    if options.decoupled_weight_decay:
        param = param * (1 - np.longdouble(options.lr) * decay)
    elif options.weight_decay:
        gradient = gradient + decay * param

    step = start.step + 1
    exp_avg = beta1 * wide(start.exp_avg) + (1 - beta1) * gradient
    exp_avg_sq = beta2 * wide(start.exp_avg_sq) + (1 - beta2) * gradient * gradient
    maximum = None
    if options.amsgrad:
        if start.max_exp_avg_sq is None:
            raise ValueError("amsgrad=True needs start.max_exp_avg_sq, got None")
        maximum = np.maximum(wide(start.max_exp_avg_sq), exp_avg_sq)
    change = adam_change(exp_avg, exp_avg_sq if maximum is None else maximum, step, options)
    return AdamReference(param - change, step, exp_avg, exp_avg_sq, maximum)


@np.errstate(all="ignore")
def sgd_reference(start: SGDState, grad: Tensor, options: SGDOptions) -> SGDReference:
    """Compute one SGD step from `start` in extended precision.

    Momentum as PyTorch defines it (Sutskever et al. 2013,
    https://proceedings.mlr.press/v28/sutskever13.html, with lr outside of the buffer): the first step fills
    the buffer with the gradient, undamped.

    Args:
        start: State before the step, real tensors of any floating dtype.
        grad: Gradient, same shape as the parameter, any floating dtype and strides.
        options: Hyperparameters.
    """
    param, gradient = wide(start.param), wide(grad)
    if options.maximize:
        gradient = -gradient
    if options.weight_decay:
        gradient = gradient + np.longdouble(options.weight_decay) * param
    lr, momentum = np.longdouble(options.lr), np.longdouble(options.momentum)
    if not options.momentum:
        return SGDReference(param - lr * gradient, None)
    if start.momentum_buffer is None:
        buffer = gradient
    else:
        buffer = momentum * wide(start.momentum_buffer) + (1 - np.longdouble(options.dampening)) * gradient
    direction = gradient + momentum * buffer if options.nesterov else buffer
    return SGDReference(param - lr * direction, buffer)
